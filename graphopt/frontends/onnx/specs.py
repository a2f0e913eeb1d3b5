"""What an ONNX graph declares of its inputs and outputs."""

from __future__ import annotations

import onnx
import torch

from graphopt.graph import Dim, ValueSpec
from graphopt.onnxfile.tensors import TORCH_DTYPES


def value_spec(value: onnx.ValueInfoProto) -> ValueSpec:
    """Name, element type and shape of an input or output."""
    if value.type.WhichOneof("value") != "tensor_type":
        return ValueSpec(value.name, _text(value.type), None)
    tensor = value.type.tensor_type
    dtype: torch.dtype | str | None = TORCH_DTYPES.get(tensor.elem_type)
    if dtype is None and tensor.elem_type in onnx.TensorProto.DataType.values():
        dtype = onnx.TensorProto.DataType.Name(tensor.elem_type).lower() if tensor.elem_type else None
    if not tensor.HasField("shape"):
        return ValueSpec(value.name, dtype, None)
    return ValueSpec(value.name, dtype, tuple(_dim(d) for d in tensor.shape.dim))


def _text(kind: onnx.TypeProto) -> str | None:
    """A type as the standard spells it: `seq(tensor(float))`."""
    which = kind.WhichOneof("value")
    if which == "sequence_type":
        return f"seq({_text(kind.sequence_type.elem_type)})"
    if which == "optional_type":
        return f"optional({_text(kind.optional_type.elem_type)})"
    if which == "map_type":
        return f"map({_element(kind.map_type.key_type)}, {_text(kind.map_type.value_type)})"
    if which == "sparse_tensor_type":
        return f"sparse_tensor({_element(kind.sparse_tensor_type.elem_type)})"
    return f"tensor({_element(kind.tensor_type.elem_type)})" if which == "tensor_type" else which


def _element(code: int) -> str:
    return onnx.TensorProto.DataType.Name(code).lower() if code in onnx.TensorProto.DataType.values() else "?"


def _dim(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    which = dim.WhichOneof("value")
    if which == "dim_value":
        return int(dim.dim_value) if dim.dim_value >= 0 else None  # some exporters write -1 for unknown
    return dim.dim_param or None if which == "dim_param" else None
