"""Operators that run on onnxruntime, with values of types that numpy does not have."""

from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto as P
from onnx import TypeProto, helper

from graphopt import GraphOptError
from graphopt.opaque import OpaqueOperator

IMPORTS = [helper.make_opsetid("", 25)]
FLOAT = helper.make_tensor_type_proto(P.FLOAT, None)
INTEGERS = helper.make_sequence_type_proto(helper.make_tensor_type_proto(P.INT64, None))


def run(name: str, *values: Any, types: tuple[int, ...] = (), protos: tuple[TypeProto | None, ...] = ()) -> Any:
    node = helper.make_node(name, [f"x{i}" for i in range(len(values))], ["y"])
    return OpaqueOperator(node, (), IMPORTS, [], {}, types, protos)(*values)


FLOATS = [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_narrow_floats(dtype: torch.dtype) -> None:
    x = torch.tensor([1.5, -2.25, float("inf"), float("nan")]).to(dtype)
    found = run("Reshape", x, torch.tensor([2, 2]))
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.to(torch.float32), x.to(torch.float32).reshape(2, 2), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("code", [P.INT4, P.UINT4, P.INT2, P.UINT2], ids=P.DataType.Name)
def test_packed_integers(code: int) -> None:
    """Transpose has kernels of these types; for int8 it would run all the same."""
    signed = P.DataType.Name(code).startswith("I")
    x = torch.tensor([[1, 0, 1], [1, 1, 0]], dtype=torch.int8 if signed else torch.uint8)
    x = -x if signed else x
    found = run("Transpose", x, types=(code,))
    assert found.dtype == x.dtype
    assert torch.equal(found, x.T)


def test_the_known_type_decides() -> None:
    x, scale, point = torch.tensor([1.0, 100.0, -100.0]), torch.tensor(1.0), torch.tensor(0, dtype=torch.int8)
    assert run("QuantizeLinear", x, scale, point).tolist() == [1, 100, -100]
    assert run("QuantizeLinear", x, scale, point, types=(0, 0, P.INT4)).tolist() == [1, 7, -8]
    declared = (None, None, helper.make_tensor_type_proto(P.INT4, []))
    assert run("QuantizeLinear", x, scale, point, protos=declared).tolist() == [1, 7, -8]
    # A pass may have replaced the int4 zero point by one of another type.
    assert run("QuantizeLinear", x, scale, point.to(torch.uint8), types=(0, 0, P.INT4)).tolist() == [1, 100, 0]


def test_empty_sequences() -> None:
    wanted = torch.arange(3)
    for known in ({"types": (P.INT64,)}, {"protos": (INTEGERS, None)}):
        found = run("SequenceInsert", [], wanted, **known)
        assert len(found) == 1
        assert torch.equal(found[0], wanted)


def test_sequences_of_several_shapes() -> None:
    found = run("SequenceAt", [torch.ones(2), torch.ones(3, 4)], torch.tensor(1))
    assert torch.equal(found, torch.ones(3, 4))


@pytest.mark.parametrize(
    ("kind", "value", "has"),
    [
        (helper.make_optional_type_proto(FLOAT), None, False),
        (helper.make_optional_type_proto(FLOAT), torch.ones(2), True),
        (FLOAT, torch.ones(2), True),
        (helper.make_optional_type_proto(INTEGERS), [torch.arange(2)], True),
        (helper.make_optional_type_proto(INTEGERS), [], True),
        (helper.make_optional_type_proto(INTEGERS), None, False),
        (None, None, False),
    ],
)
def test_optionals(kind: TypeProto | None, value: Any, has: bool) -> None:
    assert run("OptionalHasElement", value, protos=(kind,)).item() is has


def test_text() -> None:
    x = np.array(["a", "é"], dtype=object)
    assert run("Identity", x).tolist() == ["a", "é"]


def test_a_type_without_kernels() -> None:
    x = torch.ones(2).to(torch.float8_e4m3fn)
    with pytest.raises(GraphOptError, match="onnxruntime cannot run it either"):
        run("Transpose", x, types=(P.FLOAT4E2M1,))
