"""Operators that draw random numbers.

With a `seed` attribute the numbers are those of numpy's `RandomState(seed)`, whose streams numpy has frozen: they are
the same in every run, and the same that the ONNX reference evaluator draws. Without one they come from torch's default
generator of the device, so `torch.manual_seed` makes a run repeatable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .dtypes import dtype_of
from .registry import operator


def uniform(shape: Sequence[int], seed: float | None, device: torch.device) -> Tensor:
    """Draw from [0, 1) in float64."""
    if seed is None or math.isnan(seed) or device.type == "meta":
        return torch.rand(list(shape), dtype=torch.float64, device=device)
    return torch.from_numpy(np.asarray(_stream(seed).random_sample(tuple(shape)))).to(device)


def _normal(shape: Sequence[int], seed: float | None, device: torch.device) -> Tensor:
    if seed is None or math.isnan(seed) or device.type == "meta":
        return torch.randn(list(shape), dtype=torch.float64, device=device)
    return torch.from_numpy(np.asarray(_stream(seed).standard_normal(tuple(shape)))).to(device)


def _stream(seed: float) -> np.random.RandomState:
    # RandomState takes 32 bits; a seed of its range stays as it is.
    return np.random.RandomState(int(seed) % 2**32)


def _place(like: object) -> torch.device:
    # A tensor of strings gives its shape, but lies on no device.
    return like.device if isinstance(like, Tensor) else torch.device("cpu")


def _type(like: Tensor, code: int | None) -> torch.dtype:
    return like.dtype if code is None else dtype_of(code)


@operator("RandomUniform")
def random_uniform_1(
    *, dtype: int = 1, high: float = 1.0, low: float = 0.0, seed: float | None = None, shape: list[int]
) -> Tensor:
    """Draw from [low, high)."""
    return uniform(shape, seed, torch.device("cpu")).to(dtype_of(dtype)) * (high - low) + low


@operator("RandomUniformLike")
def random_uniform_like_1(
    x: Tensor, *, dtype: int | None = None, high: float = 1.0, low: float = 0.0, seed: float | None = None
) -> Tensor:
    """Draw from [low, high) as many numbers as x has elements."""
    return uniform(x.shape, seed, _place(x)).to(_type(x, dtype)) * (high - low) + low


@operator("RandomNormal")
def random_normal_1(
    *, dtype: int = 1, mean: float = 0.0, scale: float = 1.0, seed: float | None = None, shape: list[int]
) -> Tensor:
    """Draw from the normal distribution with standard deviation `scale`."""
    return _normal(shape, seed, torch.device("cpu")).to(dtype_of(dtype)) * scale + mean


@operator("RandomNormalLike")
def random_normal_like_1(
    x: Tensor, *, dtype: int | None = None, mean: float = 0.0, scale: float = 1.0, seed: float | None = None
) -> Tensor:
    """Draw from the normal distribution as many numbers as x has elements."""
    return _normal(x.shape, seed, _place(x)).to(_type(x, dtype)) * scale + mean


@operator("Bernoulli", since=15)
def bernoulli_15(x: Tensor, *, dtype: int | None = None, seed: float | None = None) -> Tensor:
    """Draw 1 with the probability in x, else 0."""
    if seed is None or math.isnan(seed) or x.is_meta:
        return (uniform(x.shape, None, x.device) < x).to(_type(x, dtype))
    # Not `uniform(...) < x`: numpy turns the same numbers into other draws where x is below one half.
    draws = _stream(seed).binomial(1, x.detach().cpu().to(torch.float64).numpy())
    return torch.from_numpy(np.asarray(draws)).to(x.device, _type(x, dtype))


@operator("Multinomial", since=7)
def multinomial_7(x: Tensor, *, dtype: int = 6, sample_size: int = 1, seed: float | None = None) -> Tensor:
    """Draw `sample_size` classes per row from unnormalised log-probabilities `[B, C]`: `[B, sample_size]`."""
    upper = torch.softmax(x.detach().to(torch.float64), 1).cumsum(1)
    drawn = uniform((x.shape[0], sample_size), seed, x.device) * upper[:, -1:]
    # A number that equals a bound belongs to the class above: one of probability 0 is an empty interval.
    return torch.searchsorted(upper, drawn, right=True).to(dtype_of(dtype))
