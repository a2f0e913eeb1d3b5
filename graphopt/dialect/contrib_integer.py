"""Products of quantised tensors in onnxruntime's com.microsoft domain."""

from __future__ import annotations

import torch
from torch import Tensor

from .contrib import DOMAIN
from .contrib_quantised import stored
from .gather import reverse_sequence_10
from .quantisation import dynamic_quantize_linear_11, q_linear_conv_10
from .recurrent import _activations, _directions, _limited, _results, _start
from .registry import operator


def exact_product(
    a: Tensor, b: Tensor, a_zero_point: Tensor | None = None, b_zero_point: Tensor | None = None
) -> Tensor:
    """Return (a - a_zero_point) @ (b - b_zero_point) in float64, which holds every sum of 8-bit products exactly.

    The zero points are scalars, or one per column.
    """
    a, b = a.to(torch.float64), b.to(torch.float64)
    a = a if a_zero_point is None else a - a_zero_point.to(torch.float64)
    return a @ (b if b_zero_point is None else b - b_zero_point.to(torch.float64))


@operator("MatMulInteger16", domain=DOMAIN)
def mat_mul_integer16(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in int32, or uint32 for unsigned inputs; sums beyond it wrap around."""
    total = exact_product(a, b).to(torch.int64)
    signed = a.dtype == torch.int16 or b.dtype == torch.int16
    # By way of int64, whose conversion drops the upper bits.
    return total.to(torch.int32 if signed else torch.uint32)


@operator("MatMulIntegerToFloat", domain=DOMAIN)
def mat_mul_integer_to_float(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero_point: Tensor | None = None,
    b_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return (a - a_zero_point) @ (b - b_zero_point) * a_scale * b_scale + bias."""
    y = exact_product(a, b, a_zero_point, b_zero_point).to(a_scale.dtype) * (a_scale * b_scale)
    return y if bias is None else y + bias


@operator("DynamicQuantizeMatMul", domain=DOMAIN)
def dynamic_quantize_mat_mul(
    a: Tensor, b: Tensor, b_scale: Tensor, b_zero_point: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Quantise a to uint8 over its range, and return MatMulIntegerToFloat."""
    codes, scale, zero = dynamic_quantize_linear_11(a)
    return mat_mul_integer_to_float(codes, b, scale, b_scale, zero, b_zero_point, bias)


@operator("QGemm", domain=DOMAIN)
def q_gemm(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    c: Tensor | None = None,
    y_scale: Tensor | None = None,
    y_zero_point: Tensor | None = None,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """Return (a @ b + c) * alpha * a_scale * b_scale, in float32 or where there is a `y_scale` in the type of a."""
    total = exact_product(a.t() if transA else a, b.t() if transB else b, a_zero_point, b_zero_point)
    total = total if c is None else total + c
    factor = alpha * a_scale * b_scale
    if y_scale is None:
        return total.to(factor.dtype) * factor
    return stored(total.to(factor.dtype), y_scale / factor, y_zero_point, a.dtype)


@operator("QLinearConv", domain=DOMAIN)
def microsoft_q_linear_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    channels_last: int = 0,
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Convolve quantised `[N, C, *spatial]`, or with `channels_last` `[N, *spatial, C]`, with `[M, C / group, *k]`."""
    y = q_linear_conv_10(
        x.movedim(-1, 1) if channels_last else x,
        x_scale,
        x_zero_point,
        w,
        w_scale,
        w_zero_point,
        y_scale,
        y_zero_point,
        bias,
        auto_pad=auto_pad,
        dilations=dilations,
        group=group,
        pads=pads,
        strides=strides,
    )
    return y.movedim(1, -1) if channels_last else y


@operator("DynamicQuantizeLSTM", domain=DOMAIN, counted=True)
def dynamic_quantize_lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None,
    lengths: Tensor | None,
    h: Tensor | None,
    c: Tensor | None,
    p: Tensor | None,
    w_scale: Tensor,
    w_zero_point: Tensor,
    r_scale: Tensor,
    r_zero_point: Tensor,
    *,
    activation_alpha: list[float] | None = None,
    activation_beta: list[float] | None = None,
    activations: list[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    outputs: int,
) -> Tensor | tuple[Tensor, ...]:
    """Run LSTM with weights `[directions, in, 4 * H]` of 8 bits; the input and each state are quantised before use.

    The scales and zero points are `[directions]`, or one per column `[directions, 4 * H]`.
    """
    ways, hidden = _directions(direction), r.shape[1]
    first, cells = _start(h, x, len(ways), hidden), _start(c, x, len(ways), hidden)
    functions = _activations(activations, ("sigmoid", "tanh", "tanh"), len(ways))
    ends = torch.full(x.shape[1:2], x.shape[0], device=x.device) if lengths is None else lengths

    def run(d: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        gate, candidate, squashed = functions[d]
        bias = None if b is None else b[d].unflatten(0, (2, -1)).sum(0)
        seen = dynamic_quantize_mat_mul(x, w[d], w_scale[d], w_zero_point[d], bias)
        seen = reverse_sequence_10(seen, ends) if ways[d] else seen
        peep_i, peep_o, peep_f = (0.0, 0.0, 0.0) if p is None else p[d].chunk(3)
        hidden_state, cell, shown = first[d], cells[d], []
        for step in range(x.shape[0]):
            live = (step < ends).unsqueeze(-1)
            # The range of the states decides how they are quantised. The last one of a sample that has ended
            # takes part once more, as it does in onnxruntime, whose outputs are zero only from then on.
            past = torch.where((step <= ends).unsqueeze(-1), hidden_state, 0)
            products = seen[step] + dynamic_quantize_mat_mul(past, r[d], r_scale[d], r_zero_point[d])
            i, o, f, n = products.chunk(4, -1)
            i = gate(_limited(i + peep_i * cell, clip))
            f = 1 - i if input_forget else gate(_limited(f + peep_f * cell, clip))
            now = f * cell + i * candidate(_limited(n, clip))
            y = gate(_limited(o + peep_o * now, clip)) * squashed(now)
            hidden_state, cell = torch.where(live, y, hidden_state), torch.where(live, now, cell)
            shown.append(torch.where(live, y, 0))
        output = torch.stack(shown)
        return reverse_sequence_10(output, ends) if ways[d] else output, (hidden_state, cell)

    return _results([run(d) for d in range(len(ways))], 0, outputs)
