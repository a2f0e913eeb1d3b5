"""Gates and mixes of onnxruntime's com.microsoft domain, which fuse the short chains of recent decoders."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .contrib import DOMAIN
from .dtypes import compute_type
from .registry import operator


def _normed(x: Tensor, scale: Tensor | None, epsilon: float) -> Tensor:
    """Divide by the root mean square over the last axis, in float32 at least."""
    wide = x.to(compute_type(x.dtype))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return y if scale is None else y * scale.to(wide.dtype)


def _branches(x: Tensor, count: int) -> Tensor:
    """`[..., C * H]` to `[..., C, H]` where a number of branches is given."""
    return x.unflatten(-1, (count, -1)) if count else x


@operator("GatedAdd", domain=DOMAIN)
def gated_add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Return x + y * gate."""
    return x + y * gate


@operator("ScaledSiLU", domain=DOMAIN)
def scaled_silu(x: Tensor, scale: Tensor | None = None, *, alpha: float = 1.0) -> Tensor:
    """Return z * sigmoid(z) of x times the scale, or else times alpha, rounding to the type of x after each step."""
    wide = x.to(compute_type(x.dtype))
    z = (wide * (alpha if scale is None else scale.reshape(()).to(wide.dtype))).to(x.dtype)
    return z * torch.sigmoid(z)


@operator("GatedRMSNorm", domain=DOMAIN)
def gated_rms_norm(
    x: Tensor, scale: Tensor, gate: Tensor, *, activation: str = "silu", epsilon: float = 1e-5
) -> Tensor:
    """Divide each run of C channels by its root mean square, times the scale `[C]` and the activation of the gate."""
    runs = x.unflatten(-1, (-1, scale.shape[0]))
    y = _normed(runs, scale, epsilon).flatten(-2)
    wide = gate.to(y.dtype)
    return (y * (torch.sigmoid(wide) if activation == "sigmoid" else F.silu(wide))).to(x.dtype)


@operator("BranchwiseRMSNorm", domain=DOMAIN)
def branchwise_rms_norm(
    x: Tensor, scale: Tensor | None = None, *, epsilon: float = 1e-5, num_branches: int = 0
) -> Tensor:
    """Divide each branch of `[..., C, H]`, or with `num_branches` of `[..., C * H]`, by its root mean square."""
    grouped = _branches(x, num_branches)
    if scale is not None and scale.numel() == math.prod(grouped.shape[-2:]):
        scale = scale.reshape(grouped.shape[-2:])
    return _normed(grouped, scale, epsilon).to(x.dtype).reshape(x.shape)


@operator("LinearAttentionGate", domain=DOMAIN, counted=True)
def linear_attention_gate(
    a: Tensor, dt_bias: Tensor, decay_scale: Tensor, b: Tensor | None = None, *, outputs: int
) -> Tensor | tuple[Tensor, Tensor | None]:
    """Return decay_scale * softplus(a + dt_bias), and the sigmoid of b, each `[B, T, H]`."""
    wide = a.to(dt_bias.dtype) + dt_bias
    decay = (decay_scale * F.softplus(wide)).to(a.dtype)
    return decay if outputs == 1 else (decay, None if b is None else torch.sigmoid(b))


@operator("HyperConnectionPreMix", domain=DOMAIN)
def hyper_connection_pre_mix(
    streams: Tensor, pre_mix: Tensor, *, num_branches: int = 0, reduction_scale: float = 1.0
) -> Tensor:
    """Return the weighted sum `[..., H]` of the streams `[..., C, H]`, whose weights are per stream or per element."""
    x = _branches(streams, num_branches)
    wide = x.to(compute_type(x.dtype))
    return ((wide * _gates(pre_mix, x).to(wide.dtype)).sum(-2) * reduction_scale).to(x.dtype)


@operator("HyperConnectionPostMix", domain=DOMAIN)
def hyper_connection_post_mix(
    streams: Tensor,
    block_output: Tensor,
    post_mix: Tensor,
    stream_mix: Tensor | None = None,
    *,
    num_branches: int = 0,
) -> Tensor:
    """Mix the streams `[..., C, H]` by matrices `[..., C, C]`, and add the gated output `[..., H]` to each."""
    x = _branches(streams, num_branches)
    wide = x.to(compute_type(x.dtype))
    mixed = wide if stream_mix is None else stream_mix.to(wide.dtype).transpose(-1, -2) @ wide
    added = _gates(post_mix, x).to(wide.dtype) * block_output.to(wide.dtype).unsqueeze(-2)
    return (mixed + added).to(x.dtype).reshape(streams.shape)


def _gates(mix: Tensor, x: Tensor) -> Tensor:
    """Shape weights to broadcast with `[..., C, H]`: given per stream, per element, or flattened."""
    if mix.dim() == x.dim():
        return mix
    return mix.unsqueeze(-1) if mix.shape[-1] == x.shape[-2] else mix.reshape(x.shape)


@operator("EngramGate", domain=DOMAIN, counted=True)
def engram_gate(
    key: Tensor,
    query: Tensor,
    value: Tensor,
    key_norm_scale: Tensor,
    query_norm_scale: Tensor,
    conv_norm_scale: Tensor | None = None,
    *,
    epsilon: float = 1e-5,
    outputs: int,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the values `[B, T, H]` times a gate of each pair of key and query `[B, T, M, H]`; and that, normalised."""
    dot = (_normed(key, key_norm_scale, epsilon) * _normed(query, query_norm_scale, epsilon)).sum(-1, keepdim=True)
    dot = dot / math.sqrt(key.shape[-1])
    gate = torch.sigmoid(torch.sign(dot) * torch.sqrt(dot.abs().clamp(min=1e-6)))
    y = gate * value.to(gate.dtype).unsqueeze(-2)
    if outputs == 1:
        return y.to(key.dtype)
    return y.to(key.dtype), _normed(y, conv_norm_scale, epsilon).to(key.dtype)
