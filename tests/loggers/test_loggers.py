"""What the loggers write, read back with the libraries' own readers, without a network."""

import importlib.util
import struct
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from flwr_cloned_kd import MlflowLogger, TensorBoardLogger, VirtualGrid, WandbLogger, loggers
from flwr_cloned_kd.io.messages import metrics_of as reported_by
from flwr_cloned_kd.loggers.rows import metrics_of
from tests.helpers.federation import NOTHING, Tally, adds
from tests.helpers.scripted import nodes
from tests.test_layers import imported

LOGGERS = {
    "tensorboard": lambda: TensorBoardLogger("unused"),
    "wandb": WandbLogger,
    "mlflow": MlflowLogger,
}


class Judge(Tally):
    """Refuses what edge 2 sends, reports an accuracy, and can write checkpoints."""

    def absorb(self, dispatch, content, staleness):
        if dispatch.edge == "2":
            raise ValueError("w: expected anything but 2")
        return super().absorb(dispatch, content, staleness) | {"core-accuracy": self.w / 100}

    def settings(self):
        return {"seed": 7, "schedule": None, "send": "cloned", "layers": [1, 2]}

    def state_dict(self):
        return {}, {"w": self.w}

    def load_state_dict(self, tensors, state):
        self.w = state["w"]


def play(logger, *, num_rounds, num_edges=4, **options):
    strategy = Judge(callbacks=[logger], **options)
    strategy.start(VirtualGrid(nodes(num_edges), compute=1.0), NOTHING, num_rounds=num_rounds)
    return strategy


def needs(library):
    return pytest.mark.skipif(
        importlib.util.find_spec(library) is None, reason=f"needs the package {library}"
    )


def shown(folder):
    """Return what TensorBoard shows of a folder: tag -> its (step, value) pairs."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }


def parameters(folder):
    """Return what the HParams page of TensorBoard shows."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(folder))
    events.Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    return HParamsPluginData.FromString(content).session_start_info.hparams


@needs("tensorboard")
def test_tensorboard_shows_each_round_as_a_step_and_refusals_as_text(tmp_path):
    strategy = play(TensorBoardLogger(tmp_path), num_rounds=4)
    values = shown(tmp_path)
    assert values["round/accepted"] == [(1, 1), (2, 0), (3, 1), (4, 1)]
    steps, accuracies = zip(*values["round/core-accuracy"])
    assert steps == (1, 3, 4)
    assert accuracies == pytest.approx((0.01, 0.04, 0.08))
    assert values["round/bytes-up"][0][1] == strategy.history[0]["bytes-up"]
    assert values["refused/text_summary"] == [(2, [b"edge 2: w: expected anything but 2"])]


@needs("tensorboard")
def test_tensorboard_gets_the_settings_as_hyperparameters(tmp_path):
    play(TensorBoardLogger(tmp_path), num_rounds=1)
    values = parameters(tmp_path)
    assert values["strategy"].string_value == "Judge"
    assert values["seed"].number_value == 7
    assert values["num_rounds"].number_value == 1
    assert values["layers"].string_value == "[1, 2]"


@needs("tensorboard")
@pytest.mark.parametrize("folder", ["first", "second"])
def test_tensorboard_shows_each_step_of_a_resumed_run_once(tmp_path, folder):
    checkpoint = tmp_path / "run.ckpt"
    play(TensorBoardLogger(tmp_path / "first"), num_rounds=3, checkpoint=checkpoint)
    play(TensorBoardLogger(tmp_path / folder), num_rounds=4, checkpoint=checkpoint)
    values = shown(tmp_path / folder)
    assert values["round/accepted"] == [(1, 1), (2, 0), (3, 1), (4, 1)]
    assert [step for step, _ in values["refused/text_summary"]] == [2]
    assert parameters(tmp_path / folder)["num_rounds"].number_value in (3, 4)


@needs("tensorboard")
def test_the_event_file_of_an_interrupted_run_is_complete(tmp_path):
    class Interrupted(Judge):
        def absorb(self, dispatch, content, staleness):
            if dispatch.edge == "3":
                raise KeyboardInterrupt
            return super().absorb(dispatch, content, staleness)

    strategy = Interrupted(callbacks=[TensorBoardLogger(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        strategy.start(VirtualGrid(nodes(3)), NOTHING, num_rounds=3)
    assert [step for step, _ in shown(tmp_path)["round/accepted"]] == [1, 2]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The address of a store of MLflow; to make one takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        yield f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


def logged(store, run_id):
    """Return a run of MLflow, and its metrics: name -> (step, value) pairs."""
    from mlflow import MlflowClient

    client = MlflowClient(store)
    run = client.get_run(run_id)
    metrics = {
        name: [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]
        for name in run.data.metrics
    }
    return run, metrics


@needs("mlflow")
@pytest.mark.filterwarnings("default")
def test_mlflow_keeps_rounds_settings_and_refusals(store):
    logger = MlflowLogger(store, experiment="digits", run_name="first")
    play(logger, num_rounds=3)
    run, metrics = logged(store, logger.run_id)
    assert metrics["accepted"] == [(1, 1), (2, 0), (3, 1)]
    assert metrics["core-accuracy"] == [(1, 0.01), (3, 0.04)]
    assert run.data.params["strategy"] == "Judge"
    assert run.data.params["seed"] == "7"
    assert run.data.tags["refused-2"] == "edge 2: w: expected anything but 2"
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")

    # A run that was killed after round 3 was logged, and resumes from round 2.
    again = MlflowLogger(store, experiment="digits", run_id=logger.run_id)
    play(again, num_rounds=4)
    run, metrics = logged(store, logger.run_id)
    assert metrics["accepted"] == [(1, 1), (2, 0), (3, 1), (4, 1)]
    assert run.data.params["num_rounds"] == "3"


@needs("mlflow")
@pytest.mark.filterwarnings("default")
def test_mlflow_gets_the_rounds_before_a_resume_and_a_failure(store, tmp_path):
    class Fails(Judge):
        def absorb(self, dispatch, content, staleness):
            if dispatch.edge == "4":
                raise KeyError("no such field")
            return super().absorb(dispatch, content, staleness)

    checkpoint = tmp_path / "run.ckpt"
    Fails(checkpoint=checkpoint).start(VirtualGrid(nodes(4)), NOTHING, num_rounds=2)
    logger = MlflowLogger(store)
    resumed = Fails(checkpoint=checkpoint, callbacks=[logger])
    with pytest.raises(KeyError):
        resumed.start(VirtualGrid(nodes(4)), NOTHING, num_rounds=4)
    run, metrics = logged(store, logger.run_id)
    assert metrics["accepted"] == [(1, 1), (2, 0), (3, 1)]
    assert run.info.status == "FAILED"


def records(path):
    """Read the records of an offline run of W&B: a log in the format of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    place, parts = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


@needs("wandb")
@pytest.mark.filterwarnings("default")
def test_an_offline_run_of_wandb_has_rounds_as_steps_settings_and_causes(tmp_path):
    logger = WandbLogger(mode="offline", dir=tmp_path, project="digits")
    play(logger, num_rounds=3)
    import_module("wandb").teardown()  # the process of W&B writes the file, and closes it here
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = []
    settings = {}
    for record in records(path):
        if record.HasField("history"):
            items = record.history.item
            rows.append({".".join(i.nested_key) or i.key: i.value_json for i in items})
        if record.HasField("config"):
            settings |= {update.key: update.value_json for update in record.config.update}
    assert [row["_step"] for row in rows] == ["1", "2", "3"]
    assert [float(row["accepted"]) for row in rows] == [1, 0, 1]
    assert rows[1]["refused"] == '"edge 2: w: expected anything but 2"'
    assert settings["seed"] == "7"


class FakeWandb:
    """Records what a run of W&B is given; its steps go on from `step`."""

    def __init__(self, step=0):
        self.step = step
        self.rows = []
        self.config = SimpleNamespace(update=lambda values, allow_val_change: None)
        self.exit_code = None

    def init(self, **options):
        return self

    def log(self, values, step, commit):
        assert step >= self.step
        self.rows.append((step, values))
        self.step = step + 1

    def finish(self, exit_code):
        self.exit_code = exit_code


def test_wandb_does_not_log_a_step_that_its_run_has(monkeypatch, tmp_path):
    fake = FakeWandb(step=3)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    play(WandbLogger(id="x", resume="allow"), num_rounds=4)
    assert [step for step, _ in fake.rows] == [3, 4]
    assert fake.exit_code == 0


def test_a_resumed_run_continues_its_run_of_wandb(monkeypatch, tmp_path):
    begun = []

    class Fresh:
        def init(self, **options):
            run = FakeWandb()
            run.id = options.get("id", f"made-{len(begun)}")
            begun.append(options)
            return run

    monkeypatch.setitem(sys.modules, "wandb", Fresh())
    logger = WandbLogger(project="p", id="x", resume="allow")
    play(logger, num_rounds=1)
    play(logger, num_rounds=2, checkpoint=tmp_path / "run.ckpt")
    play(logger, num_rounds=3, checkpoint=tmp_path / "run.ckpt")
    assert begun == [
        {"project": "p", "id": "x", "resume": "allow"},
        {"project": "p"},
        {"project": "p", "id": "made-1", "resume": "allow"},
    ]


@needs("tensorboard")
def test_a_resumed_run_continues_its_folder_of_tensorboard(tmp_path):
    logger = TensorBoardLogger(tmp_path / "run")
    play(logger, num_rounds=1)
    play(logger, num_rounds=2, checkpoint=tmp_path / "run.ckpt")
    play(logger, num_rounds=3, checkpoint=tmp_path / "run.ckpt")
    folders = {path.parent.name: path for path in tmp_path.glob("run*/events*")}
    assert set(folders) == {"run", "run-2"}
    assert [step for step, _ in shown(tmp_path / "run")["round/accepted"]] == [1]
    assert [step for step, _ in shown(tmp_path / "run-2")["round/accepted"]] == [1, 2, 3]


@needs("mlflow")
@pytest.mark.filterwarnings("default")
def test_a_resumed_run_continues_its_run_of_mlflow(store, tmp_path):
    logger = MlflowLogger(store)
    run_ids = []
    for num_rounds, options in (
        (1, {}),
        (2, {"checkpoint": tmp_path / "run.ckpt"}),
        (3, {"checkpoint": tmp_path / "run.ckpt"}),
    ):
        play(logger, num_rounds=num_rounds, **options)
        run_ids.append(logger.run_id)
    first, second, resumed = run_ids
    assert first != second == resumed
    assert logged(store, first)[1]["accepted"] == [(1, 1)]
    assert logged(store, second)[1]["accepted"] == [(1, 1), (2, 0), (3, 1)]


@pytest.mark.parametrize("library", LOGGERS)
def test_a_missing_library_is_named_with_the_command_that_installs_it(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ImportError, match=rf'pip install "flwr-cloned-kd\[{library}\]"'):
        LOGGERS[library]()


def test_the_libraries_are_imported_only_when_a_logger_is_made():
    folder = Path(loggers.__file__).parent
    names = {name.split(".")[0] for path in folder.glob("*.py") for name in imported(path)}
    assert not names & {"torch", "tensorboard", "wandb", "mlflow"}


HOSTILE = ["../../x", "a\nb", "\ud800", "x" * 64, "<b>", "a/b:c", "é"]


def hostile(message, context):
    reply = adds(1)(message, context)
    if message.metadata.message_type == "train":
        metrics = next(iter(reply.content.metric_records.values()))
        for number, name in enumerate(HOSTILE):
            metrics[name] = [1e300, -1e300, 0][number % 3]
    return reply


class Reports(Judge):
    """Reports what the edge reports, as `ClonedKD` does."""

    def absorb(self, dispatch, content, staleness):
        return reported_by(content) | super().absorb(dispatch, content, staleness)


def test_names_that_an_edge_chooses_become_plain():
    row = {"round": 1, "edge": "1", "cause": "", "accepted": 1.0}
    names = metrics_of(row | {f"reported-{name}": 1 for name in HOSTILE})
    assert "reported-.._.._x" in names
    assert "reported-a_b_c" in names
    assert not any(set(name) & set("/\n<>:\ud800") for name in names)


@needs("tensorboard")
def test_an_edge_cannot_keep_its_round_out_of_tensorboard(tmp_path, flower_log):
    strategy = Reports(callbacks=[TensorBoardLogger(tmp_path)])
    strategy.start(VirtualGrid([hostile]), NOTHING, num_rounds=1)
    assert [step for step, _ in shown(tmp_path)["round/core-accuracy"]] == [1]
    assert not any("callback" in line for line in flower_log)


@needs("mlflow")
@pytest.mark.filterwarnings("default")
def test_an_edge_cannot_keep_its_round_out_of_mlflow(store, flower_log):
    logger = MlflowLogger(store)
    strategy = Reports(callbacks=[logger])
    strategy.start(VirtualGrid([hostile]), NOTHING, num_rounds=1)
    assert logged(store, logger.run_id)[1]["core-accuracy"] == [(1, 0.01)]
    assert not any("callback" in line for line in flower_log)
