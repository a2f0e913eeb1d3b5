"""y = k(q, L) (k(L, L) + 0.01 I)^-1 k(L, k) v with a Gaussian kernel and a few landmarks L: no [T, S] matrix.

Lu et al., "SOFT: Softmax-free Transformer with Linear Complexity" (2021) and "Softmax-free Linear Transformers" (2024).
"""

from __future__ import annotations

import torch

from graphopt.ops.autograd import register_reference_autograd

SHIFT = 0.01
STEPS = 20
# Below any sum of weights that counts: without visible keys the landmarks are at zero.
TINY = 1e-30


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None = None,
    landmarks: int = 49,
) -> torch.Tensor:
    """Every query sees every key through the landmarks, which are means of the keys; computed in fp32 or better.

    Args:
        q: [B, H, T, D], scaled.
        k: [B, Hkv, S, D], scaled; Hkv divides H.
        v: [B, Hkv, S, V].
        key_weight: weight of each key [B or 1, 1, S, 1]; 0 hides it.
        landmarks: how many.

    Returns:
        [B, H, T, V] in the type of `v`; not normalised, as published.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    query, keys, values = q.to(wide), k.to(wide), v.to(wide)
    weight = keys.new_ones((1, 1, k.shape[2], 1)) if key_weight is None else key_weight.to(wide)
    centres = segment_means(keys, weight, landmarks)
    held = solve(kernel(centres, centres), kernel(centres, keys) @ (values * weight))
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        centres, held = (x.repeat_interleave(groups, 1) for x in (centres, held))
    return (kernel(query, centres) @ held).to(v.dtype)


def segment_means(x: torch.Tensor, weight: torch.Tensor, count: int) -> torch.Tensor:
    """Means over `count` segments of equal weight [B, H, count, D]; a row on a border counts in both by its share.

    Weight and not length: hidden rows then neither enter a mean nor move a border, so that padding changes nothing.

    Args:
        x: [B, H, S, D].
        weight: [B or 1, 1, S, 1].
        count: as many segments as rows give the rows themselves.
    """
    end = weight.cumsum(2)
    total = end[:, :, -1:]
    borders = torch.arange(count + 1, dtype=x.dtype, device=x.device) * total / count  # [B or 1, 1, 1, count + 1]
    share = torch.minimum(end, borders[..., 1:]) - torch.maximum(end - weight, borders[..., :-1])
    return share.clamp(min=0).transpose(-1, -2) @ x / (total / count).clamp(min=TINY)


def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """exp(-|a_i - b_j|^2 / 2): [.., I, D], [.., J, D] -> [.., I, J]."""
    lengths = a.square().sum(-1, keepdim=True) + b.square().sum(-1).unsqueeze(-2)
    return torch.exp(a @ b.transpose(-1, -2) - 0.5 * lengths)


def solve(gram: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """P^-1 right with P = gram + 0.01 I by Newton's iteration X <- X (2 I - P X) from X = I / |P|_1.

    The published start, a multiple of P, takes the square of P's condition: 20 steps do not reach the inverse where
    landmarks lie close together. From a multiple of I they do, because P is symmetric and positive definite. What
    fp32 loses in such an X, one step of iterative refinement gives back; its gradient is that of P^-1 right, with X as
    a constant.
    """
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    shifted = gram + SHIFT * eye
    with torch.no_grad():
        found = eye / shifted.sum(-1, keepdim=True).amax(-2, keepdim=True)
        for _ in range(STEPS):
            found = found @ (2 * eye - shifted @ found)
    first = found @ right
    return first + found @ (right - shifted @ first)


landmark_attention = torch.library.custom_op("graphopt::landmark_attention", reference, mutates_args=())


@landmark_attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None = None,
    landmarks: int = 49,
) -> torch.Tensor:
    return v.new_empty((*q.shape[:-1], v.shape[-1]))


register_reference_autograd(landmark_attention, reference)
