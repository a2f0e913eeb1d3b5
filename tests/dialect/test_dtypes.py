"""Each operator with each element type that the standard allows it, against onnxruntime or onnx.reference.

The calls are the suite's own node models with the type of some inputs replaced. What differs is listed, with its
reason, in dtype_gaps.txt. Casts and quantisation have tests of their own.
"""

import functools
import importlib.util
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.defs
import onnx.shape_inference
import pytest
import torch
from onnx import TensorProto as P
from onnx import helper, numpy_helper
from onnx.backend.test.case.node import collect_testcases
from onnx.reference import ReferenceEvaluator

from graphopt.dialect import Operator, lookup, table
from graphopt.onnxfile.tensors import TensorReader, from_numpy, to_numpy

_spec = importlib.util.spec_from_file_location("element_types", Path(__file__).with_name("element_types.py"))
element_types = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(element_types)
CODES, code_of, numpy_type = element_types.CODES, element_types.code_of, element_types.numpy_type

Array = np.ndarray[Any, Any]
# Where kernels round each intermediate to the type, errors are units of the largest number, not of each one.
TOLERANCE = {"float64": 1e-5, "float32": 1e-5, "float16": 2**-9, "bfloat16": 2**-6}
NAMES = {code: name.removeprefix("tensor(").removesuffix(")") for name, code in CODES.items()}
FLOATS = {P.FLOAT, P.DOUBLE, P.FLOAT16, P.BFLOAT16, *element_types.EIGHT_BIT_FLOATS, P.FLOAT4E2M1, P.FLOAT6E2M3}
FLOATS |= {P.FLOAT6E3M2}
TEXT_AND_COMPLEX = {P.STRING, P.COMPLEX64, P.COMPLEX128, P.UNDEFINED}
RANDOM = {"Bernoulli", "Dropout", "Multinomial", "RandomNormalLike", "RandomUniformLike"}
OWN_TESTS = {"BitCast", "Cast", "CastLike", "DequantizeLinear", "QuantizeLinear"}
MODELS_PER_OPERATOR = 2


@dataclass(frozen=True)
class Model:
    """A published model of one node, and its inputs."""

    node: onnx.NodeProto
    opset: int
    inputs: tuple[Array | None, ...]

    @property
    def entry(self) -> Operator:
        return lookup("", self.node.op_type, self.opset)

    @property
    def schema(self) -> onnx.defs.OpSchema:
        return onnx.defs.get_schema(self.node.op_type, self.opset)

    @property
    def formals(self) -> list[str]:
        """The type variable of each input."""
        formal = self.schema.inputs
        return [formal[min(i, len(formal) - 1)].type_str for i in range(len(self.node.input))]


def array_of(value: Any) -> Array:
    if isinstance(value, list):
        raise TypeError("a sequence")
    array = numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)
    if array.dtype.kind in "OUSc":
        raise TypeError("no real numbers")
    return array


def models() -> Iterator[Model]:
    with warnings.catch_warnings():
        # The suite computes its own NaN and infinite expectations with numpy.
        warnings.simplefilter("ignore", RuntimeWarning)
        # Each call of it in one process adds the cases once more.
        cases = {case.name: case for case in collect_testcases()}
    for case in cases.values():
        graph = case.model.graph
        node = graph.node[0]
        bodies = any(a.type == onnx.AttributeProto.GRAPH for a in node.attribute)
        if len(graph.node) > 1 or graph.initializer or node.domain or bodies:
            continue
        opset = next(o.version for o in case.model.opset_import if not o.domain)
        given = dict(zip((i.name for i in graph.input), case.data_sets[0][0], strict=True))
        try:
            inputs = tuple(array_of(given[name]) if name else None for name in node.input)
        except TypeError:
            continue
        if lookup("", node.op_type, opset) is not None and node.op_type not in RANDOM | OWN_TESTS:
            yield Model(node, opset, inputs)


def chosen() -> dict[Operator, list[Model]]:
    """The models of each operator with the most inputs, and of those the smallest."""
    found = defaultdict(list)
    for model in models():
        found[model.entry].append(model)
    size = {id(m): sum(x.size for x in m.inputs if x is not None) for group in found.values() for m in group}
    return {
        entry: sorted(group, key=lambda m: (-sum(x is not None for x in m.inputs), size[id(m)]))[:MODELS_PER_OPERATOR]
        for entry, group in found.items()
    }


CHOSEN = chosen()


def converted(array: Array, code: int) -> Array:
    """The values as another element type: as they are where it has them, else small whole numbers."""
    wide = array.astype(np.float64)
    if code == P.BOOL:
        return wide > 0
    if code == P.FLOAT8E8M0:
        return (2.0 ** np.clip(np.round(wide), -3, 3)).astype(np.float32).astype(numpy_type(code))
    if code in FLOATS:
        return wide.astype(numpy_type(code))
    if array.dtype.kind not in "iub":
        wide = np.round(np.clip(np.nan_to_num(wide) * 3, -60, 60))
    limits = ml_dtypes.iinfo(numpy_type(code))
    wide = np.abs(wide) if limits.min == 0 else wide
    return np.clip(wide, max(limits.min, -(2**31)), min(limits.max, 2**31)).astype(np.int64).astype(numpy_type(code))


def typed(model: Model, variable: str, code: int) -> list[Array | None]:
    """The model's inputs, those of one type variable in another type."""
    given = zip(model.inputs, model.formals, strict=True)
    inputs = [x if x is None or formal != variable else converted(x, code) for x, formal in given]
    if model.node.op_type in ("Div", "Mod") and code not in FLOATS:
        inputs[1] = np.where(inputs[1] == 0, inputs[1].dtype.type(1), inputs[1])
    return inputs


def expected(model: Model, variable: str, code: int, inputs: Sequence[Array | None]) -> list[Array] | None:
    """What another implementation gives: onnxruntime, also by way of float32, else onnx.reference."""
    try:
        return element_types.on_onnxruntime(model.node, inputs, model.opset)
    except Exception:
        pass  # it has no kernel for the type
    if code in (P.FLOAT16, P.BFLOAT16, P.DOUBLE):
        given = zip(inputs, model.formals, strict=True)
        wide = [x if x is None or formal != variable else x.astype(np.float32) for x, formal in given]
        try:
            results = element_types.on_onnxruntime(model.node, wide, model.opset)
        except Exception:
            results = []
        if results:
            kinds = output_types(model, inputs)
            return [y if kind is None else y.astype(kind) for y, kind in zip(results, kinds, strict=True)]
    try:
        return reference(model, inputs)
    except Exception:
        return None


def proto_of(model: Model, inputs: Sequence[Array | None]) -> onnx.ModelProto:
    fed = {name: x for name, x in zip(model.node.input, inputs, strict=True) if x is not None}
    declared = [helper.make_tensor_value_info(name, code_of(x), x.shape) for name, x in fed.items()]
    outputs = [onnx.ValueInfoProto(name=name) for name in model.node.output if name]
    graph = helper.make_graph([model.node], "one", declared, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", model.opset)])


def output_types(model: Model, inputs: Sequence[Array | None]) -> list[np.dtype[Any] | None]:
    """The output types: of the inputs with the same type variable, else by the standard's inference, or None."""
    bound = {formal: code_of(x) for x, formal in zip(inputs, model.formals, strict=True) if x is not None}
    formals = [formal.type_str for formal in model.schema.outputs]
    kinds = [formals[min(i, len(formals) - 1)] for i, name in enumerate(model.node.output) if name]
    graph = onnx.shape_inference.infer_shapes(proto_of(model, inputs)).graph
    inferred = [output.type.tensor_type.elem_type for output in graph.output]
    codes = [bound.get(kind, code) for kind, code in zip(kinds, inferred, strict=True)]
    return [numpy_type(code) if code else None for code in codes]


def reference(model: Model, inputs: Sequence[Array | None]) -> list[Array]:
    fed = {name: x for name, x in zip(model.node.input, inputs, strict=True) if x is not None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ReferenceEvaluator(proto_of(model, inputs)).run(None, fed)


def attribute(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return TensorReader(None).value(value)
    if isinstance(value, bytes):
        return value.decode()
    return [attribute(item) for item in value] if isinstance(value, (list, tuple)) else value


def called(model: Model, inputs: Sequence[Array | None]) -> list[Any]:
    """The outputs of the torch function."""
    keywords = {a.name: attribute(helper.get_attribute_value(a)) for a in model.node.attribute}
    if model.entry.counted:
        keywords["outputs"] = len(model.node.output)
    if model.entry.typed:
        keywords["types"] = tuple(0 if x is None else code_of(x) for x in inputs)
    result = model.entry.function(*(None if x is None else from_numpy(x) for x in inputs), **keywords)
    results = result if isinstance(result, tuple) else (result,)
    return [y for y, name in zip(results, model.node.output, strict=False) if name]


def same(found: Any, wanted: Any) -> bool:
    wanted = np.asarray(wanted)
    if not isinstance(found, torch.Tensor):
        return False
    found = to_numpy(found, code_of(wanted))
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return False
    if found.dtype.name not in TOLERANCE:
        return found.tobytes() == wanted.tobytes()
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    tolerance = TOLERANCE[found.dtype.name]
    largest = np.abs(b[np.isfinite(b)]).max(initial=0)
    return np.allclose(a, b, rtol=tolerance, atol=tolerance * largest, equal_nan=True)


def agrees(model: Model, variable: str, code: int) -> bool | None:
    """Whether the torch function gives what another implementation gives; None where there is no other."""
    inputs = typed(model, variable, code)
    wanted = expected(model, variable, code, inputs)
    if wanted is None or any(isinstance(y, list) for y in wanted):
        return None
    try:
        found = called(model, inputs)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return False
    return all(same(a, b) for a, b in zip(found, wanted, strict=True))


@functools.cache
def compared(entry: Operator) -> dict[tuple[str, str], bool]:
    """By type variable and type: whether all calls agree."""
    results: dict[tuple[str, str], bool] = {}
    for model in CHOSEN[entry]:
        allowed = {c.type_param_str: c.allowed_type_strs for c in model.schema.type_constraints}
        for variable in sorted(set(model.formals) & allowed.keys()):
            codes = {CODES[name] for name in allowed[variable] if name in CODES} - TEXT_AND_COMPLEX
            for code in sorted(codes):
                verdict = agrees(model, variable, code)
                if verdict is not None:
                    key = (variable, NAMES[code])
                    results[key] = results.get(key, True) and verdict
    return results


def listed() -> dict[str, set[tuple[str, str]]]:
    """The gaps by operator: a line is `Operator-since variable types... - reason`."""
    gaps = defaultdict(set)
    for line in Path(__file__).with_name("dtype_gaps.txt").read_text().splitlines():
        call, _, reason = line.partition(" - ")
        operator, variable, *types = call.split()
        assert types, line
        assert reason, line
        gaps[operator] |= {(variable, name) for name in types}
    return gaps


GAPS = listed()


def label(entry: Operator) -> str:
    return f"{entry.name}-{entry.since}"


@pytest.mark.parametrize("entry", sorted(CHOSEN, key=label), ids=label)
def test_every_allowed_type(entry: Operator) -> None:
    assert {key for key, agree in compared(entry).items() if not agree} == GAPS.get(label(entry), set())


def test_the_table_is_covered() -> None:
    """A model that is no longer chosen would silently shrink what is compared."""
    assert sum(len(compared(entry)) for entry in CHOSEN) > 1400
    assert set(GAPS) <= {label(entry) for entry in CHOSEN}
    names = {entry.name for entry in table() if not entry.domain}
    assert len({entry.name for entry in CHOSEN}) > 0.75 * len(names - RANDOM - OWN_TESTS)
