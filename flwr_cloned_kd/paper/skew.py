"""Even and skewed edges: every method on the same splits, at equal bytes."""

from itertools import pairwise
from statistics import fmean
from typing import Any

from ..apps.settings import Settings
from .controls import (
    AVERAGE,
    CEM,
    CPP,
    FEDAVG,
    FEDAVG_2,
    FEDDF,
    FEDPROX,
    PRACTICAL,
    UNSELECTIVE,
)
from .seeds import (
    Plan,
    Results,
    Summary,
    core_accuracy,
    cost,
    curve,
    over_seeds,
    spread,
)

SPLITS: dict[str, dict[str, Any]] = {
    "IID": {"split": "random"},
    "Dirichlet 0.3": {"split": "dirichlet", "dirichlet_alpha": 0.3},
    "Dirichlet 0.1": {"split": "dirichlet", "dirichlet_alpha": 0.1},
    "one class": {"split": "one-class"},
}
"""How labels are spread over the edges, the most even first. The core's part is always even."""

ONE_CLONE: dict[str, Any] = {"variant": "CPM"}
SHIFTED: dict[str, Any] = {"distill_augment": "shift"}
"""Phase 2 sees the core's images moved by at most a pixel, the other phases see them unmoved."""
FINE_TUNED: dict[str, Any] = {
    **UNSELECTIVE,
    "distillation": {"student_start": 0.6},
    "kd_weight": 0.0,
}
"""FedAsync with alpha 0.6, then Phase 2 on the core data without any teacher."""

METHODS: dict[str, tuple[dict[str, Any], int | None]] = {
    "first core": (CPP, 0),
    "ours": (PRACTICAL, None),
    "ours, 1 clone": ({**PRACTICAL, **ONE_CLONE}, None),
    "ours without teachers": ({**PRACTICAL, "kd_weight": 0.0}, None),
    "ours without teachers, 1 clone": ({**PRACTICAL, **ONE_CLONE, "kd_weight": 0.0}, None),
    "ours, shifted views": ({**PRACTICAL, **SHIFTED}, None),
    "ours without teachers, shifted views": ({**PRACTICAL, **SHIFTED, "kd_weight": 0.0}, None),
    "unselective": (UNSELECTIVE, None),
    "unselective, 1 clone": ({**UNSELECTIVE, **ONE_CLONE}, None),
    "CEM, paper": (CEM, None),
    "CPP, paper": (CPP, None),
    "keep the clone": (AVERAGE, None),
    "keep the mean of 3 clones": ({**AVERAGE, "variant": "CEM"}, None),
    "FedAsync": ({**AVERAGE, "mix": 0.6}, None),
    "FedAsync, fine-tuned": ({**FINE_TUNED, **ONE_CLONE}, None),
    "FedAsync, fine-tuned, 3 clones": (FINE_TUNED, None),
    "FedAvg, 1 round": (FEDAVG_2, 1),
    "FedAvg, 2 rounds": (FEDAVG_2, None),
    "FedAvg, R rounds": (FEDAVG, None),
    "FedProx, 1 round": (FEDAVG_2 | FEDPROX, 1),
    "FedProx, 2 rounds": (FEDAVG_2 | FEDPROX, None),
    "FedProx, R rounds": (FEDAVG | FEDPROX, None),
    "FedDF, 1 round": (FEDDF, 1),
    "FedDF, 2 rounds": (FEDDF, None),
}
"""Row -> what differs from the base settings, and after how many rounds the core is read."""


def _ours_but(**fields: Any) -> tuple[dict[str, Any], int | None]:
    return {**PRACTICAL, "distillation": fields}, None


ABLATIONS: dict[str, tuple[dict[str, Any], int | None]] = {
    "ours, every sample": _ours_but(selection="all"),
    "ours, by the label's probability": _ours_but(selection="label-probability"),
    "ours, start at the core": _ours_but(student_start=0.0),
    "ours, start at the clones' mean": _ours_but(student_start=1.0),
    "ours, start by the ensemble's share": _ours_but(student_start="ensemble-share"),
    "ours, the core does not teach": _ours_but(core_as_teacher=False),
    "ours, temperature 4": _ours_but(temperature=4.0),
}
"""Our preset with one thing changed; played with the lesser number of seeds."""

BETWEEN = " | "


def plan_skew(base: Settings, seeds: int, lesser: int) -> Plan:
    """Every method on every split, on the same seeds; what our preset is made of on fewer."""
    return {
        f"{method}{BETWEEN}{split}": over_seeds(
            base,
            lesser if method in ABLATIONS else seeds,
            **{
                name: value(base) if callable(value) else value
                for name, value in (changes | skew).items()
            },
        )
        for split, skew in SPLITS.items()
        for method, (changes, _) in (METHODS | ABLATIONS).items()
    }


def reduce_skew(results: Results) -> Summary:
    """One entry a method and split: the last core, the mean over rounds, and the worst round."""
    found: Summary = {}
    for name, runs in results.items():
        method, split = name.split(BETWEEN)
        after = (METHODS | ABLATIONS)[method][1]
        stop = len(runs[0]) if after is None else 1 + after
        cores = [[core_accuracy(record) for record in records[:stop]] for records in runs]
        found[name] = {
            "method": method,
            "split": split,
            "final": spread([core[-1] for core in cores]),
            "mean of rounds": spread([fmean(core[1:] or core) for core in cores]),
            "worst drop": max(
                (before - later for core in cores for before, later in pairwise(core)),
                default=0.0,
            ),
            "core": curve([records[:stop] for records in runs], core_accuracy),
            **cost(runs[0][:stop]),
        }
    return found
