"""The node models of the ONNX backend suite, evaluated by the dialect's functions node by node."""

import fnmatch
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.case.test_case import TestCase
from onnx.backend.test.loader import load_model_tests
from torch import Tensor

from graphopt.dialect import Operator, lookup

# The tolerance of the ONNX backend suite, with room for one float32 rounding at zero; like the suite,
# bfloat16 is given two of its own units.
RTOL, ATOL = 1e-3, 1e-5
EXPECTED_FAILURES = Path(__file__).with_name("expected_failures.txt")

BIT_PATTERNS = {
    "bfloat16": (np.int16, torch.bfloat16),
    "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn),
    "float8_e4m3fnuz": (np.uint8, torch.float8_e4m3fnuz),
    "float8_e5m2": (np.uint8, torch.float8_e5m2),
    "float8_e5m2fnuz": (np.uint8, torch.float8_e5m2fnuz),
}


def as_tensor(value: Any) -> Tensor:
    """numpy to torch, by bit pattern for the types numpy lacks; TypeError where torch lacks it too."""
    array = numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)
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
    """The function of each node, or None when one is outside the table."""
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    found = [lookup(node.domain, node.op_type, opsets.get(node.domain, 1)) for node in model.graph.node]
    return None if None in found else found


def call(entry: Operator, node: onnx.NodeProto, inputs: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    counted = {"outputs": len(node.output)} if entry.counted else {}
    result = entry.function(*inputs, **attributes(node), **counted)
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
    for node, entry in zip(model.graph.node, entries(model) or [], strict=True):
        results = call(entry, node, prepare(entry, [values[name] for name in node.input]))
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
    """The first data set as tensors, or None when it holds strings, lists, or packed types."""
    try:
        inputs, outputs = case.data_sets[0]
        return [as_tensor(value) for value in inputs], [as_tensor(value) for value in outputs]
    except (TypeError, ValueError):
        return None


def expected_failures() -> dict[str, str]:
    lines = [line.partition(" - ") for line in EXPECTED_FAILURES.read_text().splitlines()]
    return {pattern.strip(): reason.strip() for pattern, _, reason in lines if reason}


CASES = {case.name: case for case in cases()}
FAILURES = expected_failures()


def reason_of(name: str) -> str | None:
    return next((reason for pattern, reason in FAILURES.items() if fnmatch.fnmatchcase(name, pattern)), None)


def inside(case: TestCase) -> bool:
    return entries(case.model) is not None and data_of(case) is not None


INSIDE = sorted(name for name, case in CASES.items() if inside(case))


def parameters() -> list[Any]:
    marks = {name: [pytest.mark.xfail(reason=reason_of(name))] if reason_of(name) else [] for name in INSIDE}
    return [pytest.param(name, marks=marks[name], id=name) for name in INSIDE]


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    a, b = (x.to(torch.float64) if not x.dtype.is_complex else x for x in (found, expected))
    rtol = 2**-6 if found.dtype == torch.bfloat16 else RTOL
    torch.testing.assert_close(a, b, rtol=rtol, atol=ATOL, equal_nan=True)


@pytest.mark.parametrize("name", parameters())
def test_published_outputs(name: str) -> None:
    inputs, expected = data_of(CASES[name])
    for found, wanted in zip(evaluate(CASES[name].model, inputs), expected, strict=True):
        assert_same(found, wanted)


def on_meta(entry: Operator, inputs: list[Tensor | None]) -> list[Tensor | None]:
    """All inputs on the meta device as soon as one is, but for those whose values are read."""
    if not any(x is not None and x.is_meta for x in inputs):
        return inputs
    return [x if x is None or i in entry.values else x.to("meta") for i, x in enumerate(inputs)]


def read_values(model: onnx.ModelProto) -> set[str]:
    """The names whose values some function reads."""
    nodes = zip(model.graph.node, entries(model) or [], strict=True)
    return {name for node, entry in nodes for i, name in enumerate(node.input) if i in entry.values}


@pytest.mark.parametrize("name", [name for name in INSIDE if reason_of(name) is None])
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


def test_expected_failures_name_models() -> None:
    for pattern in FAILURES:
        assert fnmatch.filter(INSIDE, pattern), f"{pattern} names no model"


CONVERTED = [
    case
    for kind in ("pytorch-converted", "pytorch-operator", "simple")
    for case in load_model_tests(kind=kind)
    if case.model_dir is not None
]


@pytest.mark.parametrize("case", CONVERTED, ids=lambda case: case.name)
def test_models_of_early_opsets(case: TestCase) -> None:
    folder = Path(case.model_dir)
    model = onnx.load(folder / "model.onnx")
    if entries(model) is None:
        pytest.skip("has an operator outside the table")
    data = folder / "test_data_set_0"

    def read(kind: str) -> list[Tensor]:
        files = sorted(data.glob(f"{kind}_*.pb"), key=lambda file: int(file.stem.rpartition("_")[2]))
        return [as_tensor(onnx.load_tensor(file)) for file in files]

    for found, wanted in zip(evaluate(model, read("input")), read("output"), strict=True):
        assert_same(found, wanted)
