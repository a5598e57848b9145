"""Every knob of the example apps, as a run-config key."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from ..data.datasets import moments
from ..data.models import resnet
from ..engine.inputs import CropAndFlip
from ..engine.recipe import fold_in
from ..engine.runtime import Runtime
from ..method.guards import TrainAccuracyDrop, TrainAccuracyJump
from ..method.variants import PRESETS, VARIANTS

DATASETS = ("digits", "cifar100", "npz", "huggingface")
STRATEGIES = ("cloned-kd", "fedavg", "fedprox", "fedasync", "fedbuff")
STALENESS = ("", "constant", "polynomial", "hinge")
GUARDS = {"none": None, "jump": TrainAccuracyJump, "drop": TrainAccuracyDrop}
CHOICES = {"auto": None, "on": True, "off": False}
AUGMENTATIONS = {
    "none": None,
    "shift": CropAndFlip(pad=1, flip=False),
    "crop": CropAndFlip(flip=False),
    "crop-and-flip": CropAndFlip(),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `[tool.flwr.app.config]` of the example apps holds, with `_` for `-`.

    Args:
        dataset: digits, cifar100, npz or huggingface.
        data_path: where cifar100 is or goes to; the archive of npz; the name of huggingface's.
        image_key, label_key: columns of a huggingface dataset.
        num_edges: parts of the data besides the core's.
        split: "random" (even), "dirichlet" (labels skewed over the edges, the core even) or
            "one-class" (every edge has the images of one class, the core is even).
        dirichlet_alpha: above 0; the smaller, the more skewed.
        model: digits-cnn or resnet-DEPTH.
        variant: a row of Fig. 5: what an edge starts from, clones, memory.
        num_clones, memory_size: 0 takes the variant's.
        preset: "practical", "paper" or "unselective" (Phase 2).
        core_epochs, edge_epochs, distill_epochs: of Phases 0, 1 and 2.
        batch_size, lr, momentum, weight_decay: of all phases.
        augment: of all phases: "none", "shift" (by at most a pixel), "crop" or "crop-and-flip".
        distill_augment: of Phase 2 alone; "" takes `augment`.
        distill_lr, temperature: 0 takes the preset's.
        edge_accuracy_stop: Phase 1 ends at this training accuracy; 0 trains all epochs.
        plateau_patience: Phase 2 ends after so many epochs without progress; 0 trains all.
        noisy_edges: comma-separated partition ids whose labels are shuffled (Sec. 5.3).
        noise_probability: p, the share of their batches that are, in [0, 1].
        guard: "none", or refuse an edge after which the core's training accuracy takes a "jump"
            (Sec. 5.3) or a "drop" of more than `guard_threshold`, a fraction.
        edge_delays: comma-separated seconds that edge 0, 1, ... sleeps before it answers, for
            trying slow edges; the others do not sleep.
        strategy: one of cloned-kd, fedavg, fedprox, fedasync, fedbuff, or several, comma-separated,
            run in turn, each once.
        num_rounds: of cloned-kd; 0 visits every edge once.
        baseline_rounds: of fedavg and fedprox, each with all edges; fedasync and fedbuff take as
            many answers as that has.
        proximal_mu: of fedprox.
        max_in_flight: of cloned-kd, fedasync and fedbuff.
        max_staleness: of the same; -1 takes every answer.
        staleness_weight: of the same: "" keeps each one's own, "constant", "polynomial" (with
            exponent `staleness_a`) or "hinge" (with `staleness_a` and `staleness_b`).
        fedasync_alpha, fedbuff_size, fedbuff_lr: see `FedAsync` and `FedBuff`.
        checkpoint: absolute path of a file that cloned-kd writes after every round and goes on
            from; "" writes none.
        seed: determines every draw.
        device, client_device: "auto", "cpu", "cuda", "cuda:1", ...
        batch_clones, bf16, compile: "auto", "on" or "off"; see `Runtime`.
        cuda_graphs: see `Runtime`.
        results: absolute folder for the results; "" writes into ./results.
        timeout: seconds to wait for an edge.

    Raises:
        ValueError: naming the key, what was expected and what was found.
    """

    dataset: str = "digits"
    data_path: str = ""
    image_key: str = "img"
    label_key: str = "fine_label"
    num_edges: int = 9
    split: str = "random"
    dirichlet_alpha: float = 0.3
    model: str = "digits-cnn"
    variant: str = "CEM"
    num_clones: int = 0
    memory_size: int = 0
    preset: str = "practical"
    core_epochs: int = 12
    edge_epochs: int = 30
    distill_epochs: int = 30
    batch_size: int = 128
    lr: float = 0.1
    distill_lr: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    augment: str = "none"
    distill_augment: str = ""
    temperature: float = 0.0
    edge_accuracy_stop: float = 0.0
    plateau_patience: int = 0
    noisy_edges: str = ""
    noise_probability: float = 1.0
    guard: str = "none"
    guard_threshold: float = 0.1
    edge_delays: str = ""
    strategy: str = "cloned-kd"
    num_rounds: int = 0
    baseline_rounds: int = 9
    proximal_mu: float = 0.01
    max_in_flight: int = 1
    max_staleness: int = -1
    staleness_weight: str = ""
    staleness_a: float = 0.5
    staleness_b: float = 4.0
    fedasync_alpha: float = 0.6
    fedbuff_size: int = 3
    fedbuff_lr: float = 0.5
    checkpoint: str = ""
    seed: int = 0
    device: str = "auto"
    client_device: str = "auto"
    batch_clones: str = "auto"
    bf16: str = "auto"
    compile: str = "auto"
    cuda_graphs: bool = False
    results: str = ""
    timeout: float = 3600.0

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "Settings":
        """Check a run-config and take it over; keys are kebab-case."""
        known = {field.name.replace("_", "-"): field for field in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in config.items():
            if key not in known:
                likely = get_close_matches(key, known) or known
                raise ValueError(f"run-config {key}: expected a known key ({', '.join(likely)})")
            default = known[key].default
            kind = str if default is MISSING else type(default)
            if kind is float and type(value) is int:
                value = float(value)
            if type(value) is not kind:
                raise ValueError(f"run-config {key}: expected {kind.__name__}, got {value!r}")
            values[known[key].name] = value
        return cls(**values)

    def __post_init__(self) -> None:
        self._among("dataset", DATASETS)
        self._among("split", ("random", "dirichlet", "one-class"))
        self._among("variant", tuple(VARIANTS))
        self._among("preset", tuple(PRESETS))
        self._among("augment", tuple(AUGMENTATIONS))
        self._among("distill_augment", ("", *AUGMENTATIONS))
        self._among("guard", tuple(GUARDS))
        self._among("staleness_weight", STALENESS)
        for name in ("batch_clones", "bf16", "compile"):
            self._among(name, tuple(CHOICES))
        for name in self.strategies:
            if name not in STRATEGIES:
                self._fail("strategy", f"some of {', '.join(STRATEGIES)}")
        if len(set(self.strategies)) < len(self.strategies):
            self._fail("strategy", "each one once")
        for name in ("num_edges", "core_epochs", "edge_epochs", "distill_epochs", "batch_size",
                     "baseline_rounds", "max_in_flight", "fedbuff_size"):  # fmt: skip
            if getattr(self, name) < 1:
                self._fail(name, "at least 1")
        for name in ("num_clones", "memory_size", "num_rounds", "plateau_patience", "lr",
                     "staleness_a", "staleness_b", "distill_lr", "momentum", "weight_decay",
                     "proximal_mu", "temperature"):  # fmt: skip
            if not 0 <= getattr(self, name) < float("inf"):
                self._fail(name, "at least 0")
        for name in ("noise_probability", "edge_accuracy_stop", "guard_threshold",
                     "fedasync_alpha"):  # fmt: skip
            if not 0 <= getattr(self, name) <= 1:
                self._fail(name, "a fraction, 0 to 1")
        if self.max_staleness < -1:
            self._fail("max_staleness", "at least 0, or -1 for any")
        try:
            ready = all(0 <= delay < float("inf") for delay in self.delays)
        except ValueError:
            ready = False
        if not ready or len(self.delays) > self.num_edges:
            self._fail("edge_delays", f"at most {self.num_edges} numbers of seconds")
        for name in ("dirichlet_alpha", "timeout", "fedasync_alpha", "fedbuff_lr"):
            if not getattr(self, name) > 0:
                self._fail(name, "above 0")
        if self.dataset in ("npz", "huggingface") and not self.data_path:
            self._fail("data_path", f"where the {self.dataset} data is")
        if not all(edge.isdecimal() and int(edge) < self.num_edges for edge in self.noisy):
            self._fail("noisy_edges", f"partition ids below {self.num_edges}, comma-separated")
        build_model(self, 10)
        for name in ("device", "client_device"):
            try:
                Runtime(device=getattr(self, name))
            except ValueError:
                self._fail(name, "auto, cpu, cuda, cuda:1, ...")

    @property
    def strategies(self) -> list[str]:
        """The strategies to run, in turn."""
        return [name.strip() for name in self.strategy.split(",")]

    @property
    def noisy(self) -> list[str]:
        """The partition ids of noisy edges."""
        return [edge.strip() for edge in self.noisy_edges.split(",") if edge.strip()]

    @property
    def delays(self) -> list[float]:
        """Seconds that edge 0, 1, ... sleeps before it answers."""
        return [float(delay) for delay in self.edge_delays.split(",") if delay.strip()]

    def _among(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            self._fail(name, f"one of {', '.join(choices)}")

    def _fail(self, name: str, expected: str) -> None:
        key = name.replace("_", "-")
        raise ValueError(f"run-config {key}: expected {expected}, got {getattr(self, name)!r}")


# A client process builds its model anew for every message, from the same images.
_moments_once = lru_cache(maxsize=1)(moments)


def build_model(settings: Settings, num_classes: int, images: Tensor | None = None) -> nn.Module:
    """Build the model of a run for images like these, with weights determined by its seed."""
    channels = 3 if images is None else images.shape[1]
    raw = images is not None and not images.is_floating_point()
    pixels = _moments_once(images) if images is not None and raw else None
    seed = fold_in(settings.seed, "model")
    family, _, depth = settings.model.partition("-")
    try:
        if settings.model == "digits-cnn":
            return resnet(8, num_classes, channels=channels, width=8, seed=seed, pixels=pixels)
        if family == "resnet":
            return resnet(int(depth), num_classes, channels=channels, seed=seed, pixels=pixels)
    except ValueError:
        pass
    raise ValueError(
        f"run-config model: expected digits-cnn or resnet-DEPTH with DEPTH 8, 14, 20, 32, ..., "
        f"got {settings.model!r}"
    )
