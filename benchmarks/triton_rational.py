"""The Triton kernels of rational functions on a GPU, against GELU, plain torch, and a copy of the same bytes.

The hidden layer of ViT-B's MLP: [1024, 197, 3072] in bf16, 8 groups, degrees 5 and 4. Contenders alternate, so that a
change of clocks meets all of them, and ratios are taken round by round. Before anything is timed, each is held against
fp64.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import show, store
from benchmarks.timing import on_gpu
from graphopt.ops.group_rational import gradients, reference

BATCH, TOKENS, WIDTH, HIDDEN = 1024, 197, 768, 3072
GROUPS, M, N = 8, 5, 4
# Sequences on which the results are compared: fp64 takes eight bytes for each of the many values in between.
COMPARED = 16
# Largest error over the largest value, or RMS for gradients of coefficients: bf16 rounds a result by 3.9e-3 at most.
LIMIT = 4e-3

Call = Callable[[], Any]


def run() -> None:
    """Time every contender, and store medians, quartiles, ratios and bandwidths."""
    try:
        import triton
    except ImportError:
        print("triton_rational: skipped, triton is not installed")
        return
    if not torch.cuda.is_available():
        print("triton_rational: skipped, there is no CUDA device")
        return
    rows = [*_elementwise(), *_linear()]
    columns = ("what", "contender", "ms", "q1", "q3", "ratio", "ratio_q1", "ratio_q3", "gb_per_s", "error")
    title = f"[{BATCH}, {TOKENS}, {HIDDEN}] in bf16; ratios against the first contender of each kind"
    show(title, columns, [[row.get(c, "") for c in columns] for row in rows])
    sizes = {"batch": BATCH, "tokens": TOKENS, "width": WIDTH, "hidden": HIDDEN, "groups": GROUPS, "m": M, "n": N}
    versions = {"device": torch.cuda.get_device_name(), "triton": triton.__version__}
    store("triton_rational", {**versions, **sizes, "rows": rows})


def _coefficients(make: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """One numerator and a denominator per group, with values of ordinary size and without steep turns."""
    a = torch.randn(1, M + 1, generator=make, device="cuda") * 0.5 ** torch.arange(M + 1, device="cuda")
    return a, 0.2 * torch.randn(GROUPS, N, generator=make, device="cuda")


def _elementwise() -> list[dict[str, Any]]:
    from graphopt.backends.triton.group_rational import backward, forward

    make = torch.Generator("cuda").manual_seed(0)
    x, dy = (torch.randn(BATCH, TOKENS, HIDDEN, generator=make, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a, b = _coefficients(make)
    out = torch.empty_like(x)
    part, upstream = x[:COMPARED].double(), dy[:COMPARED].double()
    exact = reference(part, a.double(), b.double())
    errors = {
        "kernel": _error(forward(x, a, b)[:COMPARED], exact),
        "plain torch": _error(reference(x, a, b)[:COMPARED], exact),
    }
    forwards: dict[str, Call] = {
        "torch GELU": lambda: F.gelu(x),
        "kernel": lambda: forward(x, a, b),
        "plain torch": lambda: reference(x, a, b),
        "copy": lambda: out.copy_(x),
    }
    rows = _compare("forward", forwards, errors, moved=2 * x.numel() * x.element_size())

    # dx on a part, and the sums over everything in parts of the batch.
    dx, *_ = gradients(upstream, part, a.double(), b.double())
    pieces = zip(dy.split(COMPARED), x.split(COMPARED), strict=True)
    sums = [gradients(g.double(), z.double(), a.double(), b.double())[1:] for g, z in pieces]
    right = [torch.stack(each).sum(0) for each in zip(*sums, strict=True)]
    backwards: dict[str, Call] = {
        "torch GELU": lambda: torch.ops.aten.gelu_backward(dy, x),
        "kernel": lambda: backward(dy, x, a, b),
        "plain torch": lambda: gradients(dy, x, a, b),
    }
    errors = {}
    for name in ("kernel", "plain torch"):
        found = backwards[name]()
        apart = [float((u.double() - v).norm() / v.norm()) for u, v in zip(found[1:], right, strict=True)]
        errors[name] = max(_error(found[0][:COMPARED], dx), *apart)
    return rows + _compare("backward", backwards, errors, moved=3 * x.numel() * x.element_size())


def _linear() -> list[dict[str, Any]]:
    from graphopt.backends.triton import group_rational
    from graphopt.backends.triton.linear_rational import backward, forward

    make = torch.Generator("cuda").manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make, device="cuda", dtype=torch.bfloat16)

    x, w, bias = normal(BATCH, TOKENS, WIDTH), normal(HIDDEN, WIDTH) / WIDTH**0.5, normal(HIDDEN)
    dy = normal(BATCH, TOKENS, HIDDEN)
    a, b = _coefficients(make)
    z = F.linear(x, w, bias)
    part = F.linear(x[:COMPARED].double(), w.double(), bias.double())
    error = _error(forward(x, w, bias, a, b)[:COMPARED], reference(part, a.double(), b.double()))
    forwards: dict[str, Call] = {
        "linear, GELU": lambda: F.gelu(F.linear(x, w, bias)),
        "kernel": lambda: forward(x, w, bias, a, b),
        "linear, kernel of the function": lambda: group_rational.forward(F.linear(x, w, bias), a, b),
        "linear alone": lambda: F.linear(x, w, bias),
    }
    rows = _compare("linear forward", forwards, {"kernel": error})

    def gelu() -> tuple[torch.Tensor, ...]:
        """What autograd computes, with the product of the forward pass kept."""
        dz = torch.ops.aten.gelu_backward(dy, z)
        flat = dz.flatten(0, 1)
        return dz @ w, flat.t() @ x.flatten(0, 1), flat.sum(0)

    backwards: dict[str, Call] = {"linear, GELU": gelu, "kernels": lambda: backward(dy, x, w, bias, a, b)}
    return rows + _compare("linear backward", backwards, {})


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max())


def _compare(
    what: str, calls: Mapping[str, Call], errors: Mapping[str, float], moved: int | None = None
) -> list[dict[str, Any]]:
    """Times; ratios against the first contender; bandwidth, if it is known how many bytes each has to move."""
    wrong = {name: value for name, value in errors.items() if not value < LIMIT}
    if wrong:
        raise AssertionError(f"expected errors below {LIMIT} in the {what} pass, found {wrong}")
    times = on_gpu(calls)
    base = next(iter(times.values()))
    rows = []
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        ratios = statistics.quantiles([mine / other for mine, other in zip(values, base, strict=True)], n=4)
        row = {"what": what, "contender": name, "ms": middle, "q1": low, "q3": high}
        row |= dict(zip(("ratio_q1", "ratio", "ratio_q3"), ratios, strict=True))
        if moved is not None:
            row["gb_per_s"] = moved / middle / 1e6
        rows.append({**row, "error": errors[name]} if name in errors else row)
    return rows


if __name__ == "__main__":
    run()
