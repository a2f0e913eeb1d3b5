"""Softplus attention, LSSA, and its re-weighted form, LSSAR, without a [T, S] matrix.

    A_ij = softplus(log D log N_i cos(q_i, k_j)) / sum_j of the same          over the N_i keys that query i sees
    W_ij = relu(N_i A_ij - O_i)^p / sum_j of the same                         O_i = 0 where N_i <= 3, else 1

Scores are bounded by log D log N, so no maximum is subtracted; N in the exponent keeps rows as sharp as they were when
they become longer than any in training.

Gao & Spratling, "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models" (2025).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

BLOCK = 64
"""Most queries that are computed together."""

SCORES = 1 << 19
"""Most scores at a time where texts are long: they take a dozen passes, and fit into a processor's cache."""

_FEWEST = 8

EPS = 1e-12
"""Shortest vector with a direction, as in torch's normalize."""

FEW = 3
"""Rows with so few keys are sharpened without an offset: there is no mean worth exceeding."""

# From there on softplus(x) is x in fp64 too.
_LINEAR = 40.0


def evenness(wide: torch.dtype) -> float:
    """How far the largest of N A may exceed 1 in a row that counts as uniform, and is not re-weighted.

    The rounding of scores up to 40 alone makes keys differ that are the same; a power would single some of them out.
    """
    return 128 * torch.finfo(wide).eps


@dataclass(frozen=True)
class _Rows:
    """Queries `first` .. `last` - 1, which see no key from `end` on."""

    first: int
    last: int
    end: int


def _rows(q: torch.Tensor, k: torch.Tensor, causal: bool) -> Iterator[_Rows]:
    """Blocks of queries, without the first ones of a causal site that stand before all keys."""
    batch, heads, queries, keys = *q.shape[:3], k.shape[2]
    if not keys:
        return
    size = min(BLOCK, max(_FEWEST, SCORES // max(1, batch * heads * keys)))
    past = keys - queries if causal else 0
    for first in range(max(0, -past), queries, size):
        last = min(first + size, queries)
        yield _Rows(first, last, last + past if causal else keys)


def _direction(x: torch.Tensor) -> torch.Tensor:
    """Divide rows by their lengths; the gradient of a row without a direction is 0, not one over EPS."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    unit = x / length.clamp(min=EPS)
    return torch.where(length > EPS, unit, unit.detach())


def _attended(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor | None,
    power: int,
    causal: bool,
) -> torch.Tensor:
    """One block of queries; the last one sees all keys that are not padding.

    Args:
        q: directions [B, H, C, D].
        k: directions [B, Hkv, S, D].
        v: [B, Hkv, S, V].
        seen: false where a key is padding, of these keys and perhaps later ones [B or 1, 1, 1, 1, S or more].
        power: of the re-weighting; 0 leaves it out.
        causal: each query before the last sees one key less than the next.

    Returns:
        [B, H, C, V].
    """
    (_, heads, C, D), S, groups = q.shape, k.shape[2], q.shape[1] // k.shape[1]
    # Queries that share a key stand below each other: the products then need no copies of keys and values.
    cosines = (q.unflatten(1, (-1, groups)).flatten(2, 3) @ k.transpose(-1, -2)).unflatten(2, (groups, C))
    visible = torch.ones((1, 1, 1, C, S), dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril(S - C)
    if seen is not None:
        visible = visible & seen[..., :S]
    count = visible.sum(-1, keepdim=True).to(q.dtype)
    scores = cosines * (math.log(D) * count.clamp(min=1).log())
    weights = F.softplus(scores, threshold=_LINEAR).masked_fill(~visible, 0)
    if power:
        weights = _sharpened(weights, count, power)
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, 1.0, total)
    out = weights.flatten(2, 3) @ v
    return torch.reshape(out, (-1, heads, C, v.shape[-1]))


def _sharpened(weights: torch.Tensor, count: torch.Tensor, power: int) -> torch.Tensor:
    """relu(N A - O)^p up to a factor per row; a row in which nothing exceeds the mean stays as it is."""
    total = weights.sum(-1, keepdim=True)
    mean = torch.where(total == 0, 1.0, total) / count.clamp(min=1)
    excess = (weights / mean - (count > FEW).to(weights.dtype)).relu()
    # Divided by its largest entry a row keeps its proportions, and no power overflows. The factor cancels later, so
    # it needs no gradient.
    largest = excess.detach().amax(-1, keepdim=True)
    uneven = largest > evenness(weights.dtype)
    powers = _to_power(excess / torch.where(uneven, largest, 1.0), power)
    # Also true of NaN, which has to stay.
    return torch.where(largest <= evenness(weights.dtype), weights, powers)


def _to_power(x: torch.Tensor, power: int) -> torch.Tensor:
    """By squares and products, which are several times as fast as `pow`."""
    result = x if power % 2 else None
    while power := power // 2:
        x = x * x
        if power % 2:
            result = x if result is None else result * x
    assert result is not None, "the power is at least 1"
    return result


def _wide(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    wide = torch.promote_types(v.dtype, torch.float32)
    seen = None if key_weight is None else (key_weight != 0).transpose(-1, -2).unsqueeze(2)
    return q.to(wide), k.to(wide), v.to(wide), seen


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None = None,
    power: int = 0,
    causal: bool = True,
) -> torch.Tensor:
    """Softplus attention; computed in fp32 or better, in blocks of queries.

    Args:
        q: [B, H, T, D]; only directions count, as with k. A zero vector gives equal scores, and has gradient 0.
        k: [B, Hkv, S, D]; Hkv divides H.
        v: [B, Hkv, S, V].
        key_weight: [B or 1, 1, S, 1]; 0 hides a key, which then does not count in N either, anything else shows it.
        power: p of the re-weighting; 0 leaves it out. A row that is uniform up to rounding is not re-weighted.
        causal: query i sees keys up to i + (S - T); else all.

    Returns:
        [B, H, T, V] in the type of `v`; zeros where nothing is visible.

    Raises:
        ValueError: the power is negative.
    """
    if power < 0:
        raise ValueError(f"expected power to be at least 0, got {power}")
    out = v.new_zeros((*q.shape[:-1], v.shape[-1]))
    wide_q, wide_k, wide_v, seen = _wide(q, k, v, key_weight)
    wide_q, wide_k = _direction(wide_q), _direction(wide_k)
    for rows in _rows(q, k, causal):
        block = wide_q[:, :, rows.first : rows.last], wide_k[:, :, : rows.end], wide_v[:, :, : rows.end]
        out[:, :, rows.first : rows.last] = _attended(*block, seen, power, causal)
    return out


softplus_attention = torch.library.custom_op("graphopt::softplus_attention", reference, mutates_args=())


@softplus_attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None = None,
    power: int = 0,
    causal: bool = True,
) -> torch.Tensor:
    return v.new_empty((*q.shape[:-1], v.shape[-1]))


def gradients(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None = None,
    power: int = 0,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v; each block of queries is computed anew and then forgotten.

    Args:
        gradient: of the output [B, H, T, V].
        q: this and the others as of `reference`.
        k: keys.
        v: values.
        key_weight: which keys are hidden.
        power: of the re-weighting.
        causal: whether later keys are hidden.
    """
    inputs = tuple(x.detach().requires_grad_(True) for x in (q, k, v))
    with torch.enable_grad():
        wide_q, wide_k, wide_v, seen = _wide(inputs[0], inputs[1], inputs[2], key_weight)
        directions = _direction(wide_q), _direction(wide_k), wide_v
    whole = [x.detach() for x in directions]
    sums = [torch.zeros_like(x) for x in whole]
    upstream = gradient.to(wide_v.dtype)
    for rows in _rows(q, k, causal):
        places = slice(rows.first, rows.last), slice(rows.end), slice(rows.end)
        block = [x[:, :, at].detach().requires_grad_(True) for x, at in zip(whole, places, strict=True)]
        with torch.enable_grad():
            out = _attended(block[0], block[1], block[2], seen, power, causal)
            found = torch.autograd.grad(out, block, upstream[:, :, places[0]])
        for total, part, at in zip(sums, found, places, strict=True):
            total[:, :, at] += part
    dq, dk, dv = torch.autograd.grad(directions, inputs, sums)
    return dq, dk, dv


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    given = (*inputs, *(None, 0, True)[len(inputs) - 3 :])
    ctx.save_for_backward(*(x for x in given[:4] if x is not None))
    ctx.power, ctx.causal = given[4:]


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    q, k, v, *rest = ctx.saved_tensors
    found = gradients(gradient, q, k, v, rest[0] if rest else None, ctx.power, ctx.causal)
    wanted = (x if want else None for x, want in zip(found, ctx.needs_input_grad, strict=False))
    return (*wanted, *[None] * (len(ctx.needs_input_grad) - 3))


softplus_attention.register_autograd(_backward, setup_context=_setup_context)
