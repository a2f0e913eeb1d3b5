"""The Triton kernels of softmax on a GPU: rows of a vocabulary against torch.softmax, attention against torch's SDPA.

Contenders alternate, so that a change of clocks meets all of them. Before anything is timed, each is held against fp64.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import show, store
from benchmarks.timing import on_gpu

ROWS, VOCABULARY = 64, 256_000
# B, H, Hkv, T, S, D: prefill, prefill with groups, a step of decoding.
ATTENTION = ((1, 32, 32, 8192, 8192, 128), (4, 32, 8, 4096, 4096, 128), (16, 32, 32, 1, 8192, 128))
# Largest error over the largest value. bf16 rounds a result by 3.9e-3 at most; attention rounds its weights as well.
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 8e-3}

Call = Callable[[], torch.Tensor]


def run() -> None:
    """Time every contender on every shape, and store medians and quartiles."""
    try:
        import triton
    except ImportError:
        print("triton_softmax: skipped, triton is not installed")
        return
    if not torch.cuda.is_available():
        print("triton_softmax: skipped, there is no CUDA device")
        return
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in _softmax(dtype)]
    columns = ("dtype", "what", "contender", "ms", "q1", "q3", "gb_per_s", "error")
    title = f"softmax of [{ROWS}, {VOCABULARY}]; GB/s of one read and one write"
    show(title, columns, [[row[c] for c in columns] for row in rows])
    attention = [row for shape in ATTENTION for row in _attention(shape)]
    columns = ("shape", "contender", "ms", "q1", "q3", "error")
    show("causal attention, bf16, forward", columns, [[row[c] for c in columns] for row in attention])
    result = {"device": torch.cuda.get_device_name(), "triton": triton.__version__}
    store("triton_softmax", {**result, "softmax": rows, "attention": attention})


def _softmax(dtype: torch.dtype) -> list[dict[str, Any]]:
    from graphopt.backends.triton.softmax import FORMS, forward, gradient

    make = torch.Generator("cuda").manual_seed(0)
    x, dy = (torch.randn(ROWS, VOCABULARY, generator=make, device="cuda").to(dtype) for _ in range(2))
    exact = torch.softmax(x.double(), -1)
    y = exact.to(dtype)
    contenders: dict[str, Call] = {"torch": lambda: torch.softmax(x, -1)}
    contenders |= {form: lambda form=form: forward(x, form=form) for form in FORMS}  # type: ignore[misc]  # mypy infers no lambda with defaults
    backwards: dict[str, Call] = {
        "torch": lambda: torch._softmax_backward_data(dy, y, -1, dtype),
        "kernels": lambda: gradient(dy, y),
    }
    upstream, given = dy.double(), y.double()
    right = given * (upstream - (given * upstream).sum(-1, keepdim=True))
    rows = []
    for what, calls, expected, tensors in (("forward", contenders, exact, 2), ("backward", backwards, right, 3)):
        for row in _compare(calls, expected, dtype):
            moved = tensors * x.numel() * x.element_size()
            rows.append({"dtype": str(dtype), "what": what, **row, "gb_per_s": moved / row["ms"] / 1e6})
    return rows


def _attention(shape: tuple[int, ...]) -> list[dict[str, Any]]:
    from graphopt.backends.triton.unified_attention import attend

    B, H, HKV, T, S, D = shape
    make = torch.Generator("cuda").manual_seed(0)
    sizes = (B, H, T, D), (B, HKV, S, D), (B, HKV, S, D)
    q, k, v = (torch.randn(size, generator=make, device="cuda").bfloat16() for size in sizes)
    # A step of decoding sees all keys; torch's flag would count from the first.
    causal = T == S

    def sdpa(*inputs: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*inputs, is_causal=causal, enable_gqa=H != HKV)

    calls: dict[str, Call] = {
        "torch SDPA": lambda: sdpa(q, k, v),
        "unified maximum": lambda: attend(q, k, v, causal=causal),
        "unified maximum, every row outside": lambda: attend(q, k, v, causal=causal, phi=200.0),
    }
    # One sequence and the heads of one key head: scores in fp64 take half a gigabyte each.
    groups = H // HKV
    exact = sdpa(q[:1, :groups].double(), *(x[:1, :1].double().expand(-1, groups, -1, -1) for x in (k, v)))
    return [{"shape": list(shape), **row} for row in _compare(calls, exact, torch.bfloat16)]


def _compare(calls: Mapping[str, Call], expected: torch.Tensor, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Errors on the first part of each result that is as large as `expected`, and times."""
    part = tuple(slice(size) for size in expected.shape)
    scale = expected.abs().max()
    errors = {name: float((call()[part].double() - expected).abs().max() / scale) for name, call in calls.items()}
    wrong = {name: value for name, value in errors.items() if not value < LIMITS[dtype]}
    if wrong:
        raise AssertionError(f"expected errors below {LIMITS[dtype]} in {dtype}, found {wrong}")
    times = on_gpu(calls)
    rows = []
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        rows.append({"contender": name, "ms": middle, "q1": low, "q3": high, "error": errors[name]})
    return rows


if __name__ == "__main__":
    run()
