"""What `Graph.run` takes and returns, for every kind of value."""

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto as P
from onnx import helper

from graphopt import GraphOptError
from graphopt.frontends.onnx import load_onnx
from graphopt.graph import Graph
from graphopt.onnxfile import OnnxFile


def graph_of(node: onnx.NodeProto, inputs: list[Any], outputs: list[Any], opset: int = 25) -> Graph:
    """A model of one node; a type is an element type code or a whole type."""

    def declared(name: str, kind: Any) -> onnx.ValueInfoProto:
        if isinstance(kind, onnx.TypeProto):
            return helper.make_value_info(name, kind)
        return helper.make_tensor_value_info(name, kind, [3])

    graph = helper.make_graph(
        [node],
        "one",
        [declared(name, kind) for name, kind in zip(node.input, inputs, strict=True)],
        [declared(name, kind) for name, kind in zip(node.output, outputs, strict=True)],
    )
    return load_onnx(OnnxFile(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])))


def identity(kind: Any) -> Graph:
    return graph_of(helper.make_node("Identity", ["x"], ["y"]), [kind], [kind])


PACKED = {
    P.INT4: ml_dtypes.int4,
    P.UINT4: ml_dtypes.uint4,
    P.INT2: ml_dtypes.int2,
    P.UINT2: ml_dtypes.uint2,
    P.FLOAT4E2M1: ml_dtypes.float4_e2m1fn,
}


@pytest.mark.parametrize("code", PACKED, ids=P.DataType.Name)
def test_packed_types(code: int) -> None:
    wanted = np.array([1, 0, 1], PACKED[code])
    for given in (
        wanted,
        wanted.astype({"i": np.int8, "u": np.uint8}.get(wanted.dtype.name[0], ml_dtypes.float8_e4m3fn)),
    ):
        found = identity(code).run({"x": given})["y"]
        assert found.dtype == wanted.dtype
        assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu])
def test_types_of_ml_dtypes(kind: Any) -> None:
    wanted = np.array([1, 2, 4], kind)
    found = identity(helper.np_dtype_to_tensor_dtype(np.dtype(kind))).run({"x": wanted})["y"]
    assert found.dtype == wanted.dtype
    assert found.tolist() == wanted.tolist()


def test_a_cast_returns_the_declared_type() -> None:
    node = helper.make_node("Cast", ["x"], ["y"], to=P.INT4)
    found = graph_of(node, [P.FLOAT], [P.INT4]).run({"x": np.float32([1, -8, 9])})["y"]
    assert found.dtype == ml_dtypes.int4
    assert found.astype(int).tolist() == [1, -8, -7]


def test_text() -> None:
    for given in (np.array(["a", "b", "c"]), np.array(["a", "b", "c"], dtype=object)):
        found = identity(P.STRING).run({"x": given})["y"]
        assert found.dtype == object
        assert found.tolist() == ["a", "b", "c"]


def test_a_number_of_numpy_is_an_array_of_no_axes() -> None:
    scalar = helper.make_tensor_type_proto(P.FLOAT, [])
    found = identity(scalar).run({"x": np.float32(3)})["y"]
    assert (found.shape, found.dtype, float(found)) == ((), np.float32, 3.0)


def test_sequences() -> None:
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(P.FLOAT, None))
    found = identity(kind).run({"x": [np.float32([1, 2]), np.float32([3])]})["y"]
    assert [item.tolist() for item in found] == [[1, 2], [3]]
    assert identity(kind).run({"x": []})["y"] == []
    with pytest.raises(GraphOptError, match="but an array was given"):
        identity(kind).run({"x": np.zeros(3)})


def test_an_empty_optional() -> None:
    kind = helper.make_optional_type_proto(helper.make_tensor_type_proto(P.FLOAT, [3]))
    assert identity(kind).run({"x": None})["y"] is None


@pytest.mark.parametrize(
    ("code", "given", "match"),
    [
        (P.INT4, np.int8([1, 2, 8]), r"expected input x: int4\[3\], but the given array has values outside of int4"),
        (P.UINT2, np.uint8([1, 2, 4]), "values outside of uint2"),
        (P.FLOAT4E2M1, np.array([1, 2, 5], ml_dtypes.float8_e4m3fn), "values outside of float4e2m1"),
        (P.INT4, np.uint8([1, 2, 3]), "but the given array is uint8"),
        (P.INT4, np.array([1, 2, 3], ml_dtypes.uint4), "but the given array is uint4"),
        (P.INT4, np.int8([1, 2]), r"but the given array has shape \[2\]"),
        (P.INT8, np.array([1, 2, 3], ml_dtypes.int4), r"expected input x: int8\[3\], but the given array is int4"),
        (P.FLOAT, np.array(["a", "b", "c"]), "but the given array is string"),
        (P.STRING, np.float32([1, 2, 3]), r"expected input x: string\[3\], but the given array is float32"),
        (P.STRING, torch.zeros(3), "but the given array is float32"),
        (P.FLOAT, [1.0, 2.0, 3.0], r"expected input x: float32\[3\], but a list was given"),
        (P.FLOAT, None, "but nothing was given"),
        (P.FLOAT, np.zeros((3, 1), np.float32), r"but the given array has shape \[3, 1\]"),
    ],
)
def test_wrong_values(code: int, given: Any, match: str) -> None:
    with pytest.raises(GraphOptError, match=match) as caught:
        identity(code).run({"x": given})
    assert "\n" not in str(caught.value)
