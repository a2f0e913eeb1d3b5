"""Small models, and passes of a "third party" that the tests register beside our own."""

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner, Result

from graphopt import registry
from graphopt.cli import app

Invoke = Callable[..., Result]

# Rewrites of Relu that need no finder and no training, so that only the command line is under test.
PASSES = '''
"""Passes that the command-line tests register."""

import os
import time
from dataclasses import dataclass
from typing import ClassVar

import torch

from graphopt.rewrite import Equivalence, SitePass, Tolerance
from graphopt.sites import Findings, Refusal, Site


class _Clamp(torch.nn.Module):
    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def forward(self, x):
        return torch.relu(x) + self.shift


@dataclass(frozen=True)
class Soften(SitePass):
    """relu(x)   ->   relu(x) + shift [a "quoted" equation: with brackets]

    The second paragraph.
    """

    name: ClassVar[str] = "soften"
    kind: ClassVar[str] = "activation"
    equivalence: ClassVar[Equivalence] = Equivalence.APPROXIMATE
    needs_calibration: ClassVar[bool] = True

    shift: float = 0.01
    """What is added."""
    limit: float = 10.0
    """Largest relative RMS error that passes."""
    refuse: bool = False
    """Refuse every site."""
    wait: float = 0.0
    """Seconds to sleep while fitting."""

    def __post_init__(self):
        if self.limit < 0:
            raise ValueError(f"expected limit to be at least 0, got {self.limit}")

    def find(self, graph):
        sites, refusals = [], []
        for node in graph.nodes:
            origin = node.meta.get("onnx")
            if origin is not None and origin.proto.op_type == "Relu":
                sites.append(Site(origin.proto.name, node, (node,), tuple(node.all_input_nodes)))
            if origin is not None and origin.proto.op_type == "Sigmoid":
                refusals.append(Refusal("activation", origin.proto.name, "a sigmoid has no corner to soften"))
        return Findings(tuple(sites), tuple(refusals))

    def check(self, site):
        return "option refuse is set" if self.refuse else None

    def tolerance(self, dtype):
        return Tolerance(self.limit, "option limit")

    def build(self, site, context):
        return _Clamp(self.shift)

    def fit(self, replacements, context):
        if "CLITEST_MARKER" in os.environ:  # tells a test in another process that the waiting starts
            open(os.environ["CLITEST_MARKER"], "w").close()
        for _ in context.track(range(10), 10, "Waiting"):
            time.sleep(self.wait / 10)
'''


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the module of the third party."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "clitest_passes.py").write_text(PASSES)
    return folder


@pytest.fixture
def soften(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The third party's pass, registered beside ours, and a broken one."""
    monkeypatch.syspath_prepend(str(plugin))
    entries = registry._entries

    def both(group: str) -> dict[str, metadata.EntryPoint]:
        if group != registry.PASSES:
            return entries(group)
        extra = {
            "soften": metadata.EntryPoint("soften", "clitest_passes:Soften", group),
            "broken": metadata.EntryPoint("broken", "clitest_missing:Broken", group),
        }
        return {**entries(group), **extra}

    monkeypatch.setattr(registry, "_entries", both)
    yield importlib.import_module("clitest_passes").Soften
    sys.modules.pop("clitest_passes", None)


@pytest.fixture
def invoke() -> Invoke:
    """Run a command line in this process."""
    runner = CliRunner()

    def run(*args: Any) -> Result:
        return runner.invoke(app, [str(arg) for arg in args])

    return run


@pytest.fixture
def refused(invoke: Invoke) -> Callable[..., str]:
    """Run a command line that has to fail, and return its one sentence."""

    def run(*args: Any, code: int = 2) -> str:
        result = invoke(*args)
        lines = result.stderr.splitlines()
        assert result.exit_code == code, result.output
        assert len(lines) == 1, result.output
        assert lines[0].startswith("error: ")
        assert "Traceback" not in result.output
        return lines[0]

    return run


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def rejects(refused: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """As `refused`, and the folder of the test stays as it was."""

    def run(*args: Any, code: int = 2) -> str:
        before = listing(tmp_path)
        sentence = refused(*args, code=code)
        assert listing(tmp_path) == before
        return sentence

    return run


def relu_net(*, weights: Sequence[float] = (0.5, -0.25), sigmoid: bool = True) -> onnx.ModelProto:
    """x [batch, 2] -> MatMul, Relu, MatMul, Relu, Sigmoid -> y."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"], name="corner_1"),
        helper.make_node("MatMul", ["b", "w"], ["c"], name="second"),
        helper.make_node("Relu", ["c"], ["d" if sigmoid else "y"], name="corner_2"),
    ]
    if sigmoid:
        nodes.append(helper.make_node("Sigmoid", ["d"], ["y"], name="last"))
    weight = np.array([[weights[0], 1.0], [1.0, weights[1]]], np.float32)
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="tests")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small model in a folder of its own."""
    path = tmp_path / "net.onnx"
    onnx.save(relu_net(), path)
    return path


@pytest.fixture
def mlp_file(tmp_path: Path) -> Path:
    """x [batch, 4] -> Gemm, Gelu, Gemm -> y."""
    rng = np.random.default_rng(0)
    weights = {"w1": (4, 8), "b1": (8,), "w2": (8, 4), "b2": (4,)}
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["a"], name="up"),
        helper.make_node("Gelu", ["a"], ["b"], name="act"),
        helper.make_node("Gemm", ["b", "w2", "b2"], ["y"], name="down"),
    ]
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), n) for n, shape in weights.items()],
    )
    path = tmp_path / "mlp.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The same with other weights."""
    path = tmp_path / "other.onnx"
    onnx.save(relu_net(weights=(0.4, -0.3)), path)
    return path


def attention_net(
    *, batch: int | str = "batch", length: int | str = "seq", heads: int = 2, width: int = 8
) -> onnx.ModelProto:
    """One self-attention as PyTorch's exporter writes it: x [batch, seq, width] -> y."""
    rng = np.random.default_rng(0)
    size = width // heads
    weights = [
        numpy_helper.from_array(rng.normal(size=(width, width)).astype(np.float32) / width**0.5, f"w{n}")
        for n in "qkvo"
    ]
    weights.append(numpy_helper.from_array(np.array([0, 0, heads, size]), "split"))
    weights.append(numpy_helper.from_array(np.array([0, 0, width]), "join"))
    weights.append(numpy_helper.from_array(np.array(size**-0.5, np.float32), "scale"))
    nodes = []
    for n in "qkv":
        order = [0, 2, 3, 1] if n == "k" else [0, 2, 1, 3]
        nodes += [
            helper.make_node("MatMul", ["x", f"w{n}"], [f"{n}_flat"], name=f"/{n}/MatMul"),
            helper.make_node("Reshape", [f"{n}_flat", "split"], [f"{n}_split"], name=f"/{n}/Reshape"),
            helper.make_node("Transpose", [f"{n}_split"], [n], name=f"/{n}/Transpose", perm=order),
        ]
    nodes += [
        helper.make_node("MatMul", ["q", "k"], ["scores"], name="/MatMul"),
        helper.make_node("Mul", ["scores", "scale"], ["scaled"], name="/Mul"),
        helper.make_node("Softmax", ["scaled"], ["weights"], name="/Softmax", axis=-1),
        helper.make_node("MatMul", ["weights", "v"], ["heads"], name="/MatMul_1"),
        helper.make_node("Transpose", ["heads"], ["turned"], name="/Transpose", perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["turned", "join"], ["joined"], name="/Reshape"),
        helper.make_node("MatMul", ["joined", "wo"], ["y"], name="/out/MatMul"),
    ]
    shape = [batch, length, width]
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def attention(tmp_path: Path) -> Path:
    """A model with one attention site."""
    path = tmp_path / "attention.onnx"
    onnx.save(attention_net(), path)
    return path
