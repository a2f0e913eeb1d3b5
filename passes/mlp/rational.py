"""The `rational` pass: the activations of MLPs as rational functions, without training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from graphopt.fit.activation import is_relu_and_even
from graphopt.graph import Graph
from graphopt.passes.mlp.activation import ActivationSite, activations
from graphopt.passes.mlp.rational_activation import (
    Denominator,
    RationalActivation,
    check_degrees,
    fit_to_record,
    judged,
)
from graphopt.rewrite import Context, Equivalence, Replacement, SitePass, Tolerance
from graphopt.sites import Findings

if TYPE_CHECKING:
    from graphopt.rewrite.report import Status

FormOption = Literal["auto", "split", "pade"]
_PADE_DEGREES = (7, 6)


@dataclass(frozen=True)
class Rational(SitePass):
    """act(x)   ->   relu(x) - P(|x|) / Q(|x|), or P(x) / Q(x)

    gelu, silu and their like differ from relu by an even function that vanishes on both sides, so with a denominator of
    higher degree the rational function is right on both tails, wherever an input falls. `form=pade` is the function of
    Yang & Wang, "Kolmogorov-Arnold Transformer" (2024); outside of the interval of its fit, straight lines continue it.
    """

    name: ClassVar[str] = "rational"
    kind: ClassVar[str] = "mlp"
    equivalence: ClassVar[Equivalence] = Equivalence.CALIBRATED
    needs_calibration: ClassVar[bool] = True

    form: FormOption = "auto"
    """split: relu minus a rational function that vanishes; pade: one rational function; auto: split where the
    activation allows it, else pade with degrees 7 and 6."""
    denominator: Denominator = "abs_sum"
    """1 + |b_1 x + .. + b_n x^n|, or 1 + |b_1| |x| + .. + |b_n| |x|^n."""
    m: int = 4
    """Degree of the numerator, up to 7."""
    n: int = 6
    """Degree of the denominator, up to 7; of form split at least m + 1."""
    groups: int = 1
    """Groups of channels with coefficients of their own; of form split each is fitted on the interval that calibration
    saw there."""
    max_error: float = 5e-4
    """Largest error of an activation on what calibration saw."""
    preserve: bool = True
    """Leave a site that misses `max_error` as it was; false keeps it, as a start for training."""

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: a number is out of range.
        """
        check_degrees("pade" if self.form == "pade" else "split", self.m, self.n)
        if self.groups < 1:
            raise ValueError(f"expected groups of at least 1, got {self.groups}")
        if not self.max_error > 0:
            raise ValueError(f"expected max_error above 0, got {self.max_error}")

    def tolerance(self, dtype: torch.dtype) -> Tolerance:
        """The RMS error is below the largest one; what is judged is `max_error`, at the site's own scale."""
        return Tolerance(math.inf, "option max_error")

    def find(self, graph: Graph) -> Findings:
        """The activations of all MLPs."""
        return activations(graph)

    def check(self, site: ActivationSite) -> str | None:
        """Groups have to divide the channels, and `split` has to have an even remainder."""
        if site.channels % self.groups:
            return f"its {site.channels} channels are no multiple of groups={self.groups}"
        if self.form == "split" and not is_relu_and_even(site.function):
            return f"{site.function} is not relu minus an even function that vanishes; use form=pade"
        return None

    def build(self, site: ActivationSite, context: Context) -> RationalActivation:
        """The replacement; `fit` gives it its coefficients."""
        form, degrees = self.form, (self.m, self.n)
        if form == "auto":
            form = "split" if is_relu_and_even(site.function) else "pade"
            degrees = degrees if form == "split" else _PADE_DEGREES
        return RationalActivation(
            site.function, degrees, self.groups, form=form, denominator=self.denominator, bias=site.bias
        )

    def fit(self, replacements: Sequence[Replacement], context: Context) -> None:
        """Fit each group's function on the interval that calibration saw, and note the largest error there."""
        for replacement in context.track(replacements, len(replacements), "Fitting rational functions"):
            module = replacement.module
            assert isinstance(module, RationalActivation)
            # Straight lines continue form pade behind one interval for all channels.
            fit_to_record(replacement, together=module.form == "pade")

    def review(self, graph: Graph, replacement: Replacement, context: Context) -> tuple[Status, str]:
        """Hold the largest error on what calibration saw against `max_error`."""
        return judged(replacement, self.max_error, preserve=self.preserve)
