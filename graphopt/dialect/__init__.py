"""The ONNX dialect: one torch function per ONNX operator, found by domain, name and opset."""

# The family modules enter their functions into the table when they are imported.
from . import (
    activation,
    attention,
    contrib,
    contrib_attention,
    gather,
    linear,
    logic,
    loss,
    math,
    nn,
    pooling,
    quantisation,
    recurrent,
    reduction,
    resize,
    signal,
    tensor,
)
from .registry import Operator, lookup, operator, operator_of, table

__all__ = [
    "Operator",
    "activation",
    "attention",
    "contrib",
    "contrib_attention",
    "gather",
    "linear",
    "logic",
    "lookup",
    "loss",
    "math",
    "nn",
    "operator",
    "operator_of",
    "pooling",
    "quantisation",
    "recurrent",
    "reduction",
    "resize",
    "signal",
    "table",
    "tensor",
]
