"""One run, described by a value."""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ..apps.build import num_clones, phase_2
from ..apps.settings import Settings, affects_result
from ..attacks.suite import ATTACKS
from ..io.wire import check_wire_dtype
from ..method.knowledge import rule_name
from ..method.presets import SELECTIONS, START_RULES
from .combining import COMBINE

NEWER = ("wire_dtype", "attack", "strength", "bad_edges", "clip")
NEWER_SETTINGS = ("trust", "validation_share")
"""Options of `Run` and of `Settings` that records from before do not have. Their defaults are left
out of the key of a run, so that these records keep their keys."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that determines one run: the apps' settings, and options of experiments only.

    Args:
        settings: data, model, variant, preset, recipes, noise, guard and seed.
        distillation: fields of `Distillation` that differ from the preset's; functions by their
            names in `SELECTIONS` and `START_RULES`.
        combine: "distill" (Phase 2), "average" (the clones' mean, weighted by their images; with
            one edge a round this keeps the clone, with all edges it is FedAvg), or another rule of
            `combining.COMBINE`.
        mix: the share of an average in the new core, above 0 to 1: FedAsync's alpha with one edge a
            round, FedBuff's server learning rate with K edges side by side.
        edges_per_round: number of edges side by side; their clones make one ensemble.
        order: (edge, rounds late) for each round: a late edge was sent the core of that many
            rounds before. An empty order is every edge in turn, none of them late.
        edge_data: "private", "core" (self-distillation) or "none" (edges do not train at all).
        kd_weight: weight of the present edge's KD term; 0 leaves cross entropy.
        proximal_mu: FedProx's mu in Phase 1 (Li et al. 2020); 0 is no proximal term.
        core_share: the share of its part of the data that the core has, in (0, 1].
        central: the core has all the training data.
        oracle: refuse every round of a noisy or bad edge; the round is played and recorded all the
            same.
        wire_dtype: the form in which the core and the clones of private data travel, see `io.wire`.
        attack: what bad edges do, one of `attacks.ATTACKS`; "" is no attack.
        strength: of the attack.
        bad_edges: the edges, from 0, that attack at every visit.
        clip: clip the movement of each clone before Phase 2, see `combining.clip_to_median`.
    """

    settings: Settings
    distillation: dict[str, Any] = field(default_factory=dict)
    combine: str = "distill"
    mix: float = 1.0
    edges_per_round: int = 1
    order: tuple[tuple[int, int], ...] = ()
    edge_data: str = "private"
    kd_weight: float = 1.0
    proximal_mu: float = 0.0
    core_share: float = 1.0
    central: bool = False
    oracle: bool = False
    wire_dtype: str = "float32"
    attack: str = ""
    strength: float = 0.0
    bad_edges: tuple[int, ...] = ()
    clip: bool = False

    def __post_init__(self) -> None:
        if self.combine not in COMBINE:
            raise ValueError(f"combine: expected one of {', '.join(COMBINE)}, got {self.combine!r}")
        check_wire_dtype(self.wire_dtype)
        if self.attack not in ("", *ATTACKS):
            raise ValueError(f"attack: expected one of {', '.join(ATTACKS)}, got {self.attack!r}")
        if bool(self.attack) != bool(self.bad_edges):
            raise ValueError(
                f"bad_edges: expected at least one with an attack and none without, "
                f"got {self.bad_edges} with attack {self.attack!r}"
            )

    @property
    def num_rounds(self) -> int:
        """The number of rounds after Phase 0."""
        if self.central:
            return 0
        every_edge_once = -(-self.settings.num_edges // self.edges_per_round)
        return len(self.order) or self.settings.num_rounds or every_edge_once

    @property
    def num_clones(self) -> int:
        """The number of clones that an edge trains."""
        return num_clones(self.settings)

    def visits(self, server_round: int) -> tuple[list[int], int]:
        """Return the edges, from 0, of a round, from 1, and the rounds that they are late."""
        if self.order:
            edge, late = self.order[server_round - 1]
            return [edge], late
        first = (server_round - 1) * self.edges_per_round
        return [(first + i) % self.settings.num_edges for i in range(self.edges_per_round)], 0


def describe(run: Run) -> dict[str, Any]:
    """Return what determines the records of a run, ready for JSON."""
    read = affects_result()
    settings = {name: value for name, value in asdict(run.settings).items() if name in read}
    for option in fields(run.settings):
        if option.name in NEWER_SETTINGS and settings[option.name] == option.default:
            del settings[option.name]
    # The effect of Phase 2 counts. The name of its preset does not: it may get another meaning.
    for name in ("preset", "distill_augment"):
        del settings[name]
    description = {option.name: getattr(run, option.name) for option in fields(run)}
    for option in fields(run):
        if option.name in NEWER and description[option.name] == option.default:
            del description[option.name]
    return description | {
        "settings": settings,
        "order": [list(visit) for visit in run.order],
        "distillation": _describe_phase_2(run),
    }


def _describe_phase_2(run: Run) -> dict[str, Any]:
    chosen = replace(phase_2(run.settings), **with_functions(run.distillation))
    options = {name: value for name, value in vars(chosen).items() if name != "recipe"}
    description: dict[str, Any] = {"lr": chosen.recipe.lr}
    augment = run.settings.distill_augment
    if augment not in ("", run.settings.augment):
        description["augment"] = augment
    return description | {
        name: rule_name(value) if callable(value) else value for name, value in options.items()
    }


def with_functions(options: dict[str, Any]) -> dict[str, Any]:
    """Replace the names of functions, which JSON can hold, by the functions."""
    replaced = dict(options)
    if "selection" in replaced:
        replaced["selection"] = SELECTIONS[replaced["selection"]]
    if isinstance(replaced.get("student_start"), str):
        replaced["student_start"] = START_RULES[replaced["student_start"]]
    return replaced
