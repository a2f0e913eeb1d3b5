"""ONNX form of `graphopt::last_rows`: one Slice whose length is that of another value."""

from __future__ import annotations

import torch

from graphopt.backends.onnx.table import Call, lowers

_END = torch.iinfo(torch.int64).max
_ROWS = 2


@lowers("graphopt::last_rows")
def _last_rows(call: Call) -> str:
    """x[:, :, -T:, :] of values [B, H, S, D]."""
    builder = call.builder
    start = builder.op("Neg", builder.size(call.args[1], _ROWS))
    return str(builder.op("Slice", call.args[0], start, builder.ints(_END), builder.ints(_ROWS)))
