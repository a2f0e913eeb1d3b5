"""`graphopt::linear_attention` and its gradients on the kernels: the host's side."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from graphopt.errors import GraphOptError
from graphopt.ops.linear_attention import RULES

from .forward import forward_kernel, output_kernel
from .launch import BLOCK, CHUNK, padded, rows_of, strides
from .pairs import pairs_kernel
from .recurrent import recurrent_kernel
from .solve import solve_kernel

# Up to so many tokens one pass per token beats a chunk that is mostly padding.
_SHORT = 16
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# The largest head dimension whose state the kernels hold in registers.
_LARGEST = 256


def supported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the kernels compute these types and sizes: fp16, bf16 or fp32, and dimensions up to 256."""
    sizes = (*q.shape[:3], q.shape[-1], v.shape[-1])
    return all(x.dtype in _DTYPES for x in (q, k, v)) and min(sizes) > 0 and max(sizes[-2:]) <= _LARGEST


@dataclass(frozen=True)
class Problem:
    """The arguments in the form that the kernels read; `total` is the decay summed within each chunk, in fp32."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    decay: torch.Tensor | None
    beta: torch.Tensor | None
    state: torch.Tensor | None
    total: torch.Tensor | None
    scale: float

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """B, H, Hkv, T, K, V."""
        B, H, T, K = self.q.shape
        return B, H, self.k.shape[1], T, K, self.v.shape[-1]

    @property
    def chunks(self) -> int:
        """N: how many chunks T tokens make."""
        return -(-self.q.shape[2] // CHUNK)

    @property
    def kind(self) -> int:
        """What the kernels call DECAY."""
        return 0 if self.decay is None else 1 if self.decay.shape[-1] == 1 else 2

    def common(self) -> dict[str, object]:
        """The arguments that every kernel over chunks takes."""
        _, _, HKV, T, K, _ = self.sizes
        return {"k": self.k, "total": self.total, "T": T, "HKV": HKV, **strides("k", self.k), "K": K, "C": CHUNK}


def problem(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor | None,
    beta: torch.Tensor | None,
    state: torch.Tensor | None,
    rule: str,
    scale: float,
) -> Problem:
    """Check the arguments of `forward` and bring them into the form that the kernels read.

    Raises:
        GraphOptError: the rule is unknown, `decay` or `beta` do not fit it, or the kernels do not take types or sizes.
    """
    if rule not in RULES:
        raise GraphOptError(f"expected rule to be one of {', '.join(RULES)}, got {rule!r}")
    if (decay is not None) != rule.startswith("gated") or (beta is not None) != rule.endswith("delta"):
        given = [name for name, value in (("decay", decay), ("beta", beta)) if value is not None]
        raise GraphOptError(
            f"expected decay for the gated rules and beta for the delta rules, got {given} for {rule!r}"
        )
    if not supported(q, k, v):
        raise GraphOptError(
            f"expected fp16, bf16 or fp32 tensors with at least one element and dimensions up to {_LARGEST}, got "
            f"{q.dtype} {list(q.shape)} and {list(v.shape)}; the torch implementation takes others"
        )
    if beta is not None and decay is not None and decay.shape[-1] > 1:
        raise GraphOptError(f"expected one decay per token for rule {rule!r}, got {decay.shape[-1]} per token")
    dtype = functools.reduce(torch.promote_types, (q.dtype, k.dtype, v.dtype))
    rows = (*k.shape[:3], -1)
    decay, beta = (None if x is None else x.float().expand(rows).contiguous() for x in (decay, beta))
    state = None if state is None else state.float().contiguous()
    q, k, v = (rows_of(x.to(dtype)) for x in (q, k, v))
    total = None
    if decay is not None:
        total = F.pad(decay, (0, 0, 0, -q.shape[2] % CHUNK)).unflatten(2, (-1, CHUNK)).cumsum(3).flatten(2, 3)
    return Problem(q, k, v, decay, beta, state, total, scale)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    rule: str = "linear",
    scale: float = 1.0,
    *,
    form: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator on the kernels: products of the inputs' type, sums and states in fp32.

    Args:
        q: [B, H, T, K]; K and V at most 256.
        k: [B, Hkv, T, K].
        v: [B, Hkv, T, V].
        decay: [B or 1, Hkv, T, 1 or K].
        beta: [B or 1, Hkv, T, 1].
        state: [B, Hkv, K, V].
        rule: one of `graphopt.ops.linear_attention.RULES`.
        scale: factor on the output.
        form: `recurrent` (token by token), `fused` (chunks in turn), `parallel` (states in turn, then all outputs at
            once); None chooses by the sizes.

    Returns:
        The output [B, H, T, V] in the type of `v`, and the state after the last token [B, Hkv, K, V] in fp32.

    Raises:
        GraphOptError: the kernels do not take these types or sizes.
    """
    p = problem(q, k, v, decay, beta, state, rule, scale)
    B, H, HKV, T, K, V = p.sizes
    out = torch.empty((B, H, T, V), dtype=v.dtype, device=v.device)
    final = torch.empty((B, HKV, K, V), dtype=torch.float32, device=v.device)
    form = form or _form(p)
    if form == "recurrent":
        recurrent_kernel(
            lambda meta: (-(-V // meta["BV"]), B * HKV),
            q=p.q, k=p.k, v=p.v, decay=p.decay, beta=p.beta, start=p.state, out=out, final=final,
            scale=scale, T=T, H=H, HKV=HKV, **strides("q", p.q), **strides("k", p.k), **strides("v", p.v),
            K=K, V=V, BK=padded(K), DECAY=p.kind, DELTA=beta is not None, START=state is not None,
        )  # fmt: skip
        return out, final
    pairs, inverse = inside_of(p), inverse_of(p)
    if form == "fused":
        run_states(p, pairs, inverse, final, out=out)
        return out, final
    states, fresh = run_states(p, pairs, inverse, final)
    u = p.v if fresh is None else fresh
    output_kernel(
        lambda meta: (-(-V // meta["BV"]), p.chunks, B * H),
        q=p.q, u=u, inside=pairs, states=states, out=out, scale=scale, H=H, **p.common(),
        **strides("q", p.q), **strides("u", u), V=V, DECAY=p.kind,
    )  # fmt: skip
    return out, final


def _form(p: Problem) -> str:
    B, _, HKV, T, _, V = p.sizes
    if T <= _SHORT:
        return "recurrent"
    # Chunks in turn leave multiprocessors idle where there are few heads; outputs at once cost a trip to memory.
    device = p.q.device
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    programs = B * HKV * -(-V // 32)
    return "fused" if programs >= processors else "parallel"


def inside_of(p: Problem) -> torch.Tensor | None:
    """A [B, H, N, C, C] for a decay per feature."""
    if p.kind != 2:
        return None
    B, H, *_ = p.sizes
    # Rows and columns of padding are written, too.
    inside = torch.empty((B, H, p.chunks, CHUNK, CHUNK), dtype=p.q.dtype, device=p.q.device)
    pairs_kernel(
        lambda meta: (CHUNK // BLOCK, p.chunks, B * H),
        q=p.q, inside=inside, H=H, **p.common(), **strides("q", p.q), R=BLOCK,
    )  # fmt: skip
    return inside


def inverse_of(p: Problem) -> torch.Tensor | None:
    """(I + M)^-1 [B, Hkv, N, C, C] for the delta rules."""
    if p.beta is None:
        return None
    B, _, HKV, *_ = p.sizes
    inverse = torch.zeros((B, HKV, p.chunks, CHUNK, CHUNK), dtype=torch.float32, device=p.q.device)
    solve_kernel(lambda meta: (p.chunks, B * HKV), beta=p.beta, inverse=inverse, **p.common(), R=BLOCK, DECAY=p.kind)
    return inverse


def run_states(
    p: Problem,
    pairs: torch.Tensor | None,
    inverse: torch.Tensor | None,
    final: torch.Tensor,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Fills `out` if given; else the states before each chunk [B, Hkv, N, K, V], and u of the delta rules."""
    B, H, HKV, T, K, V = p.sizes
    states = fresh = None
    if out is None:
        states = p.q.new_empty((B, HKV, p.chunks, K, V))
        fresh = p.q.new_empty((B, HKV, T, V)) if p.beta is not None else None
    forward_kernel(
        lambda meta: (-(-V // meta["BV"]), B * HKV),
        q=p.q, v=p.v, inside=pairs, inverse=inverse, beta=p.beta, start=p.state, out=out, states=states, fresh=fresh,
        final=final, scale=p.scale, H=H, **p.common(), **strides("q", p.q), **strides("v", p.v),
        V=V, BK=padded(K), DECAY=p.kind, DELTA=p.beta is not None, START=p.state is not None,
        OUTPUT=out is not None, KEEP=out is None,
    )  # fmt: skip
    return states, fresh


def states_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rule `linear`: the states before each chunk [B, Hkv, N, K, V] in the inputs' type, and the last one in fp32."""
    p = problem(q, k, v, None, None, state, "linear", 1.0)
    B, _, HKV, _, K, V = p.sizes
    final = torch.empty((B, HKV, K, V), dtype=torch.float32, device=v.device)
    states, _ = run_states(p, None, None, final)
    assert states is not None
    return states, final
