"""Forms of arrays between a core and its edges, through both of Flower's APIs."""

import io

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy

from flwr_cloned_kd import (
    ClipClones,
    ClonedKD,
    LegacyClonedKD,
    LocalDpClones,
    Recipe,
    edge_app,
    edge_seed,
    practical,
    take,
    train_edge,
)
from flwr_cloned_kd.io.wire import SCALES, WIRE_DTYPES, received, transfer
from tests.flower.test_legacy import LegacyGrid
from tests.flower.test_legacy import run as run_legacy
from tests.helpers.fake_grid import FakeGrid
from tests.helpers.federation import PARTS, RECIPE, TRAIN, app, apps, edge_client, small_core
from tests.helpers.reference import same_bits

SMALLER = WIRE_DTYPES[1:]
LOOPS = {"flower's": Strategy.start, "ours": ClonedKD.start}


def play(core, wire_dtype, edges, *, rounds=1, loop=ClonedKD.start, num_clones=2, **options):
    rows = []
    strategy = ClonedKD(
        core, num_clones=num_clones, wire_dtype=wire_dtype, on_round=rows.append, **options
    )
    grid = FakeGrid(edges)
    first = ArrayRecord(core.model.state_dict())
    loop(strategy, grid, first, num_rounds=rounds, timeout=30)
    return strategy, rows, grid


def play_legacy(core, wire_dtype, edges, *, rounds=1):
    rows = []
    strategy = LegacyClonedKD(
        core,
        core.model.state_dict(),
        num_clones=2,
        wire_dtype=wire_dtype,
        timeout=0,
        on_round=rows.append,
    )
    grid = LegacyGrid(edges)
    run_legacy(strategy, grid, rounds=rounds)
    return strategy, rows, grid


@pytest.mark.parametrize("wire_dtype", SMALLER)
def test_three_paths_and_the_legacy_one_end_with_the_same_bits(wire_dtype):
    """The practical preset uses `sent`: the movement counts from what the edge has read."""
    core = small_core(distillation=practical(Recipe(epochs=2, batch_size=32)))
    state = core.state(core.model.state_dict())
    for server_round in (1, 2):
        sent = received(state.params, wire_dtype)
        data = take(TRAIN, PARTS[server_round])
        seed = edge_seed(core.seed, server_round)
        edge = train_edge(core.model, sent, data, RECIPE, num_clones=2, seed=seed)
        edge, _ = transfer(edge, sent, wire_dtype)
        state, _ = core.distill(state, edge, sent=sent)
    for loop in LOOPS.values():
        strategy, _, _ = play(core, wire_dtype, apps(2), rounds=2, loop=loop)
        assert same_bits(strategy.state.params, state.params)
    legacy, _, _ = play_legacy(core, wire_dtype, apps(2), rounds=2)
    assert same_bits(legacy.state.params, state.params)


def npy_bytes(shape, dtype):
    file = io.BytesIO()
    np.save(file, np.zeros(shape, dtype))
    return len(file.getvalue())


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
def test_the_bytes_of_a_round_are_those_that_travel(wire_dtype):
    sizes = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int8": np.int8}
    down = up = 0
    for tensor in small_core().model.state_dict().values():
        shape, is_float = tuple(tensor.shape), tensor.is_floating_point()
        request = np.float32 if wire_dtype == "float32" else np.float16
        down += npy_bytes(shape, request if is_float else np.int64)
        coded = wire_dtype == "int8" and is_float and len(shape) > 1
        dtype = np.float32 if wire_dtype == "int8" and not coded else sizes[wire_dtype]
        up += npy_bytes((2, *shape), dtype if is_float else np.int64)
        up += npy_bytes((2,), np.float32) if coded else 0
    for run in (play, play_legacy):
        _, [row], _ = run(small_core(), wire_dtype, apps(1))
        assert (row["bytes-down"], row["bytes-up"]) == (down, up)


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
def test_the_config_names_the_form_unless_it_is_float32(wire_dtype):
    _, _, grid = play(small_core(), wire_dtype, apps(1))
    request = next(m for m in grid.pushed if m.metadata.message_type == "train")
    asked = request.content["config"].get("wire-dtype")
    assert asked == (None if wire_dtype == "float32" else wire_dtype)
    # The edge widened a copy of the request, not the request itself.
    dtype = request.content["arrays"]["conv.weight"].numpy().dtype
    assert dtype == (np.float32 if wire_dtype == "float32" else np.float16)


def plain_edge(message, context):
    """Answer with a plain PyTorch model; ignore "num-clones" and "wire-dtype"."""
    if message.metadata.message_type == "query":
        return Message(RecordDict({"config": ConfigRecord({"edge": "plain"})}), reply_to=message)
    model = small_core().model
    model.load_state_dict(message.content["arrays"].to_torch_state_dict(keep_input=True))
    content = {
        "arrays": ArrayRecord(model.state_dict()),
        "metrics": MetricRecord({"num-examples": 1}),
    }
    return Message(RecordDict(content), reply_to=message)


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
def test_a_reply_in_float32_is_accepted_in_every_form(wire_dtype):
    _, [row], _ = play(small_core(), wire_dtype, [plain_edge])
    assert (row["accepted"], row["cause"], row["num-clones"]) == (1, "", 1)
    legacy = ClientApp(lambda context: edge_client(0).to_client())
    _, [row], _ = play_legacy(small_core(), wire_dtype, [legacy])
    assert (row["accepted"], row["cause"], row["num-clones"]) == (1, "", 2)


@pytest.mark.parametrize("wire_dtype", SMALLER)
def test_a_client_that_echoes_the_types_of_the_request_is_accepted(wire_dtype):
    def echo(message, context):
        reply = plain_edge(message, context)
        if message.metadata.message_type == "train":
            reply.content["arrays"] = message.content["arrays"]
        return reply

    _, [row], _ = play(small_core(), wire_dtype, [echo])
    assert (row["accepted"], row["cause"]) == (1, "")


def insists_on(wire_dtype):
    """Make an edge that replies in one form, whatever the request says."""
    edge = app()

    def answer(message, context):
        for config in message.content.config_records.values():
            config["wire-dtype"] = wire_dtype
        return edge(message, context)

    return answer


@pytest.mark.parametrize(
    ("form", "asked", "cause"),
    [
        ("float16", "float32", "expected dtype torch.float32, got torch.float16"),
        ("bfloat16", "float16", "expected dtype torch.float32, got torch.uint16"),
        ("int8", "bfloat16", "missing none, unknown 'conv.weight..scale'"),
        (
            "int4",
            "int8",
            "wire-dtype: expected one of float32, float16, bfloat16, int8, got 'int4'",
        ),
    ],
)
def test_a_form_that_was_not_requested_is_refused(form, asked, cause):
    core = small_core()
    strategy, [row], _ = play(core, asked, [insists_on(form)])
    assert row["accepted"] == 0
    assert cause in row["cause"]
    assert same_bits(strategy.state.params, core.model.state_dict())


def legacy_edge(change):
    """Make an edge whose replies to a legacy server are changed on their way."""
    edge = app()

    def answer(message, context):
        reply = edge(message, context)
        if message.metadata.message_type == "train":
            arrays = list(reply.content["fitres.parameters"].values())
            changed = change(arrays)
            numbered = {str(index): array for index, array in enumerate(changed)}
            reply.content["fitres.parameters"] = ArrayRecord(numbered)
        return reply

    return answer


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda arrays: arrays, ""),
        (lambda arrays: arrays[:-1], "parameters: expected 8 arrays, got 9"),
        (lambda arrays: [*arrays, arrays[-1]], "parameters: expected 8 arrays, got 11"),
        (lambda arrays: arrays[:8], "scale: expected scales of shape (2,), got none"),
        (
            lambda arrays: [*arrays[:-1], Array(np.full(2, -1, np.float32))],
            "head.weight..scale: expected finite scales, at least 0, got -1.0",
        ),
        (lambda arrays: [*arrays[:-1], Array(np.ones(3, np.float32))], "expected shape (2,)"),
    ],
)
def test_the_scales_of_a_legacy_reply_are_matched_by_position(change, cause):
    _, [row], _ = play_legacy(small_core(), "int8", [legacy_edge(change)])
    assert row["accepted"] == (cause == "")
    assert row["cause"].endswith(cause) if not cause else cause in row["cause"]


@pytest.mark.parametrize("wire_dtype", SMALLER)
@pytest.mark.parametrize("run", [play, play_legacy])
def test_mods_around_an_edge_handle_float32(wire_dtype, run):
    def edge(*mods):
        return [edge_app(lambda context: edge_client(0), mods=list(mods))]

    seen = []

    def look(message, context, call_next):
        reply = call_next(message, context)
        for content in (message.content, reply.content):
            [record] = content.array_records.values()
            seen.append({str(array.numpy().dtype) for array in record.values()})
        return reply

    privacy = LocalDpClones(clipping_norm=1.0, epsilon=1.0, delta=1e-5, sensitivity=1e-6)
    for mods in ([ClipClones(1e-3), look], [privacy], [look]):
        _, [row], _ = run(small_core(), wire_dtype, edge(*mods))
        assert row["cause"] == ""
    assert seen == [{"float32", "int64"}] * 4


def test_an_edge_answers_in_its_usual_form_without_the_key():
    message = Message(
        RecordDict({"arrays": ArrayRecord(small_core().model.state_dict())}),
        dst_node_id=1,
        message_type="train",
    )
    message.metadata.__dict__["_message_id"] = "id"
    reply = app()(message, Context(1, 100, {"partition-id": 0}, RecordDict(), {}))
    dtypes = {str(array.numpy().dtype) for array in reply.content["arrays"].values()}
    assert dtypes == {"float32", "int64"}
    assert not any(name.endswith(SCALES) for name in reply.content["arrays"])


def test_an_unknown_form_is_refused_at_the_start():
    for make in (
        lambda: ClonedKD(small_core(), wire_dtype="float8"),
        lambda: LegacyClonedKD(small_core(), small_core().model.state_dict(), wire_dtype="float8"),
    ):
        with pytest.raises(ValueError, match=r"^wire_dtype: expected one of float32, .*'float8'"):
            make()


def test_a_resumed_run_must_have_the_same_form(tmp_path):
    core, path = small_core(), tmp_path / "core.ckpt"
    play(core, "int8", apps(2), checkpoint=path)
    for other in ("float32", "float16"):
        with pytest.raises(ValueError, match="wire_dtype: expected "):
            play(core, other, apps(2), rounds=2, checkpoint=path)
    strategy, _, _ = play(core, "int8", apps(2), rounds=2, checkpoint=path)
    whole, _, _ = play(core, "int8", apps(2), rounds=2)
    assert same_bits(strategy.state.params, whole.state.params)


def test_a_checkpoint_from_before_the_option_is_one_of_float32():
    assert ClonedKD(small_core()).settings()["wire_dtype"] is None


def test_a_late_edge_moves_the_core_from_the_model_that_it_was_sent():
    """Two edges in flight: the second was sent the core of before the first."""
    core = small_core(distillation=practical(Recipe(epochs=2, batch_size=32)))
    _, rows, _ = play(core, "int8", apps(2), rounds=2, max_in_flight=2)
    assert [row["staleness"] for row in rows] == [0, 1]
    assert all(row["accepted"] for row in rows)
