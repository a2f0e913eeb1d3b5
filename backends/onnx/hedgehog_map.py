"""ONNX form of the hedgehog feature map: a model-local function of primitive operators."""

from __future__ import annotations

import torch

from graphopt.backends.onnx.attention_parts import suffix
from graphopt.backends.onnx.builder import Builder
from graphopt.backends.onnx.table import Call, lowers, shape_of


@lowers("graphopt::hedgehog_map")
def _hedgehog_map(call: Call) -> str:
    """One product with [W, -W] side by side, then the activation over each half.

    Computing both signs in one MatMul and viewing the result as [.., 2, F] needs neither a copy of the features nor
    a second pass over x.
    """
    bias, activation = call.get(2, "bias"), call.get(3, "activation", "softmax")
    features = shape_of(call.node)[-1] // 2
    dtype = call.dtype()

    def body(b: Builder, inputs: list[str]) -> str:
        x, weight, *shift = (b.cast(i, torch.float32) if dtype.itemsize < 4 else i for i in inputs)
        projected = b.op("MatMul", x, _both_signs(b, weight))
        if shift:
            projected = b.op("Add", projected, _both_signs(b, shift[0]))
        if activation == "exp":
            out = b.op("Exp", projected)
        else:
            signs = b.op("Reshape", projected, b.ints(0, 0, 0, 2, features))
            out = b.op("Reshape", b.op("Softmax", signs, axis=4), b.ints(0, 0, 0, 2 * features))
        return b.cast(out, dtype) if dtype.itemsize < 4 else str(out)

    name = f"HedgehogMap_{activation}_{features}_{'biased_' if bias else ''}{suffix(dtype)}"
    return str(call.builder.function(name, [*call.args[:2], *([bias] if bias else [])], body))


def _both_signs(b: Builder, weight: str) -> str:
    """[W, -W]; depends on constants only, so runtimes fold it when they load the model."""
    return str(b.op("Concat", weight, b.op("Neg", weight), axis=2))
