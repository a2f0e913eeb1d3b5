"""ONNX form of StableMax: a model-local function of primitive operators."""

from __future__ import annotations

import torch

from graphopt.backends.onnx.attention_parts import suffix
from graphopt.backends.onnx.builder import Builder, need
from graphopt.backends.onnx.table import Call, lowers


@lowers("graphopt::stablemax")
def _stablemax(call: Call) -> str:
    """(1 + max(x, 0)) / (1 + max(-x, 0)), one branch of which is 1, over the sum of these."""
    need(call.builder.opset >= 8, "stablemax below opset 8, whose Max takes no scalar")
    axis, dtype = call.axis(call.get(1, "dim", -1)), call.dtype()
    wide = torch.promote_types(dtype, torch.float32)

    def body(b: Builder, inputs: list[str]) -> str:
        x = inputs[0] if dtype == wide else b.cast(inputs[0], wide)
        zero, one = b.number(0, wide), b.number(1, wide)
        above = b.op("Add", b.op("Max", x, zero), one)
        below = b.op("Add", b.op("Max", b.op("Neg", x), zero), one)
        weights = str(b.op("Div", above, below))
        total = b.sum(weights, axis)
        # As a truth value: floats could not be compared for equality before opset 11, and NaN has to stay.
        nothing = b.cast(str(b.op("Not", b.cast(total, torch.bool))), wide)
        out = b.op("Div", weights, b.op("Add", total, nothing))
        return str(out) if dtype == wide else b.cast(out, dtype)

    return str(call.builder.function(f"StableMax_{axis}_{suffix(dtype)}", call.args[:1], body))
