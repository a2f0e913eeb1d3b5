"""Distances in units in the last place, against the neighbours that math and numpy name."""

import math

import numpy as np
import pytest
import torch

from graphopt.errors import GraphOptError
from graphopt.verification.numbers import ulps

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("value", [1.5, -3.25, 0.1328125, 1024.0])
def test_steps_to_the_next_number(dtype, value):
    x = torch.tensor([value, value], dtype=dtype)
    found = x.clone()
    for _ in range(3):
        found[1] = torch.nextafter(found[1], torch.tensor(math.copysign(math.inf, value), dtype=dtype))
    assert ulps(x.double(), found) == 3
    assert ulps(x, x) == 0


def test_the_unit_is_that_of_numpy_and_math():
    rng = np.random.default_rng(0)
    x = rng.standard_normal(1000) * 10.0 ** rng.integers(-30, 30, 1000)
    off = x * (1 + 1e-6 * rng.standard_normal(1000))
    single = off.astype(np.float32)
    expected = (np.abs(x - single.astype(np.float64)) / np.spacing(np.abs(x).astype(np.float32))).max()
    # np.spacing is that of the rounded value, which may have passed a power of two; no value of this seed has.
    assert ulps(torch.from_numpy(x), torch.from_numpy(single)) == pytest.approx(expected, rel=1e-12)
    expected = max(abs(a - b) / math.ulp(a) for a, b in zip(x, off, strict=True))
    assert ulps(torch.from_numpy(x), torch.from_numpy(off)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
def test_rounding_once_is_half_a_unit_at_most(dtype):
    # Numbers of fp32: torch rounds fp64 to 16 bits by way of fp32, which is twice.
    x = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 4
    assert 0.45 < ulps(x, x.to(dtype)) <= 0.5


def test_at_a_power_of_two_the_unit_is_the_one_above():
    below = torch.nextafter(torch.ones(1), torch.zeros(1))
    assert ulps(torch.ones(1), below) == 0.5
    assert ulps(below, torch.ones(1)) == 1


def test_small_numbers_count_in_the_units_of_the_floor():
    smallest = 2.0**-149
    x = torch.tensor([0.0, smallest, 2.0**-130])
    assert ulps(x.double(), x + 3 * smallest) == 3
    tiny = torch.tensor([1e-35])
    assert ulps(tiny.double(), torch.zeros(1)) > 1e6
    # 2^-100 has a unit of 2^-123: 9.4e-38.
    assert ulps(tiny.double(), torch.zeros(1), floor=2.0**-100) == pytest.approx(float(tiny) * 2.0**123)
    # A floor below the normal numbers is none.
    assert ulps(x.double(), x + 3 * smallest, floor=1e-320) == 3


def test_what_is_not_finite():
    x = torch.tensor([1.0, math.inf, -math.inf, math.nan])
    assert ulps(x.double(), x) == 0
    for other in ([1.0, 3.0, -math.inf, math.nan], [math.nan, math.inf, -math.inf, math.nan], [1.0, math.inf, 0, 0.0]):
        assert ulps(x.double(), torch.tensor(other)) == math.inf
    assert ulps(torch.tensor([math.inf]), torch.tensor([-math.inf])) == math.inf
    assert ulps(torch.ones(2), torch.ones(3)) == math.inf
    assert ulps(torch.empty(0, 3), torch.empty(0, 3)) == 0


def test_integers_have_no_last_place():
    with pytest.raises(GraphOptError, match=r"expected floating-point values to count ulps of, found torch\.int64"):
        ulps(torch.ones(2), torch.ones(2, dtype=torch.int64))
