"""The rational kernels against the definitions in fp64; run by ../test_rational.py."""

import itertools
from typing import Any

import pytest
import torch

from graphopt.backends.triton import enable
from graphopt.backends.triton import group_rational as grouped
from graphopt.backends.triton import linear_rational as linear
from graphopt.backends.triton.launch import Kernel
from graphopt.backends.triton.linear_rational_kernel import linear_rational_kernel
from graphopt.backends.triton.rational_kernels import group_rational_gradient_kernel, group_rational_kernel
from graphopt.errors import GraphOptError
from graphopt.ops import group_rational, linear_rational
from graphopt.ops.group_rational import FARTHEST, FORMS, gradients, reference
from graphopt.ops.linear_rational import reference as linear_reference

torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOW = pytest.mark.slow
# Largest error over the largest value. fp32 rounds by 6e-8 at most, and the terms of the polynomials here are up to 60
# times as large as what they add up to; the 16-bit types round a result by 4.9e-4 and 3.9e-3.
LIMITS = {torch.float32: 4e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
# The same for products with a matrix, whose rounded sums z go through high powers.
PRODUCT = 1e-5
VARIANTS = list(itertools.product(FORMS, (False, True)))
# Each form and both values of `split` once; the two other pairs where time allows.
SOME = [("abs_sum", False), ("sum_abs", True), *(pytest.param(*v, marks=SLOW) for v in VARIANTS[1:3])]
# Shape of x, groups of numerators and of denominators, degrees m and n.
SIZES: list[Any] = [
    ((3, 5, 24), 1, 8, 5, 4),
    ((2, 150), 3, 1, 4, 6),
    ((70, 21), 1, 1, 7, 7),
    ((1, 51), 1, 3, 0, 7),
    pytest.param((7, 8), 8, 8, 3, 0, marks=SLOW),
    pytest.param((1, 1), 1, 1, 0, 0, marks=SLOW),
    pytest.param((19,), 1, 1, 1, 1, marks=SLOW),
    pytest.param((40, 63), 3, 3, 7, 7, marks=SLOW),
    pytest.param((2, 300), 3, 1, 4, 6, marks=SLOW),
    pytest.param((9, 2, 272), 1, 2, 5, 4, marks=SLOW),
]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    make = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(*shape, generator=make).to(DEVICE, dtype)


def check(found: torch.Tensor, right: torch.Tensor, limit: float | None = None) -> None:
    assert found.shape == right.shape
    assert torch.equal(found.isnan(), right.isnan())
    assert torch.equal(found.isinf(), right.isinf())
    if found.numel() == 0:
        return
    finite = torch.nan_to_num(right, 0, 0, 0)
    apart = (torch.nan_to_num(found.double(), 0, 0, 0) - finite).abs().max() / finite.abs().max().clamp(min=1e-30)
    assert float(apart) < (limit or LIMITS[found.dtype])


def check_all(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, form: str, split: bool) -> None:
    """The result and all three gradients."""
    exact = [t.double() for t in (x, a, b)]
    found = grouped.forward(x, a, b, form, split)
    assert found.dtype == x.dtype
    check(found, reference(*exact, form, split))
    upstream = normal(*x.shape, dtype=x.dtype, seed=7)
    expected = gradients(upstream.double(), *exact, form, split)
    for value, right, like in zip(grouped.backward(upstream, x, a, b, form, split), expected, (x, a, b), strict=True):
        assert value.dtype == like.dtype
        check(value, right)


@pytest.mark.parametrize(("form", "split"), SOME)
@pytest.mark.parametrize(("shape", "first", "second", "m", "n"), SIZES)
def test_forms_and_sizes(
    shape: tuple[int, ...], first: int, second: int, m: int, n: int, form: str, split: bool
) -> None:
    check_all(normal(*shape), normal(first, m + 1), normal(second, n), form, split)


@pytest.mark.parametrize(("form", "split"), SOME)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits(dtype: torch.dtype, form: str, split: bool) -> None:
    check_all(normal(3, 5, 27, dtype=dtype), normal(1, 6), normal(3, 4), form, split)


def test_coefficients_of_another_type() -> None:
    x, a, b = normal(4, 6, dtype=torch.bfloat16), normal(2, 3, dtype=torch.float64), normal(2, 2).bfloat16()
    check(grouped.forward(x, a, b), reference(x.double(), a.float().double(), b.double()))
    found = grouped.backward(normal(4, 6).bfloat16(), x, a, b)
    assert [value.dtype for value in found] == [torch.bfloat16, torch.float64, torch.bfloat16]


@pytest.mark.parametrize(("form", "split"), VARIANTS)
def test_equations_written_out(form: str, split: bool) -> None:
    # Independent of Horner's scheme and of the closed form of the gradients.
    x, a, b = (t.double().requires_grad_() for t in (normal(11, 12), normal(3, 6), normal(3, 4)))
    columns = []
    for channel in range(12):
        t = x[:, channel].abs() if split else x[:, channel]
        group = channel // 4
        p = sum(a[group, i] * t**i for i in range(6))
        if form == "sum_abs":
            q = 1 + sum(b[group, i - 1].abs() * t.abs() ** i for i in range(1, 5))
        else:
            q = 1 + sum(b[group, i - 1] * t**i for i in range(1, 5)).abs()
        columns.append(x[:, channel].clamp(min=0) - p / q if split else p / q)
    y = torch.stack(columns, 1)
    upstream = normal(11, 12, seed=3)
    right = torch.autograd.grad(y, (x, a, b), upstream.double())
    given = [t.detach().float() for t in (x, a, b)]
    check(grouped.forward(*given, form, split), y.detach())
    for value, expected in zip(grouped.backward(upstream, *given, form, split), right, strict=True):
        check(value, expected)


@pytest.mark.parametrize(("form", "split"), VARIANTS)
def test_kinks(form: str, split: bool) -> None:
    # At 0, at a zero of the denominator's polynomial (1 - x), and where the argument of a split function stops.
    far = torch.tensor(FARTHEST)
    ends = [far, -far, torch.nextafter(far, 2 * far), -torch.nextafter(far, 2 * far)]
    x = torch.stack([torch.tensor(v) for v in (0.0, -0.0, 1.0, -1.0, 1e-40)] + (ends if split else [])).to(DEVICE)
    for b in ([1.0, -1.0], [-1.0, 1.0], [0.0, 0.5]):
        a, denominator = torch.tensor([[0.5, 1.0]], device=DEVICE), torch.tensor([b], device=DEVICE)
        ones = torch.ones_like(x)[None]
        found = grouped.backward(ones, x[None], a, denominator, form, split)
        right = gradients(ones.double(), x[None].double(), a.double(), denominator.double(), form, split)
        torch.testing.assert_close(found[0].double(), right[0], atol=1e-6, rtol=1e-6)  # fp32
        for value, expected in zip(found[1:], right[1:], strict=True):
            check(value, expected)


@pytest.mark.parametrize(("form", "split"), SOME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=SLOW)], ids=str)
def test_special_values(dtype: torch.dtype, form: str, split: bool) -> None:
    # One in each of the first groups; the last group has none, and stays clean.
    x = normal(3, 20, dtype=dtype)
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        x[1, 4 * i + 1] = value
    if split:
        x[2, 13], x[2, 14] = torch.finfo(dtype).max, torch.finfo(dtype).min
    # Degrees with a limit far out.
    check_all(x, normal(5, 5).abs(), normal(5, 6).abs(), form, split)
    found = grouped.backward(torch.ones_like(x), x, normal(5, 5), normal(5, 6), form, split)
    assert all(bool(value[-1].isfinite().all()) for value in found[1:])


@pytest.mark.parametrize("split", [False, True])
def test_nan_in_the_gradient(split: bool) -> None:
    x, upstream = normal(2, 8), normal(2, 8, seed=1)
    upstream[0, 1], upstream[1, 6] = torch.nan, torch.inf
    x[0, 1] = -2 * FARTHEST
    a, b = normal(2, 3), normal(2, 2)
    expected = gradients(upstream.double(), *(t.double() for t in (x, a, b)), "sum_abs", split)
    for value, right in zip(grouped.backward(upstream, x, a, b, "sum_abs", split), expected, strict=True):
        assert torch.equal(value.isfinite(), right.isfinite())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gelu_split_off_stays_right_far_out(dtype: torch.dtype) -> None:
    # relu(x) - r(|x|) with r of a higher degree below: exactly relu in the tails, where x^7 would overflow.
    a, b = (
        torch.tensor([[0.0, 0.5, -0.2]], device=DEVICE),
        torch.tensor([[0.1, 0.2, 0.0, 0.0, 0.0, 0.3]], device=DEVICE),
    )
    x = torch.tensor([[1e30, -1e30, 3e38, -3e38, 1e4, -1e4]], device=DEVICE).to(dtype)
    found = grouped.forward(x, a, b, "sum_abs", True)
    torch.testing.assert_close(found, x.relu(), atol=1e-10, rtol=0)
    dx, *_ = grouped.backward(torch.ones_like(x), x, a, b, "sum_abs", True)
    assert dx.tolist() == [[1, 0] * 3]


@pytest.mark.parametrize("number", [0, -1])
def test_many_programs_add_up(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "_FEWEST", 16)
    for kernel in (group_rational_kernel, group_rational_gradient_kernel):
        monkeypatch.setattr(kernel, "configs", [kernel.configs[number]])
    x = normal(70, 24)
    assert grouped._ranges(x, 2).parts == 5
    check_all(x, normal(2, 4), normal(1, 3), "abs_sum", False)


def test_ranges_cover_all_rows_and_tiles_waste_little() -> None:
    for rows, channels, groups in ((1, 1, 1), (1, 3072, 8), (201728, 3072, 8), (1000, 4096, 4096), (17, 300, 3)):
        found = grouped._ranges(torch.empty(rows, channels, device="meta"), groups)
        assert (found.parts - 1) * found.length < rows <= found.parts * found.length
    assert [grouped._span(width) for width in (384, 96, 48, 24, 300, 3, 3072)] == [128, 32, 16, 32, 64, 16, 128]


@pytest.mark.parametrize("layout", ["slice", "transposed", "expanded"])
def test_strides(layout: str) -> None:
    x = {
        "slice": normal(5, 40)[:, 4:28],
        "transposed": normal(3, 24, 5).transpose(1, 2),
        "expanded": normal(1, 24).expand(5, 24),
    }[layout]
    a, b = normal(1, 4), normal(3, 2)
    check_all(x, a, b, "abs_sum", False)
    assert grouped.forward(x, a, b).stride() == torch.empty_like(x).stride()
    ones = normal(1).expand(x.shape)  # what a sum's gradient looks like
    expected = gradients(ones.double(), x.double(), a.double(), b.double())
    for value, right in zip(grouped.backward(ones, x, a, b), expected, strict=True):
        check(value, right)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that ran."""
    enable(DEVICE)
    names: list[str] = []
    start = Kernel.__call__

    def counting(self: Kernel, *args: object, **kwargs: object) -> None:
        names.append(self.name)
        start(self, *args, **kwargs)

    monkeypatch.setattr(Kernel, "__call__", counting)
    return names


def differentiated(op: Any, inputs: list[torch.Tensor], *options: Any) -> list[torch.Tensor]:
    """The result, and the gradients of all inputs through a function that is no sum."""
    given = [t.detach().clone().requires_grad_() for t in inputs]
    y = op(*given, *options)
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), given)]


@pytest.mark.parametrize(("form", "split"), SOME)
def test_operators_take_the_kernels(form: str, split: bool, started: list[str]) -> None:
    a, b = normal(1, 4), normal(2, 3)
    inputs = [normal(5, 8), a, b]
    found = differentiated(group_rational, inputs, form, split)
    assert started == ["_group_rational_kernel", "_group_rational_gradient_kernel"]
    for value, right in zip(found, differentiated(reference, [t.double() for t in inputs], form, split), strict=True):
        check(value, right)
    started.clear()
    inputs = [normal(5, 6), normal(8, 6), normal(8), a, b]
    found = differentiated(linear_rational, inputs, form, split)
    assert started == ["_linear_rational_kernel", "_group_rational_gradient_kernel"]
    exact = differentiated(linear_reference, [t.double() for t in inputs], form, split)
    for value, right in zip(found, exact, strict=True):
        check(value, right, PRODUCT)


def test_no_bias_and_defaults(started: list[str]) -> None:
    x, w, a, b = normal(5, 6).requires_grad_(), normal(8, 6), normal(1, 4), normal(2, 3)
    linear_rational(x, w, None, a, b).sum().backward()
    assert started == ["_linear_rational_kernel", "_group_rational_gradient_kernel"]
    exact = x.detach().double().requires_grad_()
    linear_reference(exact, w.double(), None, a.double(), b.double()).sum().backward()
    check(x.grad, exact.grad, PRODUCT)


def test_gradients_can_be_differentiated(started: list[str]) -> None:
    inputs = [normal(5, 6), normal(8, 6), normal(8), normal(1, 4), normal(2, 3)]

    def penalty(op: Any, given: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        given = [t.detach().clone().requires_grad_() for t in given]
        (dx,) = torch.autograd.grad(op(*given).sin().sum(), given[0], create_graph=True)
        return torch.autograd.grad(dx.square().sum(), given)

    found, right = penalty(linear_rational, inputs), penalty(linear_reference, [t.double() for t in inputs])
    for value, expected in zip(found, right, strict=True):
        check(value, expected, 10 * PRODUCT)  # second derivatives of a function with high powers
    one, other = inputs[3:]
    x = normal(5, 8)
    found, right = (penalty(op, given) for op, given in (
        (group_rational, [x, one, other]), (reference, [x.double(), one.double(), other.double()])
    ))  # fmt: skip
    for value, expected in zip(found, right, strict=True):
        check(value, expected, PRODUCT)


def test_other_types_and_sizes_take_the_references(started: list[str]) -> None:
    a, b, w = normal(2, 4), normal(2, 3), normal(4, 6)
    assert group_rational(normal(5, 4).double(), a, b).dtype == torch.float64
    assert group_rational(normal(5, 4), normal(1, 9), b).shape == (5, 4)
    assert linear_rational(normal(5, 6).double(), w.double(), None, a, b).dtype == torch.float64
    empty = torch.zeros(0, 4, device=DEVICE, requires_grad=True)
    for option in FORMS:
        y = group_rational(empty, a.requires_grad_(), b, option)
        assert y.shape == (0, 4)
        y.sum().backward()
    assert torch.equal(a.grad, torch.zeros_like(a))
    assert linear_rational(normal(5, 6)[:0], w, None, a.detach(), b).shape == (0, 4)
    assert started == []
    with pytest.raises(ValueError, match="expected form to be one of"):
        group_rational(normal(5, 4), a.detach(), b, "safe")
    with pytest.raises(ValueError, match="as many groups"):
        group_rational(normal(5, 6), normal(2, 4), normal(3, 3))


def test_refusals() -> None:
    a, b = normal(1, 4), normal(1, 3)
    for call in (
        lambda: grouped.forward(normal(2, 3).double(), a, b),
        lambda: grouped.forward(normal(2, 3), a, b, "safe"),
        lambda: grouped.forward(normal(2, 3), normal(2, 4), b),
        lambda: grouped.backward(normal(2, 3), normal(2, 3), normal(1, 9), b),
    ):
        with pytest.raises(GraphOptError, match="the torch implementation takes others"):
            call()
    w = normal(4, 6)
    for inputs in (
        (normal(2, 5), w, None),
        (normal(2, 6), w.bfloat16(), None),
        (normal(2, 6), w, normal(5)),
        (normal(0, 6), w, None),
        (normal(2, 6).double(), w.double(), None),
    ):
        assert not linear.supported(*inputs, a, b)
        with pytest.raises(GraphOptError, match="the torch implementation takes others"):
            linear.forward(*inputs, a, b)


# Leading dimensions and K of x, C, groups of numerators and denominators, degrees, stored as [K, C], a bias.
PRODUCTS: list[Any] = [
    ((3, 5), 20, 24, 1, 8, 5, 4, False, True),
    ((130,), 70, 33, 3, 3, 3, 2, True, True),
    ((), 129, 30, 3, 1, 4, 6, True, False),
    pytest.param((1,), 1, 1, 1, 1, 0, 0, False, False, marks=SLOW),
    pytest.param((2, 70), 64, 256, 2, 2, 5, 4, False, True, marks=SLOW),
]


def product(lead: tuple[int, ...], K: int, C: int, first: int, second: int, m: int, n: int, stored: bool, bias: bool,
            dtype: torch.dtype = torch.float32) -> list[Any]:  # fmt: skip
    w = (normal(C, K) / K**0.5).to(dtype)
    if stored:
        w = w.t().contiguous().t()
    offset = normal(C, dtype=dtype, seed=1) if bias else None
    # A denominator without steep turns, which would multiply the rounding of z.
    return [normal(*lead, K, dtype=dtype), w, offset, normal(first, m + 1), 0.2 * normal(second, n)]


def exact_product(inputs: list[Any], upstream: torch.Tensor, form: str, split: bool) -> tuple[torch.Tensor, ...]:
    """The result and the gradients, in fp64."""
    exact = [None if t is None else t.double().requires_grad_() for t in inputs]
    y = linear_reference(*exact, form, split)
    wanted = [t for t in exact if t is not None]
    return y.detach(), *torch.autograd.grad(y, wanted, upstream.double(), allow_unused=True)


@pytest.mark.parametrize(("form", "split"), SOME)
@pytest.mark.parametrize(("lead", "K", "C", "first", "second", "m", "n", "stored", "bias"), PRODUCTS)
def test_linear(
    lead: tuple[int, ...], K: int, C: int, first: int, second: int, m: int, n: int, stored: bool, bias: bool,
    form: str, split: bool,
) -> None:  # fmt: skip
    inputs = product(lead, K, C, first, second, m, n, stored, bias)
    upstream = normal(*lead, C, seed=5)
    y, *right = exact_product(inputs, upstream, form, split)
    check(linear.forward(*inputs, form, split), y, PRODUCT)
    found = [t for t in linear.backward(upstream, *inputs, form, split) if t is not None]
    for value, expected in zip(found, right, strict=True):
        check(value, torch.zeros_like(value).double() if expected is None else expected, PRODUCT)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_linear_16_bits(dtype: torch.dtype, split: bool) -> None:
    inputs = product((3, 7), 20, 24, 1, 8, 5, 4, False, True, dtype)
    upstream = normal(3, 7, 24, dtype=dtype, seed=5)
    y, *_ = exact_product(inputs, upstream, "sum_abs", split)
    check(linear.forward(*inputs, "sum_abs", split), y)
    # The gradient starts from z as 16 bits hold it.
    x, w, bias, a, b = inputs
    z = (x.double() @ w.double().t() + bias.double()).to(dtype)
    dz, *coefficients = gradients(upstream.double(), z.double(), a.double(), b.double(), "sum_abs", split)
    right = dz @ w.double(), dz.flatten(0, 1).t() @ x.double().flatten(0, 1), dz.sum((0, 1)), *coefficients
    for value, expected in zip(linear.backward(upstream, *inputs, "sum_abs", split), right, strict=True):
        assert value is not None
        check(value, expected, 2 * LIMITS[dtype])  # dz is rounded, and so is what it is multiplied to


# Groups of 96 and of 100 channels: a tile, its quarter, or neither lies within one group; and two bands of rows.
TILES: list[Any] = [
    (0, 36, 3, 139),
    (6, 288, 3, 130),
    (6, 300, 3, 130),
    (7, 288, 3, 70),
    *(pytest.param(number, C, 3, 130, marks=SLOW) for number in range(1, 8) for C in (288, 300)),
    pytest.param(2, 600, 6, 9 * 64 - 5, marks=SLOW),
]


@pytest.mark.parametrize(("number", "C", "G", "rows"), TILES)
def test_linear_with_all_tiles(number: int, C: int, G: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_rational_kernel, "configs", [linear_rational_kernel.configs[number]])
    x, w, bias, a, b = product((rows,), 40, C, 1, G, 2, 2, False, True, torch.bfloat16)
    check(linear.forward(x, w, bias, a, b), linear_reference(*(t.double() for t in (x, w, bias, a, b))))


def test_linear_of_strided_inputs() -> None:
    a, b = normal(1, 3), normal(3, 2)
    x, w = normal(4, 5, 40)[..., 3:23], normal(24, 60)[:, ::3]
    upstream = normal(1).expand(4, 5, 24)
    y, *right = exact_product([x, w, None, a, b], upstream, "abs_sum", False)
    check(linear.forward(x, w, None, a, b), y, PRODUCT)
    found = [t for t in linear.backward(upstream, x, w, None, a, b) if t is not None]
    for value, expected in zip(found, right, strict=True):
        check(value, expected, PRODUCT)
