"""`graphopt::softplus_attention` and its gradients on the kernels: the host's side."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from graphopt.errors import GraphOptError
from graphopt.ops.softplus_attention import EPS

from . import linear_attention
from .launch import padded, rows_of, strides, tile
from .softplus_backward import softplus_key_kernel, softplus_query_kernel
from .softplus_forward import softplus_attention_kernel

# The kernels multiply a power out.
_LARGEST_POWER = 32


def supported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, power: int = 0) -> bool:
    """Whether the kernels compute these types, sizes and this power (0 to 32)."""
    return linear_attention.supported(q, k, v) and k.shape[2] > 0 and 0 <= power <= _LARGEST_POWER


@dataclass(frozen=True)
class Problem:
    """The arguments as the kernels read them.

    `steep` [B, H, T] is log D log N_i / |q_i|, `counts` [B or 1, T] is N_i, `inverse` [B, Hkv, S] is 1 / |k_j|.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    share: torch.Tensor | None
    steep: torch.Tensor
    counts: torch.Tensor
    inverse: torch.Tensor
    power: int
    causal: bool

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int, int]:
        """B, H, Hkv, T, S, D, V."""
        B, H, T, D = self.q.shape
        return B, H, self.k.shape[1], T, self.k.shape[2], D, self.v.shape[-1]

    def common(self) -> dict[str, object]:
        """The arguments that all three kernels take."""
        _, H, HKV, T, S, D, V = self.sizes
        return {
            "q": self.q, "k": self.k, "v": self.v, "weight": self.share, "steep": self.steep, "counts": self.counts,
            "inverse": self.inverse, "T": T, "S": S, "H": H, "HKV": HKV,
            "weight_b": 0 if self.share is None or self.share.shape[0] == 1 else S,
            "count_b": 0 if self.counts.shape[0] == 1 else T,
            **strides("q", self.q), **strides("k", self.k), **strides("v", self.v),
            "D": D, "V": V, "BD": padded(D), "BV": padded(V),
            "WEIGHT": self.share is not None, "CAUSAL": self.causal, "POWER": self.power,
        }  # fmt: skip


class Kept(NamedTuple):
    """Of each row [B, H, T]: N / L, 1 over its largest excess (0: it has none), and 1 over the sum of its weights."""

    means: torch.Tensor
    tops: torch.Tensor
    shares: torch.Tensor


def problem(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None,
    power: int,
    causal: bool,
) -> Problem:
    """Check the arguments of `forward` and bring them into the form that the kernels read.

    Raises:
        GraphOptError: the kernels do not take these types or sizes, or this power.
    """
    if not supported(q, k, v, power):
        raise GraphOptError(
            f"expected fp16, bf16 or fp32 tensors with at least one element, dimensions up to 256 and a power of 0 to "
            f"{_LARGEST_POWER}, got {q.dtype} {list(q.shape)}, {list(v.shape)} and {power}; the torch implementation "
            "takes others"
        )
    dtype = functools.reduce(torch.promote_types, (q.dtype, k.dtype, v.dtype))
    q, k, v = (rows_of(x.to(dtype)) for x in (q, k, v))
    T, S = q.shape[2], k.shape[2]
    share = None if key_weight is None else key_weight.float().expand(-1, 1, S, 1).contiguous()
    counts = _counts(share, T, S, causal, q.device)
    slope = math.log(q.shape[-1]) * counts.clamp(min=1).log().unsqueeze(1)
    return Problem(q, k, v, share, (slope * _inverse(q)).contiguous(), counts, _inverse(k), power, causal)


def _counts(share: torch.Tensor | None, T: int, S: int, causal: bool, device: torch.device) -> torch.Tensor:
    """N_i [B or 1, T]: how many keys that are no padding each query sees."""
    seen = torch.ones((1, S), device=device) if share is None else (share != 0).float().flatten(1)
    sums = seen.cumsum(1)
    if not causal:
        return sums[:, -1:].expand(-1, T).contiguous()
    at = torch.arange(S - T, S, device=device)
    return torch.where(at >= 0, sums[:, at.clamp(min=0)], 0.0)


def _lengths(x: torch.Tensor) -> torch.Tensor:
    lengths: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    return lengths


def _inverse(x: torch.Tensor) -> torch.Tensor:
    inverse: torch.Tensor = 1 / _lengths(x).clamp(min=EPS)
    return inverse


def _direction(x: torch.Tensor) -> torch.Tensor:
    """1 / |x|, but 0 for what is too short to have a gradient."""
    lengths = _lengths(x)
    return torch.where(lengths > EPS, 1 / lengths, 0.0)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None = None,
    power: int = 0,
    causal: bool = True,
) -> torch.Tensor:
    """The operator on the kernels: products of the inputs' type, sums in fp32.

    Args:
        q: [B, H, T, D]; D and V at most 256.
        k: [B, Hkv, S, D]; Hkv divides H.
        v: [B, Hkv, S, V].
        key_weight: [B or 1, 1, S, 1]; 0 hides a key.
        power: of the re-weighting, up to 32; 0 leaves it out.
        causal: query i sees keys up to i + (S - T); else all.

    Returns:
        [B, H, T, V] in the type of `v`; zeros where nothing is visible.

    Raises:
        GraphOptError: the kernels do not take these types or sizes, or this power.
    """
    out, _ = run(problem(q, k, v, key_weight, power, causal), v.dtype, keep=False)
    return out


def run(p: Problem, dtype: torch.dtype, keep: bool) -> tuple[torch.Tensor, Kept | None]:
    """The output, and with `keep` what the backward pass needs of each row."""
    B, H, _, T, _, _, V = p.sizes
    out = torch.empty((B, H, T, V), dtype=dtype, device=p.q.device)
    kept = Kept(*(torch.empty((B, H, T), device=p.q.device) for _ in Kept._fields)) if keep else None
    softplus_attention_kernel(
        lambda meta: (-(-T // meta["BM"]), B * H),
        out=out, **(kept._asdict() if kept else dict.fromkeys(Kept._fields)), **p.common(), KEEP=keep,
        TILE=tile(T),
    )  # fmt: skip
    return out, kept


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None = None,
    power: int = 0,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
    """The gradients of q, k and v in their types, from the weights computed again.

    Args:
        dout: gradient of the output [B, H, T, V].
        q: this and all others as in `forward`.
        k: see there.
        v: see there.
        key_weight: see there; it has none.
        power: see there.
        causal: see there.

    Raises:
        GraphOptError: the kernels do not take these types or sizes, or this power.
    """
    p = problem(q, k, v, key_weight, power, causal)
    B, H, HKV, T, S, D, V = p.sizes
    y, kept = run(p, torch.float32, keep=True)
    assert kept is not None
    device = p.q.device
    dy = dout.to(p.q.dtype).contiguous()
    dq = torch.empty((B, H, T, D), dtype=q.dtype, device=device)
    dk = torch.empty((B, HKV, S, D), dtype=k.dtype, device=device)
    dv = torch.empty((B, HKV, S, V), dtype=v.dtype, device=device)
    common = {
        "dy": dy, "delta": (dy.float() * y).sum(-1), "rest": torch.empty((B, H, T), device=device),
        **kept._asdict(), **p.common(),
    }  # fmt: skip
    # The first kernel writes `rest`, and the second reads it.
    softplus_query_kernel(
        lambda meta: (-(-T // meta["BM"]), B * H), dq=dq, **{**common, "direction": _direction(p.q), "TILE": tile(T)}
    )
    softplus_key_kernel(
        lambda meta: (-(-S // meta["BN"]), B * HKV),
        dk=dk,
        dv=dv,
        **{**common, "direction": _direction(p.k), "TILE": tile(S)},
    )
    return dq, dk, dv, None
