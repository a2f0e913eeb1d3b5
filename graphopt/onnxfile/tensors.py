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
from graphopt.onnxfile.read import external_span, is_external

_P = onnx.TensorProto
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
}
ONNX_DTYPES = {dtype: code for code, dtype in TORCH_DTYPES.items()}
# Packed sub-byte integers have no torch type; they are unpacked to the byte that holds their values.
_UNPACKED = {np.dtype(ml_dtypes.int4): np.int8, np.dtype(ml_dtypes.uint4): np.uint8}
# numpy has no native type of these, torch has: go through an integer view of the same width.
_VIEWED = {
    np.dtype(ml_dtypes.bfloat16): (np.int16, torch.bfloat16),
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, torch.float8_e4m3fn),
    np.dtype(ml_dtypes.float8_e4m3fnuz): (np.uint8, torch.float8_e4m3fnuz),
    np.dtype(ml_dtypes.float8_e5m2): (np.uint8, torch.float8_e5m2),
    np.dtype(ml_dtypes.float8_e5m2fnuz): (np.uint8, torch.float8_e5m2fnuz),
}


class TensorReader:
    """Turns TensorProtos into torch tensors; external data is mapped copy-on-write, once per file."""

    def __init__(self, folder: Path | None) -> None:
        """Args: folder: the directory that external data must lie in."""
        self._folder = folder
        self._maps: dict[Path, np.memmap[Any, np.dtype[np.uint8]]] = {}

    def value(self, proto: onnx.TensorProto) -> torch.Tensor | np.ndarray[Any, Any]:
        """The tensor's value; an object array where torch has no such type (strings).

        Raises:
            GraphOptError: the bytes do not fit the dims.
        """
        dtype = TORCH_DTYPES.get(proto.data_type)
        if dtype is not None and is_external(proto):
            return self._mapped(proto, dtype)
        if dtype is not None and proto.HasField("raw_data"):
            return _view(memoryview(proto.raw_data), dtype, proto)
        return from_numpy(onnx.numpy_helper.to_array(proto, str(self._folder or "")))

    def _mapped(self, proto: onnx.TensorProto, dtype: torch.dtype) -> torch.Tensor:
        span = external_span(proto, self._folder)
        if span.path not in self._maps:
            self._maps[span.path] = np.memmap(span.path, dtype=np.uint8, mode="c")
        mapped = self._maps[span.path]
        end = None if span.length is None else span.offset + span.length
        return _view(mapped[span.offset : end], dtype, proto)


def _view(buffer: Any, dtype: torch.dtype, proto: onnx.TensorProto) -> torch.Tensor:
    dims = list(proto.dims)
    if any(d < 0 for d in dims):
        raise GraphOptError(f"tensor {proto.name!r} has a negative dimension in {dims}; the file is corrupt")
    wanted = math.prod(dims) * dtype.itemsize
    if len(buffer) < wanted:
        raise GraphOptError(
            f"tensor {proto.name!r} of shape {dims} needs {wanted} bytes, but the file holds {len(buffer)}; "
            "it is corrupt"
        )
    if wanted == 0:
        return torch.empty(dims, dtype=dtype)
    with warnings.catch_warnings():
        # The bytes of a protobuf are read-only; nothing here writes to a weight in place.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(buffer, dtype=dtype, count=math.prod(dims)).view(dims)


def from_numpy(array: np.ndarray[Any, Any]) -> torch.Tensor | np.ndarray[Any, Any]:
    """A torch tensor of the same values, or the array itself where torch has no such type."""
    array = np.asarray(array)
    if array.dtype in _VIEWED:
        integer, dtype = _VIEWED[array.dtype]
        return torch.from_numpy(np.ascontiguousarray(array).view(integer).copy()).view(dtype).view(array.shape)
    if array.dtype in _UNPACKED:
        return torch.from_numpy(array.astype(_UNPACKED[array.dtype]))
    if array.dtype.kind not in "biufc":
        return array  # strings
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))


def to_numpy(value: Any) -> Any:
    """The numpy form of a runtime value: bf16 and fp8 through ml_dtypes, lists element by element."""
    if isinstance(value, (list, tuple)):
        return [to_numpy(v) for v in value]
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu().contiguous()
    for array_type, (integer, dtype) in _VIEWED.items():
        if value.dtype == dtype:
            carrier = torch.int16 if integer is np.int16 else torch.uint8
            return value.view(carrier).numpy().view(array_type)
    return value.numpy()


def to_tensor_proto(name: str, tensor: torch.Tensor) -> onnx.TensorProto:
    """An initialiser with the tensor's bytes."""
    value = tensor.detach().cpu().contiguous()
    if value.dtype not in ONNX_DTYPES:
        raise GraphOptError(f"tensor {name!r} has type {value.dtype}, which ONNX cannot store")
    proto = onnx.TensorProto(name=name, data_type=ONNX_DTYPES[value.dtype], dims=list(value.shape))
    proto.raw_data = value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    return proto
