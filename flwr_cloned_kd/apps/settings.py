"""The knobs of the example apps, each stated once: type, range, default, meaning, what it affects.

A field of `Settings` is a knob. Its run-config key is the name of the field with "-" for "_".
`python -m flwr_cloned_kd.apps` prints the knobs for the apps' pyproject.toml and docs/settings.md.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model

from ..engine.inputs import CropAndFlip
from ..engine.runtime import Runtime
from ..io.wire import WIRE_DTYPES
from ..method.guards import Trust, relative_accuracy
from ..method.presets import PRESETS
from ..method.variants import VARIANTS

WATCHERS = ("live", "tensorboard", "mlflow", "wandb")
STRATEGIES = ("cloned-kd", "fedavg", "fedprox", "fedasync", "fedbuff")
GUARDS = ("auto", "none", "jump", "drop", "validation", "gap")
BY_FALSE_ALARMS = ("validation", "gap")
"""Guards whose threshold is the probability of refusing an honest edge."""
TRUSTS: dict[str, Trust | None] = {"full": None, "relative-accuracy": relative_accuracy}
"""Rules of trust, by their names in run-configs."""
CHOICES = {"auto": None, "on": True, "off": False}
AUGMENTATIONS = {
    "none": None,
    "shift": CropAndFlip(pad=1, flip=False),
    "crop": CropAndFlip(flip=False),
    "crop-and-flip": CropAndFlip(),
}
TYPES = {str: "string", int: "int", float: "float", bool: "bool"}
"""How pydantic names the types of values in its errors."""
ALL_KEYS = "python -m flwr_cloned_kd.apps table lists all keys"
MODELS = "digits-cnn or resnet-DEPTH with DEPTH 8, 14, 20, 32, ..."

DATA = "Data"
METHOD = "Model and method"
TRAINING = "Training"
UNRELIABLE = "Unreliable edges"
RUN = "The run"
SPEED = "Speed only"

Affects = Literal["result", "Flower run", "speed", "paths"]
"""What a knob changes.

"result": the numbers of every run. "Flower run": runs through Flower, its baselines included, but
not the plain loop of `paper`. "speed": how fast a run is. "paths": where files are.
"""


class Knob(NamedTuple):
    """A field of `Settings` with its type, range and meaning."""

    key: str
    """Its key in a run-config."""
    default: Any
    kind: type
    expected: str
    """The range in words; "" if every value of the type will do."""
    choices: tuple[str, ...]
    """The names to choose from; empty if the values are no names."""
    group: str
    meaning: str
    affects: Affects


def setting(default: Any, group: str, meaning: str, affects: Affects = "result") -> Any:
    """Make a field of `Settings` with its default value, its group and its meaning."""
    return field(default=default, metadata={"group": group, "meaning": meaning, "affects": affects})


def one_of(*choices: str) -> Any:
    """Make the constraint that a text is one of these names."""
    pattern = "|".join(re.escape(choice) for choice in choices)
    expected = f"one of {', '.join(choices)}"
    return Field(pattern=f"^(?:{pattern})$", description=expected, examples=list(choices))


def model_depth(model: str) -> int:
    """Return the depth of the ResNet that a model's name stands for.

    Raises:
        ValueError: if the name is neither digits-cnn nor that of a ResNet for CIFAR.
    """
    if model == "digits-cnn":
        return 8
    family, _, depth = model.partition("-")
    if family != "resnet" or not depth.isdecimal() or int(depth) < 8 or int(depth) % 6 != 2:
        raise ValueError
    return int(depth)


def _model_name(model: str) -> str:
    model_depth(model)
    return model


def _device_name(device: str) -> str:
    Runtime(device=device)
    return device


def _strategy_names(names: str) -> str:
    if not set(_split(names)) <= set(STRATEGIES):
        raise ValueError
    return names


def _watcher_names(names: str) -> str:
    if names and not set(_split(names)) <= set(WATCHERS):
        raise ValueError
    return names


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",")]


# The description says in words what the constraint demands: for errors and for the table of knobs.
Count = Annotated[int, Field(ge=1, description="at least 1")]
CountOrZero = Annotated[int, Field(ge=0, description="at least 0")]
Staleness = Annotated[int, Field(ge=-1, description="at least 0, or -1 for any")]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False, description="at least 0")]
Positive = Annotated[float, Field(gt=0, description="above 0")]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False, description="above 0")]
Fraction = Annotated[float, Field(ge=0, le=1, description="a fraction, 0 to 1")]
FractionBelow1 = Annotated[float, Field(ge=0, lt=1, description="a fraction, 0 to 1, and below 1")]
Share = Annotated[float, Field(gt=0, le=1, description="a fraction, above 0 to 1")]
Device = Annotated[
    str, AfterValidator(_device_name), Field(description="auto, cpu, cuda, cuda:1, ...")
]
STRATEGY_NAMES = Field(description=f"some of {', '.join(STRATEGIES)}", examples=list(STRATEGIES))
WATCHER_NAMES = Field(
    description=f"the empty text or some of {', '.join(WATCHERS)}", examples=["", *WATCHERS]
)
Switch = Annotated[str, one_of(*CHOICES)]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run-config of the example apps says, checked.

    docs/settings.md explains every field; `python -m flwr_cloned_kd.apps table` prints that table.

    Raises:
        ValueError: with the key, what was expected and the value.
    """

    dataset: Annotated[str, one_of("digits", "cifar100", "npz", "huggingface")] = setting(
        "digits", DATA, "the data; digits need scikit-learn, cifar100 is downloaded"
    )
    data_path: str = setting(
        "", DATA, "folder of cifar100, archive of npz, or name of the HuggingFace dataset", "paths"
    )
    image_key: str = setting("img", DATA, "column of a HuggingFace dataset that holds the images")
    label_key: str = setting(
        "fine_label", DATA, "column of a HuggingFace dataset that holds the labels"
    )
    num_edges: Count = setting(
        9, DATA, "number of edges; the core and every edge have a part of the data"
    )
    split: Annotated[str, one_of("random", "dirichlet", "one-class")] = setting(
        "random",
        DATA,
        "parts of the edges: even, with skewed labels, or one class each; the core's part is even",
    )
    dirichlet_alpha: Positive = setting(
        0.3, DATA, "evenness of the dirichlet split; the smaller, the more skewed"
    )

    model: Annotated[str, AfterValidator(_model_name), Field(description=MODELS)] = setting(
        "digits-cnn",
        METHOD,
        "network of the core and of the edges: digits-cnn, resnet-8, resnet-14, resnet-20, ...",
    )
    variant: Annotated[str, one_of(*VARIANTS)] = setting(
        "CEM",
        METHOD,
        "row of the paper's Fig. 5: start of an edge, clones, memory; see docs/how_it_works.md",
    )
    num_clones: CountOrZero = setting(
        0, METHOD, "clones that an edge trains; 0 takes the number of the variant"
    )
    memory_size: CountOrZero = setting(
        0, METHOD, "ensembles in the temporal memory; 0 takes the number of the variant"
    )
    preset: Annotated[str, one_of(*PRESETS)] = setting(
        "practical", METHOD, "options of Phase 2 as a whole; see docs/how_it_works.md"
    )
    temperature: Amount = setting(
        0.0, METHOD, "temperature of the distillation; 0 takes the value of the preset"
    )

    core_epochs: Count = setting(12, TRAINING, "epochs of Phase 0: the core, before any edge")
    edge_epochs: Count = setting(30, TRAINING, "epochs of Phase 1: the clones on an edge")
    distill_epochs: Count = setting(30, TRAINING, "epochs of Phase 2: the core, after each edge")
    batch_size: Count = setting(128, TRAINING, "images per training step in all phases")
    lr: Amount = setting(0.1, TRAINING, "learning rate at the start of each phase")
    distill_lr: Amount = setting(
        0.0, TRAINING, "learning rate of Phase 2; 0 takes the value of the preset"
    )
    momentum: Amount = setting(
        0.9, TRAINING, "momentum of stochastic gradient descent in all phases"
    )
    weight_decay: Amount = setting(1e-4, TRAINING, "weight decay in all phases")
    augment: Annotated[str, one_of(*AUGMENTATIONS)] = setting(
        "none", TRAINING, "augmentation in all phases; shift is by at most a pixel"
    )
    distill_augment: Annotated[str, one_of("", *AUGMENTATIONS)] = setting(
        "", TRAINING, "augmentation in Phase 2; the empty text takes that of augment"
    )
    edge_accuracy_stop: Fraction = setting(
        0.0, TRAINING, "training accuracy that ends Phase 1 early; 0 trains all epochs"
    )
    plateau_patience: CountOrZero = setting(
        0, TRAINING, "epochs without progress that end Phase 2 early; 0 trains all epochs"
    )

    noisy_edges: str = setting(
        "", UNRELIABLE, 'partition ids of the edges whose labels are shuffled, such as "3,6"'
    )
    noise_probability: Fraction = setting(
        1.0, UNRELIABLE, "share of a noisy edge's batches whose labels are shuffled"
    )
    guard: Annotated[str, one_of(*GUARDS)] = setting(
        "auto",
        UNRELIABLE,
        "what refuses an edge: a jump or drop of the core's training accuracy, a significant drop "
        "of its accuracy on the validation data, or an ensemble that is worse than those of honest "
        "stand-ins; auto is validation with a guard-threshold of 0.01, and none for the preset "
        "paper",
    )
    guard_threshold: Fraction = setting(
        0.1,
        UNRELIABLE,
        "largest jump or drop that the guard accepts; for validation and gap the probability that "
        "it refuses an honest edge",
    )
    trust: Annotated[str, one_of(*TRUSTS)] = setting(
        "full",
        UNRELIABLE,
        "weight of an edge's KD term and movement: 1, or the accuracy of its ensemble as a part of "
        "the core's",
    )
    validation_share: FractionBelow1 = setting(
        0.0,
        UNRELIABLE,
        "share of the core's data that it does not train on, and on which guard and trust measure; "
        "0 takes the data that it trains on",
    )
    edge_delays: str = setting(
        "",
        UNRELIABLE,
        'seconds that edges 0, 1, ... sleep before they answer, such as "8,0,2"',
        "Flower run",
    )
    timeout: Positive = setting(
        3600.0, UNRELIABLE, "seconds to wait for an answer of an edge", "Flower run"
    )

    strategy: Annotated[str, AfterValidator(_strategy_names), STRATEGY_NAMES] = setting(
        "cloned-kd", RUN, "strategies to run in turn, separated by commas", "Flower run"
    )
    num_rounds: CountOrZero = setting(
        0,
        RUN,
        "rounds of cloned-kd, with one edge each; 0 asks every edge once, and more than num-edges "
        "asks edges again",
    )
    baseline_rounds: Count = setting(
        9,
        RUN,
        "rounds of fedavg and fedprox; fedasync and fedbuff take num-edges times as many answers",
        "Flower run",
    )
    proximal_mu: Amount = setting(0.01, RUN, "mu of fedprox", "Flower run")
    max_in_flight: Count = setting(
        1, RUN, "edges asked at the same time by cloned-kd, fedasync and fedbuff", "Flower run"
    )
    max_together: Count = setting(
        1, RUN, "waiting answers that cloned-kd distils in one Phase 2, at most", "Flower run"
    )
    max_staleness: Staleness = setting(
        -1,
        RUN,
        "versions of the core by which an answer may be late; -1 is any number",
        "Flower run",
    )
    staleness_weight: Annotated[str, one_of("", "constant", "polynomial", "hinge")] = setting(
        "",
        RUN,
        "weight of a late answer; the empty text takes the default of the strategy",
        "Flower run",
    )
    staleness_a: Amount = setting(
        0.5, RUN, "parameter a of the weights polynomial and hinge", "Flower run"
    )
    staleness_b: Amount = setting(
        4.0, RUN, "parameter b of the weight hinge, in versions", "Flower run"
    )
    fedasync_alpha: Share = setting(
        0.6, RUN, "share of a fresh answer in the new model of fedasync", "Flower run"
    )
    fedbuff_size: Count = setting(3, RUN, "answers in the buffer of fedbuff", "Flower run")
    fedbuff_lr: Rate = setting(0.5, RUN, "server learning rate of fedbuff", "Flower run")
    wire_dtype: Annotated[str, one_of(*WIRE_DTYPES)] = setting(
        "float32", RUN, "form in which models travel with cloned-kd", "Flower run"
    )
    checkpoint: str = setting(
        "",
        RUN,
        "absolute path of a file that cloned-kd writes in every round and resumes from",
        "paths",
    )
    keep_rounds: CountOrZero = setting(
        0, RUN, "latest accepted answers kept beside the checkpoint, to undo edges", "Flower run"
    )
    quarantine: str = setting(
        "",
        RUN,
        "names of edges that cloned-kd undoes and never asks, separated by commas",
        "Flower run",
    )
    seed: int = setting(0, RUN, "seed of every draw")
    results: str = setting(
        "", RUN, "absolute path of the folder for results; the empty text is ./results", "paths"
    )
    watch: Annotated[str, AfterValidator(_watcher_names), WATCHER_NAMES] = setting(
        "",
        RUN,
        "views and logs of a run while it runs, separated by commas; see docs/watching.md",
        "paths",
    )

    device: Device = setting("auto", SPEED, "device of the core", "speed")
    client_device: Device = setting("auto", SPEED, "device of the edges", "speed")
    batch_clones: Switch = setting(
        "auto", SPEED, "training of all clones in one pass, instead of one by one", "speed"
    )
    workers: CountOrZero = setting(
        0, SPEED, "clones that train side by side on a CPU; 0 takes as many as threads", "speed"
    )
    bf16: Switch = setting("auto", SPEED, "bfloat16 instead of float32 in the models", "speed")
    compile: Switch = setting("auto", SPEED, "compilation of clones that train one by one", "speed")
    cuda_graphs: bool = setting(
        False, SPEED, "replay of recorded training steps, on GPUs only", "speed"
    )

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "Settings":
        """Make settings from a run-config, whose keys have "-" for "_".

        A whole number is accepted where another number is expected.

        Raises:
            ValueError: for an unknown key, with the nearest known ones, or for a wrong value.
        """
        known = {knob.key: knob for knob in knobs()}
        values: dict[str, Any] = {}
        for key, value in config.items():
            if key not in known:
                nearest = get_close_matches(key, known)
                hint = f"nearest: {', '.join(nearest)}" if nearest else ALL_KEYS
                raise ValueError(f"run-config {key}: expected a known key ({hint})")
            whole = known[key].kind is float and type(value) is int
            values[key.replace("-", "_")] = float(value) if whole else value
        return cls(**values)

    def __post_init__(self) -> None:
        _check(vars(self))
        if len(set(self.strategies)) < len(self.strategies):
            self._fail("strategy", "each one once")
        try:
            delays_fit = all(0 <= delay < float("inf") for delay in self.delays)
        except ValueError:
            delays_fit = False
        if not delays_fit or len(self.delays) > self.num_edges:
            self._fail("edge_delays", f"at most {self.num_edges} numbers of seconds")
        if self.dataset in ("npz", "huggingface") and not self.data_path:
            self._fail("data_path", f"the place of the {self.dataset} data")
        if self.guard in BY_FALSE_ALARMS and not 0 < self.guard_threshold < 1:
            self._fail("guard_threshold", f"above 0 and below 1 for the guard {self.guard}")
        if not all(edge.isdecimal() and int(edge) < self.num_edges for edge in self.noisy):
            self._fail("noisy_edges", f"partition ids below {self.num_edges}, comma-separated")
        if self.checkpoint and not Path(self.checkpoint).is_absolute():
            self._fail("checkpoint", "an absolute path")  # an app runs in a folder of its own
        if self.keep_rounds and not self.checkpoint:
            self._fail("keep_rounds", "0 without a checkpoint")

    @property
    def strategies(self) -> list[str]:
        """The strategies to run, in turn."""
        return _split(self.strategy)

    @property
    def watched(self) -> list[str]:
        """The views and logs of a run while it runs."""
        return list(dict.fromkeys(name for name in _split(self.watch) if name))

    @property
    def noisy(self) -> list[str]:
        """The partition ids of noisy edges."""
        return [edge for edge in _split(self.noisy_edges) if edge]

    @property
    def quarantined(self) -> list[str]:
        """The names of edges in quarantine; the name of a simulated edge is its partition id."""
        return [name for name in _split(self.quarantine) if name]

    @property
    def delays(self) -> list[float]:
        """Seconds that edge 0, 1, ... sleeps before it answers."""
        return [float(delay) for delay in _split(self.edge_delays) if delay]

    def _fail(self, name: str, expected: str) -> NoReturn:
        _refuse(name, expected, getattr(self, name))


@cache
def knobs() -> tuple[Knob, ...]:
    """List the knobs in the order of the fields of `Settings`."""
    constraints = _checked().model_fields
    return tuple(
        Knob(
            key=entry.name.replace("_", "-"),
            default=entry.default,
            kind=type(entry.default),
            expected=constraints[entry.name].description or "",
            choices=tuple(constraints[entry.name].examples or ()),
            **entry.metadata,
        )
        for entry in fields(Settings)
    )


def affects_result() -> set[str]:
    """Return the fields of `Settings` that change the numbers of every run."""
    return {knob.key.replace("-", "_") for knob in knobs() if knob.affects == "result"}


@cache
def _checked() -> type[BaseModel]:
    """Make the pydantic model whose fields have the types, ranges and defaults of `Settings`."""
    hints = get_type_hints(Settings, include_extras=True)
    types: dict[str, Any] = {
        entry.name: (hints[entry.name], entry.default) for entry in fields(Settings)
    }
    return create_model("CheckedSettings", __config__=ConfigDict(strict=True), **types)


def _check(values: Mapping[str, Any]) -> None:
    """Compare values with the types and ranges of their fields; the first wrong one raises."""
    try:
        _checked()(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    else:
        return
    name = str(first["loc"][0])
    knob = next(knob for knob in knobs() if knob.key == name.replace("_", "-"))
    wrong_type = first["type"] == f"{TYPES[knob.kind]}_type"
    _refuse(name, knob.kind.__name__ if wrong_type else knob.expected, first["input"])


def _refuse(name: str, expected: str, value: object) -> NoReturn:
    key = name.replace("_", "-")
    raise ValueError(f"run-config {key}: expected {expected}, got {value!r}")
