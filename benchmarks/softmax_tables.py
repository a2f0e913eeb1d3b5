"""Sections of docs/benchmarks.md about softmax and softplus attention."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.decoder_tables import Table

_Result = dict[str, Any]


def softmax(result: _Result, table: Table) -> list[str]:
    """Time of a softmax over the last axis, by size."""
    columns = (
        "threads", "rows", "length", "two-pass ms", "three-pass", "torch", "onnxruntime", "recomputed", "GB/s", "copy",
    )  # fmt: skip
    rows = [
        [
            r["threads"],
            r["rows"],
            _power(r["length"]),
            f"{r['ms']['two_pass']:.3g}",
            *(_quartiles(r["ratio"][name]) for name in ("three_pass", "torch", "onnxruntime")),
            f"{r['ms']['three_pass'] / r['ms']['two_pass_recomputed']:.2f}",
            f"{r['GB/s']['two_pass']:.1f}",
            f"{r['GB/s']['copy']:.1f}",
        ]
        for r in result["rows"]
    ]
    return [
        "## Softmax on the CPU",
        "`two_pass_softmax` in fp32 against a three-pass softmax of the same code, torch.softmax and onnxruntime's\n"
        "Softmax, alternating in one process, correctness checked first: the other's time over ours, median and\n"
        "quartiles. Rows of up to 2^22 entries keep their terms in the output, longer ones compute them again in the\n"
        "second pass; *recomputed* is the three-pass over that second form, for all lengths. GB/s count what has to\n"
        "be read and written; *copy* is a memory copy with as many threads.",
        table(columns, rows),
    ]


def _power(length: int) -> str:
    exponent = length.bit_length() - 1
    return f"2^{exponent}" if length == 1 << exponent else str(length)


def _quartiles(ratio: list[float]) -> str:
    low, middle, high = ratio
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def length(result: _Result, table: Table) -> list[str]:
    """Perplexity by the length of the text."""
    context, found = result["context"], list(result["rows"].values())
    lengths = [int(name) for name in found[0]["lengths"]]
    times = [f"{name // context}x" for name in lengths]
    rows, curves = [], []
    for row in found:
        nats = [row["lengths"][str(name)]["nats"] for name in lengths]
        shown = [f"{math.exp(x):.3f}" for x in nats]
        rows.append([row["attention"], row["source"], *shown, f"{math.exp(nats[-1] - nats[0]):.3f}"])
        curves.append([row["attention"], row["source"], *_curve(row["lengths"][str(lengths[-1])])])
        if "near" in row:
            near = row["attention"], f"{row['source']}, the last {context:,} keys"
            curves.append([*near, *_curve(row["near"])])
    return [
        "## Length extrapolation",
        f"Perplexity per byte of the tiny decoder on the same {result['bytes']:,} held-out bytes, in windows of 1 to\n"
        f"16 times the {context:,} bytes of its training. *trained*: from scratch, with the script, data, steps and\n"
        "schedule of the softmax decoder; *converted*: from that decoder, with 40 steps of low-rank adapters at 1,024\n"
        "bytes; *swapped*: without.",
        table(("attention", "weights", *times, "16x / 1x"), rows),
        f"Nats per byte of stretches of {context:,} positions in the longest window. *The last {context:,} keys*: no\n"
        "query sees keys at distances that training did not have.",
        table(("attention", "weights", *(f"{i + 1}." for i in _SHOWN)), curves),
    ]


def _curve(found: _Result) -> list[str]:
    return [f"{found['curve'][i]:.3f}" for i in _SHOWN]


_SHOWN = (0, 1, 2, 3, 7, 11, 15)
