"""What the pass believes to know about each value, against the values themselves."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import sympy
import torch
from onnx import numpy_helper
from onnx.backend.test.case.node import collect_testcases
from torch import fx

from graphopt.api import load
from graphopt.errors import GraphOptError
from graphopt.execute import execute
from graphopt.frontends.onnx import load_onnx
from graphopt.graph import Graph
from graphopt.onnxfile import OnnxFile
from graphopt.onnxfile.tensors import from_numpy
from graphopt.passes.cleanup.checking import fingerprint
from graphopt.passes.cleanup.dims import broadcast, equal, quotient, symbol
from graphopt.passes.cleanup.facts import Fact, Facts
from graphopt.passes.cleanup.folding import Folder

N, M = symbol("n"), symbol("m")


def violations(graph: Graph, values: tuple[Any, ...]) -> list[Any]:
    """Facts that do not hold for these inputs; every symbol is an axis of a value that was computed before."""
    facts = Facts(graph, Folder(1 << 20, inexact=False))
    for node in graph.nodes:
        facts.learn(node)
    sizes: dict[sympy.Symbol, int] = {}
    wrong: list[Any] = []

    def number(dim: Any) -> int:
        return dim if isinstance(dim, int) else int(dim.subs({s: sizes[s] for s in dim.free_symbols}))

    def compare(node: fx.Node, fact: Fact, value: Any) -> None:
        if not isinstance(value, torch.Tensor):
            return
        found = {
            "dtype": fact.dtype in (None, value.dtype),
            "shape": fact.shape is None or tuple(map(number, fact.shape)) == tuple(value.shape),
            "elements": fact.elements is None or list(map(number, fact.elements)) == value.reshape(-1).tolist(),
            "value": fact.value is None or fingerprint(fact.value) == fingerprint(value),
        }
        wrong.extend((node.format_node(), what, fact, value) for what, holds in found.items() if not holds)

    def observe(node: fx.Node, value: Any) -> None:
        first = value[0] if isinstance(value, (tuple, list)) and value else value
        if isinstance(first, torch.Tensor):
            sizes.update({symbol(f"{node.name}#{i}"): size for i, size in enumerate(first.shape)})
        compare(node, facts[node], value)
        for part, each in zip(facts[node].parts, value if isinstance(value, tuple) else (), strict=False):
            compare(node, part, each)

    with torch.no_grad():
        execute(graph, values, observe)
    return wrong


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
def test_node_models(symbolic: bool) -> None:
    checked = 0
    for case in collect_testcases(None):
        if case.model is None:
            continue
        model = onnx.ModelProto()
        model.CopyFrom(case.model)
        dims = [d for i in model.graph.input for d in i.type.tensor_type.shape.dim]
        for index, dim in enumerate(dims if symbolic else ()):
            dim.dim_param = f"d{index % 3}"
        try:
            graph = load_onnx(OnnxFile(model))
            values = [v if isinstance(v, np.ndarray) else numpy_helper.to_array(v) for v in case.data_sets[0][0]]
            feeds = dict(zip((i.name for i in model.graph.input), values, strict=True))
            flat = tuple(from_numpy(v).reshape(v.shape) for v in graph.ordered(feeds))
            wrong = violations(graph, flat)
        except (GraphOptError, RuntimeError, NotImplementedError, AttributeError, TypeError, ValueError):
            continue  # not runnable here: sequences, sparse tensors, operators that no runtime has
        assert wrong == [], case.name
        checked += 1
    assert checked > 1300


def test_zoo(shared_data: Path) -> None:
    for folder in ("zoo", "zoo_extra"):
        index = shared_data / folder / "index.json"
        for entry in json.loads(index.read_text()) if index.exists() else ():
            graph = load(index.parent / entry["file"])
            rng = np.random.default_rng(entry["seed"])
            feeds = {
                s["name"]: np.asarray(
                    rng.standard_normal(s["shape"]) if s["range"] == "normal" else rng.integers(*s["range"], s["shape"])
                ).astype(s["dtype"])
                for s in entry["inputs"]
                if s["dtype"] != "bool"
            }
            try:
                values = tuple(from_numpy(v) for v in graph.ordered(feeds))
                wrong = violations(graph, values)
            except (GraphOptError, RuntimeError):
                continue
            assert wrong == [], entry["file"]


SHAPES = """(float[N, S, 12] x, int64[K] i, float[S, N] w) => (float[A, B] y) <int64[1] zero = {0}, int64[1] one = {1},
    int64[1] two = {2}, int64[1] m1 = {-1}, int64[3] t = {0, 0, -1}, int64[1] big = {2147483647}> {
    h = Shape(x) n = Gather(h, zero) s = Slice(h, one, two) ns = Mul(n, s) j = Concat<axis = 0>(ns, m1)
    a = Reshape(x, j) b = Shape(a) c = Reshape(x, t) d = Shape(c) k = Concat<axis = 0>(s, n, m1) e = Reshape(x, k)
    f = Shape(e) u = Unsqueeze(w, one) v = Transpose(u) o = Shape(v) g = Slice(x, one, big, one) p = Shape(g)
    q = Slice(x, zero, big, one) r = Shape(q) aa = ReduceMax(x, one) bb = Shape(aa) cc = MatMul(v, w) dd = Shape(cc)
    ee = Cast<to = 6>(h) ff = ReduceProd<keepdims = 0>(ee) gg = Equal(h, m1) hh = Where(gg, one, h)
    ii = ConstantOfShape(hh) jj = Expand(x, hh) kk = Flatten<axis = 2>(x) ll = Shape(kk) mm = Add(ns, n)
    nn = Div(mm, n) oo = Squeeze(ns, zero) y = Transpose(w) }"""


@pytest.mark.parametrize("sizes", [(2, 3), (3, 2), (1, 1), (1, 4), (5, 1), (2, 2)])
def test_shape_arithmetic_at_many_sizes(sizes: tuple[int, int]) -> None:
    n, s = sizes
    graph = load_onnx(OnnxFile(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 18]> g {SHAPES}')))
    assert violations(graph, (torch.randn(n, s, 12), torch.arange(2), torch.randn(s, n))) == []


@pytest.mark.parametrize("sizes", [(0, 3), (2, 0), (0, 0), (1, 0)])
def test_reshapes_of_empty_tensors(sizes: tuple[int, int]) -> None:
    text = """(float[N, S] x) => (float[A] y) <int64[1] one = {1}, int64[1] two = {2}, int64[2] t = {0, 0}> {
        h = Shape(x) a = Reshape(x, h) b = Shape(a) c = Reshape(x, t) d = Shape(c) n = Slice<>(h, one, two)
        e = Concat<axis = 0>(h, one) f = Reshape(x, e) g = Shape(f) y = Reshape(x, n) }"""
    text = text.replace("Slice<>", "Slice").replace("y = Reshape(x, n)", "y = Neg(x)")
    graph = load_onnx(OnnxFile(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 18]> g {text}')))
    assert violations(graph, (torch.randn(sizes),)) == []


def test_a_quotient_is_whole_or_unknown() -> None:
    assert quotient(12, 4) == 3
    assert quotient(12, 5) is None
    assert quotient(12, 0) is None
    assert quotient(6 * N * M, 3 * N) == 2 * M
    assert quotient(N, 2) is None
    assert quotient(N - M, 2) is None
    assert quotient(2 * N + 4, 2) == N + 2


def test_sizes_are_equal_different_or_undecided() -> None:
    assert equal(N * M, M * N) is True
    assert equal(N, -1) is False
    assert equal(N, 0) is None
    assert equal(N, M) is None


def test_broadcast_knows_what_it_does_not_know() -> None:
    unknown = object()

    def joint(*shapes: Any) -> Any:
        return broadcast(shapes, lambda axis: unknown)

    assert joint((N, 1), (4,)) == (N, 4)
    assert joint((N,), (4,)) == (4,)  # N is 1 or 4
    assert joint((N,), (M,)) == (unknown,)
    assert joint((N,), (0,)) == (0,)
    assert joint((N,), None) is None
