"""One view of a node for both dialects."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn

import graphopt
from graphopt import dialect
from graphopt.frontends.onnx import load_onnx
from graphopt.graph import Graph
from graphopt.sites import vocabulary


def aten(function: Any, *inputs: Tensor) -> Graph:
    class Own(nn.Module):
        def forward(self, *values: Tensor) -> Any:
            return function(*values)

    return graphopt.load(Own().eval(), inputs)


def one(function: Any, *inputs: Tensor) -> fx.Node:
    nodes = [n for n in aten(function, *inputs).nodes if n.op == "call_function"]
    assert len(nodes) == 1
    return nodes[0]


X, Y = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
KINDS = {
    "matmul": (torch.matmul, (X, Y)),
    "softmax": (lambda x: torch.softmax(x, -1), (X,)),
    "add": (torch.add, (X, X)),
    "mul": (lambda x: x * 2.0, (X,)),
    "transpose": (lambda x: x.permute(0, 2, 1), (X,)),
    "reshape": (lambda x: x.view(6, 4), (X,)),
    "expand": (lambda x: x.expand(5, 2, 3, 4), (X,)),
    "cast": (lambda x: x.to(torch.float16), (X,)),
    "concat": (lambda x: torch.cat([x, x], 1), (X,)),
    "sdpa": (lambda x: F.scaled_dot_product_attention(x, x, x), (X,)),
    "gelu": (F.gelu, (X,)),
    "layer_norm": (lambda x: F.layer_norm(x, (4,)), (X,)),
    "masked_fill": (lambda x, m: x.masked_fill(m, 0.0), (X, X > 0)),
    "where": (lambda x, m: torch.where(m, x, x), (X, X > 0)),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_aten(name: str) -> None:
    function, inputs = KINDS[name]
    assert vocabulary.kind(one(function, *inputs)) == name


def test_kinds_of_onnx() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    found = {(e.domain, e.name): vocabulary.kind(graph.call_function(e.function, (x,))) for e in dialect.table()}
    assert found["", "MatMul"] == "matmul"
    assert found["", "LayerNormalization"] == "layer_norm"
    assert found["", "ReduceMean"] == "mean"
    assert found["", "IsNaN"] == "isnan"
    assert found["", "Attention"] == "onnx_attention"
    assert found["com.microsoft", "Attention"] == "microsoft_attention"
    assert found["com.microsoft", "FusedMatMul"] == "fused_matmul"
    assert found["", "Gelu"] == found["com.microsoft", "Gelu"] == "gelu"
    assert all(name == name.lower() for name in found.values())


PERMUTATIONS = {
    "permute": (lambda x: x.permute(0, 2, 1), (0, 2, 1)),
    "transpose": (lambda x: x.transpose(-1, 0), (2, 1, 0)),
    "mT": (lambda x: x.mT, (0, 2, 1)),
}


@pytest.mark.parametrize("name", PERMUTATIONS)
def test_permutations(name: str) -> None:
    function, order = PERMUTATIONS[name]
    assert vocabulary.permutation(one(function, X), 3) == order


def model(*nodes: onnx.NodeProto, opset: int = 17, **weights: Any) -> onnx.ModelProto:
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", 4))]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()]
    graph = helper.make_graph(nodes, "g", given, out, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def load(proto: onnx.ModelProto, folder: Path) -> Graph:
    path = folder / "model.onnx"
    onnx.save(proto, path)
    return load_onnx(path)


def named(graph: Graph, name: str) -> fx.Node:
    return next(n for n in graph.nodes if n.meta.get("onnx_name") == name)


def test_constants_are_folded_through_casts_and_layout(tmp_path: Path) -> None:
    graph = load(
        model(
            helper.make_node("Cast", ["w"], ["a"], to=TensorProto.FLOAT),
            helper.make_node("Identity", ["a"], ["b"]),
            helper.make_node("Sqrt", ["b"], ["c"]),
            helper.make_node("Div", ["x", "c"], ["y"]),
            w=np.array([64], np.float16),
        ),
        tmp_path,
    )
    assert vocabulary.scalar(graph, named(graph, "c")) == 8.0
    assert vocabulary.constant(graph, named(graph, "y")) is None
    assert vocabulary.scalar(graph, 3) == 3.0
    assert vocabulary.scalar(graph, named(graph, "x")) is None


def test_what_depends_on_values_and_what_on_sizes_only(tmp_path: Path) -> None:
    graph = load(
        model(
            helper.make_node("Shape", ["x"], ["s"]),
            helper.make_node("ConstantOfShape", ["s"], ["z"]),
            helper.make_node("CastLike", ["z", "x"], ["l"]),
            helper.make_node("Add", ["x", "l"], ["y"]),
        ),
        tmp_path,
    )
    assert not vocabulary.depends_on_values(named(graph, "z"))
    assert not vocabulary.depends_on_values(named(graph, "l"))
    assert vocabulary.depends_on_values(named(graph, "y"))


def test_skipping_what_keeps_the_value(tmp_path: Path) -> None:
    graph = load(
        model(
            helper.make_node("Cast", ["x"], ["a"], to=TensorProto.FLOAT16),
            helper.make_node("Identity", ["a"], ["b"]),
            helper.make_node("Dropout", ["b"], ["c", "m"]),
            helper.make_node("Cast", ["c"], ["d"], to=TensorProto.BOOL),
            helper.make_node("Cast", ["d"], ["y"], to=TensorProto.FLOAT),
        ),
        tmp_path,
    )
    assert vocabulary.skip(named(graph, "c")) is named(graph, "x")
    assert vocabulary.skip(named(graph, "d")) is named(graph, "d")


@pytest.mark.parametrize(("opset", "axis", "expected"), [(11, -1, 1), (11, 0, None), (13, 0, 0), (13, -1, 1)])
def test_the_axis_of_a_softmax(opset: int, axis: int, expected: int | None, tmp_path: Path) -> None:
    graph = load(model(helper.make_node("Softmax", ["x"], ["y"], axis=axis), opset=opset), tmp_path)
    assert vocabulary.softmax_axis(named(graph, "y"), 2) == expected


def test_opaque_nodes_have_a_kind_and_attributes(tmp_path: Path) -> None:
    node = helper.make_node("Strange", ["x"], ["y"], "own", domain="com.example", size=3)
    proto = model(node)
    proto.opset_import.append(helper.make_opsetid("com.example", 1))
    found = named(load(proto, tmp_path), "y")
    assert vocabulary.kind(found) == "com.example::strange"
    assert vocabulary.attributes(found) == {"size": 3}
    assert vocabulary.name_of(found) == "own"
