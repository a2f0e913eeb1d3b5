"""all-MiniLM-L6-v2 with rational activations, from its .onnx file and as an nn.Module: errors without any training."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel

import graphopt
from benchmarks.attention_latency import sample
from benchmarks.common import show, store
from graphopt.backends.onnxruntime import Session

OPTIONS = ("rational", "rational{groups=8}", "rational{denominator=sum_abs}", "rational{m=5,n=7}")
_Run = Callable[[dict[str, Any]], np.ndarray[Any, Any]]


def run() -> None:
    """Rewrite both kinds of model, and compare the embeddings of sentences that no fit saw."""
    helper = sample()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        helper.export_encoder(root / "a.onnx")
        texts = helper.sentences()
        helper.write_batches(texts[:256], root / "calibration")
        helper.write_batches(texts[-256:], root / "held out")
        batches = [dict(np.load(path)) for path in sorted((root / "held out").glob("*.npz"))]
        encoder = helper.SentenceEncoder(AutoModel.from_pretrained(helper.model_folder())).eval()
        found = [
            *(_from_file(spelling, root, batches) for spelling in OPTIONS),
            *(_from_module(spelling, encoder, root, batches) for spelling in OPTIONS),
        ]
    columns = ["from", "pass", "largest error of an activation", "inputs from", "to", "least cosine", "mean"]
    rows = [
        [r["from"], r["pass"], r["max_error"], r["low"], r["high"], 1 - r["least_cosine_below_1"], r["mean_cosine"]]
        for r in found
    ]
    show("Rational activations in MiniLM, no training", columns, rows)
    store("rational_minilm", {"rows": found})


def _from_file(spelling: str, root: Path, batches: list[dict[str, Any]]) -> dict[str, Any]:
    original = Session(root / "a.onnx")
    result = graphopt.load(root / "a.onnx").apply(spelling, calibration=str(root / "calibration"))
    result.graph.save(root / "b.onnx", target="onnxruntime")
    changed = Session(root / "b.onnx")
    runs: tuple[_Run, _Run] = (
        lambda feeds: original.run(feeds)["sentence_embedding"],
        lambda feeds: changed.run(feeds)["sentence_embedding"],
    )
    return {"from": ".onnx, on onnxruntime", "pass": spelling} | _judged(result, runs, batches)


def _from_module(spelling: str, encoder: torch.nn.Module, root: Path, batches: list[dict[str, Any]]) -> dict[str, Any]:
    ids = torch.randint(1000, 2000, (2, 16))
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq", max=512)}
    graph = graphopt.load(encoder, (ids, torch.ones_like(ids)), {"input_ids": dims, "attention_mask": dims})
    result = graph.apply(spelling, calibration=str(root / "calibration"))
    changed = result.graph.to_module()

    def embed(module: torch.nn.Module) -> _Run:
        def run(feeds: dict[str, Any]) -> np.ndarray[Any, Any]:
            with torch.no_grad():
                values = [torch.from_numpy(feeds[name]) for name in ("input_ids", "attention_mask")]
                return np.asarray(module(*values)[1])

        return run

    return {"from": "nn.Module, in torch", "pass": spelling} | _judged(
        result, (embed(encoder), embed(changed)), batches
    )


def _judged(result: Any, runs: tuple[_Run, _Run], batches: list[dict[str, Any]]) -> dict[str, Any]:
    sites = result.report.passes[0].sites
    assert all(site.status == "rewritten" for site in sites), sites
    pairs = [[run(feeds).astype(np.float64) for run in runs] for feeds in batches]
    # The embeddings have length 1, up to fp32: what is left of 1 is half the squared distance.
    apart = np.concatenate([((a - b) ** 2).sum(-1) / 2 for a, b in pairs])
    return {
        "sites": len(sites),
        "max_error": max(site.errors["max_error"] for site in sites),
        "low": min(site.errors["low"] for site in sites),
        "high": max(site.errors["high"] for site in sites),
        "least_cosine_below_1": float(apart.max()),
        "mean_cosine": float(1 - apart.mean()),
    }
