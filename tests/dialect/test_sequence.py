"""Sequences and optionals of tensors and of strings, against onnxruntime and by hand."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from graphopt.dialect import lookup
from graphopt.errors import GraphOptError

OPSET = 22
CODES = {
    torch.float32: TensorProto.FLOAT,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.uint16: TensorProto.UINT16,
    torch.bool: TensorProto.BOOL,
}


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(seed)).abs().to(dtype)


def words(*shape: int) -> np.ndarray:
    flat = np.empty(int(np.prod(shape)), dtype=object)
    flat[:] = [f"word{i}" if i % 4 else "" for i in range(flat.size)]
    return flat.reshape(shape)


def type_of(value: Any) -> onnx.TypeProto:
    if isinstance(value, list):
        return helper.make_sequence_type_proto(type_of(value[0]))
    code = CODES[value.dtype] if isinstance(value, Tensor) else TensorProto.STRING
    return helper.make_tensor_type_proto(code, [None] * len(value.shape))


def plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.numpy() if isinstance(value, Tensor) else value


def by_onnxruntime(name: str, inputs: list[Any], **options: Any) -> Any:
    names = ["" if x is None else f"x{i}" for i, x in enumerate(inputs)]
    declared = [helper.make_value_info(n, type_of(x)) for n, x in zip(names, inputs, strict=True) if x is not None]
    made = helper.make_node(name, names, ["y"], **options)
    graph = helper.make_graph([made], "one", declared, [onnx.ValueInfoProto(name="y")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, ["CPUExecutionProvider"])
    return session.run(None, {n: plain(x) for n, x in zip(names, inputs, strict=True) if n})[0]


def dialect(name: str, *inputs: Any, **options: Any) -> Any:
    entry = lookup("", name, OPSET)
    return entry.function(*inputs, **options)


def assert_equal(found: Any, expected: Any) -> None:
    found = plain(found)
    assert isinstance(found, list) == isinstance(expected, list)
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
        return
    expected = np.asarray(expected)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert (found == expected).all()


def at(position: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(position, dtype=dtype)


TENSORS = [numbers(2, seed=1), numbers(3, seed=2), numbers(1, seed=3)]
ROWS = [numbers(2, 3, seed=1), numbers(2, 3, seed=2)]
TEXTS = [words(2), words(3), words(1)]

CASES = [
    ("SequenceConstruct", [numbers(2), numbers(3)], {}),
    ("SequenceConstruct", [words(2), words(1)], {}),
    *(("SequenceAt", [sequence, at(i)], {}) for sequence in (TENSORS, TEXTS) for i in (0, 2, -1, -3)),
    ("SequenceAt", [TENSORS, at(1, torch.int32)], {}),
    *(("SequenceErase", [sequence, at(i)], {}) for sequence in (TENSORS, TEXTS) for i in (0, 2, -1, -3)),
    *(("SequenceErase", [sequence], {}) for sequence in (TENSORS, TEXTS)),
    *(("SequenceInsert", [TENSORS, numbers(4), at(i)], {}) for i in (0, 1, 3, -1, -3)),
    ("SequenceInsert", [TEXTS, words(4), at(-2)], {}),
    ("SequenceInsert", [TENSORS, numbers(4)], {}),
    ("SequenceLength", [TENSORS], {}),
    ("SequenceLength", [TEXTS], {}),
    *(("SplitToSequence", [x], {"keepdims": k}) for x in (numbers(3, 2), words(3, 2)) for k in (0, 1)),
    ("SplitToSequence", [numbers(3, 5), at(2)], {"axis": -1}),
    ("SplitToSequence", [words(3, 5), at(2)], {"axis": 1}),
    ("SplitToSequence", [numbers(5, 2), torch.tensor([1, 4])], {"keepdims": 0}),
    ("SplitToSequence", [words(5), torch.tensor([2, 3])], {}),
    ("SplitToSequence", [numbers(5, dtype=torch.int64), torch.tensor([2, 0, 3])], {}),
    *(("ConcatFromSequence", [ROWS], {"axis": a}) for a in (0, 1, -1)),
    *(("ConcatFromSequence", [ROWS], {"axis": a, "new_axis": 1}) for a in (0, 2, -1, -3)),
    ("ConcatFromSequence", [TEXTS], {"axis": 0}),
    ("ConcatFromSequence", [[words(2, 2), words(2, 2)]], {"axis": -1, "new_axis": 1}),
]


def label(case: tuple[str, list[Any], dict[str, Any]]) -> str:
    name, inputs, options = case
    kind = "words" if "object" in str(getattr(plain(inputs[0]), "dtype", plain(inputs)[0])) else ""
    return "-".join([name, kind, *(str(x.tolist()) for x in inputs[1:] if isinstance(x, Tensor)), str(options)])


@pytest.mark.parametrize(("name", "inputs", "options"), CASES, ids=[label(case) for case in CASES])
def test_agrees_with_onnxruntime(name: str, inputs: list[Any], options: dict[str, Any]) -> None:
    kept = [list(x) if isinstance(x, list) else x for x in inputs]
    assert_equal(dialect(name, *inputs, **options), by_onnxruntime(name, inputs, **options))
    assert all(x is y or [*map(id, x)] == [*map(id, y)] for x, y in zip(kept, inputs, strict=True))


def test_types_that_onnxruntime_has_no_sequences_of() -> None:
    parts = dialect("SplitToSequence", numbers(4, 2, dtype=torch.uint16), torch.tensor([1, 3]))
    assert [(part.dtype, tuple(part.shape)) for part in parts] == [(torch.uint16, (1, 2)), (torch.uint16, (3, 2))]
    assert torch.equal(dialect("ConcatFromSequence", parts, axis=0), numbers(4, 2, dtype=torch.uint16))


def test_an_empty_axis_splits_into_nothing() -> None:
    assert dialect("SplitToSequence", torch.zeros(0, 2)) == []
    assert dialect("SplitToSequence", torch.zeros(0, 2), at(3)) == []


def test_an_empty_sequence() -> None:
    empty = dialect("SequenceEmpty", dtype=TensorProto.FLOAT)
    assert empty == []
    assert dialect("SequenceLength", empty).item() == 0
    assert torch.equal(dialect("SequenceAt", dialect("SequenceInsert", empty, numbers(2)), at(0)), numbers(2))
    assert empty == []


@pytest.mark.parametrize(
    ("name", "inputs", "options", "message"),
    [
        ("SequenceAt", [TENSORS, at(3)], {}, r"position in \[-3, 2\]"),
        ("SequenceInsert", [TENSORS, numbers(1), at(4)], {}, r"position in \[-3, 3\]"),
        ("SequenceErase", [[]], {}, r"position in \[0, -1\] for a sequence of 0"),
        ("SplitToSequence", [numbers(4), torch.tensor([1, 2])], {}, "split sizes that add up to 4"),
        ("SplitToSequence", [numbers(4), torch.tensor([-1, 5])], {}, "split sizes that add up to 4"),
        ("SplitToSequence", [numbers(4), at(0)], {}, "split sizes that add up to 4"),
        ("ConcatFromSequence", [[]], {"axis": 0}, "found an empty one"),
        ("OptionalGetElement", [None], {}, "an optional with a value"),
    ],
)
def test_what_cannot_be_says_why(name: str, inputs: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphOptError, match=message):
        dialect(name, *inputs, **options)


def test_map_takes_sequences_apart_and_passes_tensors_whole() -> None:
    calls = []

    def body(x: Tensor, y: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(whole)
        return x + y, torch.tensor(x.shape)

    ones, sums = torch.ones(1), [x + 1 for x in TENSORS]
    entry = lookup("", "SequenceMap", OPSET)
    added, shapes = entry.function(TENSORS, [ones] * 3, numbers(7), body=body, outputs=2)
    assert all(torch.equal(x, y) for x, y in zip(added, sums, strict=True))
    assert [shape.tolist() for shape in shapes] == [[2], [3], [1]]
    assert len(calls) == 3
    assert all(torch.equal(whole, numbers(7)) for whole in calls)


def test_map_over_strings_and_over_nothing() -> None:
    entry = lookup("", "SequenceMap", OPSET)
    result = entry.function(TEXTS, body=lambda x: (x + "!",), outputs=1)
    assert [x.tolist() for x in result] == [["!", "word1!"], ["!", "word1!", "word2!"], ["!"]]
    assert entry.function([], body=lambda x: (x, x), outputs=2) == ([], [])
    with pytest.raises(GraphOptError, match=r"found lengths \[2, 3\]"):
        entry.function(TENSORS, ROWS, body=lambda x, y: (x,), outputs=1)


@pytest.mark.parametrize(
    "value", [numbers(2), words(2), TENSORS, TEXTS, []], ids=["tensor", "text", "seq", "texts", "[]"]
)
def test_optionals_hold_anything(value: Any) -> None:
    held = dialect("Optional", value)
    assert dialect("OptionalHasElement", held).item() is True
    assert dialect("OptionalGetElement", held) is value


def test_empty_optionals() -> None:
    kind = helper.make_tensor_type_proto(TensorProto.FLOAT, [2])
    assert dialect("Optional", type=kind) is None
    for has in (dialect("OptionalHasElement", None), dialect("OptionalHasElement")):
        assert (has.item(), has.dtype, has.shape) == (False, torch.bool, ())
