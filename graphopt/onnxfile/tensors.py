"""ONNX tensors as torch tensors that share memory with the file: nothing is read until it is used."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import torch

from graphopt.errors import GraphOptError
from graphopt.onnxfile.packed import CARRIERS, numpy_type, pack, packed_size, unpack
from graphopt.onnxfile.read import external_span, is_external
from graphopt.onnxfile.tensor_checks import elements

_P = onnx.TensorProto
_Array = np.ndarray[Any, Any]

TORCH_DTYPES: dict[int, torch.dtype] = {
    _P.FLOAT: torch.float32,
    _P.DOUBLE: torch.float64,
    _P.FLOAT16: torch.float16,
    _P.BFLOAT16: torch.bfloat16,
    _P.INT8: torch.int8,
    _P.INT16: torch.int16,
    _P.INT32: torch.int32,
    _P.INT64: torch.int64,
    _P.UINT8: torch.uint8,
    _P.UINT16: torch.uint16,
    _P.UINT32: torch.uint32,
    _P.UINT64: torch.uint64,
    _P.BOOL: torch.bool,
    _P.COMPLEX64: torch.complex64,
    _P.COMPLEX128: torch.complex128,
    _P.FLOAT8E4M3FN: torch.float8_e4m3fn,
    _P.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    _P.FLOAT8E5M2: torch.float8_e5m2,
    _P.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    _P.FLOAT8E8M0: torch.float8_e8m0fnu,
}
ONNX_DTYPES = {dtype: code for code, dtype in TORCH_DTYPES.items()}
# numpy has no native type of these, torch has: go through an integer view of the same width.
_VIEWED = {
    torch.bfloat16: (torch.int16, np.dtype(ml_dtypes.bfloat16)),
    torch.float8_e4m3fn: (torch.uint8, np.dtype(ml_dtypes.float8_e4m3fn)),
    torch.float8_e4m3fnuz: (torch.uint8, np.dtype(ml_dtypes.float8_e4m3fnuz)),
    torch.float8_e5m2: (torch.uint8, np.dtype(ml_dtypes.float8_e5m2)),
    torch.float8_e5m2fnuz: (torch.uint8, np.dtype(ml_dtypes.float8_e5m2fnuz)),
    torch.float8_e8m0fnu: (torch.uint8, np.dtype(ml_dtypes.float8_e8m0fnu)),
}
_FROM_VIEW = {array_type: dtype for dtype, (_, array_type) in _VIEWED.items()}
_ELEMENT_TYPES: dict[str, int] = dict(_P.DataType.items())
_PACKED = {numpy_type(code): code for code in CARRIERS}
_FROM_NUMPY = {numpy_type(code): code for code in TORCH_DTYPES} | _PACKED


_NOTHING = np.empty(0, np.uint8)


class TensorReader:
    """Turns TensorProtos into torch tensors; external data is mapped copy-on-write, once per file."""

    def __init__(self, folder: Path | None) -> None:
        """Args: folder: the directory that external data must lie in."""
        self._folder = folder
        self._maps: dict[Path, _Array] = {}

    def value(self, proto: onnx.TensorProto) -> torch.Tensor | _Array:
        """The tensor's value: an object array of `str` for strings, a carrier for types that torch lacks.

        Raises:
            GraphOptError: the values do not fit the dims, or ONNX defines no such element type.
        """
        code = proto.data_type
        elements(proto, f"tensor {proto.name!r}")
        if code == _P.STRING:
            return _texts(proto)
        if code in CARRIERS:
            return from_numpy(self._unpacked(proto))
        if code not in TORCH_DTYPES:
            raise GraphOptError(f"tensor {proto.name!r} has the element type {code}, which ONNX does not define")
        if is_external(proto):
            return _view(self._mapped(proto), TORCH_DTYPES[code], proto)
        if proto.HasField("raw_data"):
            return _view(memoryview(proto.raw_data), TORCH_DTYPES[code], proto, exact=True)
        return from_numpy(_typed(proto))

    def _mapped(self, proto: onnx.TensorProto) -> _Array:
        span = external_span(proto, self._folder)
        if span.path not in self._maps:
            empty = not span.path.stat().st_size  # mmap refuses an empty file
            self._maps[span.path] = _NOTHING if empty else np.memmap(span.path, dtype=np.uint8, mode="c")
        end = None if span.length is None else span.offset + span.length
        return self._maps[span.path][span.offset : end]

    def _unpacked(self, proto: onnx.TensorProto) -> _Array:
        code, dims = proto.data_type, list(proto.dims)
        if is_external(proto):
            data = np.asarray(self._mapped(proto))
        elif proto.HasField("raw_data"):
            data = np.frombuffer(proto.raw_data, np.uint8)
            _check_exact(proto, packed_size(code, dims), data.size)
        elif code in (_P.FLOAT6E2M3, _P.FLOAT6E3M2):
            return _typed(proto)  # as numbers these are stored one by one, unlike all others of the kind
        else:
            data = np.asarray(proto.int32_data, np.int32).astype(np.uint8)
        _check_size(proto, packed_size(code, dims), data.size)
        return unpack(data, code, dims)


def _typed(proto: onnx.TensorProto) -> _Array:
    """The value of a tensor that is stored as a list of numbers."""
    try:
        return np.asarray(onnx.numpy_helper.to_array(proto))
    except (ValueError, TypeError, OverflowError) as error:
        raise GraphOptError(f"tensor {proto.name!r} does not fit its dims {list(proto.dims)}: {error}") from error


def _texts(proto: onnx.TensorProto) -> _Array:
    dims = list(proto.dims)
    if is_external(proto) or len(proto.string_data) != math.prod(dims):
        raise GraphOptError(
            f"string tensor {proto.name!r} of shape {dims} needs {math.prod(dims)} strings, but the file holds "
            f"{len(proto.string_data)}; it is corrupt"
        )
    return np.array([_text(s) for s in proto.string_data], dtype=object).reshape(dims)


def _check_size(proto: onnx.TensorProto, wanted: int, found: int) -> None:
    if found < wanted:
        raise GraphOptError(
            f"tensor {proto.name!r} of shape {list(proto.dims)} needs {wanted} bytes, but the file holds {found}; "
            "it is corrupt"
        )


def _check_exact(proto: onnx.TensorProto, wanted: int, found: int) -> None:
    if found > wanted:
        raise GraphOptError(
            f"tensor {proto.name!r} of shape {list(proto.dims)} takes {wanted} bytes, but the file holds {found}; "
            "it is corrupt"
        )


def _view(buffer: Any, dtype: torch.dtype, proto: onnx.TensorProto, *, exact: bool = False) -> torch.Tensor:
    dims = list(proto.dims)
    wanted = math.prod(dims) * dtype.itemsize
    _check_size(proto, wanted, len(buffer))
    if exact:
        _check_exact(proto, wanted, len(buffer))
    if wanted == 0:
        return torch.empty(dims, dtype=dtype)
    with warnings.catch_warnings():
        # The bytes of a protobuf are read-only; nothing here writes to a weight in place.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(buffer, dtype=dtype, count=math.prod(dims)).view(dims)


def from_numpy(array: _Array | np.generic) -> torch.Tensor | _Array:
    """A torch tensor of the same values; strings as an object array of `str`; packed types in their carriers.

    Raises:
        GraphOptError: ONNX has no such element type.
    """
    array = np.asarray(array)
    if array.dtype in _PACKED:
        carrier = CARRIERS[_PACKED[array.dtype]]
        wide = ml_dtypes.float8_e4m3fn if carrier == torch.float8_e4m3fn else numpy_type(ONNX_DTYPES[carrier])
        return from_numpy(array.astype(wide))
    if array.dtype in _FROM_VIEW:
        dtype = _FROM_VIEW[array.dtype]
        integer = np.int16 if _VIEWED[dtype][0] == torch.int16 else np.uint8
        return torch.from_numpy(np.ascontiguousarray(array).view(integer).copy()).view(dtype).view(array.shape)
    if array.dtype.kind in "OUST":
        return _strings(array)
    if array.dtype.kind not in "biufc" or array.dtype.char in "gG":
        raise GraphOptError(f"expected an array of an ONNX element type, found {array.dtype}; convert it first")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(_native(array)).reshape(array.shape))


def _native(array: _Array) -> _Array:
    """The array in this machine's byte order and under the one name of its type that torch knows."""
    dtype = np.dtype(f"{array.dtype.kind}{array.dtype.itemsize}")
    return array.view(dtype) if array.dtype == dtype else array.astype(dtype)


def _strings(array: _Array) -> _Array:
    if array.dtype.kind == "O" and all(type(item) is str for item in array.flat):
        return array
    return np.array([_text(item) for item in array.reshape(-1)], dtype=object).reshape(array.shape)


def _text(item: Any) -> str:
    """Text as `str`; bytes that are not UTF-8 come back unchanged when it is stored."""
    if isinstance(item, bytes):
        return item.decode(errors="surrogateescape")
    if not isinstance(item, str):
        raise GraphOptError(f"expected an array of numbers or text, found {type(item).__name__} in an object array")
    return str(item)  # numpy's own strings are a subclass


def to_numpy(value: Any, elem_type: int | None = None) -> Any:
    """The numpy form of a runtime value: types that numpy lacks through ml_dtypes, lists element by element.

    Args:
        value: a tensor, a list of such, or what has no other form (strings, maps, None).
        elem_type: the ONNX element type, where it is known; turns a carrier back into the packed type.
    """
    if isinstance(value, (list, tuple)):
        return [to_numpy(v, elem_type) for v in value]
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu().contiguous()
    array = value.numpy() if value.dtype not in _VIEWED else _viewed(value)
    if elem_type in CARRIERS and CARRIERS[elem_type] == value.dtype:
        return array.astype(numpy_type(elem_type))
    return array


def _viewed(value: torch.Tensor) -> _Array:
    integer, array_type = _VIEWED[value.dtype]
    return value.view(integer).numpy().view(array_type)


def element_type(dtype: torch.dtype | str | None) -> int:
    """The ONNX element type code of a `ValueSpec.dtype` ("int4", "seq(tensor(int4))"), or 0 where there is none."""
    if isinstance(dtype, torch.dtype):
        return ONNX_DTYPES.get(dtype, 0)
    name = (dtype or "").rpartition("(")[2].rstrip(")").upper()
    return _ELEMENT_TYPES.get(name, 0)


def element_type_of(value: Any) -> int:
    """The ONNX element type code of a tensor or array; 0 for anything else, and where ONNX has no such type."""
    if isinstance(value, torch.Tensor):
        return ONNX_DTYPES.get(value.dtype, 0)
    dtype = getattr(value, "dtype", None)
    if not isinstance(dtype, np.dtype):
        return 0
    return int(_P.STRING) if dtype.kind in "OUST" else _FROM_NUMPY.get(dtype, 0)


def type_name(elem_type: int) -> str:
    """The name of an element type in messages: torch's where it has one, else that of ONNX."""
    if elem_type in TORCH_DTYPES:
        return str(TORCH_DTYPES[elem_type]).removeprefix("torch.")
    return str(_P.DataType.Name(elem_type)).lower()


def to_tensor_proto(name: str, tensor: torch.Tensor | _Array, elem_type: int | None = None) -> onnx.TensorProto:
    """An initialiser with the tensor's bytes, or with its strings.

    Args:
        name: of the initialiser.
        tensor: a tensor, an object array of `str`, or an array of any other ONNX type.
        elem_type: the ONNX element type where it is a packed one that `tensor` only carries.

    Raises:
        GraphOptError: ONNX has no such element type.
    """
    if isinstance(tensor, np.ndarray):
        elem_type = elem_type or _PACKED.get(tensor.dtype)
        tensor = from_numpy(tensor)
    if isinstance(tensor, np.ndarray):
        texts = [item.encode(errors="surrogateescape") for item in tensor.flat]
        return onnx.TensorProto(name=name, data_type=_P.STRING, dims=tensor.shape, string_data=texts)
    value = tensor.detach().cpu().contiguous()
    if elem_type in CARRIERS:
        if value.dtype != CARRIERS[elem_type]:
            raise GraphOptError(
                f"expected tensor {name!r} as {CARRIERS[elem_type]}, which carries {numpy_type(elem_type)}, "
                f"found {value.dtype}"
            )
        data = pack(to_numpy(value, elem_type), elem_type)
        return onnx.TensorProto(name=name, data_type=elem_type, dims=value.shape, raw_data=data)
    if value.dtype not in ONNX_DTYPES:
        raise GraphOptError(f"tensor {name!r} has type {value.dtype}, which ONNX cannot store")
    proto = onnx.TensorProto(name=name, data_type=ONNX_DTYPES[value.dtype], dims=value.shape)
    proto.raw_data = value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    return proto
