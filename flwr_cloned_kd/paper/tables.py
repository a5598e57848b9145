"""The numbers of every figure as a Markdown table, a JSON-like dict to text."""

from collections.abc import Callable, Iterable
from typing import Any

from .experiments import LAG
from .noise import GUARD_SCORES
from .skew import BETWEEN

Data = dict[str, Any]
Rows = Iterable[list[str]]

NONE = "-"


def table(data: Data) -> str:
    """Return one figure's result, as its JSON file holds it, as Markdown."""
    settings, counts = data["settings"], sorted(set(data["seeds"].values()))
    head, rows = TABLES[data["figure"]](data["result"])
    lines = [head, ["---"] * len(head), *rows]
    return (
        f"{data['title']}: {data['dataset']}, {settings['model']}, mean ± sample standard "
        f"deviation of {' or '.join(map(str, counts))} seeds\n\n"
        + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    )


def _spread(found: Data, sign: str = "") -> str:
    return f"{found['mean']:{sign}.3f} ± {found['sd']:.3f}"


def _differ(one: Data, other: Data) -> bool:
    return bool(abs(one["mean"] - other["mean"]) > 1e-6)  # an ensemble of one clone is that clone


def _last(curve: Data) -> str:
    return f"{curve['mean'][-1]:.3f} ± {curve['sd'][-1]:.3f}"


def _cost(found: Data) -> list[str]:
    return [f"{found['bytes'] / 1e6:.2f}", f"{found['images'] / 1e3:.0f}"]


def _venn(result: Data) -> tuple[list[str], Rows]:
    head = ["", "consensus before Phase 2", "after", "mutual area", "exclusive area"]
    return head, (
        [name, *(_spread(found["consensus"][when]) for when in ("before", "after")),
         f"{found['mutual']:+.3f}", f"{found['exclusive']:+.3f}"]
        for name, found in result.items()
    )  # fmt: skip


def _variants(result: Data) -> tuple[list[str], Rows]:
    head = ["", "core after the last edge", "each seed", "first edge: one clone", "its ensemble",
            "MB", "thousands of images"]  # fmt: skip
    return head, (
        [name, _spread(found["final"]), ", ".join(f"{v:.3f}" for v in found["final"]["values"]),
         _spread(found["single clone"]),
         _spread(found["ensemble"]) if _differ(found["ensemble"], found["single clone"]) else NONE,
         *_cost(found)]
        for name, found in result.items()
    )  # fmt: skip


def _consensus(result: Data) -> tuple[list[str], Rows]:
    scores = ["consensus", "intersection", "edge-1 consensus", "edge-1 intersection"]
    head = [
        "after the last edge",
        *(score.replace("intersection", "both right") for score in scores),
    ]
    return head, ([name, *(_last(found[score]) for score in scores)]
                  for name, found in result.items())  # fmt: skip


def _lag(result: Data) -> tuple[list[str], Rows]:
    methods = dict.fromkeys(name.split()[0] for name in result)
    return ["", *LAG, "late over omitted", "each seed"], (
        [method, *(_spread(result[f"{method} {case}"]["final"]) for case in LAG),
         _spread(result[f"{method} late"]["gain"], "+"),
         ", ".join(f"{v:+.3f}" for v in result[f"{method} late"]["gain"]["values"])]
        for method in methods
    )  # fmt: skip


def _noise(result: Data) -> tuple[list[str], Rows]:
    head = ["", "noisy edges", "p", "last core", "noisy refused", "honest refused",
            *(f"area under the ROC, {guard}" for guard in GUARD_SCORES)]  # fmt: skip
    return head, (_noise_row(result, name) for name in result if "/roc/" not in name)


def _noise_row(result: Data, name: str) -> list[str]:
    (method, case, *p), found = name.split("/"), result[name]
    refused = found.get("refused")
    shares = [f"{refused[who]:.2f}" for who in ("noisy", "honest")] if refused else [NONE] * 2
    areas = [NONE] * 2
    if case == "omitted":
        areas = [f"{result[f'{method}/roc/{g}'][p[0]]['area']:.2f}" for g in GUARD_SCORES]
    what = {"clean": "none"} | {g: f"guard: {g}" for g in GUARD_SCORES}
    return [method, what.get(case, case), *(p or [NONE]), _spread(found["final"]), *shares, *areas]


def _own(result: Data) -> tuple[list[str], Rows]:
    return ["", "gain in its round"], (
        [name, _spread(found["gain"], "+")] for name, found in result.items()
    )


def _controls(result: Data) -> tuple[list[str], Rows]:
    head = ["", "", "last core", "seeds", "MB", "thousands of images"]
    return head, (
        [found["group"], name, _spread(found["core"]), str(found["core"]["n"]), *_cost(found)]
        for name, found in result.items()
    )


def _skew(result: Data) -> tuple[list[str], Rows]:
    splits = list(dict.fromkeys(found["split"] for found in result.values()))
    methods = dict.fromkeys(found["method"] for found in result.values())
    head = ["last core (mean of the rounds; largest fall in a round)", *splits, "MB", "images, k"]

    def cell(method: str, split: str) -> str:
        found = result.get(f"{method}{BETWEEN}{split}")
        if found is None:
            return NONE
        rounds = f"({found['mean of rounds']['mean']:.3f}; {found['worst drop']:.3f})"
        return f"{_spread(found['final'])} {rounds}"

    def one(method: str) -> Data:
        return next(found for found in result.values() if found["method"] == method)

    return head, (
        [method, *(cell(method, split) for split in splits), *_cost(one(method))]
        for method in methods
    )


TABLES: dict[str, Callable[[Data], tuple[list[str], Rows]]] = {
    "fig4": _venn,
    "fig5": _variants,
    "fig6": _consensus,
    "fig7": _lag,
    "fig8": _noise,
    "fig9": _own,
    "controls": _controls,
    "skew": _skew,
}
