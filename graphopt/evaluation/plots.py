"""The plots of an ablation, from its JSON data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.evaluation.extra import optional
from graphopt.evaluation.table import printable
from graphopt.onnxfile.write import replacing

Data = Mapping[str, Any]
# Okabe & Ito's colours, which colour-blind readers tell apart; the line says whether a row was trained.
_BLACK, _BLUE, _ORANGE, _GREEN, _SKY, _PURPLE = "#000000", "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#CC79A7"
_SOLID, _DASHED, _DOTTED = "-", "--", ":"
_STYLE = {
    "svg.fonttype": "none",
    # Labels are text, whatever dollars stand in them.
    "text.parse_math": False,
    "svg.hashsalt": "graphopt",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_DPI = 150
_LONGEST = 30
_WIDE = 20.0


@dataclass(frozen=True)
class _Look:
    color: str
    line: str
    marker: str


_LOOKS = {
    "original": _Look(_BLACK, _SOLID, "o"),
    "swap": _Look(_SKY, _DASHED, "s"),
    "transfer": _Look(_PURPLE, _SOLID, "s"),
    "full": _Look(_BLUE, _SOLID, "s"),
    "window": _Look(_ORANGE, _DASHED, "^"),
    "window_sinks": _Look(_ORANGE, _DOTTED, "v"),
    "window_trained": _Look(_ORANGE, _SOLID, "^"),
    "linear": _Look(_GREEN, _DASHED, "D"),
    "linear_trained": _Look(_GREEN, _SOLID, "D"),
}


def look(key: str) -> tuple[str, str]:
    """Colour and line of a row."""
    found = _LOOKS.get(key, _LOOKS["original"])
    return found.color, found.line


def draw(data: Data, folder: Path) -> dict[str, Path]:
    """Write each plot as SVG and PNG into a folder.

    Args:
        data: `Ablation.to_dict()`.
        folder: where to.

    Returns:
        The SVG files by name.

    Raises:
        GraphOptError: matplotlib is missing, or a file cannot be written.
    """
    pyplot = optional("matplotlib.pyplot")
    optional("matplotlib").use("Agg")
    made = {}
    with optional("matplotlib").rc_context(_STYLE):
        for name, plot in _PLOTS.items():
            figure = plot(data, pyplot)
            if figure is None:
                continue
            for suffix in ("svg", "png"):
                # A date would make the file another one each time.
                metadata = {"Date": None} if suffix == "svg" else None
                with replacing(folder / f"{name}.{suffix}") as temporary:
                    figure.savefig(temporary, format=suffix, dpi=_DPI, metadata=metadata, bbox_inches="tight")
            pyplot.close(figure)
            made[name] = folder / f"{name}.svg"
    return made


def _cross_entropy(data: Data, pyplot: Any) -> Any:
    figure, axes = pyplot.subplots(figsize=(7.2, 4.4))
    ends = []
    for row in data["rows"]:
        # A range of positions is drawn at its geometric middle, as the axis is logarithmic.
        x = [(b["first"] * b["last"]) ** 0.5 for b in row["buckets"]]
        y = [b["nats"] for b in row["buckets"]]
        _line(axes, row["key"], x, y)
        ends.append((row, y[-1]))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(
        title="Cross-entropy on held-out text over the position",
        xlabel="position in the text (tokens before it)",
        ylabel="cross-entropy (nats/token)",
    )
    _label_ends(axes, ends)
    return figure


def _recall(data: Data, pyplot: Any) -> Any:
    rows = [row for row in data["rows"] if row["recall"]]
    if not rows:
        return None
    figure, axes = pyplot.subplots(figsize=(7.2, 4.4))
    places = {d: i for i, d in enumerate(sorted({item["distance"] for row in rows for item in row["recall"]}))}
    ends = []
    for number, row in enumerate(rows):
        # Side by side, so that the error bars do not hide each other.
        shift = 0.3 * (number / max(1, len(rows) - 1) - 0.5)
        x = [places[item["distance"]] + shift for item in row["recall"]]
        y = [item["gain"] for item in row["recall"]]
        _line(axes, row["key"], x, y)
        axes.errorbar(x, y, [item["error"] for item in row["recall"]], fmt="none", ecolor=look(row["key"])[0], lw=0.8)
        ends.append((row, y[-1]))
    axes.axhline(0, color="0.6", lw=0.8, zorder=0)
    axes.set_xticks(list(places.values()), [str(d) for d in places])
    axes.set(
        title="Recall: what a repeated segment gains from its first copy (bars: standard error)",
        xlabel="distance between the copies (tokens)",
        ylabel="gain (nats/token)",
    )
    _label_ends(axes, ends)
    return figure


def _ratios(data: Data, pyplot: Any) -> Any:
    rows = [row for row in data["rows"] if row["ratio"] is not None]
    figure, axes = pyplot.subplots(figsize=(7.2, 0.6 + 0.36 * len(rows)))
    for place, row in enumerate(reversed(rows)):
        color, line = look(row["key"])
        trained = line == _SOLID
        axes.barh(
            place, row["ratio"], color=color if trained else "white", edgecolor=color, hatch="" if trained else "///"
        )
        axes.annotate(f"{row['ratio']:.3g}", (row["ratio"], place), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [_label(row) for row in reversed(rows)])
    if max(row["ratio"] for row in rows) > _WIDE:
        axes.set_xscale("log")
    axes.axvline(1, color="0.6", lw=0.8)
    axes.set(
        title="Perplexity relative to the original (hatched: without training)",
        xlabel="perplexity / original's (1 = same)",
    )
    return figure


_PLOTS: dict[str, Callable[[Data, Any], Any]] = {
    "cross_entropy": _cross_entropy,
    "recall": _recall,
    "perplexity": _ratios,
}


def _line(axes: Any, key: str, x: Sequence[float], y: Sequence[float]) -> None:
    found = _LOOKS.get(key, _LOOKS["original"])
    axes.plot(
        x,
        y,
        color=found.color,
        linestyle=found.line,
        marker=found.marker,
        markersize=3.5,
        markerfacecolor="white" if found.line != _SOLID else found.color,
        linewidth=1.4,
    )


def _label(row: Data) -> str:
    return printable(row["label"])[:_LONGEST]


def _label_ends(axes: Any, ends: Sequence[tuple[Data, float]]) -> None:
    """Write each row's label beside the end of its line, far enough from the others, with a thin line to it."""
    low, high = axes.get_ylim()
    gap = 0.052 * (high - low)
    places = spread([value for _, value in ends], gap)
    axes.set_ylim(min(low, min(places) - gap), max(high, max(places) + gap))
    for (row, value), place in zip(ends, places, strict=True):
        color = look(row["key"])[0]
        axes.annotate(
            _label(row),
            xy=(1.0, value),
            xytext=(1.05, place),
            xycoords=("axes fraction", "data"),
            textcoords=("axes fraction", "data"),
            color=color,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.6, "shrinkA": 0, "shrinkB": 0},
        )


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Places for labels, as near to `values` as a distance of `gap` between any two allows, in the same order."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    # Blocks of labels that touch, each around the mean of what its labels would like.
    blocks: list[tuple[float, list[int]]] = []
    for index in order:
        middle, members = values[index], [index]
        while blocks and middle - blocks[-1][0] < gap * (len(members) + len(blocks[-1][1])) / 2:
            members = blocks.pop()[1] + members
            middle = sum(values[i] for i in members) / len(members)
        blocks.append((middle, members))
    places = [0.0] * len(values)
    for middle, members in blocks:
        for rank, index in enumerate(members):
            places[index] = middle + gap * (rank - (len(members) - 1) / 2)
    return places
