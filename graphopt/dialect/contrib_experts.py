"""Mixtures of experts of onnxruntime's com.microsoft domain."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .contrib import DOMAIN
from .contrib_packed import unpacked
from .registry import operator

# Gelu is the approximate one, as in onnxruntime.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "identity": lambda x: x,
    "relu": torch.relu,
    "silu": F.silu,
}

_Expert = Callable[[int], tuple[Tensor, Tensor | None]]


def _mixed(
    x: Tensor, routing: Tensor, up: _Expert, down: _Expert, beside: _Expert | None, gate: Callable[..., Tensor]
) -> Tensor:
    """Sum the experts' outputs for every token, weighted by `routing` `[tokens, experts]`.

    Every expert sees every token, because how many chose it is not known before the values are.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = torch.zeros_like(rows)
    for expert in range(routing.shape[1]):
        parts = [F.linear(rows, *layer(expert)) for layer in (up, beside) if layer is not None]
        y = y + routing[:, expert].unsqueeze(1) * F.linear(gate(*parts), *down(expert))
    return y.reshape(x.shape)


def _gate(name: str, fusion: int, alpha: float, beta: float, limit: float | None) -> Callable[..., Tensor]:
    """Return the activation of the first layer, or of the first and the third."""
    if name != "swiglu":
        function = _ACTIVATIONS[name]
        return lambda x, factor=None: function(x) if factor is None else function(x) * factor

    def swiglu(gate: Tensor, linear: Tensor | None = None) -> Tensor:
        if linear is None:
            gate, linear = (gate[..., 0::2], gate[..., 1::2]) if fusion == 1 else gate.chunk(2, -1)
        if limit is not None:
            gate, linear = gate.clamp(max=limit), linear.clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (linear + beta)

    return swiglu


def _routing(scores: Tensor, k: int, weights: Tensor, normalise: bool) -> Tensor:
    """Keep the weights at the k highest scores of each token, zeros elsewhere."""
    chosen = torch.topk(scores, k, -1)[1]
    picked = weights.gather(1, chosen)
    if normalise:
        picked = picked / picked.sum(-1, keepdim=True)
    return torch.zeros_like(weights).scatter(1, chosen, picked)


@operator("MoE", domain=DOMAIN)
def moe(
    x: Tensor,
    router_probs: Tensor,
    fc1_experts_weights: Tensor,
    fc1_experts_bias: Tensor | None,
    fc2_experts_weights: Tensor,
    fc2_experts_bias: Tensor | None = None,
    fc3_experts_weights: Tensor | None = None,
    fc3_experts_bias: Tensor | None = None,
    *,
    activation_alpha: float = 1.0,
    activation_beta: float = 0.0,
    activation_type: str = "relu",
    k: int = 1,
    normalize_routing_weights: int = 0,
    swiglu_fusion: int = 0,
    swiglu_limit: float | None = None,
    use_sparse_mixer: int = 0,
) -> Tensor:
    """Send each token of `[..., H]` through the k experts with the highest `router_probs` `[tokens, E]`.

    The weights are `[E, out, in]`, those of an expert its share of a softmax over all of them.
    """
    if use_sparse_mixer:
        raise NotImplementedError("MoE with a sparse mixer is not covered")

    def layer(weights: Tensor, bias: Tensor | None) -> _Expert:
        return lambda expert: (weights[expert], None if bias is None else bias[expert])

    routing = _routing(router_probs, k, torch.softmax(router_probs, -1), bool(normalize_routing_weights))
    beside = None if fc3_experts_weights is None else layer(fc3_experts_weights, fc3_experts_bias)
    up, down = layer(fc1_experts_weights, fc1_experts_bias), layer(fc2_experts_weights, fc2_experts_bias)
    gate = _gate(activation_type, swiglu_fusion, activation_alpha, activation_beta, swiglu_limit)
    return _mixed(x, routing, up, down, beside, gate)


def _dequantised(packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """Return one expert's weights `[out, in]`, whose scales are `[out]` or per block `[out, in / block]`."""
    rows = packed.shape[0]
    scale = scales.reshape(rows, -1, 1).to(dtype)
    zero: Tensor | int = 2 ** (bits - 1)
    if zeros is not None:
        # Those of a scale per row are packed across the rows.
        zero = unpacked(zeros, bits, scales.shape[-1]).reshape(rows, -1, 1).to(dtype)
    elements = unpacked(packed, bits).reshape(rows, scale.shape[1], -1).to(dtype)
    return ((elements - zero) * scale).flatten(1)


@operator("QMoE", domain=DOMAIN)
def q_moe(
    x: Tensor,
    router_probs: Tensor,
    fc1_experts_weights: Tensor,
    fc1_scales: Tensor | None,
    fc1_experts_bias: Tensor | None,
    fc2_experts_weights: Tensor,
    fc2_scales: Tensor | None = None,
    fc2_experts_bias: Tensor | None = None,
    fc3_experts_weights: Tensor | None = None,
    fc3_scales: Tensor | None = None,
    fc3_experts_bias: Tensor | None = None,
    fc1_zero_points: Tensor | None = None,
    fc2_zero_points: Tensor | None = None,
    fc3_zero_points: Tensor | None = None,
    router_weights: Tensor | None = None,
    *,
    accuracy_level: int = 0,
    activation_alpha: float = 1.0,
    activation_beta: float = 0.0,
    activation_type: str = "relu",
    block_size: int = 0,
    expert_weight_bits: int = 4,
    fc1_expert_weight_bits: int | None = None,
    fc2_expert_weight_bits: int | None = None,
    fc3_expert_weight_bits: int | None = None,
    k: int = 1,
    normalize_routing_weights: int = 0,
    quant_type: str = "int",
    swiglu_fusion: int = 0,
    swiglu_limit: float | None = None,
    use_sparse_mixer: int = 0,
    weights_prepacked: int = -1,
) -> Tensor:
    """Run MoE with weights of 2, 4 or 8 bits, an expert's share being its part of a softmax over the chosen k.

    Or `router_weights`, where they are given, are the shares, and `router_probs` only choose.
    """
    if use_sparse_mixer or quant_type != "int" or weights_prepacked == 1:
        raise NotImplementedError("QMoE covers integer weights as they are stored, and no sparse mixer")

    def layer(
        weights: Tensor, scales: Tensor | None, zeros: Tensor | None, bias: Tensor | None, bits: int | None
    ) -> _Expert:
        if scales is None:
            raise NotImplementedError("QMoE covers integer weights that have scales")

        def expert(index: int) -> tuple[Tensor, Tensor | None]:
            zero = None if zeros is None else zeros[index]
            weight = _dequantised(weights[index], scales[index], zero, bits or expert_weight_bits, x.dtype)
            return weight, None if bias is None else bias[index]

        return expert

    up = layer(fc1_experts_weights, fc1_scales, fc1_zero_points, fc1_experts_bias, fc1_expert_weight_bits)
    down = layer(fc2_experts_weights, fc2_scales, fc2_zero_points, fc2_experts_bias, fc2_expert_weight_bits)
    beside = None
    if fc3_experts_weights is not None:
        beside = layer(fc3_experts_weights, fc3_scales, fc3_zero_points, fc3_experts_bias, fc3_expert_weight_bits)
    if router_weights is None:
        # The softmax over the chosen ones is that over all of them, normalised.
        routing = _routing(router_probs, k, torch.softmax(router_probs, -1), True)
    else:
        routing = _routing(router_probs, k, router_weights, bool(normalize_routing_weights))
    gate = _gate(activation_type, swiglu_fusion, activation_alpha, activation_beta, swiglu_limit)
    return _mixed(x, routing, up, down, beside, gate)
