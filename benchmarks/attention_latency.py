"""Attention sites alone: the original subgraph of a pretrained encoder against its linear replacement, on onnxruntime.

Each site is cut out of the saved models at the values that enter and leave it, so that both sides see the same
inputs (queries, keys, values, mask) and nothing else is timed. Whole models are timed beside them.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.utils
import onnxruntime

import graphopt
from benchmarks.common import show, store
from graphopt.graph import Graph

LENGTHS = (64, 128, 256, 512)
RUNS = 41
SAMPLE = Path(__file__).parents[1] / "samples" / "minilm_linear.py"


def sample() -> Any:
    """The MiniLM sample as a module."""
    spec = importlib.util.spec_from_file_location("minilm_linear", SAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def session(model: Path | bytes, threads: int) -> onnxruntime.InferenceSession:
    """A CPU session with a stated number of threads that sleep while they wait."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def cut(path: Path, inputs: list[str], output: str) -> bytes:
    """The part of a model between named values."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    known = {v.name for v in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
    for name in [*inputs, output]:
        if name not in known:
            model.graph.value_info.add(name=name).type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    functions = list(model.functions)
    part = onnx.utils.Extractor(model).extract_model(inputs, [output])
    del part.functions[:]
    part.functions.extend(functions)
    for value in (*part.graph.input, *part.graph.output):
        value.type.tensor_type.ClearField("shape")
    data: bytes = part.SerializeToString()
    return data


def pair(a: Any, b: Any, feeds: dict[str, Any], runs: int = RUNS) -> dict[str, float]:
    """Alternating runs: medians in ms, and the median and quartiles of the ratio run by run."""
    times: tuple[list[float], list[float]] = ([], [])
    taken = [{i.name: feeds[i.name] for i in one.get_inputs()} for one in (a, b)]
    for i in range(runs + 5):
        for which, one, values in zip(times, (a, b), taken, strict=True):
            start = time.perf_counter()
            one.run(None, values)
            if i >= 5:
                which.append((time.perf_counter() - start) * 1e3)
    ratio = np.array(times[0]) / np.array(times[1])
    low, middle, high = np.percentile(ratio, [25, 50, 75])
    return {
        "original_ms": float(np.median(times[0])),
        "linear_ms": float(np.median(times[1])),
        "ratio": float(middle),
        "ratio_q1": float(low),
        "ratio_q3": float(high),
    }


def site_values(graph: Graph, length: int) -> tuple[list[str], str, str, dict[str, Any]]:
    """Names and values at the first attention site, and the operator that consumes it, for one length."""
    site = graph.sites("attention")[0]
    kept: dict[str, Any] = {}

    def observe(node: Any, value: Any) -> None:
        if node in site.inputs:
            kept[node.meta["onnx_name"]] = value.numpy()

    import torch

    from graphopt.execute import execute

    ids = torch.randint(1000, 2000, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        execute(graph, (ids, torch.ones_like(ids)), observe)
    consumer = next(iter(site.output.users)).meta["onnx"].proto.name
    return [n.meta["onnx_name"] for n in site.inputs], site.output.meta["onnx_name"], consumer, kept


def run() -> None:
    """Export, linearise (untrained: the speed is the same), cut, and time with one and with two threads."""
    helper = sample()
    rows, results = [], []
    with tempfile.TemporaryDirectory() as folder:
        original, linear = Path(folder) / "a.onnx", Path(folder) / "b.onnx"
        helper.export_encoder(original)
        graph = graphopt.load(original)
        options = {"calibration": 1, "fit_steps": 0}
        result = graph.apply("linearize{max_error=10}", **options)  # type: ignore[arg-type]  # mixed options
        result.graph.save(linear, target="onnxruntime")
        for threads in (1, 2):
            for length in LENGTHS:
                inputs, output, consumer, feeds = site_values(graph, length)
                nodes = {n.name: n for n in onnx.load(linear).graph.node}
                replaced = next(i for i in nodes[consumer].input if i not in inputs)
                # The linear side reads one row of the mask and makes it from the model's own input: that is timed too.
                kept = [name for name in inputs if any(name in n.output for n in nodes.values())]
                a = session(cut(original, inputs, output), threads)
                b = session(cut(linear, [*kept, "attention_mask"], replaced), threads)
                ids = np.full((1, length), 1000)
                given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
                site = pair(a, b, feeds | given)
                whole = pair(session(original, threads), session(linear, threads), given)
                results.append({"threads": threads, "length": length, "site": site, "model": whole})
                spread = f"{site['ratio_q1']:.2f}-{site['ratio_q3']:.2f}"
                rows.append(
                    [
                        threads,
                        length,
                        site["original_ms"],
                        site["linear_ms"],
                        site["ratio"],
                        spread,
                        whole["ratio"],
                    ]
                )
                print(rows[-1], file=sys.stderr)
    columns = [
        "threads",
        "length",
        "original ms",
        "linear ms",
        "site ratio",
        "quartiles",
        "whole-model ratio",
    ]
    show("One attention site (B 1, H 12, D 32), original / linear", columns, rows)
    store("attention_latency", {"rows": results})
