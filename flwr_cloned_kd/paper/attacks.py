"""The rows of the study of bad edges: attacks, defences, and honest edges without an attack."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import NamedTuple

from ..apps.settings import Settings
from .combining import FLOWER
from .fig8 import noisy_edges
from .methods import FEDAVG_2, METHODS, OURS, UNSELECTIVE, Changes, Plan, over_seeds
from .skew import SPLITS

STRENGTHS: dict[str, tuple[float, ...]] = {
    "labels shuffled": (1.0, 0.5),
    "labels y + 1": (1.0, 0.5),
    "labels all 0": (1.0, 0.5),
    "backdoor": (1.0, 0.2),
    "movement reversed": (1.0, 3.0),
    "movement scaled": (10.0, 3.0),
    "noise": (10.0, 3.0),
    "random weights": (0.0,),
    "free rider": (0.0, 0.1),
    "two collude": (10.0, 4.0),
    "adaptive": (0.1, 0.05),
}
"""Attack -> its strengths; the first one has all seeds, the others the lesser number of seeds."""

REVISITS: dict[str, tuple[float, ...]] = {
    "first answer again": (0.0,),
    "first model again": (0.0,),
    "slow poison": (0.3,),
}
"""Attacks that need a second visit -> their strengths."""

UNGUARDED = "none"
DEFAULT_GUARD = "validation"
"""The guard that a core has by default; it is compared with the row `omitted`."""

GUARDS: dict[str, Changes] = {
    UNGUARDED: {},
    "jump": {"guard": "jump"},
    "drop": {"guard": "drop"},
    "validation": {"guard": "validation", "guard_threshold": 0.01},
    "held back": {"guard": "validation", "guard_threshold": 0.01, "validation_share": 0.2},
    "gap": {"guard": "gap", "guard_threshold": 0.01},
    "trust": {"trust": "relative-accuracy"},
}
"""Name of a guard -> what differs from the base settings. "held back" is the guard "validation"
with a fifth of the core's data held back for it; "trust" weighs edges instead of refusing them."""

OTHER_DEFENCES: dict[str, Changes] = {
    "clipping": {"clip": True},
    "FLTrust": {"variant": "CPP", "combine": "FLTrust"},
    "FedAvg": FEDAVG_2,
    **{rule: FEDAVG_2 | {"combine": rule} for rule in FLOWER},
}
"""Name of another defence -> what differs from the base settings.

Two rounds of FedAvg with nine edges send as many models as nine rounds of our method with one edge
and three clones: 36. FLTrust sends 18, because it asks each edge once and for one model.
"""

DEFENCES = GUARDS | OTHER_DEFENCES
"""Name of a defence -> what differs from the base settings. A defence is a column of the tables."""

HONEST = "clean"
OMITTED = "omitted"
"""The rows without a bad edge, and the rows in which an oracle refuses every bad edge."""

PRESETS: dict[str, Changes] = {OURS: METHODS[OURS], "unselective": UNSELECTIVE}
"""Name of a preset -> what differs from the base settings. `unselective` shows what an attack does
to a core that learns from every teacher."""

HONEST_SPLITS = {split: SPLITS[split] for split in ("IID", "Dirichlet 0.3", "Dirichlet 0.1")}


class Row(NamedTuple):
    """One row.

    Args:
        attack: one of `attacks.ATTACKS`, `HONEST` or `OMITTED`.
        defence: one of `DEFENCES`.
        strength: of the attack; None for an attack without one.
        split: one of `HONEST_SPLITS`.
        num_visits: number of visits of every edge.
        preset: one of `PRESETS`.
        main: True gives the row all seeds, False the lesser number of seeds.
    """

    attack: str
    defence: str = UNGUARDED
    strength: float | None = None
    split: str = "IID"
    num_visits: int = 1
    preset: str = OURS
    main: bool = True

    @property
    def edges(self) -> str:
        """What the bad edges do, with what differs from one visit and the preset `practical`."""
        parts = [self.attack]
        if self.strength is not None:
            parts.append(f"{self.strength:g}")
        if self.num_visits > 1:
            parts.append(f"{self.num_visits} visits")
        if self.preset != OURS:
            parts.append(self.preset)
        return ", ".join(parts)

    @property
    def name(self) -> str:
        """The name of the row in the JSON file."""
        split = "" if self.split == "IID" else f"/{self.split}"
        return f"{self.edges}/{self.defence}{split}"

    @property
    def reference(self) -> str:
        """The name of the row in which the bad edges are omitted."""
        return Row(OMITTED, num_visits=self.num_visits, preset=self.preset).name

    @property
    def usual(self) -> bool:
        """Whether the command plays the row unless its user names rows.

        These rows answer whether the default guard is as good as omitting the bad edges, and how
        often it refuses honest ones.
        """
        return self.preset == OURS and self.defence in (UNGUARDED, DEFAULT_GUARD)

    @property
    def one_edge_a_round(self) -> bool:
        """Whether a round has one edge, which can be refused."""
        return "edges_per_round" not in DEFENCES[self.defence]


def _rows(
    strengths: dict[str, tuple[float, ...]], *, num_visits: int = 1, preset: str = OURS
) -> list[Row]:
    """Return the rows of some attacks, and before them their references on even data.

    The guards have rows of every strength, the other defences have rows of the first one.
    """
    others = OTHER_DEFENCES if preset == OURS else {}
    return [
        *_each_defence(Row(HONEST, num_visits=num_visits, preset=preset), [*GUARDS, *others]),
        Row(OMITTED, num_visits=num_visits, preset=preset),
        *(
            row
            for attack in strengths
            for strength in strengths[attack]
            for row in _each_defence(
                Row(
                    attack,
                    strength=strength or None,
                    num_visits=num_visits,
                    preset=preset,
                    main=strength == strengths[attack][0],
                ),
                [*GUARDS, *(others if strength == strengths[attack][0] else ())],
            )
        ),
    ]


def _each_defence(row: Row, defences: Iterable[str]) -> list[Row]:
    return [row._replace(defence=defence) for defence in defences]


ROWS = {
    row.name: row
    for row in (
        *(
            Row(HONEST, defence, split=split)
            for split, defence in product(HONEST_SPLITS, (*GUARDS, "clipping", "FLTrust"))
        ),
        *_rows(STRENGTHS),
        *_rows(REVISITS, num_visits=2),
        *_rows(
            {attack: strengths[:1] for attack, strengths in STRENGTHS.items()},
            preset="unselective",
        ),
    )
}


def is_usual(name: str) -> bool:
    """Return whether the row of this name is played unless rows are named."""
    return ROWS[name].usual


def plan(base: Settings, seeds: int, lesser: int) -> Plan:
    """Plan bad edges in rounds 4 and 7.

    Raises:
        ValueError: if there is only one edge.
    """
    if base.num_edges < 2:
        raise ValueError("--num-edges: expected at least 2, an honest and a bad one, got 1")
    return {
        name: over_seeds(base, seeds if row.main else lesser, _changes(row, base))
        for name, row in ROWS.items()
    }


def _changes(row: Row, base: Settings) -> Changes:
    changes = {**PRESETS[row.preset], **DEFENCES[row.defence], **HONEST_SPLITS[row.split]}
    if row.num_visits > 1:
        changes["num_rounds"] = row.num_visits * changes.get("num_rounds", base.num_edges)
    if row.attack == HONEST:
        return changes
    changes["bad_edges"] = tuple(noisy_edges(base))
    if row.attack == OMITTED:  # A free rider costs the least time.
        return changes | {"attack": "free rider", "oracle": True}
    return changes | {"attack": row.attack, "strength": row.strength or 0.0}
