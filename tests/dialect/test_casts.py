"""Casts between all pairs of element types, and quantisation to all of them."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto as P
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from graphopt import GraphOptError
from graphopt.dialect import lookup
from graphopt.onnxfile.tensors import from_numpy, to_numpy

_spec = importlib.util.spec_from_file_location("element_types", Path(__file__).with_name("element_types.py"))
element_types = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(element_types)
on_onnxruntime, numpy_type, code_of = element_types.on_onnxruntime, element_types.numpy_type, element_types.code_of

OPSET = 25
SMALL_INTEGERS = {P.INT4: (-8, 7), P.UINT4: (0, 15), P.INT2: (-2, 1), P.UINT2: (0, 3)}
UNSIGNED = (P.UINT8, P.UINT16, P.UINT32, P.UINT64)
INTEGERS = (P.INT8, P.INT16, P.INT32, P.INT64, *UNSIGNED)
FLOAT8 = (P.FLOAT8E4M3FN, P.FLOAT8E4M3FNUZ, P.FLOAT8E5M2, P.FLOAT8E5M2FNUZ)
MINIFLOATS = (P.FLOAT4E2M1, P.FLOAT6E2M3, P.FLOAT6E3M2)
WIDE_FLOATS = (P.FLOAT, P.DOUBLE, P.FLOAT16, P.BFLOAT16)
# onnxruntime casts among these; only the minifloats are missing.
TYPES = (*WIDE_FLOATS, P.BOOL, *INTEGERS, *SMALL_INTEGERS, *FLOAT8, P.FLOAT8E8M0)
name_of = P.DataType.Name


def cast(x: np.ndarray[Any, Any], to: int, opset: int = OPSET, **options: Any) -> Any:
    return to_numpy(lookup("", "Cast", opset).function(from_numpy(x), to=to, **options), to)


def identical(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    """The same type, shape and numbers; one NaN is as good as another."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.kind in "iub":
        return np.array_equal(a, b)
    with np.errstate(invalid="ignore"):  # a NaN of some of the types counts as a signalling one
        return np.array_equal(a.astype(np.float64), b.astype(np.float64), equal_nan=True)


def numbers(source: int, to: int) -> np.ndarray[Any, Any]:
    """What both types hold, what must be rounded, and what leaves the target where the standard says what follows."""
    whole = to in (P.BOOL, *INTEGERS, *SMALL_INTEGERS)
    values = [0, 1, 2, 3, 0.3, 0.7, 1.2, 1.8, 2.2, 6.6]
    if to in SMALL_INTEGERS:
        values += [7, 8, 9, 15, 16, 17, 31, 100]
    elif to == P.FLOAT8E8M0:
        values += [2.0**-126, 1.3 * 2.0**-126, 2.0**20, 1.4999 * 2.0**20, 1.5 * 2.0**20, np.nan]
    elif not whole:
        values += [1e-9, 1e-4, 0.1, 100.7, 300, 449, 470, 30000, 58000, 70000, 1e30, np.inf, np.nan]
    if source in INTEGERS and to in INTEGERS:
        values += [127, 128, 200, 255, 256, 300, 40000, 70000]
    # A negative float is outside of an unsigned type, where nothing is defined.
    unsigned = to in (P.BOOL, P.FLOAT8E8M0) or (to in UNSIGNED and source not in INTEGERS)
    wide = np.array(values if unsigned else [*values, *(-v for v in values)], dtype=np.float64)
    if source in (P.BOOL, *INTEGERS):
        limited = np.nan_to_num(wide, posinf=0, neginf=0).clip(-(2**31), 2**31)
        return limited.astype(np.int64).astype(numpy_type(source))
    if source in SMALL_INTEGERS:
        limited = np.nan_to_num(wide, posinf=0, neginf=0).clip(*SMALL_INTEGERS[source])
        return limited.astype(np.int64).astype(numpy_type(source))
    if source == P.FLOAT8E8M0:
        wide = np.abs(wide) if to not in INTEGERS else np.array([1, 2, 4, 8, 64.0])
    with np.errstate(over="ignore", invalid="ignore"):
        found = wide.astype(np.float32).astype(numpy_type(source))
    return found[np.isfinite(found.astype(np.float64))] if whole else found


def is_tie(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    wide = x.astype(np.float64)
    return np.abs(wide - np.trunc(wide)) == 0.5


@pytest.mark.parametrize("to", TYPES, ids=name_of)
@pytest.mark.parametrize("source", TYPES, ids=name_of)
def test_every_pair(source: int, to: int) -> None:
    x = numbers(source, to)
    if source == to == P.FLOAT8E5M2:
        x = x[np.isfinite(x.astype(np.float64))]  # onnxruntime copies; by the standard's table they are limited
    if to in SMALL_INTEGERS:
        x = x[~is_tie(x)]  # onnxruntime rounds those away from zero, the standard to even: see below
    if to == P.BOOL and source in FLOAT8:
        x = x[x.astype(np.float64) != 0]  # onnxruntime takes -0 for true
    node = helper.make_node("Cast", ["x"], ["y"], to=to)
    assert identical(cast(x, to), on_onnxruntime(node, [x], OPSET)[0])


@pytest.mark.parametrize("to", SMALL_INTEGERS, ids=name_of)
def test_halves_go_to_even_in_small_integers(to: int) -> None:
    """Cast to a 4 bit type is done by rounding to the nearest integer, ties to even, and truncating."""
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5], dtype=np.float32)
    wanted = np.array([0, 2, 2, 0, -2]).astype(numpy_type(to))
    assert identical(cast(x, to), wanted)


def grid(low: float, high: float) -> np.ndarray[Any, Any]:
    """Float32 numbers of all sizes between, and what lies half way between numbers of few bits."""
    rng = np.random.default_rng(0)
    spread = np.exp2(rng.uniform(np.log2(low), np.log2(high), 4000)).astype(np.float32)
    powers = np.exp2(np.arange(np.floor(np.log2(low)), np.log2(high)))
    halves = (powers[:, None] * (1 + np.arange(64) / 64)).reshape(-1).astype(np.float32)
    below, above = np.nextafter(halves, np.float32(0)), np.nextafter(halves, np.float32(np.inf))
    positive = np.concatenate([spread, halves, below, above, np.float32([0, np.inf])])
    return np.concatenate([positive, -positive, np.float32([np.nan])])


@pytest.mark.parametrize("source", [P.FLOAT, P.DOUBLE], ids=name_of)
@pytest.mark.parametrize("saturate", [0, 1])
@pytest.mark.parametrize("to", FLOAT8, ids=name_of)
def test_float8_rounds_as_ml_dtypes(to: int, saturate: int, source: int) -> None:
    x = grid(1e-7, 1e6).astype(numpy_type(source))
    kind = numpy_type(to)
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = numpy_helper.saturate_cast(x, kind) if saturate else x.astype(kind)
    assert identical(cast(x, to, saturate=saturate), wanted)


@pytest.mark.parametrize("source", [P.FLOAT, P.FLOAT16, P.DOUBLE], ids=name_of)
@pytest.mark.parametrize("to", MINIFLOATS, ids=name_of)
def test_floats_of_four_and_six_bits_round_as_ml_dtypes(to: int, source: int) -> None:
    x = grid(1e-3, 100.0).astype(numpy_type(source))
    found, wanted = cast(x, to, 28), x.astype(numpy_type(to))
    assert found.tobytes() == wanted.tobytes()  # the sign of zero included


@pytest.mark.parametrize("to", [P.FLOAT, P.FLOAT16, P.BFLOAT16, P.INT8, P.BOOL], ids=name_of)
@pytest.mark.parametrize("source", MINIFLOATS, ids=name_of)
def test_floats_of_four_and_six_bits_are_read(source: int, to: int) -> None:
    bits = 4 if source == P.FLOAT4E2M1 else 6
    x = np.arange(1 << bits, dtype=np.uint8).view(numpy_type(source))
    assert identical(cast(x, to, 28), x.astype(np.float32).astype(numpy_type(to)))


@pytest.mark.parametrize("round_mode", ["up", "down", "nearest"])
@pytest.mark.parametrize("saturate", [0, 1])
def test_powers_of_two(saturate: int, round_mode: str) -> None:
    """The standard leaves negative numbers open; onnxruntime takes them for too small ones."""
    steps = np.float32([1, 1.25, 1.4999, 1.5, 1.5001, 1.9999])
    powers = np.exp2(np.arange(-149, 128, dtype=np.float64))
    x = (powers[:, None] * steps).reshape(-1).astype(np.float32)
    x = np.concatenate([x, -x[:50], np.float32([0, np.inf, -np.inf, np.nan])])
    node = helper.make_node("Cast", ["x"], ["y"], to=P.FLOAT8E8M0, saturate=saturate, round_mode=round_mode)
    found = cast(x, P.FLOAT8E8M0, saturate=saturate, round_mode=round_mode)
    assert identical(found, on_onnxruntime(node, [x], OPSET)[0])


TEXTS = ["1", "3.14", "1e-5", "-2.5E8", "100", "+INF", "inf", "-INF", "NaN", "nan", " 7", "0"]


@pytest.mark.parametrize("to", [P.FLOAT, P.DOUBLE, P.FLOAT16, P.BFLOAT16, P.FLOAT8E5M2], ids=name_of)
def test_text_to_float(to: int) -> None:
    x = np.array(TEXTS, dtype=object).reshape(3, 4)
    node = helper.make_node("Cast", ["x"], ["y"], to=to)
    assert identical(cast(x, to), on_onnxruntime(node, [x], OPSET)[0])


@pytest.mark.parametrize("to", [*INTEGERS, P.BOOL, *SMALL_INTEGERS], ids=name_of)
def test_text_to_integer(to: int) -> None:
    """By way of float32, onnxruntime rounds what becomes a small integer; others keep all digits."""
    texts = ["0", "1", "-1", " 3", "300", *(["100.5", "9223372036854775807"] if to not in SMALL_INTEGERS else [])]
    x = np.array(texts, dtype=object)
    node = helper.make_node("Cast", ["x"], ["y"], to=to)
    assert identical(cast(x, to), on_onnxruntime(node, [x], OPSET)[0])


@pytest.mark.parametrize("text", ["hello", "", "1e"])
def test_text_that_is_no_number(text: str) -> None:
    for to in (P.FLOAT, P.INT32):
        with pytest.raises(GraphOptError, match="expected text that is a number, found"):
            cast(np.array([text], dtype=object), to)
    with pytest.raises(GraphOptError, match="finite"):
        cast(np.array(["INF"], dtype=object), P.INT32)


@pytest.mark.parametrize("source", [*WIDE_FLOATS, P.BOOL, *INTEGERS, *SMALL_INTEGERS, *FLOAT8], ids=name_of)
def test_number_to_text(source: int) -> None:
    x = numbers(source, P.FLOAT)
    if source in WIDE_FLOATS[:2]:
        x = np.concatenate([x, np.array([314.15926, 1 / 3, 1e-5, 123456789, 1.5e10, 1e17, -0.0], x.dtype)])
    node = helper.make_node("Cast", ["x"], ["y"], to=P.STRING)
    found = cast(x, P.STRING)
    assert found.dtype == object
    assert found.tolist() == on_onnxruntime(node, [x], OPSET)[0].tolist()


@pytest.mark.parametrize("to", [P.INT4, P.UINT4, P.FLOAT4E2M1, P.INT2, P.UINT2], ids=name_of)
@pytest.mark.parametrize("source", [P.INT4, P.UINT4, P.FLOAT4E2M1, P.INT2, P.UINT2], ids=name_of)
def test_bits_of_small_types(source: int, to: int) -> None:
    bits = [2 if code in (P.INT2, P.UINT2) else 4 for code in (source, to)]
    if bits[0] != bits[1]:
        pytest.skip("the standard allows only types of one width")
    codes = np.arange(1 << bits[0], dtype=np.uint8)
    found = to_numpy(lookup("", "BitCast", 26).function(from_numpy(codes.view(numpy_type(source))), to=to), to)
    assert (found.view(np.uint8) & (len(codes) - 1)).tolist() == codes.tolist()
    assert found.dtype == numpy_type(to)


@pytest.mark.parametrize("like", [*TYPES, P.FLOAT4E2M1], ids=name_of)
def test_cast_like_knows_its_type(like: int) -> None:
    x = np.array([0, 1, 3, 5.75, 200], dtype=np.float32)
    y = from_numpy(np.ones(1).astype(numpy_type(like)))
    found = lookup("", "CastLike", 25).function(torch.from_numpy(x), y, types=(P.FLOAT, like))
    assert identical(to_numpy(found, like), cast(x, like))


def reference(node: onnx.NodeProto, opset: int, *inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    declared = [helper.make_tensor_value_info(n, code_of(x), x.shape) for n, x in zip(node.input, inputs, strict=True)]
    graph = helper.make_graph([node], "one", declared, [onnx.ValueInfoProto(name="y")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    return ReferenceEvaluator(model).run(None, dict(zip(node.input, inputs, strict=True)))[0]


def call(name: str, opset: int, *inputs: np.ndarray[Any, Any], **options: Any) -> torch.Tensor:
    entry = lookup("", name, opset)
    if entry.typed:
        options["types"] = tuple(map(code_of, inputs))
    return entry.function(*map(from_numpy, inputs), **options)


QUANTISED = (P.INT8, P.UINT8, P.INT16, P.UINT16, *SMALL_INTEGERS, *FLOAT8, *MINIFLOATS)
# Per tensor, per slice of an axis, and per block of two.
GRANULARITIES = {"tensor": ((), {}), "axis": ((5,), {"axis": 1}), "block": ((2, 3), {"axis": 1, "block_size": 2})}


def scaled(shape: tuple[int, ...], to: int) -> tuple[np.ndarray[Any, Any], ...]:
    """Numbers that partly leave the range of the type, scales, and zero points."""
    rng = np.random.default_rng(1)
    scale = rng.uniform(0.5, 2, shape).astype(np.float32)
    reach = 3e5 if to in (P.INT16, P.UINT16) else 600 if to in (P.INT8, P.UINT8, *FLOAT8) else 20
    x = rng.uniform(-reach, reach, (2, 5)).astype(np.float32)
    high = {P.INT16: 999, P.UINT16: 999, P.INT2: 2, P.UINT2: 4}.get(to, 8)
    # onnx.reference ignores the zero point of a float8.
    point = np.zeros(shape) if to in FLOAT8 else rng.integers(-1 if to in (P.INT2, P.INT4) else 0, high, shape)
    return x, scale, np.asarray(point).astype(numpy_type(to))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("to", QUANTISED, ids=name_of)
def test_quantize_linear(to: int, granularity: str) -> None:
    shape, options = GRANULARITIES[granularity]
    x, scale, point = scaled(shape, to)
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"], **options)
    found = to_numpy(call("QuantizeLinear", 28, x, scale, point, **options), to)
    assert identical(found, reference(node, 28, x, scale, point))


@pytest.mark.parametrize("to", [P.INT4, P.UINT2, P.FLOAT4E2M1, P.FLOAT8E5M2], ids=name_of)
def test_quantize_linear_to_the_stated_type(to: int) -> None:
    x, scale, _ = scaled((), to)
    node = helper.make_node("QuantizeLinear", ["x", "s"], ["y"], output_dtype=to)
    found = to_numpy(call("QuantizeLinear", 25, x, scale, output_dtype=to), to)
    assert identical(found, reference(node, 25, x, scale))


@pytest.mark.parametrize("kind", [P.FLOAT16, P.BFLOAT16], ids=name_of)
def test_the_quotient_has_the_precision_of_the_scale(kind: int) -> None:
    """1.4997 lies next to 1.5 in either type, and 1.5 is rounded to 2."""
    scale = np.array(1000, dtype=np.float32)
    x = np.array([1499.7, 2500.4], dtype=np.float32)
    assert call("QuantizeLinear", 25, x, scale).tolist() == [1, 3]
    assert call("QuantizeLinear", 25, x, scale, precision=kind).tolist() == [2, 2]
    assert call("QuantizeLinear", 25, x, scale.astype(numpy_type(kind))).tolist() == [2, 2]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("source", [P.INT32, *QUANTISED], ids=name_of)
def test_dequantize_linear(source: int, granularity: str) -> None:
    shape, options = GRANULARITIES[granularity]
    _, scale, point = scaled(shape, source)
    rng = np.random.default_rng(2)
    low, high = SMALL_INTEGERS.get(source, (0, 6))
    x = rng.integers(low, high + 1, (2, 5)).astype(numpy_type(source))
    # Nor does onnx.reference subtract that of a float of 4 bits.
    point = np.zeros_like(point) if source in (P.INT32, *MINIFLOATS) else point
    node = helper.make_node("DequantizeLinear", ["x", "s", "z"], ["y"], **options)
    found = call("DequantizeLinear", 28, x, scale, point, **options)
    assert identical(to_numpy(found), reference(node, 28, x, scale, point))


def test_a_scale_of_powers_of_two() -> None:
    """Blocks that share a power of two, as in the microscaling formats."""
    scale = np.array([[0.5, 4.0]], dtype=np.float32).astype(numpy_type(P.FLOAT8E8M0))
    x = np.array([[1, 2, -3, 100]], dtype=np.float32)
    y = call("QuantizeLinear", 25, x, scale, axis=1, block_size=2, output_dtype=P.FLOAT4E2M1)
    assert y.to(torch.float32).tolist() == [[2, 4, -1, 6]]  # 2 / 0.5 is 4; -0.75 is a tie, and so is no other
    back = call("DequantizeLinear", 25, to_numpy(y, P.FLOAT4E2M1), scale, axis=1, block_size=2, output_dtype=P.FLOAT)
    assert back.tolist() == [[1, 2, -4, 24]]


def test_constants_of_small_types() -> None:
    tensor = numpy_helper.from_array(np.array([-2, 1], dtype=numpy_type(P.INT2)), "w")
    value = from_numpy(numpy_helper.to_array(tensor))
    assert torch.equal(lookup("", "Constant", 25).function(value=value), torch.tensor([-2, 1], dtype=torch.int8))
