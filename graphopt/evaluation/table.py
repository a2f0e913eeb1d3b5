"""The rows of an ablation as text, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Data = Mapping[str, Any]


def columns(data: Data) -> list[str]:
    """Headings; those that end in `>` are numbers."""
    recall = [f"recall @{distance}>" for distance in data["recall"]["distances"]]
    return ["row", "nats/token>", "change>", "perplexity>", "ratio>", *recall, "seconds>"]


def cells(row: Data, data: Data) -> list[str]:
    """One line; a figure with its standard error where there is one."""
    by_distance = {item["distance"]: item for item in row["recall"]}
    recall = [by_distance.get(distance) for distance in data["recall"]["distances"]]
    return [
        row["label"],
        _with_error(row["nats"], row["error"]),
        _with_error(row["difference"], row["difference_error"], sign=True) if row["key"] != "original" else "",
        _short(row["perplexity"]),
        _short(row["ratio"]),
        *("" if item is None else _with_error(item["gain"], item["error"], sign=True) for item in recall),
        f"{row['seconds']:.1f}",
    ]


def title(data: Data) -> str:
    """What the table shows."""
    held = data["held_out"]
    return (
        f"{', '.join(data['pipeline'])} on {held['texts']} held-out texts of at most {held['length']} tokens "
        f"({held['description']})"
    )


def markdown(data: Data) -> str:
    """The table with its title, what is left out, and the notes."""
    heads = columns(data)
    lines = [
        f"# Ablation\n\n{_escaped(title(data))}\n",
        _line(head.rstrip(">") for head in heads),
        _line("---:" if head.endswith(">") else "---" for head in heads),
        *(_line(_escaped(cell) for cell in cells(row, data)) for row in data["rows"]),
        "\n± is one standard error over the texts, of `change` over the differences text by text. Recall is the gain "
        "of a repeated segment in nats/token, at that many tokens between its copies.",
    ]
    if data["left_out"] or data["notes"]:
        lines.append("")
    lines += [f"- {_escaped(item['label'])} is left out: {_escaped(item['reason'])}" for item in data["left_out"]]
    lines += [f"- {_escaped(note)}" for note in data["notes"]]
    return "\n".join(lines) + "\n"


def printable(text: str) -> str:
    """Text with control characters as escapes: they can turn text around, hide it, or break a file."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _line(parts: Any) -> str:
    return f"| {' | '.join(parts)} |"


def _escaped(text: str) -> str:
    """Text in which nothing is Markdown or HTML: names come from the model."""
    plain = " ".join(printable(str(text)).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{c}" if c in "\\`*_[]|!#~" else c for c in plain)


def _short(value: float | None) -> str:
    return "too large" if value is None else f"{value:.4g}"


def _with_error(value: float | None, error: float | None, *, sign: bool = False) -> str:
    if value is None:
        return "NaN"
    text = f"{value:+.3f}" if sign else f"{value:.3f}"
    return text if error is None else f"{text} ± {error:.3f}"
