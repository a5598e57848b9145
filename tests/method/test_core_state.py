"""A core's progress as named tensors and a JSON header, and back."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flwr_cloned_kd import CoreState, clone
from tests.helpers.reference import few, mlp, same_bits, snapshot

LIKE = mlp().state_dict()
FRACTIONS = st.lists(st.floats(0, 1), max_size=4).map(tuple)


def drawn(shape_of, seed):
    """Draw values for every tensor of a model, integers included."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(-9, 9, tensor.shape, generator=generator).to(tensor.dtype)
        for name, tensor in shape_of.items()
    }


@st.composite
def states(draw):
    sizes = draw(st.lists(st.integers(1, 3), max_size=3))
    weights = tuple(draw(st.floats(0, 1)) for _ in sizes)
    return CoreState(
        params=drawn(LIKE, draw(st.integers(0, 99))),
        memory=tuple(drawn(clone(LIKE, count), index) for index, count in enumerate(sizes)),
        version=draw(st.integers(0, 2**40)),
        train_accuracy=draw(FRACTIONS),
        memory_weights=draw(st.sampled_from([(), weights])),
    )


@few
@given(state=states(), extra=st.booleans())
def test_a_state_survives_the_way_through_tensors_and_json(state, extra):
    tensors, header = state.state_dict()
    header = json.loads(json.dumps(header))
    if extra:
        tensors |= {"past-0/x": torch.zeros(1), "right": torch.zeros(2)}
        header |= {"settings": {}}
    again = CoreState.from_state_dict(tensors, header, LIKE)
    assert list(again.params) == list(state.params)
    assert same_bits(again.params, state.params)
    assert len(again.memory) == len(state.memory)
    assert all(same_bits(*pair) for pair in zip(again.memory, state.memory))
    assert again.version == state.version
    assert again.train_accuracy == state.train_accuracy
    assert again.memory_weights == state.memory_weights


def stored():
    state = CoreState(snapshot(LIKE), memory=(clone(LIKE, 2), clone(LIKE, 3)), version=2)
    return state.state_dict()


@pytest.mark.parametrize("prefix", ["core", "0", "1"])
def test_a_missing_tensor_is_named(prefix):
    tensors, header = stored()
    del tensors[f"{prefix}/1.bias"]
    with pytest.raises(ValueError, match=rf"^{prefix}: array names: .* missing '1.bias'"):
        CoreState.from_state_dict(tensors, header, LIKE)


@pytest.mark.parametrize("prefix", ["core", "0", "1"])
def test_a_wrong_shape_is_named(prefix):
    tensors, header = stored()
    tensors[f"{prefix}/1.bias"] = torch.zeros(9)
    with pytest.raises(ValueError, match=rf"^{prefix}: 1.bias: expected shape .*, got \(9,\)"):
        CoreState.from_state_dict(tensors, header, LIKE)


@pytest.mark.parametrize("name", ["memory", "memory_weights", "train_accuracy", "version"])
def test_a_missing_entry_of_the_header_is_named(name):
    tensors, header = stored()
    del header[name]
    with pytest.raises(ValueError, match=f"core state: expected memory, .*missing .*'{name}'"):
        CoreState.from_state_dict(tensors, header, LIKE)


def test_an_ensemble_in_the_place_of_the_core_is_refused():
    tensors, header = stored()
    tensors |= {f"core/{name}": tensor for name, tensor in clone(LIKE, 2).items()}
    with pytest.raises(ValueError, match="core: expected one model, got an ensemble of 2"):
        CoreState.from_state_dict(tensors, header, LIKE)


def test_fewer_ensembles_than_the_header_counts_are_refused():
    tensors, header = stored()
    with pytest.raises(ValueError, match=r"^2: array names: "):
        CoreState.from_state_dict(tensors, header | {"memory": 3}, LIKE)
