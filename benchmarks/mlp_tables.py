"""Sections of docs/benchmarks.md about MLPs: rational functions, KAT, random features, KAN."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.decoder_tables import Table

_Result = dict[str, Any]


def minilm(result: _Result, table: Table) -> list[str]:
    """Errors of rational activations without training."""
    rows = [
        [r["from"], f"`{r['pass']}`", f"{r['max_error']:.1e}", f"{r['low']:.0f} to {r['high']:.0f}",
         f"{r['least_cosine_below_1']:.1e}"]
        for r in result["rows"]
    ]  # fmt: skip
    return [
        "## Rational activations: errors",
        "All-MiniLM-L6-v2 with its six activations replaced, without training: the largest error of any activation\n"
        "on the calibration data, its inputs, and how far the least cosine of 256 other embeddings is below 1.",
        table(["from", "pass", "largest error", "inputs", "1 - least cosine"], rows),
    ]


def cpu(result: _Result, table: Table) -> list[str]:
    """Time of a linear layer and its activation."""
    names = ("rational", "rational, frozen", "two steps", "torch")
    alone = {(r["model"], r["rows"], r["threads"]): r for r in result["rows"] if r["alone"]}
    rows = []
    for r in result["rows"]:
        if r["alone"]:
            continue
        best = min(ms[1] for name, ms in r["ms"].items() if name.startswith("onnxruntime"))
        apart = alone[r["model"], r["rows"], r["threads"]]["ratio"]["rational"]
        rows.append(
            [r["threads"], r["model"], r["rows"], best, *(_inverted(r["ratio"][n]) for n in names), _inverted(apart)]
        )
    columns = ["threads", "layer", "rows", "onnxruntime ms", *names, "activation alone"]
    return [
        "## Linear layer and rational function on the CPU",
        "The first layer of an MLP (MiniLM 384 to 1,536, ViT-B 768 to 3,072) with a rational function of degrees 4\n"
        "and 6 behind it, on the target `cpu`, against the same layer with Gelu on onnxruntime (the faster of two\n"
        "fusions): onnxruntime's time over ours, median and quartiles, alternating in one process. *frozen* keeps the\n"
        "weight packed, as onnxruntime does; *two steps* is torch's linear layer, then the kernel; *torch* is its\n"
        "linear layer and gelu.",
        table(columns, rows),
    ]


def _inverted(ratio: list[float]) -> str:
    low, middle, high = (1 / x for x in reversed(ratio))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def kat(result: _Result, table: Table) -> list[str]:
    """Accuracies of KAT from trained networks."""
    rows = []
    for network in result["networks"]:
        for label, mean in network["mean"].items():
            over = network["over_mlp"].get(label)
            gain = "" if over is None else f"{over[0]:+.2f} ± {over[1]:.2f}"
            rows.append([network["network"], label, f"{mean:.2f} ± {network['deviation'][label]:.2f}", gain])
    seeds = len(result["networks"][0]["seeds"])
    steps = "; ".join(f"{name}: {a:,}, then {b:,}" for name, (a, b) in result["steps"].items())
    return [
        "## KAT from trained networks",
        f"Handwritten digits, {result['training_images']} images for training, the others for judging, {seeds} seeds.\n"
        "Each network is trained with GELU first; then it and the KATs made of it are trained on, with the same\n"
        f"batches, rates and steps ({steps}). *over the MLP* is the mean\n"
        "difference to the MLP of the same seed, and its standard error.",
        table(["network", "", "accuracy, %, ± deviation", "over the MLP"], rows),
    ]


def snnk(result: _Result, table: Table) -> list[str]:
    """Error by size of random features."""
    rows = [
        [r["features"], f"{r['parameters']:,}", f"{r['parameters'] / result['parameters']:.2f}",
         *(f"{r[name]:.3f}" for name in ("snnk", "svd", "svd, refitted"))]
        for r in result["rows"]
    ]  # fmt: skip
    return [
        "## Random features in the place of an MLP",
        f"The MLP of layer {result['layer']} (from 0) of all-MiniLM-L6-v2: relative RMS error on held-out tokens, by\n"
        "the number of weights that are stored; beside truncated SVDs of both layers of the same size.",
        table(["features", "weights", "of the MLP", "snnk", "SVD", "SVD, second layer refitted"], rows),
    ]


def kan(result: _Result, table: Table) -> list[str]:
    """Formulas that were read back from trained MLPs."""
    rows = []
    for name in dict.fromkeys(r["formula"] for r in result["rows"]):
        found = [r for r in result["rows"] if r["formula"] == name]
        errors = [r["to_truth"] for r in found]
        example = min(found, key=lambda r: (not r["recovered"], r["to_truth"]))["found"]
        rows.append(
            [f"`{name}`", f"{sum(r['recovered'] for r in found)} of {len(found)}",
             f"{statistics.median(r['mlp_to_truth'] for r in found):.1g}", f"{min(errors):.1g} to {max(errors):.1g}",
             f"`{example}`" if len(example) < 60 else "a longer one"]
        )  # fmt: skip
    return [
        "## Formulas out of MLPs",
        f"An MLP 2-{result['width']}-1 learns each from {result['samples']:,} points of [-1, 1]^2; `kan` with\n"
        "symbolic functions reads it back. Recovered: the true formula once each constant is moved by at most\n"
        "0.01. Differences are the largest on other points.",
        table(["learned", "recovered", "MLP to the truth", "formula to the truth", "the best that came out"], rows),
    ]
