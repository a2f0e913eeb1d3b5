"""Perplexity at 1 to 16 times the context of training: softmax, LSSA and LSSAR, trained from scratch and converted.

The same bytes of held-out text in windows of each length, so that only the length differs. What is trained from scratch
comes from samples/tiny_decoder/train.py with as many steps, the same schedule and the same data as the softmax decoder
of that folder; one that is not in the cache yet is trained first, which takes over an hour and continues where it was
when interrupted. Finished rows are kept in results/length_extrapolation.json.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import graphopt
from benchmarks.common import RESULTS, SAMPLES, show, store, tiny_decoder
from graphopt.decoders.perplexity import Score, cross_entropy
from graphopt.ops import softplus_attention

CONTEXT = 1024
LENGTHS = (1024, 2048, 4096, 8192, 16384)
TEXTS = 2
"""Pieces of held-out text, each as long as the longest window."""
STEPS = 6476
"""Of the decoder in samples/tiny_decoder."""
POWERS = {"lssa": 0, "lssar3": 3, "lssar15": 15}
_FIT = "lora_steps=40"
_BLOCK = 256
_Logits = Callable[[Any], Any]


@dataclass(frozen=True)
class Row:
    """One decoder: its attention, and where its weights come from."""

    attention: str
    source: str
    """`trained` from scratch; `converted` from the softmax decoder, with the pass's fit; `swapped`, without."""

    @property
    def key(self) -> str:
        """Unique within the results."""
        return f"{self.attention}, {self.source}"


ROWS = (
    Row("softmax", "trained"),
    Row("lssar15", "trained"),
    Row("lssa", "trained"),
    Row("lssar15", "converted"),
    Row("lssa", "converted"),
    Row("lssar3", "converted"),
    Row("lssar15", "swapped"),
)


def texts() -> np.ndarray[Any, Any]:
    """Held-out bytes [TEXTS, 16 CONTEXT], at even distances."""
    data = tiny_decoder("data")
    return np.asarray(data.windows(data.texts()[1], LENGTHS[-1], TEXTS)[:, : LENGTHS[-1]])


def trained(attention: str, folder: Path, near: bool = False) -> _Logits:
    """A decoder that was trained with this attention; trains what is not there.

    Args:
        attention: which one.
        folder: where the trained decoders lie.
        near: let no query see keys further away than CONTEXT, as in training.
    """
    checkpoint = tiny_decoder("checkpoint")
    attend = _softmax if attention == "softmax" else partial(_attend, POWERS[attention])
    return _run(_with(_near(attend) if near else attend, _weights(attention, folder, checkpoint)))


def _weights(attention: str, folder: Path, checkpoint: Any) -> Any:
    if attention == "softmax":
        return checkpoint.load_tiny()
    done = folder / attention / "done"
    if not done.exists():
        command = [sys.executable, str(SAMPLES / "tiny_decoder" / "train.py"), "--out", str(done.parent)]
        print(f"training {attention}: {STEPS:,} steps, more than an hour on one core", flush=True)
        subprocess.run([*command, f"--steps={STEPS}", "--bf16", "--compile", f"--attention={attention}"], check=True)
        done.touch()
    return checkpoint.load(done.parent)


def _with(attend: Callable[..., Any], decoder: Any) -> Any:
    for layer in decoder.layers:
        layer.self_attn.attend = attend
    return decoder


def _run(decoder: torch.nn.Module) -> _Logits:
    def logits(ids: Any) -> Any:
        with torch.no_grad():
            return decoder(torch.as_tensor(ids))

    return logits


def _attend(power: int, q: Any, k: Any, v: Any, mask: Any) -> Any:
    return softplus_attention(q, k, v, None, power, True)


def _softmax(q: Any, k: Any, v: Any, mask: Any) -> Any:
    queries, keys = q.shape[2], k.shape[2]
    if queries == keys:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def _near(attend: Callable[..., Any]) -> Callable[..., Any]:
    """The same attention to the last 769 to CONTEXT keys: blocks of queries with what stands before them as a cache."""

    def run(q: Any, k: Any, v: Any, mask: Any) -> Any:
        parts = []
        for end in range(_BLOCK, q.shape[2] + _BLOCK, _BLOCK):
            seen = slice(max(0, end - CONTEXT), end)
            parts.append(attend(q[:, :, end - _BLOCK : end], k[:, :, seen], v[:, :, seen], None))
        return torch.cat(parts, 2)

    return run


def converted(row: Row, folder: Path) -> Any:
    """The softmax decoder after the pass `softplus`."""
    export, data = tiny_decoder("export"), tiny_decoder("data")
    path = folder / "softmax" / "decoder.onnx"
    if not path.exists():
        export.export(tiny_decoder("checkpoint").load_tiny(), path.parent)
    windows = data.windows(data.texts()[0], CONTEXT, 64)[:, :CONTEXT]
    fit = _FIT if row.source == "converted" else "train=none"
    graph = graphopt.load(path)
    batches = [(part,) for part in windows.split(2)]
    return graph.apply(f"softplus{{reweight={POWERS[row.attention]},{fit}}}", calibration=batches).graph


def curve(score: Score) -> list[float]:
    """Mean nats of each stretch of CONTEXT positions: a loss that grows with the distance shows here."""
    return [float(np.nanmean(part)) for part in np.array_split(score.per_position, len(score.per_position) // 1000)]


def measure(row: Row, folder: Path) -> dict[str, Any]:
    """Nats per byte at each length."""
    start = time.perf_counter()
    model = trained(row.attention, folder) if row.source == "trained" else converted(row, folder)
    made = time.perf_counter() - start
    held, found = texts(), {}
    for length in LENGTHS:
        score = cross_entropy(model, held.reshape(-1, length))
        found[length] = {"nats": score.nats, "perplexity": score.perplexity, "curve": curve(score)}
        print(f"{row.key}, {length}: {score.nats:.4f} nats", flush=True)
    result = {"attention": row.attention, "source": row.source, "seconds_to_make": made, "lengths": found}
    if row.source == "trained":
        score = cross_entropy(trained(row.attention, folder, near=True), held)
        result["near"] = {"nats": score.nats, "perplexity": score.perplexity, "curve": curve(score)}
    return result


def run() -> None:
    """Measure what is missing, and store after each decoder."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    base = Path(os.environ.get("GRAPHOPT_BENCHMARK_CACHE", tempfile.gettempdir()))
    folder = base / "graphopt-length-extrapolation"
    path = RESULTS / "length_extrapolation.json"
    kept: dict[str, Any] = json.loads(path.read_text())["rows"] if path.exists() else {}
    for row in ROWS:
        if row.key not in kept:
            kept[row.key] = measure(row, folder)
            store("length_extrapolation", {"context": CONTEXT, "bytes": TEXTS * LENGTHS[-1], "rows": kept})
    kept = json.loads(path.read_text())["rows"]
    columns = ["attention", "weights", *(f"{length // CONTEXT}x" for length in LENGTHS), "16x / 1x"]
    shown = []
    for found in kept.values():
        nats = [found["lengths"][str(length)]["nats"] for length in LENGTHS]
        shown.append([found["attention"], found["source"], *map(math.exp, nats), math.exp(nats[-1] - nats[0])])
    show("Perplexity per byte by length of the window", columns, shown)
