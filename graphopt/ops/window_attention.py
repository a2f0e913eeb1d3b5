"""softmax attention over the last `window` keys and the first `sinks` ones, without a [T, S] matrix.

Beltagy et al., "Longformer" (2020); the first keys as sinks: Xiao et al., "Efficient Streaming Language Models with
Attention Sinks" (2024).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from graphopt.ops.autograd import register_reference_autograd

# Below any sum of weights that counts: a row that sees no key gives zeros.
TINY = 1e-30


def exponentials(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None,
    window: int,
    sinks: int,
    scale: float,
) -> torch.Tensor:
    """Sum over visible j of exp(scale q_i k_j - c_i) w_j [v_j, 1], where c_i is the largest visible exponent.

    Args:
        q: [B, H, T, D].
        k: [B, Hkv, S, D]; query i stands at key i + (S - T), and sees it and the window - 1 keys before it.
        v: [B, Hkv, S, V].
        key_weight: [B or 1, 1, S, 1]; 0 hides a key, None is 1.
        window: how many keys a query sees besides the sinks.
        sinks: how many of the first keys every later query sees; they count in no window.
        scale: factor on q k^T.

    Returns:
        [B, H, T, V + 1]: numerator and denominator; both 0 where nothing is visible.
    """
    T, S, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    weight = k.new_ones((1, 1, S, 1)) if key_weight is None else key_weight
    values = torch.cat([v, torch.ones_like(v[..., :1])], -1) * weight
    # Heads that share a key stand beside each other: [B, Hkv, G, T, D].
    q = scale * q.unflatten(1, (-1, groups))
    k, values, seen = k.unsqueeze(2), values.unsqueeze(2), (weight != 0).unsqueeze(2)
    position = torch.arange(S - T, S, device=q.device)
    parts = []
    if sinks:
        early = torch.arange(min(sinks, S), device=q.device) <= position[:, None]
        parts.append(_scores(q, k[..., :sinks, :], values[..., :sinks, :], seen[..., :sinks, :], early))
    if window:
        late = seen & (torch.arange(S, device=q.device) >= sinks)[:, None]
        parts.append(_near(q, k, values, late, min(window, S), position))
    if not parts:
        return values.new_zeros((*q.shape[:-1], values.shape[-1])).flatten(1, 2)
    # Where another sum shares the denominator the shift does not cancel, so it has a gradient of its own.
    largest = torch.stack([_rows(scores, T).amax(-1) for scores, _ in parts]).amax(0)
    largest = largest.masked_fill(largest == -torch.inf, 0).unsqueeze(-1)
    sums = [_weighted(scores, held, largest) for scores, held in parts]
    return torch.stack(sums).sum(0).flatten(1, 2) if len(sums) > 1 else sums[0].flatten(1, 2)


def _scores(
    q: torch.Tensor, k: torch.Tensor, values: torch.Tensor, seen: torch.Tensor, visible: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = ~(visible & seen.transpose(-1, -2))
    return (q @ k.transpose(-1, -2)).masked_fill(hidden, -torch.inf), values


def _near(
    q: torch.Tensor, k: torch.Tensor, values: torch.Tensor, seen: torch.Tensor, window: int, position: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of each query with the keys of its window: one row of all keys, or rows of two blocks for many queries."""
    T, S = q.shape[-2], k.shape[-2]
    if window >= T:
        apart = position[:, None] - torch.arange(S, device=q.device)
        return _scores(q, k, values, seen, (apart >= 0) & (apart < window))
    # Key P + i, where query i stands, moves to window + i: a block of queries reads its own keys and the block before.
    lead, tail = window - (S - T), -T % window
    q = F.pad(q, (0, 0, 0, tail)).unflatten(-2, (-1, window))
    k, values = (_pairs(F.pad(x, (0, 0, lead, tail)), window) for x in (k, values))
    seen = _pairs(F.pad(seen, (0, 0, lead, tail)), window)
    apart = torch.arange(2 * window, device=q.device) - torch.arange(window, device=q.device)[:, None]
    return _scores(q, k, values, seen, (apart >= 1) & (apart <= window))


def _pairs(x: torch.Tensor, size: int) -> torch.Tensor:
    """[.., (N + 1) size, D] -> [.., N, 2 size, D]: each block behind the one before it."""
    blocks = x.unflatten(-2, (-1, size))
    return torch.cat([blocks[..., :-1, :, :], blocks[..., 1:, :, :]], -2)


def _rows(scores: torch.Tensor, count: int) -> torch.Tensor:
    """[.., N, C, M] -> [.., count, M]; rank 5 is rows already."""
    return scores if scores.dim() == 5 else scores.flatten(-3, -2)[..., :count, :]


def _weighted(scores: torch.Tensor, values: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    T = largest.shape[-2]
    if scores.dim() == 5:
        return torch.exp(scores - largest) @ values
    size = scores.shape[-2]
    shift = F.pad(largest, (0, 0, 0, -T % size)).unflatten(-2, (-1, size))
    return _rows(torch.exp(scores - shift) @ values, T)


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None = None,
    window: int = 64,
    sinks: int = 0,
    scale: float = 1.0,
) -> torch.Tensor:
    """Softmax attention of each query over its window and the sinks; computed in fp32 or better.

    Args: as of `exponentials`.

    Returns:
        [B, H, T, V] in the type of `v`; zeros where nothing is visible.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    weight = None if key_weight is None else key_weight.to(wide)
    sums = exponentials(q.to(wide), k.to(wide), v.to(wide), weight, window, sinks, scale)
    return (sums[..., :-1] / sums[..., -1:].clamp(min=TINY)).to(v.dtype).contiguous()


window_attention = torch.library.custom_op("graphopt::window_attention", reference, mutates_args=())


@window_attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None = None,
    window: int = 64,
    sinks: int = 0,
    scale: float = 1.0,
) -> torch.Tensor:
    return v.new_empty((*q.shape[:-1], v.shape[-1]))


register_reference_autograd(window_attention, reference)
