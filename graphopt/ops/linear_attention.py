"""o_t = scale S_t^T q_t with a state S_t that four rules update: causal linear attention, in linear time.

    linear       S_t = S_{t-1} + k_t v_t^T
    gated        S_t = diag(exp(decay_t)) S_{t-1} + k_t v_t^T
    delta        S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T
    gated_delta  S_t = S' + beta_t k_t (v_t - S'^T k_t)^T  with  S' = exp(decay_t) S_{t-1}

Katharopoulos et al. (2020); Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training" (2024),
"Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (2024), "Gated Delta Networks" (2025).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from graphopt.ops.autograd import register_reference_autograd

RULES = ("linear", "gated", "delta", "gated_delta")
# Within a chunk the form is quadratic; between chunks it carries a state.
_CHUNK = 64
# A decay per feature needs [chunk, chunk, K] to stay stable: exp of a positive sum of decays could overflow.
_FINE_CHUNK = 16

Pair = tuple[torch.Tensor, torch.Tensor]


def recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    rule: str = "linear",
    scale: float = 1.0,
) -> Pair:
    """The definition, one token at a time; see `chunked` for the arguments."""
    S, q, k, v, decay, beta = _prepare(q, k, v, decay, beta, state, rule)
    groups = q.shape[1] // k.shape[1]
    outputs = []
    for t in range(q.shape[2]):
        key, value = k[:, :, t, :, None], v[:, :, t, None, :]
        if decay is not None:
            S = torch.exp(decay[:, :, t, :, None]) * S
        if beta is not None:
            value = beta[:, :, t, :, None] * (value - (key * S).sum(-2, keepdim=True))
        S = S + key * value
        outputs.append(scale * (q[:, :, t, :, None] * S.repeat_interleave(groups, 1)).sum(-2))
    shape = (*q.shape[:3], v.shape[-1])
    return (torch.stack(outputs, 2) if outputs else q.new_zeros(shape)), S


def chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    rule: str = "linear",
    scale: float = 1.0,
) -> Pair:
    """The same values as `recurrent`, chunk by chunk; computed in fp32 or better.

    Args:
        q: queries or their features [B, H, T, K].
        k: keys [B, Hkv, T, K]; Hkv divides H, and each state serves H / Hkv queries.
        v: values [B, Hkv, T, V].
        decay: log of the factor on the state, at most 0: [B or 1, Hkv, T, 1] or, for rule `gated`, [B or 1, Hkv, T, K].
        beta: strength of the delta rules [B or 1, Hkv, T, 1].
        state: what the tokens before left behind [B, Hkv, K, V]; None is zero.
        rule: one of `RULES`.
        scale: factor on the output.

    Returns:
        The output [B, H, T, V] in the type of `v`, and the state after the last token [B, Hkv, K, V] in fp32 or better.

    Raises:
        ValueError: the rule is unknown, or `decay` or `beta` are missing or too many for it.
    """
    S, query, keys, values, decay, beta = _prepare(q, k, v, decay, beta, state, rule)
    groups, T = q.shape[1] // k.shape[1], q.shape[2]
    size = _FINE_CHUNK if decay is not None and decay.shape[-1] > 1 else _CHUNK
    size = max(1, min(size, T))
    # Heads that share a state stand beside each other: [B, Hkv, G, N, C, K]. A padded token changes no state.
    query = _chunks(query.unflatten(1, (-1, groups)), size)
    keys, values = (_chunks(x.unsqueeze(2), size) for x in (keys, values))
    total = None
    if decay is not None:
        total = _chunks(decay.unsqueeze(2), size).cumsum(-2)
    if beta is None:
        out, S = _additive(query, keys, values, total, S)
    else:
        out, S = _delta(query, keys, values, total, _chunks(beta.unsqueeze(2), size), S)
    out = out.flatten(-3, -2)[..., :T, :].flatten(1, 2)
    # A copy of the last state: a view would keep the states of all chunks alive.
    return (scale * out).to(v.dtype).contiguous(), S.clone(memory_format=torch.contiguous_format)


def _prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor | None,
    beta: torch.Tensor | None,
    state: torch.Tensor | None,
    rule: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    if rule not in RULES:
        raise ValueError(f"expected rule to be one of {', '.join(RULES)}, got {rule!r}")
    if (decay is not None) != rule.startswith("gated") or (beta is not None) != rule.endswith("delta"):
        given = [name for name, value in (("decay", decay), ("beta", beta)) if value is not None]
        raise ValueError(
            f"expected decay for the gated rules and beta for the delta rules, got {given} for rule {rule!r}"
        )
    wide = torch.promote_types(v.dtype, torch.float32)
    if state is None:
        state = v.new_zeros((*k.shape[:2], k.shape[-1], v.shape[-1]), dtype=wide)
    decay = None if decay is None else decay.to(wide)
    beta = None if beta is None else beta.to(wide)
    return state.to(wide), q.to(wide), k.to(wide), v.to(wide), decay, beta


def _chunks(x: torch.Tensor, size: int) -> torch.Tensor:
    """[.., T, K] -> [.., N, size, K], padded with zeros: keys and decays of 0 leave a state as it is."""
    chunks: torch.Tensor = F.pad(x, (0, 0, 0, -x.shape[-2] % size)).unflatten(-2, (-1, size))
    return chunks


def _additive(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, total: torch.Tensor | None, state: torch.Tensor
) -> Pair:
    """Rules `linear` and `gated`; `total` is the decay summed within each chunk [B, Hkv, 1, N, C, 1 or K]."""
    state = state.unsqueeze(2)
    if total is None:
        added = k.transpose(-1, -2) @ v  # [B, Hkv, 1, N, K, V]
        sums = torch.cat([state.unsqueeze(3), added], 3).cumsum(3)
        out = (q @ k.transpose(-1, -2)).tril() @ v + q @ sums[:, :, :, :-1]
        return out, sums[:, :, 0, -1]
    last = total[..., -1:, :]
    added = (k * torch.exp(last - total)).transpose(-1, -2) @ v
    before, state = _scan(torch.exp(last).transpose(-1, -2), added, state)
    return _inside(q, k, total) @ v + (q * torch.exp(total)) @ before, state.squeeze(2)


def _scan(factor: torch.Tensor, added: torch.Tensor, state: torch.Tensor) -> Pair:
    """The states before each chunk, and behind the last one; factor [.., N, K or 1, 1], added [.., N, K, V]."""
    before = []
    for n in range(added.shape[3]):
        before.append(state)
        state = factor[:, :, :, n] * state + added[:, :, :, n]
    return (torch.stack(before, 3) if before else added), state


def _inside(q: torch.Tensor, k: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor:
    """sum_d q_id k_jd exp(total_id - total_jd) for j <= i, else 0: [.., N, C, C]."""
    if total is None:
        return (q @ k.transpose(-1, -2)).tril()
    hidden = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    apart = total.unsqueeze(-2) - total.unsqueeze(-3)  # [.., i, j, 1 or K], at most 0 where j <= i
    weight = torch.exp(apart.masked_fill(hidden.unsqueeze(-1), -torch.inf))
    if total.shape[-1] == 1:
        return (q @ k.transpose(-1, -2)) * weight.squeeze(-1)
    return torch.einsum("...id,...jd,...ijd->...ij", q, k, weight)


def _delta(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    total: torch.Tensor | None,
    beta: torch.Tensor,
    state: torch.Tensor,
) -> Pair:
    """The delta rules: what the tokens of a chunk really add solves a unit triangular system (the WY form)."""
    state = state.unsqueeze(2)
    grown = k if total is None else k * torch.exp(total)
    # What each token finds of the earlier ones of its chunk.
    mixing = (beta * _inside(k, k, total)).tril(-1)
    right = torch.cat([beta * v, beta * grown], -1)
    solved = torch.linalg.solve_triangular(
        mixing + torch.eye(k.shape[-2], dtype=k.dtype, device=k.device), right, upper=False, unitriangular=True
    )
    fresh, carried = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
    inside = _inside(q, k, total)
    leaving = k if total is None else k * torch.exp(total[..., -1:, :] - total)
    queries = q if total is None else q * torch.exp(total)
    outputs = []
    for n in range(k.shape[3]):
        added = fresh[:, :, :, n] - carried[:, :, :, n] @ state
        outputs.append(queries[:, :, :, n] @ state + inside[:, :, :, n] @ added)
        if total is not None:
            state = torch.exp(total[:, :, :, n, -1:, :]) * state
        state = state + leaving[:, :, :, n].transpose(-1, -2) @ added
    out = torch.stack(outputs, 3) if outputs else q.new_zeros((*q.shape[:-1], v.shape[-1]))
    return out, state.squeeze(2)


linear_attention = torch.library.custom_op("graphopt::linear_attention", chunked, mutates_args=())


@linear_attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    rule: str = "linear",
    scale: float = 1.0,
) -> Pair:
    wide = torch.promote_types(v.dtype, torch.float32)
    shape = (*k.shape[:2], k.shape[-1], v.shape[-1])
    return v.new_empty((*q.shape[:-1], v.shape[-1])), v.new_empty(shape, dtype=wide)


register_reference_autograd(linear_attention, chunked)
