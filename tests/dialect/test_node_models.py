"""Shapes without data: the node models of the ONNX backend suite on the meta device.

That the functions compute the published outputs is for tests/conformance to say.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.case.test_case import TestCase
from torch import Tensor

from graphopt.dialect import Operator, lookup

BIT_PATTERNS = {
    "bfloat16": (np.int16, torch.bfloat16),
    "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn),
    "float8_e4m3fnuz": (np.uint8, torch.float8_e4m3fnuz),
    "float8_e5m2": (np.uint8, torch.float8_e5m2),
    "float8_e5m2fnuz": (np.uint8, torch.float8_e5m2fnuz),
    "float8_e8m0fnu": (np.uint8, torch.float8_e8m0fnu),
}
# Types of fewer than 8 bits travel in a wider one.
CARRIERS = {
    "int4": np.int8,
    "int2": np.int8,
    "uint4": np.uint8,
    "uint2": np.uint8,
    "float4_e2m1fn": ml_dtypes.float8_e4m3fn,
}


def as_tensor(value: Any) -> Tensor:
    """numpy to torch, by bit pattern for the types numpy lacks; TypeError for text and lists."""
    if value is None or isinstance(value, list):
        raise TypeError("no tensor")
    array = numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)
    if array.dtype.name in CARRIERS:
        array = array.astype(CARRIERS[array.dtype.name])
    if array.dtype.name in BIT_PATTERNS:
        pattern, dtype = BIT_PATTERNS[array.dtype.name]
        return torch.from_numpy(array.view(pattern).copy()).view(dtype)
    return torch.from_numpy(array.copy())


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, onnx.TensorProto):
            return as_tensor(value)
        if isinstance(value, bytes):
            return value.decode()
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return {name: value if isinstance(value, (int, float)) else plain(value) for name, value in values.items()}


def entries(model: onnx.ModelProto) -> list[Operator] | None:
    """The function of each node, or None when one is outside the table or has bodies, which need a graph to run."""
    if any(a.type == onnx.AttributeProto.GRAPH for node in model.graph.node for a in node.attribute):
        return None
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    found = [lookup(node.domain, node.op_type, opsets.get(node.domain, 1)) for node in model.graph.node]
    return None if None in found else found


def declared_types(model: onnx.ModelProto) -> dict[str, int]:
    """The element type code of each value whose type the model states."""
    values = [*model.graph.input, *model.graph.value_info, *model.graph.output]
    codes = {value.name: value.type.tensor_type.elem_type for value in values}
    return codes | {init.name: init.data_type for init in model.graph.initializer}


def call(
    entry: Operator, node: onnx.NodeProto, inputs: list[Tensor | None], codes: dict[str, int]
) -> tuple[Tensor | None, ...]:
    extra: dict[str, Any] = {"outputs": len(node.output)} if entry.counted else {}
    if entry.typed:
        extra["types"] = tuple(codes.get(name, 0) for name in node.input)
    result = entry.function(*inputs, **attributes(node), **extra)
    return result if isinstance(result, tuple) else (result,)


def evaluate(
    model: onnx.ModelProto,
    inputs: list[Tensor],
    prepare: Callable[[Operator, list[Tensor | None]], list[Tensor | None]] = lambda entry, inputs: inputs,
) -> list[Tensor]:
    values: dict[str, Tensor | None] = {"": None}
    values |= {init.name: as_tensor(init) for init in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in values]
    values |= dict(zip(names, inputs, strict=True))
    codes = declared_types(model)
    for node, entry in zip(model.graph.node, entries(model) or [], strict=True):
        results = call(entry, node, prepare(entry, [values[name] for name in node.input]), codes)
        values |= {name: x for name, x in zip(node.output, results, strict=False) if name}
    found = [values[value.name] for value in model.graph.output]
    assert all(isinstance(value, Tensor) for value in found)
    return [value for value in found if value is not None]


def cases() -> Iterator[TestCase]:
    with warnings.catch_warnings():
        # The suite computes its own NaN and infinite expectations with numpy.
        warnings.simplefilter("ignore", RuntimeWarning)
        yield from collect_testcases()


def data_of(case: TestCase) -> tuple[list[Tensor], list[Tensor]] | None:
    """The first data set as tensors, or None when it holds strings or lists."""
    try:
        inputs, outputs = case.data_sets[0]
        return [as_tensor(value) for value in inputs], [as_tensor(value) for value in outputs]
    except (TypeError, ValueError):
        return None


CASES = {case.name: case for case in cases()}


def inside(case: TestCase) -> bool:
    return entries(case.model) is not None and data_of(case) is not None


INSIDE = sorted(name for name, case in CASES.items() if inside(case))


def on_meta(entry: Operator, inputs: list[Tensor | None]) -> list[Tensor | None]:
    """All inputs on the meta device as soon as one is, but for those whose values are read."""
    if not any(x is not None and x.is_meta for x in inputs):
        return inputs
    return [x if x is None or i in entry.values else x.to("meta") for i, x in enumerate(inputs)]


def read_values(model: onnx.ModelProto) -> set[str]:
    """The names whose values some function reads."""
    nodes = zip(model.graph.node, entries(model) or [], strict=True)
    return {name for node, entry in nodes for i, name in enumerate(node.input) if i in entry.values}


@pytest.mark.parametrize("name", INSIDE)
def test_shapes_on_meta(name: str) -> None:
    model = CASES[name].model
    inputs, expected = data_of(CASES[name])
    read = read_values(model)
    names = [value.name for value in model.graph.input]
    data = [x.dtype.is_floating_point and n not in read for x, n in zip(inputs, names, strict=True)]
    if not any(data):
        pytest.skip("no floating point input but those whose values are read")
    shapes = [x.to("meta") if is_data else x for x, is_data in zip(inputs, data, strict=True)]
    for found, wanted in zip(evaluate(model, shapes, on_meta), expected, strict=True):
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)


def test_the_table_covers_the_suite() -> None:
    """A function that no longer registers would silently shrink what the other tests run."""
    assert len(INSIDE) > 1500
