import pytest
import torch
from torch import nn

from flwr_cloned_kd import digits_cnn, initialise, resnet, resnet32
from flwr_cloned_kd.data.datasets import moments, standardise
from flwr_cloned_kd.engine.ensemble import seeded
from tests.helpers.reference import same_bits, snapshot


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_resnet32_has_the_parameters_of_the_papers_model():
    # A convolution has 9 in out weights and a norm 2 out. Stem: 9 3 16 + 32 = 464. Stage 1: ten of
    # 9 16 16 + 32 = 23,360. Stage 2: 9 16 32 + 64, then nine of 9 32 32 + 64 = 88,192. Stage 3:
    # 9 32 64 + 128, then nine of 9 64 64 + 128 = 351,488. Head: 64 100 + 100 = 6,500.
    assert num_parameters(resnet32()) == 464 + 23_360 + 88_192 + 351_488 + 6_500 == 470_004


def test_digits_cnn_has_about_nineteen_thousand_parameters():
    # As above with one block per stage, one input channel and 8, 16, 32 channels:
    # 88, 2 592, 1184 + 2336, 4672 + 9280, 32 10 + 10.
    assert num_parameters(digits_cnn()) == 88 + 1_184 + 3_520 + 13_952 + 330 == 19_074


@pytest.mark.parametrize(
    ("model", "shape", "num_classes"),
    [
        (digits_cnn(), (2, 1, 8, 8), 10),
        (digits_cnn(3), (2, 1, 4, 4), 3),
        (resnet(8, 5, width=4), (2, 3, 32, 32), 5),
        (resnet(14, 5, width=4), (2, 3, 7, 9), 5),
    ],
)
def test_a_resnet_maps_images_of_any_size_from_four_pixels_to_logits(model, shape, num_classes):
    with torch.no_grad():
        assert model.eval()(torch.zeros(shape)).shape == (shape[0], num_classes)


def test_depth_counts_the_layers_with_weights():
    for depth in (8, 14, 32):
        layers = [m for m in resnet(depth, 2, width=1).modules() if hasattr(m, "weight")]
        assert sum(not isinstance(layer, nn.BatchNorm2d) for layer in layers) == depth


@pytest.mark.parametrize("depth", [2, 7, 9, 18])
def test_a_depth_of_another_form_is_refused(depth):
    with pytest.raises(ValueError, match=rf"depth: expected 6n \+ 2 .*, got {depth}"):
        resnet(depth, 10)


def test_the_shortcut_samples_pixels_and_pads_channels_with_zeros():
    block = resnet(8, 3, width=4).blocks[1].eval()
    with torch.no_grad():
        block.conv1.weight.zero_()
        block.conv2.weight.zero_()
        x = torch.rand(2, 4, 6, 6)
        out = block(x)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    assert not out[:, :2].any()
    assert not out[:, 6:].any()


@pytest.mark.parametrize(("width", "before"), [(1, 0), (3, 1), (5, 2), (6, 3)])
def test_the_shortcut_of_any_width_has_as_many_channels_as_the_block(width, before):
    # Half of the new channels, rounded down, come first; the others come last.
    block = resnet(8, 3, width=width).blocks[1].eval()
    with torch.no_grad():
        block.conv2.weight.zero_()
        x = torch.rand(2, width, 6, 6)
        out = block(x)
    assert out.shape == (2, 2 * width, 3, 3)
    assert torch.equal(out[:, before : before + width], x[:, :, ::2, ::2])
    assert not out[:, :before].any()
    assert not out[:, before + width :].any()


def test_convolutions_are_drawn_with_the_deviation_of_he_et_al():
    # sqrt(2 / fan_out) with fan_out = 9 64; a sample deviation of 36,864 normal draws is off by
    # 1 / sqrt(2 36864) = 0.4 % (one sigma), so 2 % is five.
    weight = resnet(8, 3, seed=5).blocks[2].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)


def test_the_seed_alone_determines_the_weights():
    torch.manual_seed(1)
    first = digits_cnn(seed=3).state_dict()
    torch.manual_seed(2)
    assert same_bits(digits_cnn(seed=3).state_dict(), first)
    assert not torch.equal(digits_cnn(seed=4).state_dict()["conv.weight"], first["conv.weight"])


def test_initialising_changes_neither_model_nor_global_generator():
    model = digits_cnn(seed=0)
    before, state = snapshot(model.state_dict()), torch.get_rng_state()
    fresh = initialise(model, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert same_bits(model.state_dict(), before)
    assert same_bits(fresh, digits_cnn(seed=1).state_dict())


def test_drawing_weights_resets_running_statistics():
    model = digits_cnn()
    model(torch.randn(4, 1, 8, 8))
    assert model.bn.num_batches_tracked == 1
    fresh = initialise(model, 0)
    assert fresh["bn.num_batches_tracked"] == 0
    assert same_bits(fresh, digits_cnn(seed=0).state_dict())


def test_a_bare_parameter_keeps_its_value():
    model = nn.Sequential(nn.Linear(2, 2))
    model.scale = nn.Parameter(torch.tensor([5.0]))
    assert initialise(model, 0)["scale"] == 5


SIZES = {"nhead": 2, "dim_feedforward": 6, "batch_first": True}


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.MultiheadAttention(4, 2),
        lambda: nn.TransformerEncoderLayer(4, **SIZES),
        lambda: nn.Transformer(4, num_encoder_layers=1, num_decoder_layers=1, **SIZES),
    ],
    ids=["attention", "encoder layer", "transformer"],
)
def test_the_seed_determines_the_weights_of_attention_too(build):
    first = initialise(build(), 3)
    assert same_bits(initialise(build(), 3), first)
    other = initialise(build(), 4)
    drawn = [name for name in first if not torch.equal(first[name], other[name])]
    # PyTorch draws every matrix. The other tensors are vectors: norms, and biases that
    # nn.MultiheadAttention sets to 0 after its submodules have been reset.
    assert [name for name in first if first[name].dim() == 2] == [
        name for name in drawn if first[name].dim() == 2
    ]
    for name in first:
        assert not name.endswith(("in_proj_bias", "out_proj.bias")) or not first[name].any()


def test_seeded_gives_a_model_its_weights_in_place():
    model = nn.Linear(2, 2)
    assert seeded(model, 4) is model
    assert same_bits(model.state_dict(), initialise(nn.Linear(2, 2), 4))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_model_that_is_given_the_moments_standardises_raw_pixels(dtype):
    images = torch.randint(256, (5, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    images = images.to(dtype)
    (x, _), _ = standardise((images, images), (images, images))
    raw = resnet(8, 4, pixels=moments(images)).eval()
    plain = resnet(8, 4).eval()
    assert raw.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(raw(images), plain(x))


def test_integer_pixels_without_moments_are_divided_by_255():
    images = torch.arange(192, dtype=torch.uint8).reshape(1, 3, 8, 8)
    model = resnet(8, 4).eval()
    assert torch.equal(model(images), model(images / 255))
