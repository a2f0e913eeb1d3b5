"""Tensors of every element type between files, numpy and torch."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto as P
from onnx import helper, numpy_helper

from graphopt import GraphOptError
from graphopt.onnxfile import TensorReader, to_tensor_proto
from graphopt.onnxfile.tensors import element_type, element_type_of, from_numpy, to_numpy, type_name

PACKED = {
    P.INT4: torch.int8,
    P.UINT4: torch.uint8,
    P.INT2: torch.int8,
    P.UINT2: torch.uint8,
    P.FLOAT4E2M1: torch.float8_e4m3fn,
    P.FLOAT6E2M3: torch.float8_e4m3fn,
    P.FLOAT6E3M2: torch.float8_e4m3fn,
}
BITS = {P.INT4: 4, P.UINT4: 4, P.INT2: 2, P.UINT2: 2, P.FLOAT4E2M1: 4, P.FLOAT6E2M3: 6, P.FLOAT6E3M2: 6}
WHOLE = {
    P.FLOAT: torch.float32,
    P.DOUBLE: torch.float64,
    P.FLOAT16: torch.float16,
    P.BFLOAT16: torch.bfloat16,
    P.INT8: torch.int8,
    P.INT16: torch.int16,
    P.INT32: torch.int32,
    P.INT64: torch.int64,
    P.UINT8: torch.uint8,
    P.UINT16: torch.uint16,
    P.UINT32: torch.uint32,
    P.UINT64: torch.uint64,
    P.BOOL: torch.bool,
    P.COMPLEX64: torch.complex64,
    P.COMPLEX128: torch.complex128,
    P.FLOAT8E4M3FN: torch.float8_e4m3fn,
    P.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    P.FLOAT8E5M2: torch.float8_e5m2,
    P.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    P.FLOAT8E8M0: torch.float8_e8m0fnu,
}
name_of = P.DataType.Name
STRANGE = [b"plain", b"a\x00b\x00", b"\xff\xfe not utf-8", "Grüße".encode(), b""]


def numpy_type(code: int) -> np.dtype[Any]:
    return np.dtype(helper.tensor_dtype_to_np_dtype(code))


def array(code: int, *shape: int) -> np.ndarray[Any, Any]:
    """Numbers of a type: for small ones all there are, one after the other."""
    count = int(np.prod(shape))
    if code in BITS:
        return (np.arange(count) % (1 << BITS[code])).astype(np.uint8).view(numpy_type(code)).reshape(shape)
    values = np.arange(count) % 2 if code == P.BOOL else 2.0 ** (np.arange(count) % 5)
    return values.astype(np.float32).astype(numpy_type(code)).reshape(shape)


def same(a: Any, b: np.ndarray[Any, Any]) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and np.ascontiguousarray(a).tobytes() == b.tobytes()


@pytest.mark.parametrize("shape", [(7,), (3, 5), (), (2, 0, 3), (16,)], ids=str)
@pytest.mark.parametrize("code", [*PACKED, *WHOLE], ids=name_of)
def test_there_and_back(code: int, shape: tuple[int, ...]) -> None:
    wanted = array(code, *shape)
    tensor = from_numpy(wanted)
    assert tensor.dtype == {**PACKED, **WHOLE}[code]
    assert tuple(tensor.shape) == shape
    found = to_numpy(tensor, code)
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    assert np.array_equal(found, wanted)
    proto = to_tensor_proto("w", tensor, code)
    assert np.array_equal(numpy_helper.to_array(proto), wanted)
    assert proto.raw_data == numpy_helper.from_array(wanted).raw_data


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 33])
@pytest.mark.parametrize("code", PACKED, ids=name_of)
def test_packed_types_are_read(code: int, count: int, tmp_path: Path) -> None:
    wanted = array(code, count)
    raw = numpy_helper.from_array(wanted, "w")
    assert np.array_equal(to_numpy(TensorReader(None).value(raw), code), wanted)

    listed = onnx.TensorProto(name="w", data_type=code, dims=[count])
    # As numbers the 6-bit types lie one by one, all others packed.
    listed.int32_data.extend(wanted.view(np.uint8) if BITS[code] == 6 else raw.raw_data)
    assert np.array_equal(to_numpy(TensorReader(None).value(listed), code), wanted)

    (tmp_path / "w.bin").write_bytes(b"12345" + raw.raw_data)
    outside = onnx.TensorProto(name="w", data_type=code, dims=[count], data_location=P.EXTERNAL)
    for key, value in (("location", "w.bin"), ("offset", 5), ("length", len(raw.raw_data))):
        outside.external_data.add(key=key, value=str(value))
    assert np.array_equal(to_numpy(TensorReader(tmp_path).value(outside), code), wanted)


@pytest.mark.parametrize("code", WHOLE, ids=name_of)
def test_lists_of_numbers_are_read(code: int) -> None:
    wanted = array(code, 2, 3)
    if code in (P.FLOAT16, P.BFLOAT16):
        stored = wanted.view(np.uint16).reshape(-1).tolist()
    elif "FLOAT8" in name_of(code):
        stored = wanted.view(np.uint8).reshape(-1).tolist()
    else:
        stored = wanted.reshape(-1).tolist()
    raw = code in (P.FLOAT16, P.BFLOAT16) or "FLOAT8" in name_of(code)
    proto = onnx.TensorProto(name="w", data_type=code, dims=[2, 3])
    if raw:
        proto.int32_data.extend(stored)
    else:
        proto = helper.make_tensor("w", code, [2, 3], stored)
    assert np.array_equal(to_numpy(TensorReader(None).value(proto)), wanted)


def test_signed_values_of_packed_types() -> None:
    assert from_numpy(np.array([-8, 7], ml_dtypes.int4)).tolist() == [-8, 7]
    assert from_numpy(np.array([-2, 1], ml_dtypes.int2)).tolist() == [-2, 1]
    assert from_numpy(np.array([-6, 0.5], ml_dtypes.float4_e2m1fn)).to(torch.float32).tolist() == [-6, 0.5]


def test_large_external_tensors_are_not_copied(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(np.arange(1 << 16, dtype=np.float32).tobytes())
    proto = onnx.TensorProto(name="w", data_type=P.FLOAT, dims=[1 << 16], data_location=P.EXTERNAL)
    proto.external_data.add(key="location", value="w.bin")
    reader = TensorReader(tmp_path)
    first, second = reader.value(proto), reader.value(proto)
    assert first.data_ptr() == second.data_ptr()
    assert first[-1] == (1 << 16) - 1


def test_text_keeps_every_byte() -> None:
    proto = onnx.TensorProto(name="t", data_type=P.STRING, dims=[5, 1], string_data=STRANGE)
    value = TensorReader(None).value(proto)
    assert value.dtype == object
    assert value.shape == (5, 1)
    assert all(type(text) is str for text in value.flat)
    assert value[1, 0] == "a\x00b\x00"
    again = to_tensor_proto("t", value)
    assert (list(again.string_data), list(again.dims), again.data_type) == (STRANGE, [5, 1], P.STRING)


def test_text_from_numpy() -> None:
    for given in (np.array(["a", "bc"]), np.array([b"a", b"bc"]), np.array([b"a", "bc"], dtype=object)):
        found = from_numpy(given)
        assert found.dtype == object
        assert found.tolist() == ["a", "bc"]
        assert all(type(text) is str for text in found)
    assert from_numpy(np.array("a")).shape == ()
    kept = np.array(["x"], dtype=object)
    assert from_numpy(kept) is kept


def test_all_names_of_numpy_types() -> None:
    assert from_numpy(np.array([1], "longlong")).dtype == torch.int64
    assert from_numpy(np.array([1], "ulonglong")).dtype == torch.uint64
    assert from_numpy(np.array([1.5, 2], ">f4")).tolist() == [1.5, 2]
    assert from_numpy(np.float32(3)).tolist() == 3
    for unknown in (np.zeros(1, "longdouble"), np.zeros(1, "M8[s]"), np.zeros(1, ml_dtypes.float8_e3m4)):
        with pytest.raises(GraphOptError, match="expected an array of an ONNX element type, found") as caught:
            from_numpy(unknown)
        assert str(unknown.dtype) in str(caught.value)
    with pytest.raises(GraphOptError, match="found int in an object array"):
        from_numpy(np.array(["a", 1], dtype=object))


@pytest.mark.parametrize(
    ("proto", "match"),
    [
        (onnx.TensorProto(name="w", data_type=P.INT4, dims=[5], raw_data=b"12"), "needs 3 bytes, but the file holds 2"),
        (onnx.TensorProto(name="w", data_type=P.INT2, dims=[9], int32_data=[1, 2]), "needs 3 bytes"),
        (onnx.TensorProto(name="w", data_type=P.FLOAT, dims=[2], raw_data=bytes(7)), "needs 8 bytes"),
        (onnx.TensorProto(name="w", data_type=P.FLOAT, dims=[2], float_data=[1]), "does not fit its dims"),
        (onnx.TensorProto(name="w", data_type=P.STRING, dims=[2], string_data=[b"a"]), "needs 2 strings"),
        (onnx.TensorProto(name="w", data_type=99, dims=[1], raw_data=b"1"), "element type 99"),
        (onnx.TensorProto(name="w", data_type=P.FLOAT, dims=[-1]), "negative dimension"),
        (onnx.TensorProto(name="w", data_type=P.FLOAT, dims=[0, 1 << 62, 1 << 62]), "overflow"),
    ],
    ids=lambda value: value if isinstance(value, str) else name_of(value.data_type) if value.data_type < 30 else "?",
)
def test_wrong_tensors(proto: onnx.TensorProto, match: str) -> None:
    with pytest.raises(GraphOptError, match=match) as caught:
        TensorReader(None).value(proto)
    assert "\n" not in str(caught.value)


def test_a_carrier_of_another_type() -> None:
    with pytest.raises(GraphOptError, match=r"expected tensor 'w' as torch\.int8, which carries int4, found torch\.fl"):
        to_tensor_proto("w", torch.zeros(2), P.INT4)


def test_names_of_element_types() -> None:
    assert element_type(torch.bfloat16) == P.BFLOAT16
    assert element_type("int4") == element_type("seq(tensor(int4))") == P.INT4
    assert element_type("string") == element_type_of(np.array(["a"])) == P.STRING
    assert element_type("sequence_type") == element_type(None) == element_type_of(3.0) == 0
    assert element_type_of(np.zeros(1, ml_dtypes.uint2)) == P.UINT2
    assert (type_name(P.INT4), type_name(P.FLOAT), type_name(P.FLOAT8E8M0)) == ("int4", "float32", "float8_e8m0fnu")


def test_lists_element_by_element() -> None:
    found = to_numpy([torch.ones(1, dtype=torch.int8), None], P.INT4)
    assert found[0].dtype == ml_dtypes.int4
    assert found[1] is None
