"""The `unified_max` pass: one calibrated constant in place of every row's maximum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from graphopt.passes.attention.softmax_pass import SoftmaxPass, SoftmaxReplacement
from graphopt.rewrite import Context, Equivalence, Replacement, Tolerance
from graphopt.sites import SoftmaxSite

# In a row whose largest entry is phi - 18, a term of 2^-100 of the largest is still a normal number in fp32.
LOW = -18.0
# e^60 times 2^31 entries is still finite in fp32; the operator takes no more.
HIGH = 60.0
# Rows at the very edge of what calibration saw stay within the bounds.
_MARGIN = 1.0
# e^(x - phi) carries the rounding of x - phi, half an ulp of 60 at most.
_TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class UnifiedMax(SoftmaxPass):
    """e^(x_i - max_j x_j) / sum_j e^(x_j - max_j x_j)   ->   e^(x_i - phi) / sum_j e^(x_j - phi)

    phi is one constant per site, the middle of the row maxima that calibration saw, so that parts of a row need not
    wait for each other's maximum. Rows that it does not fit are computed again with their own maximum.

    Hong et al., "FlashDecoding++" (2023).
    """

    name: ClassVar[str] = "unified_max"
    operator: ClassVar[str] = "unified_max_softmax"
    equivalence: ClassVar[Equivalence] = Equivalence.CALIBRATED
    needs_calibration: ClassVar[bool] = True

    def tolerance(self, dtype: torch.dtype) -> Tolerance:
        """As for the others, and the rounding of x - phi besides."""
        return Tolerance(_TOLERANCES.get(dtype, 0.0), f"rounding of x - phi in {dtype}")

    def build(self, site: SoftmaxSite, context: Context) -> SoftmaxReplacement:
        """The operator with phi = 0, which `fit` replaces."""
        module = super().build(site, context)
        module.options = (0.0, LOW, HIGH)
        return module

    def fit(self, replacements: Sequence[Replacement], context: Context) -> None:
        """Choose each site's phi by its row maxima on the training batches."""
        for replacement in replacements:
            assert isinstance(replacement.module, SoftmaxReplacement)
            phi = middle(_maxima(replacement, context.training()))
            replacement.module.options = (phi, LOW, HIGH)

    def describe(self, replacement: Replacement, context: Context) -> str:
        """What all softmax passes say, with phi and the share of rows that it does not fit."""
        assert isinstance(replacement.module, SoftmaxReplacement)
        phi = replacement.module.options[0]
        distance = _maxima(replacement, range(len(replacement.record))) - phi
        outside = ~((distance > LOW) & (distance < HIGH))
        share = float(outside.double().mean()) if outside.numel() else 0.0
        replacement.errors |= {"phi": phi, "recomputed": share}
        text = super().describe(replacement, context)
        return f"{text}; phi = {phi:.4g}, {share:.2%} of the rows in calibration are computed again"


def middle(maxima: torch.Tensor) -> float:
    """The phi for which the bounds hold the most of these row maxima: the middle between those that they hold.

    Masked rows count as rows far away, which one constant cannot serve too.

    Args:
        maxima: of any number of rows; those that are not finite are left out.

    Returns:
        phi; 0 where there are no rows.
    """
    values = maxima[torch.isfinite(maxima)].sort().values
    if not values.numel():
        return 0.0
    ends = torch.searchsorted(values, values + (HIGH - LOW - 2 * _MARGIN))
    first = int((ends - torch.arange(len(values))).argmax())
    low, high = float(values[first]), float(values[ends[first] - 1])
    return min((low + high) / 2, low - LOW - _MARGIN)


def _maxima(replacement: Replacement, batches: Sequence[int]) -> torch.Tensor:
    """The largest entry of each row, in one dimension and fp64."""
    assert isinstance(replacement.site, SoftmaxSite)
    inputs = [replacement.record.inputs(i)[0].to(torch.float64) for i in batches]
    return torch.cat([x.amax(replacement.site.axis).flatten() for x in inputs if x.numel()] or [torch.empty(0)])
