"""Attacks on models and on data, against numbers computed by hand."""

import pytest
import torch

from flwr_cloned_kd import CoreState
from flwr_cloned_kd.attacks import (
    AddNoise,
    Backdoor,
    FreeRider,
    OneLabel,
    SameDirection,
    ScaleMovement,
    ShiftLabels,
    ShuffleLabels,
    SlowPoison,
    StayBelow,
    attack_model,
    first_answer_again,
    first_model_again,
    loss_of_copy,
    random_weights,
)
from flwr_cloned_kd.attacks.models import movement_norms
from tests.helpers.reference import same_bits

SENT = {"weight": torch.tensor([[1.0, -2.0], [0.0, 4.0]]), "count": torch.tensor(5)}
EDGE = {
    "weight": torch.tensor([[[2.0, -2.0], [0.0, 4.0]], [[1.0, -2.0], [3.0, 0.0]]]),
    "count": torch.tensor([7, 7]),
}
"""The two clones moved by 1 and by 5."""
ATTACKS_ON_MODELS = [
    ScaleMovement(-1.0),
    AddNoise(1.0),
    SameDirection(2.0),
    FreeRider(0.0),
    FreeRider(0.5),
    SlowPoison(0.5),
    StayBelow(0.1, lambda sent, edge: 0.0),
    random_weights,
    first_answer_again,
    first_model_again,
]


def sent_by(change, sent=SENT, edge=EDGE, **options):
    return attack_model(change, sent, edge, **options)[0]


def copy(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "change",
    ATTACKS_ON_MODELS,
    ids=lambda attack: getattr(attack, "__name__", type(attack).__name__),
)
def test_an_attack_has_the_form_of_an_ensemble_and_changes_no_argument(change):
    sent, edge = copy(SENT), copy(EDGE)
    attacked = sent_by(change, sent, edge)
    assert same_bits(sent, SENT)
    assert same_bits(edge, EDGE)
    assert {name: (t.shape, t.dtype) for name, t in attacked.items()} == {
        name: (t.shape, t.dtype) for name, t in EDGE.items()
    }
    assert same_bits(attacked, sent_by(change))  # the same seed draws the same numbers


def test_a_movement_is_scaled_and_reversed():
    weight = sent_by(ScaleMovement(-1.0))["weight"]
    assert torch.equal(weight[0], torch.tensor([[0.0, -2.0], [0.0, 4.0]]))
    assert torch.equal(weight[1], torch.tensor([[1.0, -2.0], [-3.0, 8.0]]))
    assert same_bits(sent_by(ScaleMovement(1.0)), EDGE)


def test_a_variance_stays_positive():
    sent = {"variance": torch.tensor([1.0, 2.0])}
    edge = {"variance": torch.tensor([[3.0, 2.5]])}
    # Reversed they would be -1 and 1.5; the first keeps its honest value.
    assert sent_by(ScaleMovement(-1.0), sent, edge)["variance"].tolist() == [[3.0, 1.5]]


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_noise_has_a_share_of_the_norm_of_each_movement(share):
    assert movement_norms(SENT, EDGE).tolist() == [1.0, 5.0]
    noise = sent_by(AddNoise(share))["weight"] - EDGE["weight"]
    assert noise.flatten(1).norm(dim=1).tolist() == pytest.approx([share, 5 * share], rel=1e-5)


def test_edges_that_collude_move_in_the_same_direction():
    other = {"weight": SENT["weight"] - 3, "count": torch.tensor(6)}
    trained = {"weight": other["weight"][None] * 2, "count": torch.tensor([8])}
    one = sent_by(SameDirection(2.0), seed=1)["weight"] - SENT["weight"]
    two = sent_by(SameDirection(2.0), other, trained, seed=2)["weight"] - other["weight"]
    cosine = torch.nn.functional.cosine_similarity(one[0].flatten(), two[0].flatten(), dim=0)
    assert float(cosine) == pytest.approx(1.0)
    assert torch.equal(one[0], one[1])
    third = sent_by(SameDirection(2.0, seed=1))["weight"] - SENT["weight"]
    assert not torch.allclose(third, one)


def test_random_weights_are_the_values_that_were_sent_in_another_order():
    sent = {"weight": torch.arange(100.0)}
    weight = sent_by(random_weights, sent, {"weight": torch.zeros(2, 100)})["weight"]
    assert torch.equal(weight.sort().values, sent["weight"].expand(2, 100))
    assert not torch.equal(weight[0], weight[1])


def test_a_free_rider_sends_what_it_was_sent():
    sent = sent_by(FreeRider())
    assert torch.equal(sent["weight"], torch.stack([SENT["weight"]] * 2))
    assert sent["count"].tolist() == [5, 5]
    noisy = sent_by(FreeRider(0.1))["weight"]
    assert not torch.equal(noisy[0], noisy[1])


def test_a_replay_is_that_of_the_first_visit():
    _, visit = attack_model(first_answer_again, SENT, EDGE)
    later = {name: tensor + 1 for name, tensor in SENT.items()}
    trained = {name: tensor + 1 for name, tensor in EDGE.items()}
    answer, second = attack_model(first_answer_again, later, trained, last=visit)
    assert same_bits(answer, EDGE)
    assert second.number == 1
    model, third = attack_model(first_model_again, later, trained, last=second)
    assert torch.equal(model["weight"][0], SENT["weight"])
    assert third.number == 2


def test_slow_poison_goes_towards_one_model_from_wherever_the_core_is():
    change = SlowPoison(0.25, wrong=ScaleMovement(-1.0))
    _, visit = attack_model(change, SENT, EDGE)
    bad = sent_by(ScaleMovement(-1.0))["weight"].mean(0)
    later = {**SENT, "weight": SENT["weight"] + 10}
    sent = sent_by(change, later, EDGE, last=visit)["weight"]
    assert torch.allclose(sent[0], 0.75 * later["weight"] + 0.25 * bad)
    with pytest.raises(ValueError, match="step: expected above 0, at most 1, got 0"):
        SlowPoison(0)


@pytest.mark.parametrize(("threshold", "factor"), [(0.3, 3.0), (5.0, 10.0), (0.0, 0.0)])
def test_the_adaptive_attacker_goes_as_far_as_its_threshold(threshold, factor):
    # The loss is a tenth of the length of the step of clone 0, whose movement has the length 1.
    change = StayBelow(
        threshold, lambda sent, edge: float(movement_norms(sent, edge)[0]) / 10, ScaleMovement(-1.0)
    )
    sent = sent_by(change)
    # Six halvings of 10 leave a step of 10 / 64.
    reached = float(movement_norms(SENT, sent)[0])
    assert factor - 10 / 64 - 1e-6 <= reached <= factor
    assert float(sent["weight"][0, 0, 0]) <= 1.0


class CoreThatRefuses:
    def state(self, sent):
        return CoreState(sent, train_accuracy=(0.9,))

    def distill(self, state, edge):
        raise ValueError("edge predictions: logits: expected finite values")


def test_clones_that_the_core_refuses_count_as_a_total_loss():
    assert loss_of_copy(CoreThatRefuses())(SENT, EDGE) == 1.0


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


DATASET = torch.rand(20, 1, 4, 4, generator=draw()), torch.arange(20) % 5


def test_labels_are_changed_on_a_share_of_the_samples():
    images, labels = DATASET
    for attack, changed in (
        (ShiftLabels(5), (labels + 1) % 5),
        (OneLabel(3), torch.full_like(labels, 3)),
    ):
        inputs, new = attack(DATASET, draw())
        assert inputs is images
        assert torch.equal(new, changed)
    _, half = ShiftLabels(5, share=0.5)(DATASET, draw())
    assert int((half != labels).sum()) == 10
    _, shuffled = ShuffleLabels()(DATASET, draw())
    assert torch.equal(shuffled.sort().values, labels.sort().values)
    assert not torch.equal(shuffled, labels)
    with pytest.raises(ValueError, match="share: expected a fraction, 0 to 1, got 2"):
        OneLabel(share=2)(DATASET, draw())


def test_a_backdoor_adds_copies_with_a_square_and_a_label():
    images, labels = DATASET
    new, new_labels = Backdoor(label=2, share=0.25, size=2)(DATASET, draw())
    assert torch.equal(new[:20], images)
    assert torch.equal(new_labels[:20], labels)
    assert new_labels[20:].tolist() == [2] * 5
    assert (new[20:, :, 2:, 2:] == images.max()).all()
    triggered, wanted = Backdoor(label=2, size=2).test_set(DATASET)
    assert len(wanted) == int((labels != 2).sum())
    assert set(wanted.tolist()) == {2}
    assert (triggered[:, :, 2:, 2:] == images.max()).all()
