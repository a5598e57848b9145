"""Forms of arrays on the wire: their errors, what travels as it is, and malformed replies."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from flwr_cloned_kd import clone, digits_cnn, member
from flwr_cloned_kd.io.messages import ensemble_of
from flwr_cloned_kd.io.wire import (
    MAX_CODE,
    SCALES,
    WIRE_DTYPES,
    check_wire_dtype,
    decode_request,
    encode_reply,
    encode_request,
    received,
    scale_names,
    transfer,
)

SMALLER = WIRE_DTYPES[1:]
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
MODERATE = st.floats(-1e3, 1e3, width=32)


def matrices(values, num_clones=3):
    return hnp.arrays(np.float32, (num_clones, 2, 4), elements=values).map(torch.from_numpy)


def round_trip(tensor, sent, wire_dtype):
    """Send clones of one matrix."""
    ensemble, _ = transfer({"w": tensor}, {"w": sent}, wire_dtype)
    return ensemble["w"]


@given(matrices(FLOATS), matrices(FLOATS, 1))
def test_float32_keeps_every_bit(edge, sent):
    assert round_trip(edge, sent[0], "float32") is edge
    assert received({"w": edge}, "float32")["w"] is edge
    assert encode_request({"w": edge}, "float32")["w"] is edge


@given(matrices(FLOATS))
def test_float16_is_off_by_half_of_its_last_place(edge):
    """A normal number has 11 significant bits, so rounding moves it by at most 2^-11 of itself.

    Below 2^-14 the numbers are 2^-24 apart, so rounding moves them by at most 2^-25.
    """
    difference = (round_trip(edge, edge[0], "float16") - edge).double().abs()
    assert bool((difference <= 2.0**-11 * edge.double().abs() + 2.0**-25).all())


@given(matrices(FLOATS))
def test_bfloat16_is_off_by_half_of_its_last_place(edge):
    """8 significant bits; the smallest numbers are 2^-133 apart, as the exponents are float32's."""
    difference = (round_trip(edge, edge[0], "bfloat16") - edge).double().abs()
    assert bool((difference <= 2.0**-8 * edge.double().abs() + 2.0**-134).all())


@given(matrices(MODERATE), matrices(MODERATE, 1))
@example(torch.full((3, 2, 4), 190 * 2.0**-149), torch.zeros(1, 2, 4))
def test_int8_is_off_by_half_a_scale_of_each_clones_movement(edge, sent):
    """A code is at most 1/2 off, in units of the scale: largest movement of the clone / 127.

    Besides, four operations round in float32, each by at most 2^-24 of a number below
    4 x (largest clone + largest sent). A scale below 2^-126 is itself off by at most 2^-150, which
    counts up to 127 times in a movement.
    """
    received_edge = round_trip(edge, sent[0], "int8").double()
    movement = (edge.double() - sent[0].double()).abs().amax((1, 2))
    rounding = 2.0**-20 * (edge.double().abs().max() + sent.double().abs().max())
    bound = movement / MAX_CODE / 2 + rounding + MAX_CODE * 2.0**-149
    difference = (received_edge - edge.double()).abs().amax((1, 2))
    assert bool((difference <= bound).all())


def test_int8_codes_of_a_matrix_by_hand():
    """The largest movement is 2.54, so the scale is 0.02, and 0.975 / 0.02 = 48.75 becomes 49."""
    sent = {"w": torch.tensor([[1.0, 1.0, 1.0]])}
    edge = {"w": torch.tensor([[[1.0, 1.975, -1.54]], [[1.0, 1.0, 1.0]]])}
    encoded = encode_reply(edge, sent, "int8")
    assert encoded["w"].tolist() == [[[0, 49, -127]], [[0, 0, 0]]]
    assert encoded["w" + SCALES].tolist() == pytest.approx([0.02, 0.0])


@pytest.mark.parametrize("wire_dtype", SMALLER)
@given(hnp.arrays(np.float32, (2, 5), elements=st.floats(0, 2.0**100, width=32)))
@example(np.array([[0, 0, 0, 0, 200]] * 2, np.float32))
def test_a_running_variance_never_becomes_negative(wire_dtype, variances):
    edge = {"bn.running_var": torch.from_numpy(variances)}
    sent = {"bn.running_var": torch.ones(5)}
    ensemble, _ = transfer(edge, sent, wire_dtype)
    assert bool((ensemble["bn.running_var"] >= 0).all())


def test_movement_codes_would_make_a_running_variance_negative():
    """Why int8 leaves vectors alone: here the scale is 1, and -0.6 rounds to -1."""
    sent, variance = torch.tensor([[0.6, 1.0]]), torch.tensor([[[0.0, 128.0]]])
    assert float(round_trip(variance, sent, "int8").min()) < 0


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
def test_integers_and_double_precision_travel_as_they_are(wire_dtype):
    sent = {"n": torch.tensor([[7, 2**40]]), "d": torch.tensor([[1 / 3]], dtype=torch.float64)}
    edge = {"n": torch.tensor([[[8, 2**40 + 1]]]), "d": torch.full((1, 1, 1), 0.1).double()}
    ensemble, _ = transfer(edge, sent, wire_dtype)
    assert all(torch.equal(ensemble[name], edge[name]) for name in edge)
    assert all(ensemble[name].dtype == edge[name].dtype for name in edge)
    assert all(received(sent, wire_dtype)[name] is sent[name] for name in sent)


def test_a_tensor_with_a_value_too_large_for_its_form_travels_as_float32():
    edge = {"w": torch.tensor([[[1e5, 0.1]]]), "v": torch.tensor([[[1.0, 0.1]]])}
    encoded = encode_reply(edge, member(edge, 0), "float16")
    assert encoded["w"] is edge["w"]
    assert encoded["v"].dtype == torch.float16
    assert torch.equal(received({"w": edge["w"]}, "float16")["w"], edge["w"])
    largest = {"w": torch.full((1, 1, 1), torch.finfo(torch.float32).max)}
    assert encode_reply(largest, member(largest, 0), "bfloat16")["w"] is largest["w"]


@pytest.mark.parametrize("wire_dtype", SMALLER)
def test_the_server_knows_what_the_edge_reads_from_a_request(wire_dtype):
    params = digits_cnn().state_dict()
    read = decode_request(encode_request(params, wire_dtype))
    expected = received(params, wire_dtype)
    assert all(torch.equal(read[name], expected[name]) for name in params)
    assert all(read[name].dtype == params[name].dtype for name in params)
    assert not torch.equal(read["conv.weight"], params["conv.weight"])


def model_and_edge(num_clones=2):
    sent = {"conv.weight": torch.ones(2, 3), "bn.weight": torch.ones(2), "n": torch.tensor(4)}
    edge = clone(sent, num_clones)
    edge["conv.weight"][0, 1, 2] = 2.0
    return sent, edge


def read(arrays, sent, wire_dtype):
    record = ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})
    return ensemble_of(record, sent, sent=sent, wire_dtype=wire_dtype)


def arrays_of(edge, sent, wire_dtype):
    encoded = encode_reply(edge, sent, wire_dtype)
    return {name: tensor.numpy() for name, tensor in encoded.items()}


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
def test_a_reply_of_one_plain_model_is_an_ensemble_of_one(wire_dtype):
    sent, edge = model_and_edge()
    plain = read(arrays_of(member(edge, 0), sent, wire_dtype), sent, wire_dtype)
    ensemble = read(arrays_of(edge, sent, wire_dtype), sent, wire_dtype)
    assert all(torch.equal(plain[name][0], ensemble[name][0]) for name in sent)
    # These values are exact in every form: ones, and a movement of 127 / 127.
    assert all(torch.equal(ensemble[name], edge[name]) for name in sent)


@pytest.mark.parametrize("wire_dtype", SMALLER)
def test_a_reply_in_float32_or_in_the_form_of_the_request_is_accepted(wire_dtype):
    sent, edge = model_and_edge()
    for form in ("float32", "float16"):
        ensemble = read(arrays_of(edge, sent, form), sent, wire_dtype)
        assert all(torch.equal(ensemble[name], edge[name]) for name in sent)


@pytest.mark.parametrize(
    ("form", "asked", "dtype"),
    [
        ("float16", "float32", "float16"),
        ("bfloat16", "float32", "uint16"),
        ("bfloat16", "float16", "uint16"),
        ("bfloat16", "int8", "uint16"),
    ],
)
def test_a_form_that_was_not_requested_is_refused(form, asked, dtype):
    sent, edge = model_and_edge()
    cause = f"^conv.weight: expected dtype torch.float32, got torch.{dtype}$"
    with pytest.raises(ValueError, match=cause):
        read(arrays_of(edge, sent, form), sent, asked)


@pytest.mark.parametrize("asked", ["float32", "float16", "bfloat16"])
def test_int8_codes_that_were_not_requested_are_refused(asked):
    sent, edge = model_and_edge()
    arrays = arrays_of(edge, sent, "int8")
    with pytest.raises(ValueError, match=r"missing none, unknown 'conv.weight\.\.scale'$"):
        read(arrays, sent, asked)
    del arrays["conv.weight" + SCALES]
    with pytest.raises(ValueError, match=r"^conv.weight: expected dtype torch.float32, got .*int8"):
        read(arrays, sent, asked)


CODES = np.zeros((2, 2, 3), np.int8)
MALFORMED = {
    "no scales": ({"conv.weight..scale": None}, r"expected scales of shape \(2,\), got none"),
    "scales in float64": (
        {"conv.weight..scale": np.ones(2)},
        "expected dtype float32, got float64",
    ),
    "scales as text": (
        {"conv.weight..scale": np.array(["1", "2"])},
        "expected dtype float32, got <U1",
    ),
    "one scale for two clones": (
        {"conv.weight..scale": np.ones(1, np.float32)},
        r"expected shape \(2,\), got \(1,\)",
    ),
    "a scale per value": (
        {"conv.weight..scale": np.ones((2, 2, 3), np.float32)},
        r"expected shape \(2,\), got \(2, 2, 3\)",
    ),
    "scale not a number": (
        {"conv.weight..scale": np.array([1, np.nan], np.float32)},
        "expected finite scales, at least 0, got nan",
    ),
    "infinite scale": (
        {"conv.weight..scale": np.array([np.inf, 1], np.float32)},
        "expected finite scales, at least 0, got inf",
    ),
    "negative scale": (
        {"conv.weight..scale": np.array([1, -0.5], np.float32)},
        "expected finite scales, at least 0, got -0.5",
    ),
    "scale that overflows": (
        {
            "conv.weight..scale": np.full(2, 3e38, np.float32),
            "conv.weight": np.full((2, 2, 3), 127, np.int8),
        },
        "expected finite values, got 12 of 12 not finite",
    ),
    "codes of one value": (
        {"conv.weight": np.zeros((2, 1, 1), np.int8)},
        r"expected shape \(2, 3\) per clone, got \(2, 1, 1\)",
    ),
    "codes with two more axes": (
        {"conv.weight": np.zeros((1, 2, 2, 3), np.int8)},
        r"expected shape \(2, 3\) per clone, got \(1, 2, 2, 3\)",
    ),
    "codes without an axis": (
        {"conv.weight": np.zeros((), np.int8)},
        r"expected shape \(2, 3\) per clone, got \(\)",
    ),
    "codes of no clones": (
        {"conv.weight": CODES[:0], "conv.weight..scale": np.ones(0, np.float32)},
        r"expected shape \(2, 2, 3\), got \(0, 2, 3\)",
    ),
    "codes of too few clones": (
        {"conv.weight": CODES[:1], "conv.weight..scale": np.ones(1, np.float32)},
        r"expected shape \(2, 2, 3\), got \(1, 2, 3\)",
    ),
    "codes in a wider type": (
        {"conv.weight": CODES.astype(np.int16)},
        r"unknown 'conv.weight\.\.scale'",
    ),
    "codes of a vector": ({"bn.weight": np.zeros((2, 2), np.int8)}, "expected dtype torch.float32"),
    "scales of a vector": (
        {"bn.weight..scale": np.ones(2, np.float32)},
        r"unknown 'bn.weight\.\.scale'",
    ),
    "scales of values in float32": (
        {"conv.weight": np.ones((2, 2, 3), np.float32)},
        r"unknown 'conv.weight\.\.scale'",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_codes_and_scales_are_refused_in_one_line(case):
    changes, cause = MALFORMED[case]
    sent, edge = model_and_edge()
    arrays = arrays_of(edge, sent, "int8") | changes
    arrays = {name: array for name, array in arrays.items() if array is not None}
    with pytest.raises(ValueError, match=cause) as caught:
        read(arrays, sent, "int8")
    name = next(iter(changes))
    assert name.removesuffix(SCALES) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wire_dtype", SMALLER)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_clones_that_are_not_finite_are_refused_in_every_form(wire_dtype, value):
    sent, edge = model_and_edge()
    edge["conv.weight"][1, 0, 0] = value
    with pytest.raises(ValueError, match=r"^conv.weight(\.\.scale)?: expected finite"):
        read(arrays_of(edge, sent, wire_dtype), sent, wire_dtype)


@given(hnp.arrays(st.sampled_from([np.uint16, np.float16]), (2, 2, 3)))
def test_any_16_bits_are_a_number_or_are_refused(array):
    sent, edge = model_and_edge()
    arrays = arrays_of(edge, sent, "bfloat16") | {"conv.weight": array}
    bits = torch.from_numpy(array)
    values = bits if bits.is_floating_point() else bits.view(torch.bfloat16)
    if bool(values.isfinite().all()):
        ensemble = read(arrays, sent, "bfloat16")
        assert torch.equal(ensemble["conv.weight"], values.float())
    else:
        with pytest.raises(ValueError, match=r"^conv.weight: expected finite values"):
            read(arrays, sent, "bfloat16")


@pytest.mark.parametrize("wire_dtype", SMALLER)
def test_a_reply_in_the_other_byte_order_is_the_same_ensemble(wire_dtype):
    sent, edge = model_and_edge()
    edge["conv.weight"][1, 1, 1] = -0.25
    arrays = arrays_of(edge, sent, wire_dtype)
    swapped = {name: array.astype(array.dtype.newbyteorder(">")) for name, array in arrays.items()}
    expected, ensemble = read(arrays, sent, wire_dtype), read(swapped, sent, wire_dtype)
    assert all(torch.equal(ensemble[name], expected[name]) for name in sent)


def test_scales_follow_the_arrays_of_a_reply_in_the_order_of_their_names():
    sent = digits_cnn().state_dict()
    encoded = encode_reply(clone(sent, 2), sent, "int8")
    assert list(encoded) == [*sent, *scale_names(sent, "int8")]
    matrices = [name for name, tensor in sent.items() if tensor.dim() > 1]
    assert [name for name in sent if encoded[name].dtype == torch.int8] == matrices
    assert [encoded[name + SCALES].shape for name in matrices] == [(2,)] * len(matrices)
    assert scale_names(sent, "float16") == []


def test_the_name_of_scales_is_no_name_of_a_parameter():
    """PyTorch refuses a dot in a name and an empty name, of which two dots would be made."""
    for name in ("weight..scale", "weight.", ""):
        with pytest.raises(KeyError):
            nn.Module().register_parameter(name, None)
        with pytest.raises(KeyError):
            nn.Module().register_buffer(name, None)
        with pytest.raises(KeyError):
            nn.Module().add_module(name, nn.Linear(1, 1))


@pytest.mark.parametrize("wire_dtype", SMALLER)
@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"conv.weight": torch.ones(2, 1, 1)}, "conv.weight: expected shape"),
        ({"conv.weight": torch.ones(3)}, "conv.weight: expected shape"),
        ({"conv.weight": torch.ones(2, 2, 3).double()}, "conv.weight: expected dtype"),
        ({"fc.weight": torch.ones(2, 2, 3)}, "missing none, unknown 'fc.weight'"),
    ],
)
def test_a_model_that_does_not_fit_is_encoded_and_refused(wire_dtype, change, cause):
    sent, edge = model_and_edge()
    with pytest.raises(ValueError, match=cause):
        read(arrays_of(edge | change, sent, wire_dtype), sent, wire_dtype)


def test_the_bytes_of_a_transfer_are_those_of_its_values():
    sent, edge = model_and_edge()
    sizes = {form: transfer(edge, sent, form)[1] for form in WIRE_DTYPES}
    # Two clones of 6 weights, 2 weights of a vector and an int64 counter; an int8 scale per clone.
    assert sizes == {
        "float32": 2 * (6 * 4 + 2 * 4 + 8),
        "float16": 2 * (6 * 2 + 2 * 2 + 8),
        "bfloat16": 2 * (6 * 2 + 2 * 2 + 8),
        "int8": 2 * (6 + 2 * 4 + 8 + 4),
    }


def test_an_unknown_form_is_named():
    with pytest.raises(ValueError, match=r"^wire_dtype: expected one of float32, .*, got 'int4'$"):
        check_wire_dtype("int4")
