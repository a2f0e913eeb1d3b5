"""Decoding with samples/tiny_decoder on onnxruntime's CPU provider: a growing cache against a window and a state.

One step of one sequence at several lengths of the text before it, original and linearised file alternating in one
process; caches of random values stand for that text, since time and memory do not depend on what was said.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

import graphopt
from benchmarks.common import show, store

SAMPLES = Path(__file__).resolve().parents[1] / "samples"
WINDOW = 64
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
STEPS = 41
Feeds = dict[str, np.ndarray[Any, Any]]


def export(folder: Path) -> dict[str, Path]:
    """The original and the linearised file; untrained maps take the same time."""
    sys.path.append(str(SAMPLES))
    from tiny_decoder.checkpoint import load_tiny
    from tiny_decoder.export import export as write

    write(load_tiny(), folder)
    paths = {"original": folder / "decoder_with_past.onnx", "linearised": folder / "linear.onnx"}
    graph = graphopt.load(paths["original"])
    text = np.random.default_rng(0).integers(0, 256, (1, 2 * WINDOW))
    result = graph.apply(f"linearize{{window={WINDOW},train=none,max_error=99}}", calibration=[{"input_ids": text}])
    result.graph.save(paths["linearised"], target="onnxruntime")
    return paths


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """A session that only decodes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def memory(runner: onnxruntime.InferenceSession, past: int) -> Feeds:
    """Caches and states after `past` tokens."""
    rng = np.random.default_rng(past)
    states = any("state" in i.name for i in runner.get_inputs())
    kept = min(past, WINDOW) if states else past
    found = {}
    for item in runner.get_inputs():
        if item.name.startswith("past"):
            sizes = [d if isinstance(d, int) else kept if i == 2 else 1 for i, d in enumerate(item.shape)]
            found[item.name] = rng.random(sizes, np.float32)
    return found


def step(runner: onnxruntime.InferenceSession, past: int, held: Mapping[str, np.ndarray[Any, Any]]) -> float:
    """Seconds for one token."""
    cached = next(v.shape[2] for n, v in held.items() if "key_values" in n)
    feeds = {
        "input_ids": np.array([[65]]),
        "attention_mask": np.ones((1, cached + 1), np.int64),
        "position_ids": np.array([[past]]),
        **held,
    }
    start = time.perf_counter()
    runner.run(None, feeds)
    return time.perf_counter() - start


def compare(paths: Mapping[str, Path], threads: int) -> list[dict[str, Any]]:
    """Median milliseconds per token with quartiles of the ratio, and bytes that are carried from step to step."""
    runners = {name: session(path, threads) for name, path in paths.items()}
    found = []
    for past in LENGTHS:
        held = {name: memory(runner, past) for name, runner in runners.items()}
        for name, runner in runners.items():
            step(runner, past, held[name])
        times = {name: [] for name in runners}
        for _ in range(STEPS):
            for name, runner in runners.items():
                times[name].append(1e3 * step(runner, past, held[name]))
        ratio = np.array(times["original"]) / np.array(times["linearised"])
        carried = {name: sum(v.nbytes for v in values.values()) for name, values in held.items()}
        found.append(
            {
                "threads": threads,
                "past": past,
                **{f"{name}_ms": float(np.median(times[name])) for name in runners},
                "ratio": float(np.median(ratio)),
                "quartiles": [float(q) for q in np.quantile(ratio, (0.25, 0.75))],
                **{f"{name}_kb": carried[name] / 1e3 for name in runners},
                "kb_ratio": carried["original"] / carried["linearised"],
            }
        )
    return found


def run() -> None:
    """Export, check that prefill and decoding agree, measure, and store."""
    from graphopt.decoders import logits

    with tempfile.TemporaryDirectory() as folder:
        paths = export(Path(folder))
        text = np.random.default_rng(1).integers(0, 256, (1, 200))
        apart = float(np.abs(logits(paths["linearised"], text) - logits(paths["linearised"], text, split=100)).max())
        if not apart < 1e-3:
            raise SystemExit(f"decoding differs from prefill by {apart:.3g}: nothing was measured")
        found = [row for threads in (1, 2) for row in compare(paths, threads)]
    columns = ["threads", "tokens before", "original ms", "linear ms", "ratio", "original kB", "linear kB", "ratio"]
    keys = ("threads", "past", "original_ms", "linearised_ms", "ratio", "original_kb", "linearised_kb", "kb_ratio")
    show("One token", columns, [[r[k] for k in keys] for r in found])
    store("decoding", {"window": WINDOW, "steps": STEPS, "decode_from_prefill": apart, "rows": found})
