"""`graphopt::windowed_linear_attention` and its gradients on the kernels: the host's side."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from graphopt.errors import GraphOptError

from . import linear_attention
from .launch import CHUNK, padded, rows_of, strides
from .windowed import hybrid_kernel

# Beside v, h has a column of ones, and zeros up to a multiple of 16 elements: rows stay aligned.
EXTRA = 16


def supported(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, query_features: torch.Tensor, key_features: torch.Tensor
) -> bool:
    """Whether the kernels compute these types and sizes."""
    held = v.new_empty(()).expand(*v.shape[:-1], v.shape[-1] + EXTRA)
    return linear_attention.supported(q, k, v) and linear_attention.supported(query_features, key_features, held)


@dataclass(frozen=True)
class Problem:
    """The arguments as the kernels read them; `features` [B, Hf, T, F] and `held` [B, Hf, T, V + 16] are moved."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    query_features: torch.Tensor
    features: torch.Tensor
    held: torch.Tensor
    share: torch.Tensor | None
    gate: torch.Tensor
    state: torch.Tensor | None
    early: int
    window: int
    sinks: int
    scale: float

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int, int]:
        """B, H, Hkv, T, S, D, V."""
        B, H, T, D = self.q.shape
        return B, H, self.k.shape[1], T, self.k.shape[2], D, self.v.shape[-1]

    def common(self) -> dict[str, object]:
        """The arguments that all three kernels take."""
        _, H, HKV, T, S, D, V = self.sizes
        return {
            "q": self.q, "k": self.k, "v": self.v, "weight": self.share, "gate": self.gate, "scale": self.scale,
            "T": T, "S": S, "H": H, "HKV": HKV, "window": self.window, "sinks": self.sinks,
            "gate_b": 0 if self.gate.shape[0] == 1 else H,
            "weight_b": 0 if self.share is None or self.share.shape[0] == 1 else S,
            **strides("q", self.q), **strides("k", self.k), **strides("v", self.v),
            "D": D, "V": V, "C": CHUNK, "BD": padded(D), "WEIGHT": self.share is not None, "SINKS": self.sinks > 0,
        }  # fmt: skip


class Kept(NamedTuple):
    """Of each row [B, H, T]: its largest exponent, the key that has it (-1: it sees none), and the denominator."""

    maxima: torch.Tensor
    peaks: torch.Tensor
    sums: torch.Tensor


def weights_of(key_weight: torch.Tensor | None, sinks: int, S: int, device: torch.device) -> torch.Tensor | None:
    """The weight with which each key enters the state [B or 1, 1, S, 1]: sinks never do."""
    weight = None if key_weight is None else key_weight.float()
    if sinks:
        late = (torch.arange(S, device=device) >= sinks).float()[:, None]
        weight = late.expand(1, 1, S, 1) if weight is None else weight * late
    return weight


def problem(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_features: torch.Tensor,
    key_features: torch.Tensor,
    gate: torch.Tensor,
    key_weight: torch.Tensor | None,
    state: torch.Tensor | None,
    window: int,
    sinks: int,
    scale: float,
) -> Problem:
    """Check the arguments of `forward` and bring them into the form that the kernels read.

    Raises:
        GraphOptError: the kernels do not take these types or sizes.
    """
    if not supported(q, k, v, query_features, key_features):
        raise GraphOptError(
            f"expected fp16, bf16 or fp32 tensors with at least one element, dimensions up to 256 and values up to "
            f"{256 - EXTRA}, got {q.dtype} {list(q.shape)} and {list(v.shape)}; the torch implementation takes others"
        )
    tensors = (q, k, v, query_features, key_features)
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    q, k, v, query_features, key_features = (rows_of(x.to(dtype)) for x in tensors)
    T, S = q.shape[2], k.shape[2]
    held = held_of(v, weights_of(key_weight, sinks, S, v.device), key_features.shape[1])
    state = None if state is None else F.pad(state.float(), (0, EXTRA - 1))
    # Query i meets key i + early: zeros stand for keys before the first, and keys before query 0's are in the state.
    early = S - T - window
    if early > 0:
        added = key_features[:, :, :early].transpose(-1, -2).float() @ held[:, :, :early].float()
        state = added if state is None else state + added
    features, held = (
        F.pad(x[:, :, max(early, 0) :], (0, 0, max(-early, 0), 0))[:, :, :T] for x in (key_features, held)
    )
    share = None
    if key_weight is not None:
        share = key_weight.float().expand(-1, 1, S, 1).contiguous()
    return Problem(
        q, k, v, query_features, features.contiguous(), held.contiguous(), share, gate.contiguous(), state,
        early, window, sinks, scale,
    )  # fmt: skip


def held_of(v: torch.Tensor, weight: torch.Tensor | None, heads: int) -> torch.Tensor:
    """w_j [v_j, 1, 0 ..] for each head that has features of its own: [B, Hf, S, V + 16]."""
    held = v.new_zeros((*v.shape[:-1], v.shape[-1] + EXTRA))
    held[..., : v.shape[-1]] = v
    held[..., v.shape[-1]] = 1
    if weight is not None:
        held = (held * weight).to(v.dtype)
    return held.repeat_interleave(heads // v.shape[1], 1)


def forward(
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
    """The operator on the kernels.

    Args:
        q: [B, H, T, D].
        k: [B, Hkv, S, D].
        v: [B, Hkv, S, V].
        query_features: [B, H, T, F].
        key_features: [B, Hf, S, F].
        gate: [1 or B, H, 1, 1].
        key_weight: [B or 1, 1, S, 1].
        state: [B, Hf, F, V + 1].
        window: how many keys a query sees exactly.
        sinks: how many of the first keys are always seen exactly.
        scale: factor on q k^T.

    Returns:
        The output [B, H, T, V] in the type of `v`, and the state [B, Hf, F, V + 1] in fp32.

    Raises:
        GraphOptError: the kernels do not take these types or sizes.
    """
    p = problem(q, k, v, query_features, key_features, gate, key_weight, state, window, sinks, scale)
    out, final, _ = run(p, v.dtype, keep=False)
    return out, final[..., : v.shape[-1] + 1].contiguous()


def run(p: Problem, dtype: torch.dtype, keep: bool) -> tuple[torch.Tensor, torch.Tensor, Kept | None]:
    """Output, padded final state, and with `keep` what the backward pass needs of each row."""
    B, H, _, T, _, _, V = p.sizes
    states, final = linear_attention.states_of(p.query_features, p.features, p.held, p.state)
    out = torch.empty((B, H, T, V), dtype=dtype, device=p.q.device)
    kept = None
    if keep:
        types = (torch.float32, torch.int32, torch.float32)
        kept = Kept(*(torch.empty((B, H, T), dtype=x, device=p.q.device) for x in types))
    hybrid_kernel(
        lambda meta: (-(-V // meta["BV"]), -(-T // CHUNK), B * H),
        query_features=p.query_features, features=p.features, held=p.held, states=states, out=out,
        **(kept._asdict() if kept else dict.fromkeys(Kept._fields)),
        HF=p.features.shape[1], **p.common(), **strides("f", p.query_features),
        F=p.features.shape[-1], HELD=p.held.shape[-1], KEEP=keep,
    )  # fmt: skip
    return out, final, kept
