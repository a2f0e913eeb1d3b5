"""Loading and saving a 3 GB model with external data, beside the tools users would pick instead.

Each tool runs in a process of its own: import, load, save. Memory is the process's resident set after loading, its
increase over what the imports took, and the peak at the end (Linux's VmHWM; pages of mapped files count).
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper

from benchmarks.common import show, store

LAYERS, WIDTH = 48, 4096  # 48 weights of 64 MiB: 3.2 GB
RUNS = 3

TOOLS = {
    "graphopt": ("import graphopt; graphopt.load", "m = graphopt.load(source)", "m.save(target)"),
    "onnx_ir": (
        "import onnx_ir",
        "m = onnx_ir.load(source)",
        "onnx_ir.save(m, target, external_data='model.onnx.data')",
    ),
    "onnxscript.optimizer": (
        "import onnx_ir, onnxscript.optimizer",
        "m = onnx_ir.load(source); onnxscript.optimizer.optimize(m)",
        "onnx_ir.save(m, target, external_data='model.onnx.data')",
    ),
    "onnxslim": (
        "import onnxslim",
        "m = onnxslim.slim(source)",
        "import onnx; onnx.save(m, target, save_as_external_data=True, location='model.onnx.data')",
    ),
}

PROGRAM = """
import json, sys, time
source, target = sys.argv[1:3]
def memory(key):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) / 1e3
start = time.perf_counter(); {0}; imported = time.perf_counter() - start
base = memory("VmRSS")
start = time.perf_counter(); {1}; load = time.perf_counter() - start
loaded = memory("VmRSS")
start = time.perf_counter(); {2}; save = time.perf_counter() - start
times = dict(import_s=imported, load_s=load, save_s=save)
print(json.dumps(times | dict(import_mb=base, loaded_mb=loaded, peak_mb=memory("VmHWM"))))
"""


def build(path: Path) -> None:
    """Write the model: products and ReLUs in a row, all weights in one data file."""
    block = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32)
    graph = onnx.GraphProto(name="large")
    graph.input.append(onnx.helper.make_tensor_value_info("x0", 1, ["batch", WIDTH]))
    graph.output.append(onnx.helper.make_tensor_value_info(f"x{LAYERS}", 1, ["batch", WIDTH]))
    with (path.parent / "model.onnx.data").open("wb") as data:
        for i in range(LAYERS):
            tensor = graph.initializer.add(name=f"layers.{i}.weight", data_type=1, dims=[WIDTH, WIDTH])
            tensor.data_location = onnx.TensorProto.EXTERNAL
            span = {"location": "model.onnx.data", "offset": data.tell(), "length": block.nbytes}
            for key, value in span.items():
                tensor.external_data.add(key=key, value=str(value))
            data.write((block * (i + 1)).tobytes())
            graph.node.append(onnx.helper.make_node("MatMul", [f"x{i}", tensor.name], [f"h{i}"], name=f"product{i}"))
            graph.node.append(onnx.helper.make_node("Relu", [f"h{i}"], [f"x{i + 1}"], name=f"relu{i}"))
    opsets = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), path)


def measure(tool: str, source: Path, target: Path) -> dict[str, Any]:
    """One process: a dict of figures, or the error."""
    program = PROGRAM.format(*TOOLS[tool])
    command = [sys.executable, "-c", program, str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr else f"exit code {done.returncode}"}
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    figures["same_data"] = filecmp.cmp(source.parent / "model.onnx.data", target.parent / "model.onnx.data", False)
    return figures


def run() -> None:
    """Measure every tool in turn, several rounds, and store medians."""
    with tempfile.TemporaryDirectory(prefix="graphopt-large-") as folder:
        source = Path(folder) / "model.onnx"
        build(source)
        rounds: dict[str, list[dict[str, Any]]] = {tool: [] for tool in TOOLS}
        for i in range(RUNS):
            for tool in TOOLS:
                if i and tool in ("onnxscript.optimizer", "onnxslim"):
                    continue  # minutes and many GB each: once is enough to see the order of magnitude
                target = Path(folder) / "out" / "model.onnx"
                target.parent.mkdir()
                os.sync()
                rounds[tool].append(measure(tool, source, target))
                shutil.rmtree(target.parent)
    rows, result = [], {}
    for tool, found in rounds.items():
        if "error" in found[0]:
            result[tool] = found[0]
            rows.append([tool, found[0]["error"], "", "", "", "", ""])
            continue
        keys = [k for k in found[0] if k != "same_data"]
        middle = {k: float(np.median([f[k] for f in found])) for k in keys}
        result[tool] = {"median": middle, "rounds": found}
        extra = middle["loaded_mb"] - middle["import_mb"]
        rows.append(
            [
                tool,
                *(middle[k] for k in ("load_s", "save_s", "loaded_mb")),
                extra,
                middle["peak_mb"],
                found[0]["same_data"],
            ]
        )
    show(
        "3.2 GB of external data",
        ["tool", "load s", "save s", "RSS loaded MB", "of it by load", "peak MB", "data same"],
        rows,
    )
    store("large_model", {"bytes": LAYERS * WIDTH * WIDTH * 4, "tools": result})
