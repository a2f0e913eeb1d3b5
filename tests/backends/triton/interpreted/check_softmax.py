"""The softmax kernels against torch's softmax in fp64; run by ../test_kernels.py."""

import pytest
import torch

from graphopt.backends.triton import enable, softmax
from graphopt.backends.triton.launch import Kernel
from graphopt.backends.triton.softmax import FORMS, forward, gradient
from graphopt.backends.triton.softmax_split import softmax_parts_kernel, softmax_write_kernel
from graphopt.errors import GraphOptError
from graphopt.ops import online_softmax, two_pass_softmax, unified_max_softmax

torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATORS = {"two_pass": two_pass_softmax, "online": online_softmax, "unified": unified_max_softmax}
# Largest error over the largest value: fp32 rounds by 6e-8 at most, and an exponential, a sum and a product add a few
# of those; the 16-bit types round the result alone, by 4.9e-4 and 3.9e-3 at most.
LIMITS = {torch.float32: 5e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}
MINIMUM = torch.finfo(torch.float32).min


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that ran."""
    names: list[str] = []
    start = Kernel.__call__

    def counting(self: Kernel, *args: object, **kwargs: object) -> None:
        names.append(self.name)
        start(self, *args, **kwargs)

    monkeypatch.setattr(Kernel, "__call__", counting)
    return names


def normal(*shape: int, dtype: torch.dtype = torch.float32, spread: float = 5.0) -> torch.Tensor:
    make = torch.Generator().manual_seed(sum(shape))
    return (spread * torch.randn(*shape, generator=make)).to(DEVICE, dtype)


def expected(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """fp64; rows of -inf alone are 0, rows with NaN or +inf are NaN."""
    y = torch.softmax(x.double(), dim)
    return torch.where((x == -torch.inf).all(dim, keepdim=True), 0.0, y)


def check(found: torch.Tensor, right: torch.Tensor) -> None:
    assert torch.equal(found.isnan(), right.isnan())
    apart = (found.double() - right).nan_to_num().abs().max() / right.nan_to_num().abs().max().clamp(min=1e-30)
    assert float(apart) < LIMITS[found.dtype]


@pytest.mark.parametrize("split", [False, True], ids=["on chip", "split"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("shape", [(3, 1), (5, 7), (2, 5000)], ids=str)
def test_rows(shape: tuple[int, int], dtype: torch.dtype, form: str, split: bool) -> None:
    x = normal(*shape, dtype=dtype)
    found = forward(x, form=form, split=split)
    assert (found.shape, found.dtype) == (x.shape, dtype)
    check(found, expected(x))


@pytest.mark.parametrize("split", [False, True], ids=["on chip", "split"])
@pytest.mark.parametrize("dim", [0, 1, -2, -1])
def test_axes_and_strides(dim: int, split: bool) -> None:
    x = normal(3, 2, 4).transpose(1, 2)
    found = forward(x, dim, split=split)
    assert found.is_contiguous()
    check(found, expected(x, dim))
    wide = normal(3, 40)[:, 4:30]
    check(forward(wide, split=split), expected(wide))


@pytest.mark.parametrize("split", [False, True], ids=["on chip", "split"])
@pytest.mark.parametrize("form", FORMS)
def test_special_values(form: str, split: bool) -> None:
    N = 2500
    x = normal(8, N)
    x[0] = -torch.inf
    x[1, : N - 1] = -torch.inf  # whole parts hide
    x[2, 3] = torch.nan
    x[3, N - 1] = torch.inf
    x[4] = MINIMUM
    x[5, :2000] = MINIMUM
    x[6] = -1e30
    x[6, 7] = 0
    x[7, 2000:] = -1e30
    found = forward(x, form=form, split=split)
    check(found, expected(x))
    assert torch.equal(found[0], torch.zeros_like(found[0]))
    assert found[2].isnan().all()
    assert found[3].isnan().all()
    assert float(found[1, -1]) == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("level", [1e3, -1e3, 1e5, -1e5, 3e7, 2.0**30, -(2.0**30), 1e30, -1e30, 1.7e38, MINIMUM / 2])
def test_levels_far_beyond_the_range_of_exponentials(level: float, form: str) -> None:
    # At 1e5 neighbours are 0.008 apart, at 3e7 2, at 2^30 128: the kernel gets what is left of x, and so does the right
    # side. Entries of finfo.min are masked beside any of them.
    x = normal(2, 1500, spread=1.0) + level
    x[1, :200] = MINIMUM
    check(forward(x, form=form, split=True), expected(x))


def test_pairs_of_any_two_neighbours() -> None:
    # Around 2^30 the exponents change from log4(e) x to x: what is above must stay above.
    steps = torch.arange(-4, 5, device=DEVICE, dtype=torch.int32)
    near = (torch.tensor(2.0**30, device=DEVICE).view(torch.int32) + steps).view(torch.float32)
    for x in (near, -near):
        check(forward(x[None], form="two_pass", split=True), expected(x[None]))
        pairs = torch.stack([x[:-1], x[1:]], -1)
        check(forward(pairs, form="two_pass", split=True), expected(pairs))


@pytest.mark.parametrize("phi", [-200.0, -59.0, 3.0, 59.0, 200.0])
@pytest.mark.parametrize("bounds", [(-60.0, 60.0), (-1.0, 1.0), (-30.0, 60.0)])
def test_unified_is_right_whatever_the_constant(phi: float, bounds: tuple[float, float]) -> None:
    x = normal(4, 3000)
    x[0, 1024:2048] += 150  # one part above, the others in range
    x[1, 1024:] -= 150  # and one in range, the others below
    x[2] -= 300
    check(forward(x, -1, phi, *bounds, form="unified", split=True), expected(x))


def test_unified_refuses_bounds_that_fp32_does_not_hold() -> None:
    with pytest.raises(ValueError, match="low < high <= 60"):
        forward(normal(2, 4), -1, 0.0, -60.0, 90.0, form="unified")


@pytest.mark.parametrize("split", [False, True], ids=["on chip", "split"])
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("N", [1, 9, 3001])
def test_gradients(N: int, dtype: torch.dtype, split: bool) -> None:
    x, dy = normal(4, N, dtype=dtype), normal(4, N, dtype=dtype, spread=1.0).flip(0)
    x[0] = -torch.inf
    exact = x[1:].double().requires_grad_()
    y = torch.softmax(exact, -1)
    (right,) = torch.autograd.grad(y, exact, dy[1:].double())
    # The kernel is given the exact result, rounded once.
    given = torch.cat([torch.zeros_like(dy[:1]), y.detach().to(dtype)])
    found = gradient(dy, given, split=split)
    assert torch.equal(found[0], torch.zeros_like(found[0]))
    # Differences of numbers that the 16-bit types had rounded: against the largest term instead of the difference.
    largest = (y.detach() * dy[1:].double()).abs().max()
    assert float((found[1:].double() - right).abs().max() / largest) < 2 * LIMITS[dtype]


def test_gradient_of_another_axis() -> None:
    y, dy = expected(normal(3, 8, 4), 1), normal(3, 8, 4).double()
    right = y * (dy - (y * dy).sum(1, keepdim=True))
    found = gradient(dy.float(), y.float(), 1)
    torch.testing.assert_close(found.double(), right, atol=1e-6, rtol=1e-6)  # fp32 rounds three times


@pytest.mark.parametrize("form", FORMS)
def test_blocks_that_divide_no_part(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in (softmax_parts_kernel, softmax_write_kernel):
        monkeypatch.setattr(kernel, "configs", kernel.configs[:1])
    x = normal(2, 5001)
    check(forward(x, form=form, split=True), expected(x))


def test_what_splits(started: list[str]) -> None:
    forward(normal(2, 40000))
    assert started == ["_softmax_parts_kernel", "_softmax_write_kernel"]
    started.clear()
    forward(normal(2, 1000))
    assert started == ["_softmax_rows_kernel"]


def test_parts_cover_the_row() -> None:
    for count, N in ((1, 256000), (64, 256000), (1000, 40000), (1, 1024), (3, 1025)):
        length, parts = softmax._parts(count, N, torch.device("cpu"))
        assert (parts - 1) * length < N <= parts * length


@pytest.mark.parametrize("form", FORMS)
def test_operators_take_the_kernels(form: str, started: list[str]) -> None:
    enable(DEVICE)
    x = normal(3, 50).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, right = OPERATORS[form](x), torch.softmax(exact, -1)
    check(y.detach(), right.detach())
    assert started == ["_softmax_rows_kernel"]
    upstream = normal(3, 50, spread=1.0)
    y.backward(upstream)
    right.backward(upstream.double())
    torch.testing.assert_close(x.grad.double(), exact.grad, atol=1e-6, rtol=1e-5)  # fp32
    assert OPERATORS[form](x.detach().t(), 0).shape == (50, 3)


def test_other_types_and_shapes_take_the_references(started: list[str]) -> None:
    enable(DEVICE)
    for operator in OPERATORS.values():
        assert operator(normal(2, 5).double()).dtype == torch.float64
        assert operator(torch.zeros(3, 0, device=DEVICE)).shape == (3, 0)
        assert operator(torch.zeros((), device=DEVICE)).shape == ()
    assert started == []


def test_refusals() -> None:
    with pytest.raises(GraphOptError, match="expected form to be one of two_pass, online, unified, got 'safe'"):
        forward(normal(2, 3), form="safe")
    with pytest.raises(GraphOptError, match="expected an fp16, bf16 or fp32 tensor"):
        forward(normal(2, 3).double())
