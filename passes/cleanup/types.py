"""Element types of ONNX operators, from those of their operands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from graphopt.dialect.dtypes import dtype_of

from .inference import BINARY, UNARY
from .operators import words

if TYPE_CHECKING:
    from .facts import View

_BOOLEAN = words("Equal Greater Less GreaterOrEqual LessOrEqual And Or Xor Not IsNaN IsInf")
_INTEGER = words("Shape Size ArgMax ArgMin NonZero")
_OTHER_TYPE = (
    _BOOLEAN | _INTEGER | {"Cast", "CastLike", "Where", "ConstantOfShape", "QuantizeLinear", "DequantizeLinear"}
)
_SAME_TYPE = (UNARY | BINARY) - _OTHER_TYPE | words(
    "Reshape Flatten Squeeze Unsqueeze Transpose Expand Tile Pad Slice Split Concat Gather "
    "GatherElements GatherND MatMul Gemm Conv ConvTranspose Range ReduceMean ReduceSum ReduceMax "
    "ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSum ReduceLogSumExp "
    "GlobalAveragePool GlobalMaxPool AveragePool MaxPool Resize DepthToSpace SpaceToDepth"
)


def element_type(view: View) -> torch.dtype | None:
    """The element type of the first output."""
    name = view.name
    if name in _BOOLEAN:
        return torch.bool
    if name in _INTEGER:
        return torch.int64
    if name == "Cast":
        try:
            return dtype_of(int(view.attribute("to", 0)))
        except NotImplementedError:
            return None
    if name == "ConstantOfShape":
        value = view.tensor_attribute("value")
        return torch.float32 if value is None else value.dtype
    if "output_dtype" in view.node.kwargs:
        return None
    position = {"CastLike": 1, "Where": 1, "DequantizeLinear": 1}.get(name, 0 if name in _SAME_TYPE else None)
    return None if position is None else view.argument(position).dtype
