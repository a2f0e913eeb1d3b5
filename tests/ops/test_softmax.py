"""The three forms of softmax against fp64: any axis, any length, masks, extreme scales, and their shared gradient."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.ops import online_softmax, two_pass_softmax, unified_max_softmax
from graphopt.ops.online_softmax import BLOCK
from graphopt.ops.online_softmax import reference as online_reference
from graphopt.ops.two_pass_softmax import pairs, total
from graphopt.ops.two_pass_softmax import reference as two_pass_reference
from graphopt.ops.unified_max_softmax import reference as unified_max_reference

OPERATORS = [two_pass_softmax, online_softmax, unified_max_softmax]
REFERENCES = [two_pass_reference, online_reference, unified_max_reference]
IDS = [f"{form} {kind}" for kind in ("reference", "operator") for form in ("two-pass", "online", "unified")]
LOWEST = torch.finfo(torch.float32).min
INF, NAN = math.inf, math.nan

# fp32: entry by entry at most 1.5 units of the largest, for the sum, the exponential and the product.
FP32 = 4 * 2.0**-24


def by_hand(row):
    """Softmax of one row in fp64, entry by entry: the defined value where there is nothing to weigh or no value."""
    if any(math.isnan(v) or v == INF for v in row):
        return [NAN] * len(row)
    top = max(row)
    if top == -INF:
        return [0.0] * len(row)
    weights = [math.exp(v - top) for v in row]
    return [w / math.fsum(weights) for w in weights]


def in_units(found, right, of):
    """The largest error in units in the last place of the numbers `of`, in fp32."""
    return (np.abs(found.numpy() - right) / np.spacing(of.astype(np.float32))).max()


def batches_of_rows():
    """A million rows of 1 to 64 entries [R, N], one length at a time: extreme scales, masks, rows of -inf alone."""
    generator = torch.Generator().manual_seed(0)
    for length in (1, 2, 3, 5, 8, 13, 21, 64):
        x = torch.randn(125_000, length, generator=generator)
        x *= 10 ** (torch.rand(125_000, 1, generator=generator) * 35 - 30)  # 1e-30 .. 1e5
        x[:20_000] += torch.randn(20_000, 1, generator=generator) * 1e4
        for part, mask in ((slice(0, 10_000), -INF), (slice(30_000, 40_000), LOWEST), (slice(50_000, 60_000), -1e30)):
            x[part].masked_fill_(torch.rand(10_000, length, generator=generator) < 0.5, mask)
        x[-1000:] = -INF
        yield x


def test_as_accurate_as_torch_on_a_million_rows():
    functions = [torch.softmax, *REFERENCES, *OPERATORS]
    of_row, of_entry = (dict.fromkeys(functions, 0.0) for _ in range(2))
    for x in batches_of_rows():
        # torch has no value for rows of -inf alone: they are zeros.
        right = x.double().softmax(-1).nan_to_num(0).numpy()
        # Errors of each entry against the largest of its row, and against itself, if it is no smaller than 2^-100.
        largest, itself = right.max(-1, keepdims=True), np.maximum(right, 2.0**-100)
        for f in functions:
            found = f(x, -1).nan_to_num(0) if f is torch.softmax else f(x, -1)
            of_row[f] = max(of_row[f], in_units(found, right, largest))
            of_entry[f] = max(of_entry[f], in_units(found, right, itself))
    assert max(of_row.values()) <= of_row[torch.softmax] + 1
    # x - max is rounded, n ln 2 is not: far below the maximum torch loses digits that two passes keep.
    assert max(of_entry[two_pass_reference], of_entry[two_pass_softmax]) < 6 < of_entry[torch.softmax]


# Zeros of both signs, subnormal numbers, numbers at the ends of the range, masks, and what is no number.
ENTRIES = st.one_of(
    st.floats(width=32),
    st.floats(-100, 100, width=32),
    st.sampled_from([0.0, -0.0, 1e-40, LOWEST, -LOWEST, -1e30, 1e30, 1e5, -1e5, -INF]),
)


@pytest.mark.parametrize("function", [*REFERENCES, *OPERATORS], ids=IDS)
@given(row=st.lists(ENTRIES, min_size=1, max_size=40))
def test_any_row(function, row):
    x = torch.tensor(row, dtype=torch.float32)
    right = torch.tensor(by_hand(x.tolist()), dtype=torch.float64)
    # Relative: x - max is rounded by half a unit of at most 104, below which e^x is 0 (2^-18 each).
    torch.testing.assert_close(function(x).double(), right, rtol=2.0**-17, atol=FP32 / 4, equal_nan=True)


@pytest.mark.parametrize("op", OPERATORS, ids=IDS[3:])
@given(
    row=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40),
    data=st.data(),
)
def test_masked_entries_weigh_nothing_and_order_is_kept(op, row, data):
    x = torch.tensor(row)
    mask = data.draw(st.sampled_from([-INF, LOWEST, -1e30]))
    places = sorted(data.draw(st.sets(st.integers(0, len(row)), max_size=5)), reverse=True)
    longer = list(row)
    for place in places:
        longer.insert(place, mask)
    hidden = torch.tensor(longer) == mask
    y = op(torch.tensor(longer))
    assert (y[hidden] == 0).all()
    torch.testing.assert_close(y[~hidden], op(x), rtol=2 * FP32, atol=0)  # both are off by that much
    assert abs(y.double().sum() - 1) < 1e-5
    assert (torch.diff(y[~hidden][x.argsort()]) >= 0).all()


@pytest.mark.parametrize("function", [*REFERENCES, *OPERATORS], ids=IDS)
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([-INF, -INF], [0, 0]),
        ([LOWEST, LOWEST], [0.5, 0.5]),
        ([-1e30, -1e30, -2e30], [0.5, 0.5, 0]),
        ([3e38, 3e38, -3e38], [0.5, 0.5, 0]),
        ([1e5, 1e5, -1e5], [0.5, 0.5, 0]),
        ([NAN, 0, -INF], [NAN, NAN, NAN]),
        ([-NAN, -INF, -INF], [NAN, NAN, NAN]),
        ([INF, 0, NAN], [NAN, NAN, NAN]),
        ([INF, -INF], [NAN, NAN]),
        ([7], [1]),
    ],
)
def test_rows_with_a_defined_value(function, row, expected):
    found = function(torch.tensor(row, dtype=torch.float32))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=2e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", OPERATORS, ids=IDS[3:])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((), -1), ((), 0), ((5,), 0), ((3, 4, 5), 1), ((3, 4, 5), -3), ((2, 3, 0), 1), ((2, 0, 3), 1), ((0, 7), -1)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_axes_types_and_empty_tensors(op, shape, dim, dtype):
    x = (torch.randn(shape, dtype=torch.float64) * 4).to(dtype)
    y = op(x, dim)
    assert y.dtype == dtype
    assert y.shape == x.shape
    # Narrow types are rounded once from a result in fp32; torch sums fp64 in another order.
    right = x.double().softmax(dim)
    rtol = {torch.float64: 1e-14, torch.float32: 3e-6}.get(dtype, torch.finfo(dtype).eps * 0.505)
    torch.testing.assert_close(y.double(), right, rtol=rtol, atol=torch.finfo(dtype).smallest_normal)


@pytest.mark.parametrize("op", OPERATORS, ids=IDS[3:])
def test_a_transposed_tensor(op):
    x = torch.randn(6, 5, 4, dtype=torch.float64).transpose(0, 2)
    torch.testing.assert_close(op(x, 1), x.softmax(1), rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("op", OPERATORS, ids=IDS[3:])
@pytest.mark.parametrize("dim", [0, -1])
def test_gradients(op, dim):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: op(x, dim), x)
    assert torch.autograd.gradgradcheck(lambda x: op(x, dim), x)


@pytest.mark.parametrize("op", OPERATORS, ids=IDS[3:])
def test_a_row_without_visible_entries_has_no_gradient(op):
    x = torch.tensor([[-INF, -INF], [0.5, -INF]], requires_grad=True)
    (found,) = torch.autograd.grad(op(x), x, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert found.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("op", OPERATORS, ids=IDS[3:])
def test_library_registration(op):
    name = op._qualname.removeprefix("graphopt::")
    x = torch.randn(2, 3, 4, requires_grad=True)
    torch.library.opcheck(getattr(torch.ops.graphopt, name).default, (x, 1))


@pytest.mark.parametrize("op", OPERATORS, ids=IDS[3:])
def test_only_floats(op):
    with pytest.raises(ValueError, match="expected a tensor of floats"):
        op(torch.arange(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_are_the_exponential(dtype):
    """e^x = m 2^n, from numpy in the widest type that it has."""
    x = torch.linspace(-80, 80, 100_001, dtype=dtype)
    m, n = pairs(x)
    found = np.ldexp(m.numpy().astype(np.longdouble), n.numpy().astype(int))
    right = np.exp(x.numpy().astype(np.longdouble))
    assert np.abs(found / right - 1).max() < torch.finfo(dtype).eps
    assert m.min() > 0.7
    assert m.max() < 1.42


def test_pairs_add_up_across_thousands_of_exponents():
    mantissas = torch.tensor([1.0, 1.25, 1.0, 0.75, 1.0])
    exponents = torch.tensor([3000.0, 3002.0, -40.0, 3001.0, -3000.0])
    m, e = total(mantissas, exponents)
    assert m * 4 == 1 + 5 + 1.5
    assert e == 3002


@pytest.mark.parametrize("length", [BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3])
def test_online_over_blocks_with_a_growing_maximum(length):
    x = torch.linspace(-500, 500, length, dtype=torch.float64)
    for row in (x, x.flip(0), torch.where(x < 100, -INF, x)):
        torch.testing.assert_close(online_reference(row), row.softmax(-1), rtol=1e-13, atol=0)


@pytest.mark.parametrize("phi", [-1000.0, -61.0, -59.0, 0.0, 59.0, 61.0, 1000.0])
def test_no_constant_is_wrong(phi):
    x = torch.randn(50, 20, dtype=torch.float64) * 3
    x[0] += phi  # one row that fits among those that do not
    torch.testing.assert_close(unified_max_softmax(x, -1, phi), x.softmax(-1), rtol=1e-13, atol=1e-30)
    found = unified_max_softmax(x.float(), -1, phi)
    torch.testing.assert_close(found.double(), x.float().double().softmax(-1), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(("low", "high"), [(1.0, -1.0), (-61.0, 0.0), (0.0, 61.0), (NAN, 0.0)])
def test_bounds_that_fp32_cannot_keep(low, high):
    with pytest.raises(ValueError, match="expected -60 <= low < high <= 60"):
        unified_max_softmax(torch.ones(3), -1, 0.0, low, high)
