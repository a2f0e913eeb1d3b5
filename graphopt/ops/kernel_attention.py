"""y = phi(q) (phi(k)^T v) / phi(q) (phi(k)^T 1) over all keys: kernel attention without an order, in linear time.

Katharopoulos et al., "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention" (2020).
"""

from __future__ import annotations

import torch

from graphopt.ops.autograd import register_reference_autograd


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Every query sees every key; computed in fp32 or better.

    Args:
        q: query features [B, H, T, K].
        k: key features [B, Hkv, S, K]; Hkv divides H.
        v: values [B, Hkv, S, V].
        key_weight: weight of each key [B or 1, 1 or Hkv, S, 1]; 0 hides it (padding).
        eps: added to the sum of the weights, so that a row without visible keys gives zeros.

    Returns:
        [B, H, T, V] in the type of `v`.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    query, keys, values = q.to(wide), k.to(wide), v.to(wide)
    if key_weight is not None:
        keys = keys * key_weight.to(wide)
    # A column of ones makes the same product compute numerator and denominator.
    values = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
    state = keys.transpose(-1, -2) @ values
    if groups > 1:
        state = state.repeat_interleave(groups, 1)
    out = query @ state
    return (out[..., :-1] / (out[..., -1:] + eps)).to(v.dtype)


kernel_attention = torch.library.custom_op("graphopt::kernel_attention", reference, mutates_args=())


@kernel_attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    return v.new_empty((*q.shape[:-1], v.shape[-1]))


register_reference_autograd(kernel_attention, reference)
