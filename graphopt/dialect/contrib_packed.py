"""Operators of onnxruntime's com.microsoft domain whose weights are packed integers with a scale per block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .contrib import DOMAIN
from .nn import rms_norm
from .registry import operator

_UINT8, _UINT4 = 2, 21


def unpacked(x: Tensor, bits: int, count: int | None = None) -> Tensor:
    """Return the integers of so many bits that the bytes of the last axis hold, the lowest bits first.

    Args:
        x: uint8 `[..., bytes]`.
        bits: 2, 4 or 8.
        count: how many of the integers of a row count, all by default.

    Returns:
        uint8 `[..., count]`.
    """
    if bits not in (2, 4, 8):
        raise NotImplementedError(f"integers of 2, 4 or 8 bits are covered, found {bits}")
    if bits == 8:
        return x[..., :count]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=x.device)
    integers: Tensor = ((x.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)
    return integers[..., :count]


@operator("MatMulNBits", domain=DOMAIN)
def mat_mul_n_bits(
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    g_idx: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    K: int,
    N: int,
    accuracy_level: int = 0,
    bits: int = 4,
    block_size: int,
    weight_prepacked: int = 0,
) -> Tensor:
    """Return a @ ((b - zero_points) * scales)^T + bias.

    Args:
        a: `[..., K]`.
        b: uint8 `[N, blocks, block_size * bits / 8]`.
        scales: `[N, blocks]`, of the type of a; early models have it flattened.
        zero_points: uint8 `[N, ceil(blocks * bits / 8)]`, packed as b, or floats `[N, blocks]`.
        g_idx: `[K]`, the block whose scale each input feature has; by default that in which it lies.
        bias: `[N]`.
        K: the number of input features.
        N: the number of output features.
        accuracy_level: down to which type a kernel may round a; here it is never rounded.
        bits: of an element of b.
        block_size: how many input features share a scale.
        weight_prepacked: whether b is in a layout of one kernel, which is not covered.
    """
    if weight_prepacked:
        raise NotImplementedError("MatMulNBits with weights in the layout of one kernel is not covered")
    blocks = -(-K // block_size)
    scale = scales.reshape(N, blocks)
    if zero_points is None:
        zero = torch.full_like(scale, 2 ** (bits - 1))
    elif zero_points.dtype == torch.uint8:
        zero = unpacked(zero_points.reshape(N, -1), bits, blocks).to(scale.dtype)
    else:
        zero = zero_points.reshape(N, blocks)
    elements = unpacked(b.reshape(N, -1), bits, blocks * block_size).to(scale.dtype)
    if g_idx is None:
        blocked = elements.reshape(N, blocks, block_size)
        weight = ((blocked - zero.unsqueeze(2)) * scale.unsqueeze(2)).flatten(1)[:, :K]
    else:
        group = g_idx[:K].to(torch.int64)
        weight = (elements[:, :K] - zero[:, group]) * scale[:, group]
    y = a @ weight.t()
    return y if bias is None else y + bias


def _normed(a: Tensor, skip: Tensor | None, scale: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return a + skip divided by its root mean square, and that sum."""
    total = a if skip is None else a + skip
    return (total if scale is None else rms_norm(total, scale, -1, epsilon, 1)[0]), total


@operator("MatMulNBitsMlp", domain=DOMAIN, counted=True)
def mat_mul_n_bits_mlp(
    a: Tensor,
    skip: Tensor | None,
    norm_scale: Tensor | None,
    gate_b: Tensor,
    gate_scales: Tensor,
    gate_bias: Tensor | None,
    up_b: Tensor,
    up_scales: Tensor,
    up_bias: Tensor | None = None,
    *,
    K: int,
    N: int,
    accuracy_level: int = 0,
    activation: str,
    bits: int = 4,
    block_size: int,
    epsilon: float = 1e-5,
    outputs: int,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return activation(gate) * up, two MatMulNBits of the normalised sum of a and skip; and that sum."""
    if activation != "silu":
        raise NotImplementedError(f"MatMulNBitsMlp with the activation {activation!r} is not covered")
    x, total = _normed(a, skip, norm_scale, epsilon)
    gate = mat_mul_n_bits(x, gate_b, gate_scales, bias=gate_bias, K=K, N=N, bits=bits, block_size=block_size)
    up = mat_mul_n_bits(x, up_b, up_scales, bias=up_bias, K=K, N=N, bits=bits, block_size=block_size)
    y = F.silu(gate) * up
    return y if outputs == 1 else (y, total)


@operator("MatMulNBitsQkv", domain=DOMAIN, counted=True)
def mat_mul_n_bits_qkv(
    a: Tensor,
    skip: Tensor | None,
    norm_scale: Tensor,
    q_b: Tensor,
    q_scales: Tensor,
    q_bias: Tensor | None,
    k_b: Tensor,
    k_scales: Tensor,
    k_bias: Tensor | None,
    v_b: Tensor,
    v_scales: Tensor,
    v_bias: Tensor | None = None,
    *,
    K: int,
    Nkv: int,
    Nq: int,
    accuracy_level: int = 0,
    bits: int = 4,
    block_size: int,
    epsilon: float = 1e-6,
    outputs: int,
) -> tuple[Tensor, ...]:
    """Return three MatMulNBits of the normalised sum of a and skip; and that sum."""
    x, total = _normed(a, skip, norm_scale, epsilon)
    parts = ((q_b, q_scales, q_bias, Nq), (k_b, k_scales, k_bias, Nkv), (v_b, v_scales, v_bias, Nkv))
    products = (
        mat_mul_n_bits(x, b, scales, bias=bias, K=K, N=width, bits=bits, block_size=block_size)
        for b, scales, bias, width in parts
    )
    return (*products, total)[:outputs]


# The values of bitsandbytes' 4-bit types, by their codes.
_FP4 = [0.0, 0.0052083334, 0.6666667, 1.0, 0.33333334, 0.5, 0.16666667, 0.25]
_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


@operator("MatMulBnb4", domain=DOMAIN)
def mat_mul_bnb4(
    a: Tensor,
    b: Tensor,
    absmax: Tensor,
    *,
    K: int,
    N: int,
    block_size: int,
    quant_type: int,
    training_mode: int = 0,
    transB: int = 1,
) -> Tensor:
    """Return a @ weight^T, the weight `[N, K]` a row of FP4 or NF4 codes, the first in the upper half of a byte."""
    table = torch.tensor(_NF4 if quant_type else _FP4 + [-x for x in _FP4], dtype=a.dtype, device=a.device)
    codes = torch.stack((b >> 4, b & 15), -1).reshape(-1)[: N * K]
    scale = absmax.reshape(-1).repeat_interleave(block_size)[: N * K]
    weight = (table[codes.to(torch.int64)] * scale).reshape(N, K)
    return a @ (weight.t() if transB else weight)


@operator("GatherBlockQuantized", domain=DOMAIN, typed=True)
def gather_block_quantized(
    data: Tensor,
    indices: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    *,
    bits: int = 4,
    block_size: int = 128,
    gather_axis: int = 0,
    quantize_axis: int = 1,
    types: tuple[int, ...] = (),
) -> Tensor:
    """Gather slices of quantised data and scale them; an index outside of the data gives zeros.

    Bytes hold one integer or several along the last axis, elements of the other types are what they are.
    """
    kind = types[0] if types and types[0] else _UINT8 * (data.dtype == torch.uint8)
    per_byte = 8 // bits if kind == _UINT8 else 1
    rank = data.dim()
    gathered, blocked = gather_axis % rank, quantize_axis % rank
    size = data.shape[gathered]
    index = torch.where(indices < 0, indices + size, indices).reshape(-1).to(torch.int64)
    inside = (index >= 0) & (index < size)
    index = torch.where(inside, index, torch.zeros_like(index))
    whole = data.shape[blocked] * (per_byte if blocked == rank - 1 else 1)
    block = block_size or whole
    x = _selected(data, index, gathered)
    x = unpacked(x, bits) if per_byte > 1 else x
    scale = _blocks(scales, index, gathered, blocked, block, whole)
    y = x.to(scales.dtype)
    if zero_points is not None:
        zero = unpacked(zero_points, bits, scales.shape[-1]) if per_byte > 1 else zero_points
        y = y - _blocks(zero, index, gathered, blocked, block, whole).to(scales.dtype)
    elif kind == _UINT8:
        y = y - 2 ** (bits - 1)
    live = inside.reshape(-1, *(1,) * (rank - gathered - 1))
    y = torch.where(live, y * scale, torch.zeros((), dtype=y.dtype, device=y.device))
    return y.reshape(*y.shape[:gathered], *indices.shape, *y.shape[gathered + 1 :])


def _selected(x: Tensor, index: Tensor, axis: int) -> Tensor:
    if x.dtype.is_floating_point and x.dtype.itemsize == 1:
        # torch does not index 8-bit floats.
        return x.view(torch.uint8).index_select(axis, index).view(x.dtype)
    return x.index_select(axis, index)


def _blocks(parameter: Tensor, index: Tensor, gathered: int, blocked: int, block: int, whole: int) -> Tensor:
    """Return the parameter of each block for the gathered slices, of their shape or with axes of size one."""
    if gathered == blocked:
        return parameter.index_select(gathered, index // block)
    if parameter.shape[gathered] > 1:
        parameter = parameter.index_select(gathered, index)
    return parameter.repeat_interleave(block, blocked).narrow(blocked, 0, whole)
