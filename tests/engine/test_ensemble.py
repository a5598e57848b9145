import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flwr_cloned_kd import as_ensemble, clone, digits_cnn, fold_in, member
from flwr_cloned_kd.engine.ensemble import check_finite, mean, size
from tests.helpers.reference import distance, few, same_bits

DTYPES = (torch.float32, torch.float64, torch.int64, torch.bool)


@st.composite
def state_dicts(draw):
    shapes = draw(st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return {
        f"layer{i}.weight": (10 * torch.randn(shape, generator=generator)).to(
            draw(st.sampled_from(DTYPES))
        )
        for i, shape in enumerate(shapes)
    }


def arrays(params):
    return {name: tensor.numpy() for name, tensor in params.items()}


@few
@given(params=state_dicts(), num_clones=st.integers(1, 4))
def test_every_member_of_a_cloned_model_is_that_model(params, num_clones):
    ensemble = clone(params, num_clones)
    assert size(ensemble) == num_clones
    assert all(same_bits(member(ensemble, e), params) for e in range(num_clones))


@few
@given(params=state_dicts(), num_clones=st.integers(1, 4))
def test_an_ensemble_sent_as_numpy_arrays_comes_back_as_it_was(params, num_clones):
    ensemble = clone(params, num_clones)
    received = as_ensemble(arrays(ensemble), params)
    assert same_bits(received, ensemble)
    assert list(received) == list(params)
    assert all(received[name].dtype == params[name].dtype for name in params)


@few
@given(params=state_dicts())
def test_arrays_shaped_as_the_core_are_an_ensemble_of_one(params):
    received = as_ensemble(arrays(params), params)
    assert size(received) == 1
    assert same_bits(member(received, 0), params)


def test_counters_become_an_ensemble_of_one_too():
    core = digits_cnn().state_dict()
    assert core["bn.num_batches_tracked"].shape == ()
    core["bn.num_batches_tracked"].fill_(7)
    received = as_ensemble(arrays(core), core)
    assert received["bn.num_batches_tracked"].tolist() == [7]
    assert received["conv.weight"].shape == (1, 8, 1, 3, 3)


def test_a_model_whose_first_tensor_is_a_counter_can_be_an_ensemble():
    like = {"steps": torch.tensor(3), "weight": torch.zeros(2)}
    assert size(as_ensemble(arrays(like), like)) == 1
    assert same_bits(as_ensemble(arrays(clone(like, 3)), like), clone(like, 3))


def test_a_received_batch_norm_model_can_be_loaded():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    received = as_ensemble(arrays(clone(model.state_dict(), 2)), model.state_dict())
    model.load_state_dict(member(received, 1))


def test_arrays_of_the_other_byte_order_keep_their_values():
    received = as_ensemble({"w": np.array([1.5, -2.0], dtype=">f4")}, {"w": torch.zeros(2)})
    assert received["w"].tolist() == [[1.5, -2.0]]


def test_a_received_ensemble_does_not_share_memory_with_the_message():
    message = {"w": np.zeros(2, dtype=np.float32)}
    received = as_ensemble(message, {"w": torch.zeros(2)})
    message["w"][:] = 1
    assert received["w"].tolist() == [[0, 0]]


def test_the_clones_do_not_share_memory_with_the_model():
    params = {"w": torch.zeros(2)}
    ensemble = clone(params, 2)
    ensemble["w"][0] = 1
    assert ensemble["w"].tolist() == [[1, 1], [0, 0]]
    assert params["w"].tolist() == [0, 0]


@pytest.mark.parametrize("num_clones", [0, -1])
def test_fewer_than_one_clone_is_refused(num_clones):
    with pytest.raises(ValueError, match=f"num_clones: expected at least 1, got {num_clones}"):
        clone({"w": torch.zeros(1)}, num_clones)


def test_the_mean_takes_counters_from_the_first_clone():
    ensemble = {"w": torch.tensor([[1.0, 2.0], [3.0, 6.0]]), "steps": torch.tensor([4, 9])}
    assert mean(ensemble)["w"].tolist() == [2.0, 4.0]
    assert mean(ensemble)["steps"] == 4


@few
@given(params=state_dicts(), num_clones=st.integers(1, 4))
def test_the_mean_of_equal_clones_is_the_model(params, num_clones):
    # The sum of equal numbers rounds once and the division rounds once, for numbers of at most 50:
    # 2 * 2^-24 * 50 = 6e-6.
    assert distance(mean(clone(params, num_clones)), params) < 1e-5


def test_seeds_of_clones_differ():
    assert len({fold_in(0, e) for e in range(100)}) == 100


LIKE = {"bias": torch.zeros(3), "weight": torch.zeros(3, 2)}
PLAIN = {"bias": np.zeros(3, np.float32), "weight": np.zeros((3, 2), np.float32)}


def npz_file():
    file = io.BytesIO()
    np.savez(file, weight=np.zeros(1))
    file.seek(0)
    return np.load(file)


def with_weight(value):
    return {**PLAIN, "weight": value}


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (
            {"weight": PLAIN["weight"]},
            "array names: expected the core's 2, missing 'bias', unknown none",
        ),
        (
            {**PLAIN, "extra": np.zeros(1)},
            "array names: expected the core's 2, missing none, unknown 'extra'",
        ),
        ({}, "array names: expected the core's 2, missing 'bias', 'weight', unknown none"),
        (
            with_weight(np.zeros((3, 2))),
            "weight: expected dtype torch.float32, got torch.float64",
        ),
        (
            with_weight(np.zeros((3, 2), np.int64)),
            "weight: expected dtype torch.float32, got torch.int64",
        ),
        (
            with_weight(torch.zeros(3, 2, dtype=torch.float16)),
            "weight: expected dtype torch.float32, got torch.float16",
        ),
        (
            {n: np.zeros((4, *a.shape[::-1]), np.float32) for n, a in PLAIN.items()},
            "weight: expected shape (4, 3, 2), got (4, 2, 3)",
        ),
        (
            {n: np.zeros((e, *a.shape), np.float32) for e, (n, a) in enumerate(PLAIN.items(), 2)},
            "weight: expected shape (2, 3, 2), got (3, 3, 2)",
        ),
        (
            {n: np.zeros((0, *a.shape), np.float32) for n, a in PLAIN.items()},
            "bias: expected shape (1, 3), got (0, 3)",
        ),
        (
            {"bias": np.zeros((2, 3), np.float32), "weight": PLAIN["weight"]},
            "weight: expected shape (2, 3, 2), got (3, 2)",
        ),
        (
            with_weight(np.array([[0, np.nan], [np.nan, 0], [0, 0]], np.float32)),
            "weight: expected finite values, got 2 of 6 not finite",
        ),
        (
            with_weight(np.array([[0, np.inf], [0, 0], [0, 0]], np.float32)),
            "weight: expected finite values, got 1 of 6 not finite",
        ),
        (
            with_weight(np.array([[0, -np.inf], [0, 0], [0, 0]], np.float32)),
            "weight: expected finite values, got 1 of 6 not finite",
        ),
        (
            with_weight(np.array([[None] * 2] * 3)),
            "weight: expected an array of numbers, got dtype object",
        ),
        (
            with_weight(np.array([["a"] * 2] * 3)),
            "weight: expected an array of numbers, got dtype <U1",
        ),
        (
            with_weight(np.zeros((3, 2), np.complex64)),
            "weight: expected an array of numbers, got dtype complex64",
        ),
        (with_weight(npz_file()), "weight: expected an array of numbers, got NpzFile"),
        (with_weight([[0.0] * 2] * 3), "weight: expected an array of numbers, got list"),
        (with_weight(None), "weight: expected an array of numbers, got NoneType"),
    ],
    ids=[
        "a missing array",
        "an unknown array",
        "no arrays",
        "a wrong float type",
        "an integer type",
        "a tensor of a wrong type",
        "a wrong shape",
        "mixed clone counts",
        "zero clones",
        "one array without clones",
        "nan",
        "inf",
        "minus inf",
        "an object array",
        "a string array",
        "a complex array",
        "an archive",
        "a list",
        "nothing",
    ],
)
def test_a_refusal_names_the_array_the_expected_and_the_actual(sent, message):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - the whole message is compared
        as_ensemble(sent, LIKE)
    assert str(refusal.value) == message


def test_the_array_that_differs_from_the_others_is_named():
    like = {**LIKE, "head": torch.zeros(5), "count": torch.tensor(0.0)}
    sent = arrays(clone(like, 4))
    for name, expected in [
        ("bias", "bias: expected shape (4, 3), got (3,)"),
        ("weight", "weight: expected shape (4, 3, 2), got (3, 2)"),
        ("count", "count: expected shape (4,), got ()"),
    ]:
        with pytest.raises(ValueError, match="expected shape") as refusal:
            as_ensemble({**sent, name: like[name].numpy()}, like)
        assert str(refusal.value) == expected
    plain = {**arrays(like), "bias": sent["bias"]}
    with pytest.raises(ValueError, match=r"^bias: expected shape \(3,\), got \(4, 3\)$"):
        as_ensemble(plain, like)
    plain = {**arrays(like), "weight": np.zeros((2, 3), np.float32)}
    with pytest.raises(ValueError, match=r"^weight: expected shape \(3, 2\), got \(2, 3\)$"):
        as_ensemble(plain, like)


def test_names_in_a_refusal_cannot_forge_a_line_of_the_log():
    with pytest.raises(ValueError, match="unknown") as refusal:
        as_ensemble({**PLAIN, "w\nINFO all is well\x1b[2J": np.zeros(1)}, LIKE)
    assert r"'w\nINFO all is well\x1b[2J'" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert "\x1b" not in str(refusal.value)


def test_a_refusal_stays_short_however_many_and_long_the_names_are():
    many = {f"{i}" + "x" * 10_000: np.zeros(1) for i in range(50)}
    with pytest.raises(ValueError, match="and 47 more") as refusal:
        as_ensemble({**PLAIN, **many}, LIKE)
    assert len(str(refusal.value)) < 400


def test_a_value_that_is_not_finite_is_named_after_the_prefix():
    with pytest.raises(ValueError, match="core: b: expected finite values, got 1 of 2 not finite"):
        check_finite({"a": torch.zeros(1), "b": torch.tensor([0, torch.inf])}, "core: ")
