"""Attention with a constant in place of the maximum, against torch's softmax in fp64; run by ../test_softmax.py."""

import math

import pytest
import torch

from graphopt.backends.triton.unified_attention import attend
from graphopt.errors import GraphOptError

torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# RMS(error) / RMS(value): fp32 rounds by 6e-8, which products over 256 features and 150 keys add up to some of; the
# 16-bit types round the weights, the result, and nothing else: 1.7e-3 each in bf16, an eighth of that in fp16.
LIMITS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def inputs(
    T: int, S: int, *, B: int = 1, H: int = 2, HKV: int = 1, D: int = 16, V: int = 16,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    make = torch.Generator().manual_seed(T + S + D)
    shapes = (B, H, T, D), (B, HKV, S, D), (B, HKV, S, V)
    q, k, v = (torch.randn(shape, generator=make).to(DEVICE, dtype) for shape in shapes)
    return q, k, v


def right(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = scale * q @ k.transpose(-1, -2)
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        scores = scores.masked_fill(~hidden, -torch.inf)
    return torch.where((scores == -torch.inf).all(-1, keepdim=True), 0.0, scores.softmax(-1)) @ v


def check(found: torch.Tensor, expected: torch.Tensor, further: float = 0.0) -> None:
    assert found.shape == expected.shape
    assert float((found.double() - expected).norm() / expected.norm()) < LIMITS[found.dtype] + further


SIZES = [
    {"T": 70, "S": 70},
    {"T": 130, "S": 130, "H": 1, "D": 32, "V": 48},  # two blocks of queries, three of keys
    {"T": 33, "S": 150, "B": 2, "H": 4, "HKV": 2, "D": 60, "V": 24},  # a cache, groups, odd dimensions
    {"T": 1, "S": 130, "D": 128, "V": 128},  # a step of decoding
    {"T": 20, "S": 7, "H": 1},  # queries that see nothing
    {"T": 40, "S": 40, "H": 1, "D": 256, "V": 256},
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(sizes: dict[str, int], causal: bool) -> None:
    q, k, v = inputs(**sizes)
    flagged = torch.full(q.shape[:3], -1, dtype=torch.int32, device=DEVICE)
    check(attend(q, k, v, causal=causal, flagged=flagged), right(q, k, v, causal, q.shape[-1] ** -0.5))
    assert not flagged.any()  # scores of a few units


@pytest.mark.parametrize("phi", [-300.0, -50.0, 4.0, 50.0, 300.0])
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
def test_right_whatever_the_constant(dtype: torch.dtype, phi: float) -> None:
    q, k, v = inputs(40, 70, H=1, dtype=dtype)
    flagged = torch.full(q.shape[:3], -1, dtype=torch.int32, device=DEVICE)
    # Within the bounds the exponent that is rounded to 24 bits is as large as phi.
    further = abs(phi) * 2.0**-24 if abs(phi) < 60 else 0.0
    check(attend(q, k, v, scale=0.3, phi=phi, flagged=flagged), right(q, k, v, True, 0.3), further)
    assert bool(flagged.all()) == (abs(phi) > 60 or (dtype == torch.float16 and abs(phi) > 10))
    assert bool(flagged.any()) == bool(flagged.all())


def test_flags_are_those_of_the_rows_outside() -> None:
    q, k, v = inputs(150, 150, H=1)
    q[:, :, 3] *= 200
    q[:, :, 140] = 0
    k[..., 0] += 4  # so that a row against this feature has low scores only
    q[:, :, 120] = -torch.eye(16, device=DEVICE)[0]
    scores = 0.5 * q.double() @ k.double().transpose(-1, -2)
    sums = scores.exp().tril().sum(-1)
    flagged = torch.empty(q.shape[:3], dtype=torch.int32, device=DEVICE)
    check(attend(q, k, v, scale=0.5, low=-1.0, high=9.0, flagged=flagged), right(q, k, v, True, 0.5))
    high, low = sums >= math.exp(9), sums <= torch.arange(1, 151, device=DEVICE) * math.exp(-1)
    assert torch.equal(flagged.bool(), high | low)
    assert bool(high[0, 0, 3])
    assert bool(low[0, 0, 120])
    assert float(sums[0, 0, 120]) > math.exp(-1)
    assert not bool(flagged[0, 0, 140])


def test_nan_stays_in_its_row() -> None:
    q, k, v = inputs(20, 20, H=1)
    q[0, 0, 5] = torch.nan
    found = attend(q, k, v)
    assert torch.equal(found.isnan().any(-1)[0, 0], torch.arange(20, device=DEVICE) == 5)


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
def test_strides_of_projections(dtype: torch.dtype) -> None:
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(20, 20, B=2, HKV=2, dtype=dtype))
    check(attend(q, k, v, causal=False), right(q, k, v, False, 0.25))


def test_refusals() -> None:
    q, k, v = inputs(4, 4)
    with pytest.raises(GraphOptError, match="expected fp16, bf16 or fp32"):
        attend(q.double(), k.double(), v.double())
    with pytest.raises(ValueError, match="low < high <= 60"):
        attend(q, k, v, low=0.0, high=0.0)
