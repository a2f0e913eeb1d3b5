"""Whether a tensor of a file is what it says: a known type, sizes that exist, and as many values as the sizes name."""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx
import onnx.helper

from graphopt.errors import GraphOptError

_P = onnx.TensorProto
# Values of small integer and float types lie in `int32_data`, two or more of the packed ones in each entry.
_INT32 = (
    _P.INT32, _P.INT16, _P.INT8, _P.UINT16, _P.UINT8, _P.BOOL, _P.FLOAT16, _P.BFLOAT16,
    _P.FLOAT8E4M3FN, _P.FLOAT8E4M3FNUZ, _P.FLOAT8E5M2, _P.FLOAT8E5M2FNUZ, _P.FLOAT8E8M0,
    _P.FLOAT6E2M3, _P.FLOAT6E3M2, _P.INT4, _P.UINT4, _P.FLOAT4E2M1, _P.INT2, _P.UINT2,
)  # fmt: skip
_FIELDS: dict[int, str] = {
    **dict.fromkeys(_INT32, "int32_data"),
    **dict.fromkeys((_P.FLOAT, _P.COMPLEX64), "float_data"),
    **dict.fromkeys((_P.DOUBLE, _P.COMPLEX128), "double_data"),
    **dict.fromkeys((_P.UINT32, _P.UINT64), "uint64_data"),
    _P.INT64: "int64_data",
    _P.STRING: "string_data",
}
_PER_ENTRY: dict[int, int] = {_P.INT4: 2, _P.UINT4: 2, _P.FLOAT4E2M1: 2, _P.INT2: 4, _P.UINT2: 4}
_ENTRIES: dict[int, int] = {_P.COMPLEX64: 2, _P.COMPLEX128: 2}
_DATA = frozenset({*_FIELDS.values(), "raw_data"})
# All sparse tensors of a file together are given this many bytes in their dense form, which is the one that runs.
DENSE_LIMIT = 1 << 30
# A dim_value of more would overflow the arithmetic on sizes of every runtime.
MOST_ELEMENTS = 1 << 62


def check_tensor(tensor: onnx.TensorProto) -> None:
    """Check everything about a tensor but the length of its raw or external bytes, which reading it checks.

    Raises:
        GraphOptError: its type is unknown, its dims are negative or overflow, or its values are another number.
    """
    label = f"tensor {tensor.name!r}"
    if tensor.data_type not in _FIELDS:
        raise GraphOptError(f"expected an ONNX element type for {label}, found the number {tensor.data_type}")
    count = elements(tensor, label)
    if tensor.HasField("segment"):
        raise GraphOptError(f"{label} is one segment of a larger tensor, which ONNX abandoned; store it whole")
    held = [field.name for field, _ in tensor.ListFields() if field.name in _DATA]
    if tensor.data_location == _P.EXTERNAL:
        if held or tensor.data_type == _P.STRING:
            raise GraphOptError(f"expected {label} to lie in another file, but it has {held or 'strings'}")
        return
    wanted = _FIELDS[tensor.data_type]
    if held not in ([], [wanted], ["raw_data"]) or (held == ["raw_data"] and tensor.data_type == _P.STRING):
        raise GraphOptError(f"expected the values of {label} in {wanted} or raw_data alone, found them in {held}")
    if held == ["raw_data"]:
        return
    found, needed = len(getattr(tensor, wanted)), _entries(count, tensor.data_type)
    if found != needed:
        dims = list(tensor.dims)
        raise GraphOptError(f"expected {needed} entries in {wanted} of {label} of shape {dims}, found {found}")


def elements(tensor: onnx.TensorProto | onnx.SparseTensorProto, label: str) -> int:
    """The number of elements that the dims name.

    Raises:
        GraphOptError: a dim is negative, or they overflow.
    """
    dims = list(tensor.dims)
    if any(d < 0 for d in dims):
        raise GraphOptError(f"{label} has a negative dimension in {_shown(dims)}; the file is corrupt")
    # Beside a dim of zero the others still have to fit: torch multiplies them all.
    if math.prod(d for d in dims if d) > MOST_ELEMENTS:
        raise GraphOptError(f"the dimensions {_shown(dims)} of {label} overflow; the file is corrupt")
    return math.prod(dims)


def _shown(dims: list[int]) -> str:
    return str(dims) if len(dims) <= 8 else f"{dims[:8]} and {len(dims) - 8} more"


def _entries(count: int, data_type: int) -> int:
    return -(-count // _PER_ENTRY.get(data_type, 1)) * _ENTRIES.get(data_type, 1)


def check_sparse(sparse: onnx.SparseTensorProto) -> int:
    """Check a sparse tensor but for the values of its indices; the bytes of its dense form.

    Raises:
        GraphOptError: one of its two tensors is wrong, or they do not belong together.
    """
    label = f"sparse tensor {sparse.values.name!r}"
    check_tensor(sparse.values)
    check_tensor(sparse.indices)
    if sparse.indices.data_type != _P.INT64 or sparse.values.data_type == _P.STRING:
        raise GraphOptError(f"expected numbers with indices of type INT64 in {label}, found other types")
    stored, indices = list(sparse.values.dims), list(sparse.indices.dims)
    if len(stored) != 1 or indices not in (stored, [*stored, len(sparse.dims)]):
        raise GraphOptError(
            f"expected one index per value in {label}, found values {_shown(stored)} and indices {_shown(indices)}"
        )
    return elements(sparse, label) * _itemsize(sparse.values.data_type)


def raw_bytes(tensor: onnx.TensorProto) -> int:
    """The length of the tensor's raw bytes, from its type and dims: asking protobuf for them would copy them."""
    if not tensor.HasField("raw_data"):
        return 0
    per_byte = _PER_ENTRY.get(tensor.data_type, 0)
    count: int = math.prod(tensor.dims)
    return -(-count // per_byte) if per_byte else count * _itemsize(tensor.data_type)


def _itemsize(data_type: int) -> int:
    return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize)


def tensors_in(attribute: onnx.AttributeProto) -> Iterator[onnx.TensorProto]:
    """The dense tensors of an attribute, the parts of its sparse ones included."""
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    for sparse in sparse_in(attribute):
        yield from (sparse.values, sparse.indices)


def sparse_in(attribute: onnx.AttributeProto) -> Iterator[onnx.SparseTensorProto]:
    """The sparse tensors of an attribute."""
    if attribute.HasField("sparse_tensor"):
        yield attribute.sparse_tensor
    yield from attribute.sparse_tensors
