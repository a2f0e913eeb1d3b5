"""The Triton kernels of linear attention on a GPU, alternating with flash-linear-attention and torch's softmax.

Causal, bf16, forward and forward with backward. Before anything is timed, each contender of a rule is held against the
operator's reference in fp64 on two of the heads.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import show, store
from benchmarks.timing import on_gpu
from graphopt.ops.linear_attention import chunked

# As flash-linear-attention writes them: [B, T, H, D].
SHAPES = ((1, 8192, 96, 128), (4, 4096, 64, 128))
# RMS(error) / RMS(value): storing a value in bf16 alone costs 1.7e-3.
LIMIT = 4e-3

Call = Callable[..., torch.Tensor]


def run() -> None:
    """Time every contender on every shape, and store medians and quartiles."""
    try:
        import triton
    except ImportError:
        print("triton_linear: skipped, triton is not installed")
        return
    if not torch.cuda.is_available():
        print("triton_linear: skipped, there is no CUDA device")
        return
    rows = []
    for shape in SHAPES:
        for rule in ("linear", "gated", "gated per feature"):
            rows += _compare(shape, rule)
    columns = ("shape", "rule", "what", "contender", "ms", "q1", "q3", "error")
    show("causal linear attention, bf16", columns, [[row.get(c, "") for c in columns] for row in rows])
    store("triton_linear", {"device": torch.cuda.get_device_name(), "triton": triton.__version__, "rows": rows})


def _compare(shape: tuple[int, int, int, int], rule: str) -> list[dict[str, Any]]:
    B, T, H, D = shape
    make = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=make, device="cuda")

    q, k, v = (normal(B, T, H, D).bfloat16() for _ in range(3))
    k = F.normalize(k, dim=-1)
    decay = None
    if rule != "linear":
        decay = F.logsigmoid(normal(B, T, H, D if "feature" in rule else 1)) / 16
    inputs = [x.requires_grad_() for x in (q, k, v, decay) if x is not None]
    scale = D**-0.5
    contenders = _contenders(rule, scale)
    errors = {name: _error(call, inputs, rule, scale) for name, call in contenders.items() if name != "softmax"}
    wrong = {name: value for name, value in errors.items() if not value < LIMIT}
    if wrong:
        raise AssertionError(f"expected errors below {LIMIT} for {rule} at {shape}, found {wrong}")
    dout = normal(B, T, H, D).bfloat16()
    rows = []
    for what in ("forward", "forward and backward"):
        times = _alternate(contenders, inputs, dout if "backward" in what else None)
        for name, values in times.items():
            low, middle, high = statistics.quantiles(values, n=4)
            row = {"shape": list(shape), "rule": rule, "what": what, "contender": name}
            rows.append({**row, "ms": middle, "q1": low, "q3": high, "error": errors.get(name, "")})
    return rows


def _contenders(rule: str, scale: float) -> dict[str, Call]:
    """Functions of q, k, v [B, T, H, D] and, for the gated rules, the decay."""
    from graphopt.backends.triton import enable
    from graphopt.backends.triton.linear_attention import forward
    from graphopt.ops import linear_attention

    enable()

    def ours(form: str | None) -> Call:
        def call(*inputs: torch.Tensor) -> torch.Tensor:
            q, k, v, *decay = (x.transpose(1, 2) for x in inputs)
            arguments = (q, k, v, decay[0] if decay else None, None, None, rule.split()[0], scale)
            if form is None or torch.is_grad_enabled():
                out, _ = linear_attention(*arguments)
            else:
                out, _ = forward(*arguments, form=form)
            return out.transpose(1, 2)

        return call

    def softmax(*inputs: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in inputs[:3])
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)

    found: dict[str, Call] = {"graphopt": ours(None)}
    found |= {f"graphopt {form}": ours(form) for form in ("fused", "parallel")}
    found["softmax"] = softmax
    return {**found, **_flash_linear_attention(rule, scale)}


def _flash_linear_attention(rule: str, scale: float) -> dict[str, Call]:
    try:
        from fla.ops.gla import chunk_gla
        from fla.ops.linear_attn import chunk_linear_attn
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        return {}

    def linear(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = chunk_linear_attn(q, k, v, scale=scale, normalize=False)[0]
        return out

    def simple(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = chunk_simple_gla(q, k, v, g=decay.squeeze(-1), scale=scale)[0]
        return out

    def fine(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = chunk_gla(q, k, v, g=decay, scale=scale)[0]
        return out

    return {"flash-linear-attention": {"linear": linear, "gated": simple}.get(rule, fine)}


@torch.no_grad()
def _error(call: Call, inputs: list[torch.Tensor], rule: str, scale: float) -> float:
    """RMS(error) / RMS(value) of two heads."""
    found = call(*inputs)[:, :, :2].double()
    q, k, v, *decay = (x[:, :, :2].transpose(1, 2).double() for x in inputs)
    right, _ = chunked(q, k, v, decay[0] if decay else None, None, None, rule.split()[0], scale)
    right = right.transpose(1, 2)
    return float((found - right).norm() / right.norm())


def _alternate(
    contenders: dict[str, Call], inputs: list[torch.Tensor], dout: torch.Tensor | None
) -> dict[str, list[float]]:
    """Milliseconds of each contender, one run of each in turn, so that a change of clocks meets all of them."""

    def once(name: str) -> None:
        with torch.set_grad_enabled(dout is not None):
            out = contenders[name](*inputs)
            if dout is not None:
                torch.autograd.grad(out, inputs[:3] if name == "softmax" else inputs, dout)

    return on_gpu({name: partial(once, name) for name in contenders})


if __name__ == "__main__":
    run()
