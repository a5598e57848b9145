"""Models of the examples. The algorithm takes any `nn.Module` from inputs to logits."""

from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.ensemble import seeded


class _Conv(nn.Conv2d):
    """A 3x3 convolution without bias, initialised for ReLU (He et al. 2015)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__(channels_in, channels_out, 3, stride, 1, bias=False)

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")


class _Block(nn.Module):
    """Two convolutions around a shortcut without parameters: option A of He et al. 2016."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _Conv(channels_in, channels_out, stride)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = _Conv(channels_out, channels_out)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.stride = stride
        num_new = channels_out - channels_in
        self.padding = (num_new // 2, num_new - num_new // 2)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.stride > 1 or any(self.padding):
            sampled = x[:, :, :: self.stride, :: self.stride]
            shortcut = F.pad(sampled, (0, 0, 0, 0, *self.padding))
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + shortcut)


Moments = tuple[Tensor, Tensor]


class _ResNet(nn.Module):
    mean: Tensor | None
    deviation: Tensor | None

    def __init__(
        self, blocks: int, num_classes: int, channels: int, width: int, pixels: Moments | None
    ) -> None:
        super().__init__()
        mean, deviation = pixels or (None, None)
        # Not persistent: the moments are part of the architecture, not of the weights that travel.
        for name, moment in (("mean", mean), ("deviation", deviation)):
            moment = moment if moment is None else moment[:, None, None].float()
            self.register_buffer(name, moment, persistent=False)
        self.conv = _Conv(channels, width)
        self.bn = nn.BatchNorm2d(width)
        parts = []
        channels_in = width
        for stage in range(3):
            for block in range(blocks):
                channels_out = width * 2**stage
                stride = 2 if stage > 0 and block == 0 else 1
                parts.append(_Block(channels_in, channels_out, stride))
                channels_in = channels_out
        self.blocks = nn.Sequential(*parts)
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if self.mean is not None and self.deviation is not None:
            x = (x - self.mean) / self.deviation
        elif not x.is_floating_point():
            x = x / 255
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def resnet(
    depth: int,
    num_classes: int,
    *,
    channels: int = 3,
    width: int = 16,
    seed: int = 0,
    pixels: Moments | None = None,
) -> nn.Module:
    """Build the CIFAR form of ResNet (He et al. 2016, Sec. 4.2; option A shortcuts).

    Three stages of `width`, 2 `width` and 4 `width` channels; `[B, channels, H, W]` to
    `[B, num_classes]` logits for any H and W of at least 4.

    Args:
        depth: 6n + 2 for n blocks per stage: 8, 14, 20, 32, 44, 56, 110, ...
        num_classes: number of outputs.
        channels: of the images: 1 for grey, 3 for colours.
        width: channels of the first stage.
        seed: determines the initial weights; the global generator is not touched.
        pixels: mean and standard deviation `[channels]` of raw pixels, as `moments` returns them;
            the model then standardises its inputs. None: floats stay as they are, and integers
            are divided by 255.

    Raises:
        ValueError: for another depth.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import resnet
        >>> model = resnet(20, num_classes=5, channels=1)
        >>> model(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 5])
        >>> resnet(21, num_classes=5)
        Traceback (most recent call last):
        ValueError: depth: expected 6n + 2 (8, 14, 20, 32, ...), got 21
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth: expected 6n + 2 (8, 14, 20, 32, ...), got {depth}")
    return seeded(_ResNet((depth - 2) // 6, num_classes, channels, width, pixels), seed)


def resnet32(num_classes: int = 100, *, seed: int = 0, pixels: Moments | None = None) -> nn.Module:
    """Build the paper's model: ResNet-32, about 0.47 million parameters.

    Args:
        num_classes: number of outputs.
        seed: determines the initial weights.
        pixels: mean and standard deviation of raw pixels, see `resnet`.

    Examples:
        >>> from flwr_cloned_kd import resnet32
        >>> sum(parameter.numel() for parameter in resnet32().parameters())
        470004
    """
    return resnet(32, num_classes, seed=seed, pixels=pixels)


def digits_cnn(num_classes: int = 10, *, seed: int = 0) -> nn.Module:
    """Build a ResNet-8 of width 8 for 8x8 grey images: about 20,000 parameters.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import digits_cnn
        >>> digits_cnn()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    return resnet(8, num_classes, channels=1, width=8, seed=seed)
