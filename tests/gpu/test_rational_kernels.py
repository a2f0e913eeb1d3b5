"""The compiled rational kernels on a GPU at real sizes, against the definitions in fp64."""

import itertools

import pytest
import torch

from graphopt.ops import group_rational, linear_rational
from graphopt.ops.group_rational import FORMS, gradients, reference
from graphopt.ops.linear_rational import reference as linear_reference

pytestmark = pytest.mark.gpu

VARIANTS = list(itertools.product(FORMS, (False, True)))
# Largest error over the largest value: the 16-bit types round the result by 4.9e-4 and 3.9e-3 at most; in fp32 a GPU's
# quotient is off by two units of 6e-8, and the terms of the polynomials are some times as large as what they add up to.
LIMITS = {torch.float32: 4e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
# Of a sum over millions of entries in fp32, RMS(error) / RMS(value).
SUMS = 1e-5


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    make = torch.Generator("cuda").manual_seed(sum(shape) + seed)
    return torch.randn(*shape, generator=make, device="cuda").to(dtype)


def coefficients(first: int, second: int, m: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    # Denominators without steep turns, and numerators whose highest powers do not drown the others.
    falling = 0.5 ** torch.arange(m + 1, device="cuda")
    return normal(first, m + 1) * falling, 0.2 * normal(second, n)


def check(found: torch.Tensor, right: torch.Tensor, limit: float | None = None) -> None:
    assert found.shape == right.shape
    assert torch.equal(found.isnan(), right.isnan())
    if found.numel() == 0:
        return
    apart = (found.double() - right).nan_to_num().abs().max() / right.nan_to_num().abs().max().clamp(min=1e-30)
    assert float(apart) < (limit or LIMITS[found.dtype])


def close(found: torch.Tensor, right: torch.Tensor, limit: float) -> None:
    assert float((found.double() - right).norm() / right.norm()) < limit


@pytest.mark.parametrize(("form", "split"), VARIANTS)
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize(
    ("shape", "first", "second", "m", "n"),
    [
        ((8, 197, 3072), 1, 8, 5, 4),
        ((8, 197, 768), 8, 1, 4, 6),
        ((1000, 300), 3, 3, 7, 7),
        ((1, 3072), 8, 8, 5, 4),
        ((5000, 7), 1, 7, 3, 0),
    ],
    ids=str,
)
def test_group_rational(
    shape: tuple[int, ...], first: int, second: int, m: int, n: int, dtype: torch.dtype, form: str, split: bool
) -> None:
    pytest.importorskip("triton")
    from graphopt.backends.triton.group_rational import backward, forward

    x, dy, (a, b) = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1), coefficients(first, second, m, n)
    wide, above, below = (t.double() for t in (x, a, b))
    check(forward(x, a, b, form, split), reference(wide, above, below, form, split))
    found, again = (backward(dy, x, a, b, form, split) for _ in range(2))
    dx, *right = gradients(dy.double(), wide, above, below, form, split)
    check(found[0], dx)
    for value, expected in zip(found[1:], right, strict=True):
        if expected.numel():
            close(value, expected, SUMS)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
def test_special_values(dtype: torch.dtype, form: str) -> None:
    pytest.importorskip("triton")
    from graphopt.backends.triton.group_rational import backward, forward

    x, (a, b) = normal(100, 384, dtype=dtype), coefficients(4, 4, 4, 6)
    x[1, 5], x[2, 100], x[3, 200] = torch.nan, torch.inf, -torch.inf
    x[4, 300], x[5, 301], x[6, 302] = torch.finfo(dtype).max, torch.finfo(dtype).min, 0
    wide, above, below = (t.double() for t in (x, a, b))
    found, right = forward(x, a, b, form, True), reference(wide, above, below, form, True)
    # The largest numbers come through as they are; the others are held against the largest of the others.
    large = right.abs() > 60000
    assert torch.equal(found[large], right[large].to(dtype))
    check(found.masked_fill(large, 0), right.masked_fill(large, 0))
    ones = torch.ones_like(x)
    for value, expected in zip(
        backward(ones, x, a, b, form, True), gradients(ones.double(), wide, above, below, form, True), strict=True
    ):
        assert torch.equal(value.isfinite(), expected.isfinite())
    # Without the split, powers of infinity divide one another.
    x[4:6, 300:302] = 0
    assert torch.equal(forward(x, a, b, form).isnan(), reference(x.double(), above, below, form).isnan())


@pytest.mark.parametrize(("form", "split"), VARIANTS)
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize(
    ("rows", "K", "C", "G", "stored", "bias"),
    [
        (1576, 768, 3072, 8, False, True),
        (1000, 192, 768, 8, True, True),
        (77, 100, 300, 3, False, False),
        (1, 768, 3072, 1, True, False),
    ],
    ids=str,
)
def test_linear_rational(
    rows: int, K: int, C: int, G: int, stored: bool, bias: bool, dtype: torch.dtype, form: str, split: bool
) -> None:
    pytest.importorskip("triton")
    from graphopt.backends.triton.linear_rational import backward, forward

    x, w, (a, b) = normal(rows, K, dtype=dtype), (normal(C, K) / K**0.5).to(dtype), coefficients(1, G, 5, 4)
    w = w.t().contiguous().t() if stored else w
    offset = normal(C, dtype=dtype) if bias else None
    exact = None if offset is None else offset.double()
    right = linear_reference(x.double(), w.double(), exact, a.double(), b.double(), form, split)
    # Sums of 768 products in fp32 before the function.
    check(forward(x, w, offset, a, b, form, split), right, 1e-5 if dtype == torch.float32 else None)
    # The gradient starts from z as this type holds it. Rounded twice: dz, and what it is multiplied to.
    dy = normal(rows, C, dtype=dtype, seed=1)
    z = torch.nn.functional.linear(x, w, offset)
    dz, da, db = gradients(dy.double(), z.double(), a.double(), b.double(), form, split)
    expected = dz @ w.double(), dz.t() @ x.double(), dz.sum(0) if bias else None, da, db
    for value, wanted in zip(backward(dy, x, w, offset, a, b, form, split), expected, strict=True):
        assert (value is None) == (wanted is None)
        if value is not None and wanted is not None:
            close(value, wanted, 1e-5 if dtype == torch.float32 else 2 * LIMITS[dtype])


def test_operators_dispatch_to_the_kernels() -> None:
    pytest.importorskip("triton")
    from graphopt.backends.triton import enable
    from graphopt.ops import kernels

    enable()
    a, b = coefficients(1, 8, 5, 4)
    x, w = normal(50, 96).requires_grad_(), (normal(768, 96) / 96**0.5).requires_grad_()
    for operator in (group_rational, linear_rational):
        assert kernels.registered(operator, "cuda") is not None
    y = group_rational(linear_rational(x, w, None, a, b), a, b)
    y.sum().backward()
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    z = linear_reference(exact[0], exact[1], None, a.double(), b.double())
    right = reference(z, a.double(), b.double())
    right.sum().backward()
    check(y.detach(), right.detach(), 1e-4)  # a function of high powers twice over
    for value, expected in zip((x, w), exact, strict=True):
        assert value.grad is not None
        assert expected.grad is not None
        close(value.grad, expected.grad, 1e-4)
