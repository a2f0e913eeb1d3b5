"""Softmax over long rows on the CPU: two passes against three, torch, and onnxruntime, beside a copy of the memory.

Everything runs in one process, in turn, into buffers that exist already, after its result was held against fp64.
Bandwidths count what an algorithm must move, 3 N for two passes and 4 N for three, and not the lines that a processor
fetches before it overwrites them. With OMP_WAIT_POLICY=PASSIVE torch's threads sleep between calls, as all others here
do; else they keep the other cores from whoever runs next.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper

from benchmarks.common import show, store
from benchmarks.timing import on_cpu
from graphopt.backends.cpu import launch
from graphopt.backends.cpu.softmax import IN_CACHE

# Rows and their lengths; the largest has 256 MB.
SHAPES = (*((1, 2**i) for i in range(10, 27, 2)), *((64, 2**i) for i in (10, 12, 14, 16, 18, 20)))
THREADS = (1, 2)
ROUNDS = 15
KERNELS = {
    "two_pass": launch.TWO_PASS,
    "two_pass_recomputed": launch.TWO_PASS_RECOMPUTED,
    "online": launch.ONLINE,
    "unified_max": launch.unified_max(0.0, -60.0, 60.0),
    "three_pass": launch.THREE_PASS,
}
# Times N: each pass reads the row, and the last also writes it. In cache `two_pass` writes twice to compute once.
TRAFFIC = {"two_pass": 3, "two_pass_recomputed": 3, "online": 3, "unified_max": 3, "three_pass": 4, "copy": 2}
COMPARED = ("two_pass_recomputed", "three_pass", "online", "unified_max", "torch", "onnxruntime")

Array = np.ndarray[Any, np.dtype[np.float32]]


def session(x: Array, y: Array, threads: int) -> Callable[[], Any]:
    """One Softmax node on onnxruntime, bound to these buffers."""
    spec = {name: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, x.shape) for name in "xy"}
    graph = helper.make_graph([helper.make_node("Softmax", ["x"], ["y"], axis=-1)], "softmax", [spec["x"]], [spec["y"]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    made = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = made.io_binding()
    binding.bind_input("x", "cpu", 0, np.float32, x.shape, x.ctypes.data)
    binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)
    return lambda: made.run_with_iobinding(binding)


def contestants(x: Array, y: Array, threads: int) -> dict[str, Callable[[], Any]]:
    """Name -> what fills y with the softmax of x."""
    x_torch, y_torch = torch.from_numpy(x), torch.from_numpy(y)
    return {
        **{name: (lambda a=algorithm: launch.softmax(x, y, a)) for name, algorithm in KERNELS.items()},
        "torch": lambda: torch.softmax(x_torch, -1, out=y_torch),
        "onnxruntime": session(x, y, threads),
        "copy": lambda: y_torch.copy_(x_torch),
    }


def errors(x: Array, y: Array, runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The largest error of each, relative to the largest entry of its row.

    Raises:
        AssertionError: one of our kernels is off by more than fp32 explains.
    """
    right = torch.from_numpy(x).double().softmax(-1).numpy()
    largest = right.max(-1, keepdims=True)
    found = {}
    for name, run in runs.items():
        if name == "copy":
            continue
        y.fill(np.nan)
        run()
        found[name] = float((np.abs(y - right) / largest).max())
        assert name not in KERNELS or found[name] < 1e-6, f"{name} is off by {found[name]} at {x.shape}"
    return found


def compare(shape: tuple[int, int], threads: int) -> dict[str, Any]:
    """One shape on so many threads: medians, and the ratio to two passes round by round."""
    torch.set_num_threads(threads)
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32) * 3
    y = np.empty_like(x)
    runs = contestants(x, y, threads)
    wrong = errors(x, y, runs)
    taken = on_cpu(runs, ROUNDS)
    result: dict[str, Any] = {"rows": shape[0], "length": shape[1], "threads": threads, "error": wrong}
    result["ms"] = {name: float(np.median(t)) * 1e3 for name, t in taken.items()}
    result["best_ms"] = {name: min(t) * 1e3 for name, t in taken.items()}
    traffic = TRAFFIC | ({"two_pass": 4} if shape[1] <= IN_CACHE else {})
    result["GB/s"] = {n: k * x.nbytes / float(np.median(taken[n])) / 1e9 for n, k in traffic.items()}
    ratios = {n: np.array(t) / np.array(taken["two_pass"]) for n, t in taken.items() if n not in ("two_pass", "copy")}
    result["ratio"] = {n: [float(q) for q in np.percentile(r, [25, 50, 75])] for n, r in ratios.items()}
    result["best_ratio"] = {n: min(t) / min(taken["two_pass"]) for n, t in taken.items()}
    return result


def run() -> None:
    """Time every shape with one thread and with two."""
    results, rows = [], []
    before = torch.get_num_threads()
    for threads in THREADS:
        for shape in SHAPES:
            result = compare(shape, threads)
            results.append(result)
            ratio = {name: f"{m:.2f} ({a:.2f}-{b:.2f})" for name, (a, m, b) in result["ratio"].items()}
            bandwidth = [result["GB/s"][name] for name in ("two_pass", "three_pass", "copy")]
            others = [ratio[name] for name in COMPARED]
            rows.append([threads, shape, result["ms"]["two_pass"], *bandwidth, *others])
            print(rows[-1], file=sys.stderr)
    torch.set_num_threads(before)
    columns = ["threads", "shape", "two-pass ms", "GB/s", "three-pass GB/s", "copy GB/s"]
    columns += COMPARED
    show("Softmax in fp32; on the right time / time of two passes, with quartiles", columns, rows)
    waiting = os.environ.get("OMP_WAIT_POLICY", "default")
    store("softmax_cpu", {"omp_wait_policy": waiting, "rows": results})
