"""The rows of `controls`: baselines, and every knob turned, on the same splits and seeds.

R is the number of edges: so many rounds the paper's method has.
"""

from typing import Any, NamedTuple

from ..apps.settings import Settings


class Control(NamedTuple):
    """One row.

    Args:
        group: rows that are read together.
        name: says what differs.
        changes: of `Run` or `Settings`; values may be functions of the base settings.
        main: gets all seeds; others get the lesser number.
        after: read the core after so many rounds; None is after the last.
    """

    group: str
    name: str
    changes: dict[str, Any]
    main: bool = True
    after: int | None = None


PAPER: dict[str, Any] = {"preset": "paper"}
CEM: dict[str, Any] = {"variant": "CEM", **PAPER}
CEP: dict[str, Any] = {"variant": "CEP", **PAPER}
CPP: dict[str, Any] = {"variant": "CPP", **PAPER}
PRACTICAL: dict[str, Any] = {"variant": "CEM", "preset": "practical"}
UNSELECTIVE: dict[str, Any] = {"variant": "CEM", "preset": "unselective"}


def _all(base: Settings) -> int:
    return base.num_edges


def _three_in_flight(base: Settings) -> tuple[tuple[int, int], ...]:
    """Every edge once, sent the core as it was when two others were under way."""
    return tuple((edge, min(edge, 2)) for edge in range(base.num_edges))


def _epochs(times: int) -> Any:
    return lambda base: times * max(base.core_epochs, base.edge_epochs)


AVERAGE: dict[str, Any] = {**CPP, "combine": "average"}
FEDAVG: dict[str, Any] = {**AVERAGE, "edges_per_round": _all, "num_rounds": _all}
FEDAVG_2: dict[str, Any] = {**FEDAVG, "num_rounds": 2}
FEDPROX: dict[str, Any] = {"proximal_mu": 0.01}
THREE: dict[str, Any] = {"edges_per_round": lambda base: min(3, base.num_edges)}
FEDDF: dict[str, Any] = {"variant": "CPP", "preset": "unselective", "edges_per_round": _all,
                         "num_rounds": 2}  # fmt: skip
NO_EDGES: dict[str, Any] = {"variant": "CPP", "edge_data": "none", "kd_weight": 0.0}


def _skewed(alpha: float) -> dict[str, Any]:
    return {"split": "dirichlet", "dirichlet_alpha": alpha}


CONTROLS = [
    Control("methods", "CEM, practical (ours)", PRACTICAL),
    Control("methods", "CPM, practical: 1 clone", {**PRACTICAL, "variant": "CPM"}),
    Control("methods", "CEM, unselective", UNSELECTIVE),
    Control("methods", "CEM, paper", CEM),
    Control("methods", "CPP, paper", CPP),
    Control("baselines", "keep the clone", AVERAGE),
    Control("baselines", "FedAvg, 1 round", FEDAVG_2, after=1),
    Control("baselines", "FedAvg, 2 rounds", FEDAVG_2),
    Control("baselines", "FedAvg, R rounds", FEDAVG),
    Control("baselines", "FedProx, 1 round", FEDAVG_2 | FEDPROX, after=1),
    Control("baselines", "FedProx, 2 rounds", FEDAVG_2 | FEDPROX),
    Control("baselines", "FedProx, R rounds", FEDAVG | FEDPROX),
    *(
        Control("baselines", f"FedAsync, alpha {alpha}", {**AVERAGE, "mix": alpha})
        for alpha in (0.3, 0.6, 0.9)
    ),
    Control("baselines", "FedAsync, alpha 0.6, 3 in flight",
            {**AVERAGE, "mix": 0.6, "order": _three_in_flight}),
    *(
        Control("baselines", f"FedBuff, K 3, lr {lr}", {**AVERAGE, **THREE, "mix": lr})
        for lr in (0.5, 1.0)
    ),
    Control("baselines", "average, then distil (FedDF), 1 round", FEDDF, after=1),
    Control("baselines", "average, then distil (FedDF), 2 rounds", FEDDF),
    Control("without edges", "core only", CPP, after=0),
    Control("without edges", "core only, R restarts", {**NO_EDGES, **PAPER}),
    Control("without edges", "core only, R restarts, lr / 5",
            {**NO_EDGES, "preset": "unselective"}),
    Control("without edges", "self-distillation (edge data = core data)",
            {**CEM, "edge_data": "core"}),
    Control("without edges", "all data central", {"central": True, "core_epochs": _epochs(1)}),
    Control("without edges", "all data central, 3 x epochs",
            {"central": True, "core_epochs": _epochs(3)}),
    Control("equal bytes", "3 clones of 3 edges, in turn", CEP, after=3),
    Control("equal bytes", "1 clone of 6 edges, in turn", CPP, after=6),
    Control("equal bytes", "1 clone of 6 edges, 3 side by side", {**CPP, **THREE},
            after=2),
    Control("memory", "memory 1 (CEP)", CEP),
    Control("memory", "memory 2", {**CEM, "memory_size": 2}, False),
    Control("memory", "memory 3 (CEM)", CEM),
    Control("memory", "memory 5", {**CEM, "memory_size": 5}, False),
    Control("memory", "memory 1, KD weight x 3", {**CEP, "kd_weight": 3.0}),
    Control("memory", "memory 3, mean instead of sum",
            {**CEM, "distillation": {"mean_over_memory": True}}),
    Control("memory", "practical, memory 1", {**PRACTICAL, "memory_size": 1}),
    Control("clones", "1 clone (CPM)", {"variant": "CPM", **PAPER}),
    Control("clones", "2 clones", {**CEM, "num_clones": 2}, False),
    Control("clones", "3 clones (CEM)", CEM),
    Control("clones", "5 clones", {**CEM, "num_clones": 5}, False),
    Control("temperature", "temperature 1", {**CEM, "temperature": 1.0}, False),
    Control("temperature", "temperature 2", {**CEM, "temperature": 2.0}, False),
    Control("temperature", "temperature 4 (CEM)", CEM),
    Control("start", "student starts at the core (CEM)", CEM),
    Control("start", "student starts half way", {**CEM, "distillation": {"student_start": 0.5}},
            False),
    Control("start", "student starts at the clones' mean",
            {**CEM, "distillation": {"student_start": 1.0}}, False),
    *(
        Control("core size", f"{name}, core with {share:.0%} of its images",
                {**method, "core_share": share}, False)
        for name, method in (("CEM paper", CEM), ("practical", PRACTICAL))
        for share in (0.25, 0.5)
    ),
    *(
        Control("Dirichlet", f"{name}, alpha {alpha}", {**method, **_skewed(alpha)}, False, after)
        for alpha in (1.0, 0.3, 0.1)
        for name, method, after in (("CEM practical", PRACTICAL, None), ("CPP paper", CPP, None),
                                    ("keep the clone", AVERAGE, None),
                                    ("FedAvg 2 rounds", FEDAVG_2, None))
    ),
]  # fmt: skip


def control_runs(base: Settings) -> list[tuple[Control, dict[str, Any]]]:
    """Return every row with its changes worked out for these settings."""
    return [
        (control, {k: v(base) if callable(v) else v for k, v in control.changes.items()})
        for control in CONTROLS
    ]
