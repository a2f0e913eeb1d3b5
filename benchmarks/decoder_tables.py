"""Sections of docs/benchmarks.md about linearised decoders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import mean, stdev
from typing import Any

_Result = dict[str, Any]
Table = Callable[[Sequence[str], Iterable[Sequence[Any]]], str]
_COLUMNS = ("what", "options", "text", "seeds", "nats/token", "perplexity ratio", "seconds")


def perplexity(result: _Result, table: Table) -> list[str]:
    """Quality by model, method and text; the rows of several seeds as one."""
    parts = [
        "## Linearised decoders: perplexity",
        "Held-out texts that no training saw; the ratio is to the original's perplexity on them. *Own* texts were\n"
        "written by the model itself, *real* ones are sources of Python's standard library. *Alone* rows leave one of\n"
        "the two parts away and are trained alike. stories260K: window 16, texts of 256 tokens; tiny decoder: window\n"
        "64, texts of 1,024 bytes: there a window alone loses little to begin with, so the linear part adds little.\n"
        "Seconds are on one thread, with another run beside it.",
    ]
    for model in dict.fromkeys(row["model"] for row in result["rows"].values()):
        rows = [row for row in result["rows"].values() if row["model"] == model]
        parts.append(f"**{model}**, original {rows[0]['teacher_nats']:.4f} nats/token")
        parts.append(table(_COLUMNS, map(_cells, _merged(rows))))
    return parts


def _merged(rows: list[_Result]) -> list[list[_Result]]:
    groups: dict[tuple[str, ...], list[_Result]] = {}
    for row in rows:
        groups.setdefault((row["name"], row["options"], row["text"]), []).append(row)
    return list(groups.values())


def _cells(rows: list[_Result]) -> list[Any]:
    first, ratios = rows[0], [row["ratio"] for row in rows]
    spread = f" ± {stdev(ratios):.4f}" if len(ratios) > 1 else ""
    return [
        first["name"],
        f"`{first['options'].replace(',max_error=9', '')}`",
        first["text"],
        len(rows),
        f"{mean(row['nats'] for row in rows):.4f}",
        f"{mean(ratios):.4f}{spread}",
        f"{mean(row['seconds'] for row in rows):.0f}",
    ]


def decoding(result: _Result, table: Table) -> list[str]:
    """Time and memory of one step."""
    columns = ("threads", "tokens before", "original ms", "linear ms", "ratio", "quartiles", "original kB", "linear kB")
    keys = ("threads", "past", "original_ms", "linearised_ms", "ratio")
    rows = [
        [
            *(r[k] for k in keys),
            "{:.2f} to {:.2f}".format(*r["quartiles"]),
            f"{r['original_kb']:.0f}",
            f"{r['linearised_kb']:.0f} ({r['kb_ratio']:.1f}x)",
        ]
        for r in result["rows"]
    ]
    return [
        "## Linearised decoders: one step",
        f"The tiny decoder on onnxruntime CPU, one sequence, window {result['window']}: milliseconds for a token, and\n"
        "what is carried from step to step.",
        table(columns, rows),
    ]


def memory(result: _Result, table: Table) -> list[str]:
    """Memory beyond the mapped weights."""
    columns = ("pass", "weights MB", "memory beyond MB", "of the weights", "load s", "apply s")
    rows = [
        [name, f"{r['weights_mb']:.0f}", f"{r['peak_mb'] - r['before_mb']:.0f}", r["ratio"], r["load_s"], r["apply_s"]]
        for name, r in result["passes"].items()
    ]
    return [
        "## Linearising a Llama of the 1B shape",
        "HuggingFace's architecture with random bf16 weights, mapped from a file: anonymous memory beyond what\n"
        "the imports took, at its peak.",
        table(columns, rows),
    ]
