"""Linear + rational on the CPU against linear + GELU of onnxruntime and torch, and the activations alone.

Everything runs in one process, in turn, after its result was held against fp64. onnxruntime runs with all of its own
fusions. Its results go into buffers that exist already, as do all activations; behind a layer torch and the operators
make theirs. The rational function is fitted to GELU, with degrees 4 and 6. With OMP_WAIT_POLICY=PASSIVE torch's threads
sleep between calls, as all others here do; else they keep the other cores from whoever runs next.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import nn

import graphopt
from benchmarks.common import show, store
from benchmarks.timing import on_cpu
from graphopt import registry
from graphopt.backends.cpu import launch_rational
from graphopt.fit.activation import fit_activation
from graphopt.ops import group_rational
from graphopt.ops.group_rational import reference

# K and C of the first layer of the MLP in all-MiniLM-L6-v2 and in ViT-B.
LAYERS = {"MiniLM": (384, 1536), "ViT-B": (768, 3072)}
ROWS = (16, 128, 1024, 8192)
THREADS = (1, 2)
ROUNDS = 7
OURS = "rational"
GELU = ("onnxruntime Gelu", "onnxruntime BiasGelu")

Array = np.ndarray[Any, np.dtype[np.float32]]
Run = Callable[[], Any]


def coefficients() -> tuple[torch.Tensor, torch.Tensor]:
    """Numerator [1, 5] and denominator [1, 6] of relu(x) - gelu(x) as a function of |x|."""
    found = fit_activation("gelu", 8.0, (4, 6), split=True)
    return torch.tensor([found.numerator]).float(), torch.tensor([found.denominator]).float()


class Rational(nn.Module):
    """The activation, behind a linear layer if there is one."""

    def __init__(self, layer: nn.Linear | None = None) -> None:
        """Args: layer: what stands in front."""
        super().__init__()
        self.layer = layer
        self.numerator, self.denominator = (nn.Parameter(c) for c in coefficients())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[.., K] -> [.., C]."""
        z = x if self.layer is None else self.layer(x)
        value: torch.Tensor = group_rational(z, self.numerator, self.denominator, "abs_sum", True)
        return value


def gelu_model(layer: nn.Linear | None, channels: int, erf: bool) -> onnx.ModelProto:
    """MatMul, Add and Gelu, or the activation alone; with `erf` in the parts that onnxruntime makes BiasGelu of."""
    stored, nodes, value = [], [], "x"
    if layer is not None:
        assert layer.bias is not None
        weight, bias = layer.weight.detach().t().contiguous().numpy(), layer.bias.detach().numpy()
        stored = [numpy_helper.from_array(weight, "W"), numpy_helper.from_array(bias, "b")]
        nodes = [helper.make_node("MatMul", ["x", "W"], ["p"]), helper.make_node("Add", ["p", "b"], ["z"])]
        value = "z"
    if erf:
        constants = {"root": np.sqrt(2), "one": 1.0, "half": 0.5}
        stored += [numpy_helper.from_array(np.float32(c), name) for name, c in constants.items()]
        nodes += [
            helper.make_node("Div", [value, "root"], ["d"]),
            helper.make_node("Erf", ["d"], ["e"]),
            helper.make_node("Add", ["e", "one"], ["s"]),
            helper.make_node("Mul", [value, "s"], ["m"]),
            helper.make_node("Mul", ["m", "half"], ["y"]),
        ]
    else:
        nodes.append(helper.make_node("Gelu", [value], ["y"]))
    width = channels if layer is None else layer.in_features
    # Behind a product of matrices onnxruntime makes Gemm and Gelu of both; of three axes the product stays MatMul.
    leading = [1, "n"] if erf else ["n"]
    kind = onnx.TensorProto.FLOAT
    specs = [helper.make_tensor_value_info(n, kind, [*leading, c]) for n, c in (("x", width), ("y", channels))]
    graph = helper.make_graph(nodes, "gelu", specs[:1], specs[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def lowered(module: nn.Module, x: torch.Tensor) -> onnx.ModelProto:
    """The module as an .onnx model for the target onnxruntime."""
    rows = torch.export.Dim("rows", min=2)
    model: onnx.ModelProto = registry.backend("onnxruntime").lower(
        graphopt.load(module, (x,), dynamic_shapes=({0: rows},))
    )
    return model


def session(model: onnx.ModelProto, x: Array, y: Array, threads: int) -> tuple[Run, list[str]]:
    """The model bound to these buffers, and the operators that onnxruntime made of it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        made = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        operators = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    binding = made.io_binding()
    binding.bind_input(made.get_inputs()[0].name, "cpu", 0, np.float32, x.shape, x.ctypes.data)
    binding.bind_output(made.get_outputs()[0].name, "cpu", 0, np.float32, y.shape, y.ctypes.data)
    return lambda: made.run_with_iobinding(binding), operators


class Contest:
    """One shape on so many threads: with a layer in front, or the activations alone."""

    def __init__(self, rows: int, layer: nn.Linear | None, channels: int, threads: int) -> None:
        """Args: rows: of x. layer: in front, or None. channels: of the result. threads: of everything."""
        self.x = torch.randn(rows, channels if layer is None else layer.in_features)
        self.y = np.empty((rows, channels), np.float32)
        self.layer = layer
        self.operators: dict[str, list[str]] = {}
        self.module = Rational(layer)
        self.runs: dict[str, Run] = {}
        if layer is None:
            y, coefficients = torch.from_numpy(self.y), (self.module.numerator, self.module.denominator)
            self.runs[OURS] = lambda: launch_rational.fill(y, self.x, *coefficients, "abs_sum", True)
            self.runs["torch"] = lambda: torch.ops.aten.gelu.out(self.x, out=y)
            self.runs["copy"] = lambda: y.copy_(self.x)
            self._bind("onnxruntime rational", lowered(self.module, self.x), threads)
        else:
            self.runs[OURS] = self._ours(self.module)
            self.runs["rational, frozen"] = self._ours(self.module, frozen=True)
            turned = nn.Linear(layer.in_features, channels)
            turned.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
            turned.bias = layer.bias
            self.runs["rational, W stored [K, C]"] = self._ours(Rational(turned))
            self.runs["two steps"] = lambda: self.module(self.x)
            self.runs["torch"] = lambda: F.gelu(layer(self.x))
        for name, erf in zip(GELU, (False, True), strict=True):
            self._bind(name, gelu_model(layer, channels, erf), threads, (1,) if erf else ())

    def _ours(self, module: nn.Module, frozen: bool = False) -> Run:
        compiled = registry.backend("cpu").lower(graphopt.load(module, (self.x,)), frozen=frozen)
        return lambda: compiled(self.x)

    def _bind(self, name: str, model: onnx.ModelProto, threads: int, leading: tuple[int, ...] = ()) -> None:
        x, y = (v.reshape(*leading, *v.shape) for v in (self.x.numpy(), self.y))
        self.runs[name], self.operators[name] = session(model, x, y, threads)

    def errors(self) -> dict[str, float]:
        """The largest error of each against its own function in fp64.

        Raises:
            AssertionError: one of the rational ones is off by more than fp32 explains.
        """
        few = torch.cat([self.x[:64], self.x[-64:]]).double()
        z = few if self.layer is None else F.linear(few, self.layer.weight.double(), self.layer.bias.double())
        ours = reference(z, self.module.numerator.double(), self.module.denominator.double(), "abs_sum", True)
        found = {}
        for name, run in self.runs.items():
            if name == "copy":
                continue
            self.y.fill(np.nan)
            given = run()
            y = given if isinstance(given, torch.Tensor) else torch.from_numpy(self.y)
            rational = "rational" in name or name == "two steps"
            right = ours if rational else F.gelu(z)
            found[name] = float((torch.cat([y[:64], y[-64:]]) - right).abs().max())
            assert not rational or found[name] < 1e-5, f"{name} is off by {found[name]}"
        return found


def compare(model: str, rows: int, threads: int, alone: bool) -> dict[str, Any]:
    """Medians, quartiles and best times; ratios to the faster GELU of onnxruntime, round by round and best to best."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    inner, channels = LAYERS[model]
    contest = Contest(rows, None if alone else nn.Linear(inner, channels), channels, threads)
    result: dict[str, Any] = {"model": model, "rows": rows, "threads": threads, "alone": alone}
    result["error"], result["operators"] = contest.errors(), contest.operators
    taken = on_cpu(contest.runs, ROUNDS)
    result["ms"] = {name: [float(q) * 1e3 for q in np.percentile(t, [25, 50, 75])] for name, t in taken.items()}
    result["best_ms"] = {name: min(t) * 1e3 for name, t in taken.items()}
    best = min(GELU, key=lambda name: result["ms"][name][1])
    result["ratio"] = {n: [float(q) for q in _ratio(t, taken[best])] for n, t in taken.items() if n not in GELU}
    least = min(result["best_ms"][name] for name in GELU)
    result["best_ratio"] = {n: ms / least for n, ms in result["best_ms"].items() if n not in GELU}
    return result


def _ratio(first: list[float], second: list[float]) -> Any:
    return np.percentile(np.array(first) / np.array(second), [25, 50, 75])


def run() -> None:
    """Time every shape with one thread and with two."""
    before = torch.get_num_threads()
    results = []
    with torch.no_grad():
        for alone in (False, True):
            table = []
            for threads in THREADS:
                for model in LAYERS:
                    for rows in ROWS:
                        result = compare(model, rows, threads, alone)
                        results.append(result)
                        ours = [f"{m:.2f} ({a:.2f}-{b:.2f})" for a, m, b in result["ratio"].values()]
                        best = result["best_ratio"][OURS]
                        table.append([threads, model, rows, *(ms[1] for ms in result["ms"].values()), *ours, best])
                        print(table[-1], file=sys.stderr)
            columns = ["threads", "layer", "rows", *(f"{name} ms" for name in result["ms"])]
            columns += [*(f"{name} / Gelu" for name in result["ratio"]), "best of each"]
            title = "The activation alone" if alone else "A linear layer and its activation"
            show(f"{title}, fp32; ratios to the faster Gelu of onnxruntime, with quartiles", columns, table)
    torch.set_num_threads(before)
    store("rational_cpu", {"omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"), "rows": results})
