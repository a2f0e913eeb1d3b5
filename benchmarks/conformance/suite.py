"""The backend suite of the onnx package: its models with their published data, and what it means to agree with them.

Shared by the benchmark and by tests/conformance, which loads this file by its path; so it imports no peer, and nothing
from beside it.
"""

from __future__ import annotations

import ctypes
import functools
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from onnx.backend.test import loader
from onnx.backend.test.case.node import collect_testcases

from graphopt.onnxfile.read import graphs

FILE_KINDS = ("simple", "pytorch-converted", "pytorch-operator")
# What a published random output shares with another draw is its type and shape.
_RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
# What numpy has a type of its own for.
_INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_PLAIN = frozenset(f"tensor({name})" for name in ("float", "double", "float16", "bool", "string", *_INTEGERS))
# numpy.dtype.isbuiltin of the types that ml_dtypes adds.
_REGISTERED = 2


@dataclass(frozen=True, eq=False)
class Case:
    """One model of the suite: its data sets are pairs of inputs by name and outputs in order."""

    name: str
    kind: str
    model: onnx.ModelProto
    data_sets: tuple[tuple[Mapping[str, Any], Sequence[Any]], ...]
    rtol: float
    atol: float

    @functools.cached_property
    def data(self) -> bytes:
        """The model's file."""
        return self.model.SerializeToString()

    @property
    def random(self) -> bool:
        """Whether the outputs are drawn anew by every implementation."""
        nodes = [node for graph in graphs(self.model) for node in graph.node]
        # A ratio of 0 keeps every value; those cases are called so.
        drops = any(n.op_type == "Dropout" and len(n.input) == 3 for n in nodes) and "zero_ratio" not in self.name
        return drops or any(n.op_type in _RANDOM for n in nodes)


class Wrong(AssertionError):
    """A value is not the expected one; `kind` is `wrong type`, `wrong shape`, or `wrong values`."""

    def __init__(self, kind: str, expected: Any, found: Any) -> None:
        super().__init__(f"{kind}: expected {expected}, found {found}")
        self.kind = kind


@functools.cache
def cases() -> tuple[Case, ...]:
    """All models whose files come with the onnx package: the node models, then those of each other kind."""
    with warnings.catch_warnings():
        # The suite computes its own NaN and infinite expectations with numpy.
        warnings.simplefilter("ignore", RuntimeWarning)
        nodes = collect_testcases()
    found = [
        Case(c.name, "node", c.model, tuple(_named(c.model, *data) for data in c.data_sets), c.rtol, c.atol)
        for c in nodes
    ]
    for kind in FILE_KINDS:
        tests = sorted(loader.load_model_tests(kind=kind), key=lambda test: str(test.name))
        found += [_from_folder(c.name, kind, Path(c.model_dir), c.rtol, c.atol) for c in tests if c.model_dir]
    return (*found, *_light())


def _named(model: onnx.ModelProto, inputs: Sequence[Any], outputs: Sequence[Any]) -> tuple[dict[str, Any], list[Any]]:
    stored = {tensor.name for tensor in model.graph.initializer}
    fed = [value.name for value in model.graph.input if value.name not in stored]
    return dict(zip(fed, map(_value, inputs), strict=True)), [_value(x) for x in outputs]


def _value(published: Any) -> Any:
    if isinstance(published, onnx.TensorProto):
        return numpy_helper.to_array(published)
    return np.asarray(published) if isinstance(published, np.generic) else published


def _from_folder(name: str, kind: str, folder: Path, rtol: float, atol: float) -> Case:
    model = onnx.load(folder / "model.onnx")

    def read(data: Path, prefix: str, declared: Sequence[onnx.ValueInfoProto]) -> list[Any]:
        files = sorted(data.glob(f"{prefix}_*.pb"), key=lambda file: int(file.stem.rpartition("_")[2]))
        return [_parse(file.read_bytes(), value.type) for file, value in zip(files, declared, strict=False)]

    folders = sorted(folder.glob("test_data_set_*"))
    data = [_named(model, read(f, "input", model.graph.input), read(f, "output", model.graph.output)) for f in folders]
    return Case(name, kind, model, tuple(data), rtol, atol)


def _parse(data: bytes, declared: onnx.TypeProto) -> Any:
    if declared.HasField("sequence_type"):
        return numpy_helper.to_list(onnx.SequenceProto.FromString(data))
    if declared.HasField("optional_type"):
        return numpy_helper.to_optional(onnx.OptionalProto.FromString(data))
    return numpy_helper.to_array(onnx.TensorProto.FromString(data))


def _light() -> Iterator[Case]:
    """The image classifiers with constants for weights; the suite's runner feeds them a ramp."""
    data = Path(loader.DATA_DIR)
    for path in sorted((data / "light").glob("*.onnx")):
        model = onnx.load(path)
        settings = json.loads((data / "real" / path.stem.replace("light", "test", 1) / "data.json").read_text())
        stored = {tensor.name for tensor in model.graph.initializer}
        inputs = [_ramp(value) for value in model.graph.input if value.name not in stored]
        outputs = [
            numpy_helper.to_array(onnx.load_tensor(path.with_name(f"{path.stem}_output_{i}.pb")))
            for i in range(len(model.graph.output))
        ]
        yield Case(path.stem, "light", model, (_named(model, inputs, outputs),), settings["rtol"], settings["atol"])


def _ramp(value: onnx.ValueInfoProto) -> np.ndarray[Any, Any]:
    shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    count = int(np.prod(shape))
    return (np.arange(count).reshape(shape) / count).astype(np.float32)


def check_values(
    expected: Any,
    found: Any,
    *,
    rtol: float,
    atol: float,
    tighter: Mapping[str, float] = MappingProxyType({}),
    random: bool = False,
) -> None:
    """Compare two runtime values: arrays, sequences, optionals, maps, strings.

    Integers, booleans, strings, and floating point types of one byte have to be equal, NaN equals NaN, and bfloat16 is
    given two of its own units, as the suite's own runner does.

    Args:
        expected: the published value.
        found: the value to judge.
        rtol: allowed difference of floating point numbers, relative to the expected one.
        atol: the same, absolute.
        tighter: by type name what takes the place of `rtol`, and of `atol` where that is larger.
        random: compare only types and shapes.

    Raises:
        Wrong: they differ.
    """
    if isinstance(expected, (list, tuple)):
        if not isinstance(found, (list, tuple)) or len(found) != len(expected):
            raise Wrong("wrong type", f"a sequence of {len(expected)}", _describe(found))
        for one, other in zip(expected, found, strict=True):
            check_values(one, other, rtol=rtol, atol=atol, tighter=tighter, random=random)
        return
    if expected is None or found is None or isinstance(expected, dict):
        if type(expected) is not type(found) or expected != found:
            raise Wrong("wrong values", _describe(expected), _describe(found))
        return
    expected, found = np.asarray(expected), np.asarray(found)
    if found.dtype != expected.dtype:
        raise Wrong("wrong type", expected.dtype, found.dtype)
    if found.shape != expected.shape:
        raise Wrong("wrong shape", expected.shape, found.shape)
    if expected.dtype.name in tighter:
        rtol = tighter[expected.dtype.name]
        atol = min(atol, rtol)
    if not random and not _close(expected, found, rtol, atol):
        raise Wrong("wrong values", *_worst(expected, found))


def _describe(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"a sequence of {len(value)}"
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:60]}"


def _is_text(array: np.ndarray[Any, Any]) -> bool:
    return array.dtype.kind in "OUS"


def _close(expected: np.ndarray[Any, Any], found: np.ndarray[Any, Any], rtol: float, atol: float) -> bool:
    if expected.dtype.kind in "biu" or _is_text(expected):
        return np.array_equal(expected, found)
    if expected.dtype.itemsize == 1:
        rtol = atol = 0
    elif expected.dtype.name == "bfloat16":
        rtol = max(rtol, 2**-6)
    return bool(np.isclose(_wide(found), _wide(expected), rtol=rtol, atol=atol, equal_nan=True).all())


def _wide(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with np.errstate(invalid="ignore"):  # signalling NaNs become quiet ones
        return array if array.dtype.kind == "c" else array.astype(np.float64)


def _worst(expected: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> tuple[str, str]:
    """The elements that are farthest apart, or the first texts that differ."""
    if _is_text(expected):
        pairs = zip(expected.ravel(), found.ravel(), strict=True)
        one, other = next((a, b) for a, b in pairs if a != b)
        return repr(one), repr(other)
    a, b = _wide(expected).ravel(), _wide(found).ravel()
    with np.errstate(invalid="ignore"):
        apart = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0, np.nan_to_num(abs(a - b), nan=np.inf))
    worst = int(np.argmax(apart))
    return str(a[worst]), f"{b[worst]} ({np.count_nonzero(apart)} of {a.size} elements differ)"


def session(model: bytes | Path) -> onnxruntime.InferenceSession:
    """A session that computes the same each time: one thread, and random operators start from one seed."""
    onnxruntime.set_seed(0)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, feeds: Mapping[str, Any]) -> list[Any]:
    """The outputs; of a type that onnxruntime has no array for, the bytes behind them."""
    plain = all(_is_plain(value.type) for value in (*session.get_inputs(), *session.get_outputs()))
    if plain:
        return list(session.run(None, dict(feeds)))
    values = {name: _ort_value(value) for name, value in feeds.items()}
    return [_from_ort_value(value) for value in session.run_with_ort_values(None, values)]


def _is_plain(kind: str) -> bool:
    return not kind.startswith("tensor(") or kind in _PLAIN


def _ort_value(value: np.ndarray[Any, Any]) -> onnxruntime.OrtValue:
    if value.dtype.isbuiltin != _REGISTERED:
        return onnxruntime.OrtValue.ortvalue_from_numpy(value)
    code = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(value), code)


def _from_ort_value(value: onnxruntime.OrtValue) -> np.ndarray[Any, Any]:
    if _is_plain(value.data_type()):
        return value.numpy()
    data = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    dtype = onnx.helper.tensor_dtype_to_np_dtype(value.element_type())
    shape = value.shape()
    # Types of two and four bits are packed.
    packed = len(data) != dtype.itemsize * int(np.prod(shape))
    return np.frombuffer(data, np.uint8) if packed else np.frombuffer(data, dtype).reshape(shape)


def outcome(model: bytes | Path, feeds: Mapping[str, Any]) -> list[Any] | str:
    """What onnxruntime makes of a model: its outputs, or why there are none."""
    try:
        return run(session(model), feeds)
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        return str(error)


def identical(expected: Any, found: Any) -> bool:
    """Whether two runtime values are the same bit by bit."""
    if isinstance(expected, (list, tuple)):
        alike = isinstance(found, (list, tuple)) and len(expected) == len(found)
        return alike and all(map(identical, expected, found))
    if expected is None or isinstance(expected, (dict, str)):
        return type(expected) is type(found) and bool(expected == found)
    expected, found = np.asarray(expected), np.asarray(found)
    if (expected.dtype, expected.shape) != (found.dtype, found.shape):
        return False
    if expected.dtype.kind == "O":
        return bool(expected.tolist() == found.tolist())
    return expected.tobytes() == found.tobytes()
