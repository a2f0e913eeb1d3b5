"""softmax over a window and linear attention over everything before it, under one denominator: LoLCATs' hybrid.

    y_i = [ g sum_{j in window of i} exp(s q_i k_j - c_i) v_j + phi(q_i)^T sum_{j before it} phi(k_j) v_j^T ]
        / [ the same with 1 in place of v_j ]

c_i is the largest exponent within the window; the linear sum is scaled neither by exp(-c_i) nor by s.

Zhang et al., "LoLCATs: On Low-Rank Linearizing of Large Language Models" (2024).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from graphopt.ops.autograd import register_reference_autograd
from graphopt.ops.linear_attention import chunked
from graphopt.ops.window_attention import TINY, exponentials


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_features: torch.Tensor,
    key_features: torch.Tensor,
    gate: torch.Tensor,
    key_weight: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    window: int = 64,
    sinks: int = 0,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """LoLCATs' hybrid attention; computed in fp32 or better, in time linear in T.

    A key enters the state when it leaves the window, so a cache for decoding keeps the sinks and the last `window`
    keys, and `state` holds the rest: feeding both back gives what one run over the whole text gives.

    Args:
        q: queries [B, H, T, D].
        k: keys [B, Hkv, S, D]; the first S - T of them come from a cache.
        v: values [B, Hkv, S, V].
        query_features: phi(q) [B, H, T, F], not negative.
        key_features: phi(k) [B, Hf, S, F], not negative; Hf is H (maps of their own) or Hkv (shared maps).
        gate: factor g on the window [1 or B, H, 1, 1]; 0 leaves the linear part alone.
        key_weight: [B or 1, 1, S, 1]; 0 hides a key, None is 1.
        state: sum of phi(k_j) [v_j, 1]^T of the keys before k [B, Hf, F, V + 1]; None is zero.
        window: how many keys a query sees exactly, its own included; 0 gives linear attention over all keys.
        sinks: how many of the first keys are always seen exactly, and never enter the state.
        scale: factor on q k^T.

    Returns:
        The output [B, H, T, V] in the type of `v`, zeros where nothing is visible, and the state of all keys but the
        sinks and the last `window` [B, Hf, F, V + 1] in fp32 or better.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    q, k, values, query_features, key_features, gate = (
        x.to(wide) for x in (q, k, v, query_features, key_features, gate)
    )
    weight = None if key_weight is None else key_weight.to(wide)
    near = exponentials(q, k, values, weight, window, sinks, scale)
    far, state = _linear(query_features, key_features, values, weight, state, window, sinks)
    sums = gate * near + far
    return (sums[..., :-1] / sums[..., -1:].clamp(min=TINY)).to(v.dtype).contiguous(), state


def _linear(
    query_features: torch.Tensor,
    key_features: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor | None,
    state: torch.Tensor | None,
    window: int,
    sinks: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """phi(q_i)^T (state + sum over j <= i + (S - T) - window), and the state behind the last query."""
    T, S = query_features.shape[2], key_features.shape[2]
    held = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    if weight is not None:
        held = held * weight
    if sinks:
        held = held * (torch.arange(S, device=v.device) >= sinks).to(v.dtype)[:, None]
    held = held.repeat_interleave(key_features.shape[1] // v.shape[1], 1)
    # Query i meets key i + early: zeros stand for keys before the first, and keys before query 0's are in the state.
    early = S - T - window
    if early > 0:
        added = key_features[:, :, :early].transpose(-1, -2) @ held[:, :, :early]
        state = added if state is None else state + added
    features, held = (
        F.pad(x[:, :, max(early, 0) :], (0, 0, max(-early, 0), 0))[:, :, :T] for x in (key_features, held)
    )
    return chunked(query_features, features, held, state=state)


windowed_linear_attention = torch.library.custom_op("graphopt::windowed_linear_attention", reference, mutates_args=())


@windowed_linear_attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_features: torch.Tensor,
    key_features: torch.Tensor,
    gate: torch.Tensor,
    key_weight: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    window: int = 64,
    sinks: int = 0,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(v.dtype, torch.float32)
    shape = (*key_features.shape[:2], key_features.shape[-1], v.shape[-1] + 1)
    return v.new_empty((*q.shape[:-1], v.shape[-1])), v.new_empty(shape, dtype=wide)


register_reference_autograd(windowed_linear_attention, reference)
