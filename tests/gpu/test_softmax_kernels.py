"""The compiled softmax kernels, and attention of other kinds of softmax, on a GPU at real sizes, against fp64."""

import pytest
import torch

from graphopt.ops import online_softmax, softplus_attention, two_pass_softmax, unified_max_softmax
from graphopt.ops.softplus_attention import gradients, reference

pytestmark = pytest.mark.gpu

FORMS = ("two_pass", "online", "unified")
# Largest error over the largest value: the 16-bit types round the result by 4.9e-4 and 3.9e-3 at most; in fp32 a GPU's
# exponentials are off by two units of 6e-8, and sums over 256000 entries by some more.
LIMITS = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
# RMS(error) / RMS(value) of attention: weights, their gradients and the result are rounded by 1.7e-3 each in bf16.
BF16 = 4e-3


def normal(*shape: int, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> torch.Tensor:
    make = torch.Generator("cuda").manual_seed(sum(shape))
    return (spread * torch.randn(*shape, generator=make, device="cuda")).to(dtype)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def check(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(found.isnan(), expected.isnan())
    largest = expected.nan_to_num().abs().max()
    assert float((found.double() - expected).nan_to_num().abs().max() / largest) < LIMITS[found.dtype]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("shape", [(64, 256000), (1, 128256), (3, 50257), (5000, 1000), (300, 32768)], ids=str)
def test_softmax(shape: tuple[int, int], dtype: torch.dtype, form: str) -> None:
    pytest.importorskip("triton")
    from graphopt.backends.triton.softmax import forward, gradient

    x, dy = normal(*shape, dtype=dtype, spread=4.0), normal(*shape, dtype=dtype)
    y = torch.softmax(x.double(), -1)
    found = forward(x, form=form)
    check(found, y)
    given = y.to(dtype)
    exact = given.double() * (dy.double() - (given.double() * dy.double()).sum(-1, keepdim=True))
    check(gradient(dy, given), exact)


@pytest.mark.parametrize("form", FORMS)
def test_softmax_of_special_values_and_levels(form: str) -> None:
    # The interpreter has no fused product and sum, of which the exponents of large numbers are made.
    pytest.importorskip("triton")
    from graphopt.backends.triton.softmax import forward

    levels = [0, 1e3, -1e3, 1e5, -1e5, 3e7, 2.0**30, -(2.0**30), 1e30, -1e30, 1.7e38]
    x = normal(len(levels) + 4, 100003) + torch.tensor([*levels, 0, 0, 0, 0], device="cuda")[:, None]
    x[: len(levels), ::3] = torch.finfo(torch.float32).min
    x[-4] = -torch.inf
    x[-3, 7] = torch.nan
    x[-2, 99999] = torch.inf
    x[-1, :70000] = -torch.inf
    expected = torch.softmax(x.double(), -1)
    expected[-4] = 0
    found = forward(x, form=form)
    for row, right in zip(found, expected, strict=True):
        if right.any():
            check(row, right)
    assert not found[-4].any()


@pytest.mark.parametrize("phi", [-300.0, 0.0, 8.0, 300.0])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "size", [(1, 8, 2, 4096, 4096, 128), (2, 4, 4, 1000, 1777, 64), (4, 8, 1, 1, 3000, 256)], ids=str
)
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
def test_unified_attention(dtype: torch.dtype, size: tuple[int, ...], causal: bool, phi: float) -> None:
    pytest.importorskip("triton")
    from graphopt.backends.triton.unified_attention import attend

    B, H, HKV, T, S, D = size
    q, k, v = normal(B, H, T, D, dtype=dtype), normal(B, HKV, S, D, dtype=dtype), normal(B, HKV, S, D, dtype=dtype)
    flagged = torch.full((B, H, T), -1, dtype=torch.int32, device="cuda")
    found = attend(q, k, v, causal=causal, phi=phi, flagged=flagged)
    mask = torch.ones(T, S, dtype=torch.bool, device="cuda").tril(S - T) if causal else None
    exact = (q.double(), *(x.double().repeat_interleave(H // HKV, 1) for x in (k, v)))
    expected = torch.nn.functional.scaled_dot_product_attention(*exact, attn_mask=mask)
    assert error(found, expected) < {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: BF16}[dtype]
    assert bool(flagged.all()) == (abs(phi) > 60)
    assert bool(flagged.any()) == (abs(phi) > 60)


@pytest.mark.parametrize("power", [0, 3, 15])
@pytest.mark.parametrize("size", [(1, 4, 2, 2048, 2048, 128), (2, 4, 1, 500, 777, 60), (1, 8, 8, 1, 5000, 64)], ids=str)
def test_softplus_attention(size: tuple[int, ...], power: int) -> None:
    pytest.importorskip("triton")
    from graphopt.backends.triton.softplus_attention import backward, forward

    B, H, HKV, T, S, D = size
    q, k, v = (normal(B, h, n, D).bfloat16() for h, n in ((H, T), (HKV, S), (HKV, S)))
    weight = torch.ones(B, 1, S, 1, device="cuda")
    weight[0, :, :100] = 0
    exact = [x.double() for x in (q, k, v)]
    assert error(forward(q, k, v, weight, power), reference(*exact, weight, power)) < BF16
    dout = normal(B, H, T, D).bfloat16()
    expected = gradients(dout.double(), *exact, weight, power)
    for name, found, right in zip("qkv", backward(dout, q, k, v, weight, power), expected, strict=False):
        assert error(found, right) < 2 * BF16, name


def test_operators_dispatch_to_the_kernels() -> None:
    pytest.importorskip("triton")
    from graphopt.backends.triton import enable
    from graphopt.ops import kernels

    enable()
    x = normal(4, 100000).requires_grad_()
    right = torch.softmax(x.detach().double(), -1)
    for operator in (two_pass_softmax, online_softmax, unified_max_softmax):
        assert kernels.registered(operator, "cuda") is not None
        y = operator(x)
        check(y.detach(), right)
        (found,) = torch.autograd.grad(y.square().sum(), x)
        check(found, right * (2 * right - (2 * right * right).sum(-1, keepdim=True)))
    assert kernels.registered(softplus_attention, "cuda") is not None
