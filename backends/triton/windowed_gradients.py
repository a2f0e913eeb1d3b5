"""Gradients of `graphopt::windowed_linear_attention` on the kernels: the host's side."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from graphopt.ops.window_attention import TINY

from . import linear_gradients
from .launch import CHUNK, padded
from .windowed_attention import EXTRA, held_of, problem, run, weights_of
from .windowed_backward import hybrid_key_kernel, hybrid_query_kernel

Gradients = tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    None,
    torch.Tensor | None,
]


def backward(
    dout: torch.Tensor | None,
    dfinal: torch.Tensor | None,
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
) -> Gradients:
    """The gradients of all tensors but `key_weight`, in the order and types of the arguments of `forward`.

    Args:
        dout: gradient of the output [B, H, T, V]; None is zero.
        dfinal: gradient of the final state [B, Hf, F, V + 1]; None is zero.
        q: this and all others as in `windowed_attention.forward`.
        k: see there.
        v: see there.
        query_features: see there.
        key_features: see there.
        gate: see there.
        key_weight: see there.
        state: see there.
        window: see there.
        sinks: see there.
        scale: see there.
    """
    p = problem(q, k, v, query_features, key_features, gate, key_weight, state, window, sinks, scale)
    B, H, HKV, T, S, D, V = p.sizes
    dtype, device = p.q.dtype, p.q.device
    y, _, kept = run(p, torch.float32, keep=True)
    assert kept is not None
    sums = kept.sums
    dy = torch.zeros_like(y) if dout is None else dout.float()
    # Where nothing is visible the bound holds the denominator, and no gradient passes it: fp16 would make it infinite.
    dy = dy * (sums > TINY).unsqueeze(-1)
    dn = (dy / sums.unsqueeze(-1)).to(dtype)
    dt = -(dy * y).sum(-1) / sums
    dq = torch.empty((B, H, T, D), dtype=q.dtype, device=device)
    dk = torch.empty((B, HKV, S, D), dtype=k.dtype, device=device)
    dv = torch.empty((B, HKV, S, V), dtype=torch.float32, device=device)
    dgate = torch.empty((B, H, T), dtype=torch.float32, device=device)
    rest = torch.empty((B, H, T), dtype=torch.float32, device=device)
    common = {
        "dnumerator": dn, "dtotal": dt.contiguous(), "maxima": kept.maxima, "peaks": kept.peaks, "rest": rest,
        "BV": padded(V), **p.common(),
    }  # fmt: skip
    # The first kernel writes `rest`, and the second reads it.
    hybrid_query_kernel(lambda meta: (-(-T // CHUNK), B * H), dq=dq, dgate=dgate, **common)
    hybrid_key_kernel(lambda meta: (-(-S // CHUNK), B * HKV), dk=dk, dv=dv, **common)

    dheld_out = F.pad(torch.cat([dn, dt.unsqueeze(-1).to(dtype)], -1), (0, EXTRA - 1))
    dfinal = None if dfinal is None else F.pad(dfinal.float(), (0, EXTRA - 1))
    dqf, dmoved, dheld, _, _, dstate = linear_gradients.backward(
        dheld_out, dfinal, p.query_features, p.features, p.held, state=p.state
    )
    dkf = _moved_back(dmoved.float(), p.early, S)
    dheld = _moved_back(dheld.float(), p.early, S)
    weight = weights_of(key_weight, sinks, S, device)
    if p.early > 0 and dstate is not None:
        early = p.early
        held = held_of(p.v, weight, p.features.shape[1])[:, :, :early].float()
        dkf[:, :, :early] += held @ dstate.transpose(-1, -2)
        dheld[:, :, :early] += key_features[:, :, :early].float() @ dstate
    far = dheld[..., :V].unflatten(1, (HKV, -1)).sum(2)
    dv += far if weight is None else far * weight
    return (
        dq,
        dk,
        dv.to(v.dtype),
        dqf.to(query_features.dtype),
        dkf.to(key_features.dtype),
        dgate.sum(-1)[..., None, None].sum_to_size(gate.shape).to(gate.dtype),
        None,
        None if state is None or dstate is None else dstate[..., : V + 1].to(state.dtype),
    )


def _moved_back(x: torch.Tensor, early: int, S: int) -> torch.Tensor:
    """Undoes the move of `_problem`: row i belongs to key i + early; [B, Hf, T, .] -> [B, Hf, S, .]."""
    x = x[:, :, max(-early, 0) :]
    first = max(early, 0)
    return F.pad(x, (0, 0, first, S - first - x.shape[2]))
