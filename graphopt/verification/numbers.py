"""How far one value is from another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from graphopt.errors import GraphOptError


@dataclass(frozen=True)
class Difference:
    """Distance of a value from the expected one.

    Attributes:
        max_abs: largest absolute difference.
        rel_rms: RMS of the difference over RMS of the expected value (over 1 where that is all zeros).
        cosine: mean cosine similarity along the last axis; 1 for values that are equal.
        bitwise: equal in type, shape and every bit (NaN equal to NaN).
    """

    max_abs: float
    rel_rms: float
    cosine: float
    bitwise: bool


def difference(expected: Any, found: Any) -> Difference:
    """Compare two values: tensors or arrays of any type, or sequences of them (the worst element counts).

    Infinite where the shapes differ or exactly one side is NaN or infinite.
    """
    if isinstance(expected, (list, tuple)):
        pairs = [difference(e, f) for e, f in zip(expected, found, strict=False)]
        if len(expected) != len(found):
            return _WORST
        worst = max(pairs, key=lambda d: d.rel_rms, default=_SAME)
        return worst
    if isinstance(expected, dict):  # an ONNX map: scores by label
        if not isinstance(found, dict) or expected.keys() != found.keys():
            return _WORST
        return difference(np.array(list(expected.values())), np.array([found[key] for key in expected]))
    a, b = _float64(expected), _float64(found)
    if a is None or b is None:
        return _SAME if np.array_equal(np.asarray(expected), np.asarray(found)) else _WORST
    if a.shape != b.shape:
        return _WORST
    if a.numel() == 0:
        return _SAME
    if a.ndim > 2:  # some operators of torch stop at 64 axes
        a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    same = (a == b) | (a.isnan() & b.isnan())
    signs = torch.signbit(a) == torch.signbit(b)  # -0 equals 0 and is another value
    bitwise = bool((same & (signs | a.isnan())).all()) and getattr(expected, "dtype", None) == getattr(
        found, "dtype", None
    )
    if bitwise or bool(same.all()):
        return Difference(0.0, 0.0, 1.0, bitwise)
    delta = torch.where(same, torch.zeros_like(a), a - b)
    if not bool(torch.isfinite(delta).all()):
        return _WORST
    finite = torch.where(torch.isfinite(a), a, torch.zeros_like(a))
    scale = float(finite.square().mean().sqrt())
    rms = float(delta.square().mean().sqrt())
    return Difference(float(delta.abs().max()), rms / (scale or 1.0), _cosine(finite, finite - delta), bitwise)


def ulps(expected: torch.Tensor, found: torch.Tensor, floor: float | None = None) -> float:
    """The largest distance in units in the last place of the type of `found`.

    The unit is the spacing of that type at the expected value, which is the more exact of the two and need not be
    rounded to the type: a correctly rounded value is at most 0.5 away. Values below `floor` count in units of `floor`.

    Args:
        expected: reference values, best in fp64.
        found: values of a floating-point type, of the same shape.
        floor: default is the smallest normal number of the type, whose unit is that of all subnormal numbers.

    Returns:
        0 for values that are equal (NaN equals NaN); infinite where the shapes differ, or where one side alone is NaN
        or infinite.

    Raises:
        GraphOptError: `found` holds integers, booleans or complex numbers.
    """
    if not found.is_floating_point():
        raise GraphOptError(
            f"expected floating-point values to count ulps of, found {found.dtype}; compare them exactly"
        )
    if expected.shape != found.shape:
        return math.inf
    kind = torch.finfo(found.dtype)
    a, b = expected.detach().to(torch.float64), found.detach().to(torch.float64)
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    lowest = kind.smallest_normal if floor is None else max(floor, kind.smallest_normal)
    # x = m 2^e with m in [0.5, 1): the spacing at x is eps 2^(e - 1).
    _, exponent = torch.frexp(a.abs().clamp_min(lowest))
    unit = torch.ldexp(torch.full_like(a, kind.eps), exponent - 1)
    distance = torch.where(same, 0.0, (a - b).abs() / unit)
    return math.inf if bool(distance.isnan().any()) else float(distance.max())


# As float64 these are 16 GB; an expanded value may claim any size without taking memory.
_MOST_ELEMENTS = 1 << 31
_SAME = Difference(0.0, 0.0, 1.0, True)
_WORST = Difference(float("inf"), float("inf"), 0.0, False)


def _float64(value: Any) -> torch.Tensor | None:
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf":
            return None
        value = torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, torch.Tensor) or value.is_complex():
        return None
    if value.numel() > _MOST_ELEMENTS:
        raise GraphOptError(f"cannot compare values of {list(value.shape)}: they would take more than 16 GB as float64")
    return value.detach().to(torch.float64)


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.ndim == 0:
        a, b = a.view(1), b.view(1)
    zero = (a.norm(dim=-1) == 0) & (b.norm(dim=-1) == 0)
    similarity = torch.nn.functional.cosine_similarity(a, b, dim=-1, eps=1e-30)
    return float(torch.where(zero, torch.ones_like(similarity), similarity).mean())
