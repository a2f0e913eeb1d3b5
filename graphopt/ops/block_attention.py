"""softmax(scale q k^T) v within blocks of tokens that are counted from the first one: no [T, S] matrix.

The diagonal attention of early layers in Qin et al., "The Devil in Linear Transformer" (2022).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from graphopt.ops.autograd import register_reference_autograd

# Below any sum of weights that counts: a row that sees no key gives zeros.
TINY = 1e-30


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None = None,
    block: int = 64,
    causal: bool = False,
    scale: float = 1.0,
) -> torch.Tensor:
    """Every query sees the keys of its own block; computed in fp32 or better.

    Args:
        q: [B, H, T, D].
        k: [B, Hkv, T, D]; Hkv divides H.
        v: [B, Hkv, T, V].
        key_weight: factor on the exponential of each key [B or 1, 1, T, 1]; 0 hides it.
        block: number of tokens in a block.
        causal: a query does not see the keys behind it.
        scale: factor on q k^T.

    Returns:
        [B, H, T, V] in the type of `v`; zeros where nothing is visible.

    Raises:
        ValueError: there are not as many keys as queries.
    """
    T, groups = q.shape[2], q.shape[1] // k.shape[1]
    if k.shape[2] != T:
        raise ValueError(f"expected as many keys as queries for blocks of both, got {k.shape[2]} and {T}")
    wide = torch.promote_types(v.dtype, torch.float32)
    weight = k.new_ones((1, 1, T, 1)) if key_weight is None else key_weight
    # Heads that share a key stand beside each other: [B, Hkv, G, N, C, D]. What fills up the last block weighs 0.
    query = _blocks(q.to(wide).unflatten(1, (-1, groups)), block)
    keys, values, seen = (_blocks(x.to(wide).unsqueeze(2), block) for x in (k, v, weight))
    hidden = seen.transpose(-1, -2) == 0
    if causal:
        hidden = hidden | torch.ones(block, block, dtype=torch.bool, device=q.device).triu(1)
    scores = (scale * query @ keys.transpose(-1, -2)).masked_fill(hidden, -torch.inf)
    largest = scores.amax(-1, keepdim=True).detach()
    weights = torch.exp(scores - largest.masked_fill(largest == -torch.inf, 0)) * seen.transpose(-1, -2)
    out = weights @ values / weights.sum(-1, keepdim=True).clamp(min=TINY)
    return out.flatten(-3, -2)[..., :T, :].flatten(1, 2).to(v.dtype).contiguous()


def _blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    """[.., T, K] -> [.., N, size, K], filled up with zeros."""
    blocks: torch.Tensor = F.pad(x, (0, 0, 0, -x.shape[-2] % size)).unflatten(-2, (-1, size))
    return blocks


block_attention = torch.library.custom_op("graphopt::block_attention", reference, mutates_args=())


@block_attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None = None,
    block: int = 64,
    causal: bool = False,
    scale: float = 1.0,
) -> torch.Tensor:
    return v.new_empty((*q.shape[:-1], v.shape[-1]))


register_reference_autograd(block_attention, reference)
