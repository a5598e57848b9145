"""The numbers of every figure as a Markdown table, a JSON-like dict to text."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from .experiments import LAG
from .noise import GUARD_SCORES
from .skew import BETWEEN

Data = dict[str, Any]
Rows = Iterable[list[str]]
Make = Callable[[Data], tuple[list[str], Rows]]
"""A figure's result -> the headings of the columns, and the rows."""

NONE = "-"
SEEDS = "seeds"


def table(data: Data) -> str:
    """Return one figure's result, as its JSON file holds it, as Markdown with a title."""
    settings, counts = data["settings"], sorted(set(data["seeds"].values()))
    title = (
        f"{data['title']}: {data['dataset']}, {settings['model']}, mean ± sample standard "
        f"deviation of {' or '.join(map(str, counts))} seeds"
    )
    return "\n".join([f"{title}\n", *(bare(data, part) for part in TABLES[data["figure"]])])


def bare(data: Data, part: str = "", rows: Sequence[str] = (), columns: Sequence[str] = ()) -> str:
    """Return one table of a figure's result as Markdown, without a title.

    Args:
        data: what the figure's JSON file holds.
        part: one of the figure's tables in `TABLES`; "" is the first.
        rows: their names, in the wanted order; none keeps all. The first cell names a row, as does
            any other cell without a heading.
        columns: their headings; none keeps all. The first column, columns without a heading and
            the seeds always stay.

    Raises:
        ValueError: for a part, a row or a column that is not there.
    """
    parts = TABLES[data["figure"]]
    if part:
        expect("part", part, parts)
    make = parts[part or next(iter(parts))]
    head, lines = make(data["result"])
    naming = [i for i, heading in enumerate(head) if i == 0 or not heading]
    known = dict.fromkeys(line[i] for line in lines for i in naming)
    for row in rows:
        expect("row", row, known)
    for column in columns:
        expect("column", column, head[1:])
    head, lines = make(_shown(data["result"], rows, columns))
    named = [([line[i] for i in naming], line) for line in lines]
    for row in rows:
        expect(
            f"row with {'; '.join(columns)}", row, [name for names, _ in named for name in names]
        )
    wanted = [line for row in rows for names, line in named if row in names]
    every = wanted if rows else [line for _, line in named]
    kept = [
        i
        for i, name in enumerate(head)
        if not columns or i == 0 or name in ("", SEEDS) or name in columns
    ]
    cells = [[line[i] for i in kept] for line in (head, ["---"] * len(head), *every)]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def expect(what: str, name: str, known: Collection[str]) -> None:
    """Raise a ValueError that lists what is known unless it contains a name."""
    if name not in known:
        raise ValueError(f"{what}: expected one of {'; '.join(known)}; got {name!r}")


def _shown(result: Data, rows: Sequence[str], columns: Sequence[str]) -> Data:
    """Drop methods and splits that a table leaves out: the seeds are counted of what it shows."""
    splits = [found["split"] for found in result.values() if found.get("split") in columns]
    return {
        name: found
        for name, found in result.items()
        if (not rows or found.get("method", rows[0]) in rows)
        and (not splits or found["split"] in splits)
    }


def _spread(found: Data, sign: str = "") -> str:
    mean = f"{found['mean']:{sign}.3f}"
    return f"{mean} ± {found['sd']:.3f}" if found["n"] > 1 else mean


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
    head = ["", "", "last core", SEEDS, "MB", "thousands of images"]
    return head, (
        [found["group"], name, _spread(found["core"]), str(found["core"]["n"]), *_cost(found)]
        for name, found in result.items()
    )


def _by_split(what: str, cell: Callable[[Data], str], *, priced: bool = False) -> Make:
    """Make a table with a row for each method, and a column for each split of the labels."""

    def make(result: Data) -> tuple[list[str], Rows]:
        splits = list(dict.fromkeys(found["split"] for found in result.values()))
        methods = dict.fromkeys(found["method"] for found in result.values())
        counts = {found["final"]["n"] for found in result.values()}
        same = len(counts) == 1
        seeds = f", {_plural(*counts)}" if same else ""
        price = ["MB", "thousands of images"] if priced else []
        rows = []
        for method in methods:
            found = [result.get(f"{method}{BETWEEN}{split}", {}) for split in splits]
            rows.append(
                [
                    method,
                    *(cell(one) if one else NONE for one in found),
                    *([] if same else [_counts(found)]),
                    *(_cost(next(filter(None, found))) if priced else []),
                ]
            )
        return [f"{what}{seeds}", *splits, *([] if same else [SEEDS]), *price], rows

    return make


def _plural(count: int) -> str:
    return f"{count} seed{'s' * (count > 1)}"


def _counts(found: list[Data]) -> str:
    """Write one number of seeds, or one for each split where they differ."""
    counts = [str(one["final"]["n"]) if one else NONE for one in found]
    return ", ".join(counts) if len({*counts} - {NONE}) > 1 else max(counts)


def _fall(found: Data) -> str:
    return f"{found['worst drop']:.3f}" if found["worst drop"] > 0 else "none"


TABLES: dict[str, dict[str, Make]] = {
    "fig4": {"all": _venn},
    "fig5": {"all": _variants},
    "fig6": {"all": _consensus},
    "fig7": {"all": _lag},
    "fig8": {"all": _noise},
    "fig9": {"all": _own},
    "controls": {"all": _controls},
    "skew": {
        "final": _by_split("last core", lambda found: _spread(found["final"]), priced=True),
        "rounds": _by_split("mean over rounds", lambda found: _spread(found["mean of rounds"])),
        "falls": _by_split("largest fall in a round", _fall),
    },
}
"""Figure -> its tables by their names, the first one first."""
