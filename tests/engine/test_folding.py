import pytest
import torch
from torch import nn

from flwr_cloned_kd import Recipe, Runtime, clone, fit, member, predict, resnet
from flwr_cloned_kd.engine.folding import folded
from flwr_cloned_kd.engine.runtime import is_small
from tests.helpers.reference import ROUNDING, cnn, distance, images, mlp

DATA = images(24)


def trained(model):
    recipe = Recipe(epochs=2, batch_size=8)
    model.load_state_dict(member(fit(model, clone(model.state_dict(), 1), DATA, recipe), 0))
    return model.eval()


def kinds(model, kind):
    return sum(isinstance(part, kind) for part in model.modules())


class Shared(nn.Module):
    """The output of the convolution goes to the normalisation and also around it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.conv(x)
        return self.head((x + self.norm(x)).mean((2, 3)))


class Twice(nn.Module):
    """One convolution runs twice, before two normalisations."""

    def __init__(self):
        super().__init__()
        self.conv, self.first = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1)
        self.second, self.head = nn.BatchNorm2d(1), nn.Linear(64, 3)

    def forward(self, x):
        return self.head(self.second(self.conv(self.first(self.conv(x)).tanh())).flatten(1))


class OneNorm(nn.Module):
    """Two convolutions run before one normalisation."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(1), nn.Linear(64, 3)

    def forward(self, x):
        return self.head(self.norm(self.second(self.norm(self.first(x)).tanh())).flatten(1))


class ByKeyword(nn.Module):
    """Calls its normalisation by the name of the argument, which a hook does not see."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(input=self.conv(x)).mean((2, 3)))


class Volumes(nn.Module):
    """A convolution in three dimensions, and then one in two with a normalisation."""

    def __init__(self):
        super().__init__()
        self.deep, self.conv = nn.Conv3d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(self.conv(self.deep(x[:, :, None])[:, :, 0])).mean((2, 3)))


BUILDS = {"cnn": cnn, "resnet": lambda: resnet(8, 3, channels=1), "3-D": Volumes}


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_a_folded_model_predicts_the_same_without_normalisation(build):
    model = trained(build())
    actual = folded(model, DATA[0][:2])
    assert kinds(model, nn.BatchNorm2d) > 0 == kinds(actual, nn.BatchNorm2d)
    with torch.no_grad():
        expected = model(DATA[0])
        # Eight layers at most, each rounded once more at 6e-8.
        assert (actual(DATA[0]) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("build", [Shared, Twice, OneNorm, ByKeyword, mlp])
def test_a_model_that_cannot_be_folded_stays_itself(build):
    model = trained(build())
    assert folded(model, DATA[0][:2]) is model


def test_folding_leaves_the_model_as_it_was():
    model = trained(cnn())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded(model, DATA[0][:2])
    assert distance(before, model.state_dict()) == 0
    assert not any(part._forward_hooks for part in model.modules())


def test_predictions_of_a_large_model_are_those_of_the_model_itself():
    model = resnet(8, 3, channels=1)
    assert not is_small(model)
    trained(model)
    logits = predict(
        model, clone(model.state_dict(), 2), DATA[0], runtime=Runtime(device="cpu"), batch_size=7
    )
    with torch.no_grad():
        assert (logits[1] - model(DATA[0])).abs().max() < ROUNDING
