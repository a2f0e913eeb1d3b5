"""Gradients of `graphopt::linear_attention` on the kernels: the host's side."""

from __future__ import annotations

import torch

from .backward import gradient_kernel, reverse_kernel
from .launch import BLOCK, CHUNK, padded, strides
from .linear_attention import Problem, inside_of, inverse_of, problem, run_states
from .pairs import pairs_backward_kernel

# Columns of K that one program of gradient_kernel takes: its sums over K are partial sums over such blocks.
_BLOCK_K = 64

Gradients = tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
]


def backward(
    dout: torch.Tensor | None,
    dfinal: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    rule: str = "linear",
    scale: float = 1.0,
) -> Gradients:
    """The gradients of q, k, v, decay, beta and state; the states are computed anew.

    Args:
        dout: gradient of the output [B, H, T, V]; None is zero.
        dfinal: gradient of the final state [B, Hkv, K, V]; None is zero.
        q: this and all others as in `linear_attention.forward`.
        k: see there.
        v: see there.
        decay: see there.
        beta: see there.
        state: see there.
        rule: see there.
        scale: see there.

    Returns:
        Each in the type and shape of its input, None for an input that is None.

    Raises:
        GraphOptError: the kernels do not take these types or sizes.
    """
    p = problem(q, k, v, decay, beta, state, rule, scale)
    B, H, HKV, T, K, V = p.sizes
    inside, inverse = inside_of(p), inverse_of(p)
    states, fresh = run_states(p, inside, inverse, _sums(p, B, HKV, K, V))
    u = p.v if fresh is None else fresh
    dout = p.q.new_zeros((B, H, T, V)) if dout is None else dout.to(p.q.dtype).contiguous()
    dfinal = None if dfinal is None else dfinal.float().contiguous()

    dstates = p.q.new_empty((B, HKV, p.chunks, K, V))
    dv = torch.empty((B, HKV, T, V), dtype=v.dtype, device=v.device)
    dr = None if beta is None else p.q.new_empty((B, HKV, T, V))
    dstart = _sums(p, B, HKV, K, V)
    reverse_kernel(
        lambda meta: (-(-V // meta["BV"]), B * HKV),
        q=p.q, dout=dout, inside=inside, inverse=inverse, beta=p.beta, dfinal=dfinal, dstates=dstates, dr=dr, dv=dv,
        dstart=dstart, scale=scale, H=H, **p.common(), **strides("q", p.q),
        V=V, BK=padded(K), DECAY=p.kind, DELTA=beta is not None, FINAL=dfinal is not None,
    )  # fmt: skip

    blocks = -(-K // _BLOCK_K)
    # With a decay per feature another kernel adds to these two.
    dq = _sums(p, B, H, T, K) if p.kind == 2 else torch.empty((B, H, T, K), dtype=q.dtype, device=q.device)
    dk = _sums(p, B, HKV, T, K) if p.kind == 2 else torch.empty((B, HKV, T, K), dtype=k.dtype, device=k.device)
    dinside = _sums(p, B, H, p.chunks, CHUNK, CHUNK) if p.kind == 2 else None
    tail = _sums(p, B, HKV, p.chunks, K) if p.kind == 2 else None
    dtotal = _sums(p, blocks, B, HKV, p.chunks * CHUNK) if p.kind == 1 else None
    dbeta = None if beta is None else _sums(p, blocks, B, HKV, T)
    gradient_kernel(
        lambda meta: (blocks, p.chunks, B * HKV),
        q=p.q, v=p.v, u=u, dout=dout, dr=dr, beta=p.beta, states=states, dstates=dstates, dq=dq, dk=dk,
        dinside=dinside, tail=tail, dtotal=dtotal, dbeta=dbeta, scale=scale, H=H, PAIRS=B * HKV, **p.common(),
        **strides("q", p.q), **strides("v", p.v), **strides("u", u),
        V=V, BK=min(_BLOCK_K, padded(K)), DECAY=p.kind, DELTA=beta is not None,
    )  # fmt: skip
    ddecay = None
    if p.kind == 1 and dtotal is not None and decay is not None:
        ddecay = _to_decay(dtotal.sum(0).unsqueeze(-1), decay)
    if p.kind == 2 and decay is not None:
        dq, dk, dfine = _through_pairs(p, dq, dk, dinside, tail)
        ddecay = _to_decay(dfine, decay)
    if dbeta is not None and beta is not None:
        dbeta = dbeta.sum(0).unsqueeze(-1).sum_to_size(beta.shape).to(beta.dtype)
    dstate = None if state is None else dstart.to(state.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv, ddecay, dbeta, dstate


def _sums(p: Problem, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=p.q.device)


def _through_pairs(
    p: Problem, dq: torch.Tensor, dk: torch.Tensor, dinside: torch.Tensor | None, tail: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k, and of the summed decay, once what comes through A is added."""
    B, H, HKV, _, K, _ = p.sizes
    whole_q, whole_k = torch.empty_like(dq), torch.empty_like(dk)
    dtotal = _sums(p, B, HKV, p.chunks * CHUNK, K)
    pairs_backward_kernel(
        lambda meta: (CHUNK // BLOCK * -(-K // meta["BK"]), p.chunks, B * HKV),
        q=p.q, dinside=dinside, dq_far=dq, dk_far=dk, tail=tail, dq=whole_q, dk=whole_k, dtotal=dtotal, H=H,
        **p.common(), **strides("q", p.q), R=BLOCK,
    )  # fmt: skip
    return whole_q, whole_k, dtotal


def _to_decay(dtotal: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """A decay enters the sums of its own token and of all later ones in its chunk."""
    each = dtotal.unflatten(2, (-1, CHUNK)).flip(3).cumsum(3).flip(3).flatten(2, 3)[:, :, : decay.shape[2]]
    return torch.Tensor.sum_to_size(each, decay.shape).to(decay.dtype)
