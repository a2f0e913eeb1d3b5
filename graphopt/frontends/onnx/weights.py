"""The constants of an ONNX graph: initialisers, sparse ones, and Constant nodes."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx.helper
import torch

from graphopt.errors import GraphOptError
from graphopt.onnxfile import TensorReader

# A sparse tensor is stored dense here; beyond this many bytes it is refused rather than allocated.
_DENSE_LIMIT = 1 << 32


def densify(sparse: onnx.SparseTensorProto, reader: TensorReader) -> torch.Tensor:
    """The dense form of a sparse tensor.

    Raises:
        GraphOptError: an index lies outside of the dims, or the dense form would be larger than 4 GB.
    """
    name, dims = sparse.values.name, list(sparse.dims)
    values, indices = reader.value(sparse.values), reader.value(sparse.indices)
    if not isinstance(values, torch.Tensor) or not isinstance(indices, torch.Tensor):
        raise GraphOptError(f"expected numbers in the sparse tensor {name!r}, found strings; the file is corrupt")
    if any(d < 0 for d in dims) or math.prod(dims) * values.element_size() > _DENSE_LIMIT:
        raise GraphOptError(f"the sparse tensor {name!r} of dims {dims} is too large to be stored densely")
    flat = indices.to(torch.int64)
    if flat.ndim == 2 and flat.shape[1] == len(dims):
        if bool(((flat < 0) | (flat >= torch.tensor(dims))).any()):
            raise GraphOptError(f"the sparse tensor {name!r} has an index outside of its dims; the file is corrupt")
        strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
        flat = (flat * torch.tensor(strides)).sum(1)
    size = math.prod(dims)
    fits = flat.ndim == 1 and flat.numel() == values.numel() and not bool(((flat < 0) | (flat >= size)).any())
    if not fits:
        raise GraphOptError(f"the indices of the sparse tensor {name!r} do not fit its dims; the file is corrupt")
    dense = torch.zeros(size, dtype=values.dtype)
    dense[flat] = values.reshape(-1)
    return dense.reshape(dims)


def constant_value(attribute: onnx.AttributeProto) -> torch.Tensor | np.ndarray[tuple[int, ...], np.dtype[np.object_]]:
    """The value of a Constant node that holds no tensor: numbers, or strings as an object array."""
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.type == onnx.AttributeProto.STRING:
        return np.array(value.decode(errors="surrogateescape"), dtype=object)
    if attribute.type == onnx.AttributeProto.STRINGS:
        texts = np.empty(len(value), dtype=object)
        texts[:] = [v.decode(errors="surrogateescape") for v in value]
        return texts
    kinds = {onnx.AttributeProto.FLOAT: torch.float32, onnx.AttributeProto.FLOATS: torch.float32}
    kinds |= {onnx.AttributeProto.INT: torch.int64, onnx.AttributeProto.INTS: torch.int64}
    if attribute.type not in kinds:
        raise GraphOptError(f"expected a number or a text in a Constant node's {attribute.name!r}, found another kind")
    return torch.tensor(value, dtype=kinds[attribute.type])
