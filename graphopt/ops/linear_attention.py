"""y = phi(q) (phi(k)^T v) / phi(q) (phi(k)^T 1), over all keys or causal, in time linear in the length.

Katharopoulos et al., "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention" (2020).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from graphopt.ops.autograd import register_reference_autograd

# Within a chunk the causal form is quadratic; between chunks it carries a state.
_CHUNK = 64


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None = None,
    causal: bool = False,
    normalize: bool = True,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Linear attention; computed in fp32 or better.

    Args:
        q: query features [B, H, T, K].
        k: key features [B, Hkv, S, K]; Hkv divides H.
        v: values [B, Hkv, S, V].
        key_weight: weight of each key [B or 1, 1 or Hkv, S, 1]; 0 hides it (padding).
        causal: query i sees keys up to i + (S - T).
        normalize: divide by the sum of the weights.
        eps: added to that sum, so that a row without visible keys gives zeros.

    Returns:
        [B, H, T, V] in the type of `v`.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    query, keys, values = q.to(wide), k.to(wide), v.to(wide)
    if key_weight is not None:
        keys = keys * key_weight.to(wide)
    if normalize:
        # A column of ones makes the same product compute numerator and denominator.
        values = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    out = _causal(query, keys, values) if causal else query @ (keys.transpose(-1, -2) @ values)
    if normalize:
        out = out[..., :-1] / (out[..., -1:] + eps)
    return out.to(v.dtype)


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Chunkwise: a masked product inside each chunk, a running sum of k^T v before it."""
    T, S = q.shape[-2], k.shape[-2]
    q = F.pad(q, (0, 0, S - T, 0))  # queries stand at the end: query i sees keys up to i + (S - T)
    pad = -S % _CHUNK
    q, k, v = (F.pad(x, (0, 0, 0, pad)).unflatten(-2, (-1, _CHUNK)) for x in (q, k, v))
    inside = (q @ k.transpose(-1, -2)).tril() @ v
    states = k.transpose(-1, -2) @ v  # [B, H, N, K, V]
    before = states.cumsum(-3) - states
    return (inside + q @ before).flatten(-3, -2)[..., S - T : S, :]


linear_attention = torch.library.custom_op("graphopt::linear_attention", reference, mutates_args=())


@linear_attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None = None,
    causal: bool = False,
    normalize: bool = True,
    eps: float = 1e-6,
) -> torch.Tensor:
    return v.new_empty((*q.shape[:-1], v.shape[-1]))


register_reference_autograd(linear_attention, reference)
