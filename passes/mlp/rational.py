"""The `rational` pass: the activations of MLPs as rational functions, without training."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from graphopt.fit.rational import RationalFunction, fit_rational
from graphopt.graph import Graph
from graphopt.ops import group_rational
from graphopt.passes.mlp.activation import ActivationSite, activations
from graphopt.rewrite import Context, Equivalence, Replacement, SitePass, Tolerance
from graphopt.sites import Findings
from graphopt.sites.mlp import activation

if TYPE_CHECKING:
    from graphopt.rewrite.report import Status

Form = Literal["split", "pade"]
Denominator = Literal["abs_sum", "sum_abs"]
_Array = np.ndarray[Any, Any]
# The interval of a fit is the least power of two times this that holds what calibration saw, so that few intervals
# are fitted, and inputs somewhat beyond it are still inside.
_UNIT = 8.0
_FINEST = 1e-12


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

    form: Form = "split"
    """split: relu minus a rational function that vanishes; pade: one rational function, for training."""
    denominator: Denominator = "abs_sum"
    """1 + |b_1 x + .. + b_n x^n|, or 1 + |b_1| |x| + .. + |b_n| |x|^n."""
    m: int = 4
    """Degree of the numerator, up to 7."""
    n: int = 6
    """Degree of the denominator, up to 7; of form split at least m + 1."""
    groups: int = 1
    """Groups of channels with coefficients of their own, each fitted on the interval that calibration saw there."""
    max_error: float = 5e-4
    """Largest error of an activation on what calibration saw."""
    preserve: bool = True
    """Leave a site that misses `max_error` as it was; false keeps it, as a start for training."""

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: a number is out of range.
        """
        if not (0 <= self.m <= 7 and 0 <= self.n <= 7):
            raise ValueError(f"expected degrees m and n of 0 to 7, got {self.m} and {self.n}")
        if self.form == "split" and self.n <= self.m:
            raise ValueError(
                f"expected n above m for form=split, which vanishes far out, got m={self.m} and n={self.n}"
            )
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
        if self.form == "split" and not _is_relu_and_even(site.function):
            return f"{site.function} is not relu minus an even function that vanishes; use form=pade"
        return None

    def build(self, site: ActivationSite, context: Context) -> RationalActivation:
        """The replacement; `fit` gives it its coefficients."""
        return RationalActivation(site, self.form, self.denominator, (self.m, self.n), self.groups)

    def fit(self, replacements: Sequence[Replacement], context: Context) -> None:
        """Fit each group's function on the interval that calibration saw, and note the largest error there."""
        for replacement in context.track(replacements, len(replacements), "Fitting rational functions"):
            module = replacement.module
            assert isinstance(module, RationalActivation)
            low, high = _seen(replacement, module)
            module.set_functions([module.fitted(a, b) for a, b in zip(low, high, strict=True)])
            replacement.errors["max_error"] = _largest_error(replacement)
            replacement.errors["low"], replacement.errors["high"] = min(low), max(high)

    def review(self, graph: Graph, replacement: Replacement, context: Context) -> tuple[Status, str]:
        """Hold the largest error on what calibration saw against `max_error`."""
        error = replacement.errors["max_error"]
        low, high = replacement.errors["low"], replacement.errors["high"]
        text = f"{replacement.site.function} on [{low:.3g}, {high:.3g}], largest error {error:.2g}"  # type: ignore[attr-defined]  # an ActivationSite
        if not error <= self.max_error and self.preserve:  # also true of NaN
            return "reverted", f"{text}, above max_error={self.max_error:.3g}; use higher degrees, or form=split"
        return "rewritten", text


class RationalActivation(torch.nn.Module):
    """An activation [.., C] -> [.., C] with coefficients for each group of channels."""

    numerator: torch.nn.Parameter
    denominator: torch.nn.Parameter
    bias: torch.Tensor | None

    def __init__(
        self, site: ActivationSite, form: Form, denominator: Denominator, degrees: tuple[int, int], groups: int
    ) -> None:
        """Zero coefficients.

        Args:
            site: what is replaced.
            form: see `Rational`.
            denominator: see `Rational`.
            degrees: of numerator and denominator.
            groups: how many groups of channels have coefficients of their own.
        """
        super().__init__()
        self.function, self.form, self.safe, self.degrees, self.groups = (
            site.function,
            form,
            denominator,
            degrees,
            groups,
        )
        self.numerator = torch.nn.Parameter(torch.zeros(groups, degrees[0] + 1))
        self.denominator = torch.nn.Parameter(torch.zeros(groups, degrees[1]))
        self.interval = (-_UNIT, _UNIT)
        self.slopes = (0.0, 0.0)
        self.register_buffer("bias", None if site.bias is None else site.bias.clone())

    def fitted(self, low: float, high: float) -> RationalFunction:
        """The rational function for inputs in [low, high]."""
        reach = _UNIT * 2 ** max(0, math.ceil(math.log2(max(-low, high, _FINEST) / _UNIT)))
        return _fitted(self.function, self.form, self.safe, reach, self.degrees)

    def set_functions(self, functions: Sequence[RationalFunction]) -> None:
        """Take one function per group."""
        with torch.no_grad():
            self.numerator.copy_(torch.tensor([f.numerator for f in functions]))
            self.denominator.copy_(torch.tensor([f.denominator for f in functions]))
        reach = max(f.high for f in functions)
        self.interval = (-reach, reach)
        exact = _exact(self.function)
        ends = exact(np.array([-2 * reach, -reach, reach, 2 * reach]))
        self.slopes = (float(ends[1] - ends[0]) / reach, float(ends[3] - ends[2]) / reach)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The function of x [.., C]."""
        if self.bias is not None:
            x = x + self.bias
        if self.form == "split":
            return self._rational(x)
        low, high = self.interval
        inside = torch.clamp(x, low, high)
        value = self._rational(inside)
        below, above = self.slopes
        # Beyond the interval the rational function may go anywhere; an activation is straight there.
        if above:
            value = value + torch.relu(x - high) * above
        if below:
            value = value - torch.relu(low - x) * below
        return value

    def _rational(self, x: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = group_rational(x, self.numerator, self.denominator, self.safe, self.form == "split")
        return value


def _exact(name: str) -> Callable[[_Array], _Array]:
    function = activation(name)
    return lambda x: np.asarray(function(torch.from_numpy(np.asarray(x, np.float64))).numpy())


@functools.cache
def _is_relu_and_even(name: str) -> bool:
    """Whether relu(x) - f(x) is the same for x and -x, and vanishes far out."""
    x = np.linspace(0, 40, 401)
    function = _exact(name)
    right, left = x - function(x), -function(-x)
    return bool(np.abs(right - left).max() < _FINEST and abs(right[-1]) < _FINEST)


@functools.cache
def _fitted(
    name: str, form: Form, denominator: Denominator, reach: float, degrees: tuple[int, int]
) -> RationalFunction:
    exact = _exact(name)
    if form == "split":
        return fit_rational(lambda t: np.maximum(t, 0) - exact(t), 0.0, reach, degrees, denominator)
    return fit_rational(exact, -reach, reach, degrees, denominator)


def _seen(replacement: Replacement, module: RationalActivation) -> tuple[list[float], list[float]]:
    """Smallest and largest input of each group on the calibration data."""
    low, high = [math.inf] * module.groups, [-math.inf] * module.groups
    for i in range(len(replacement.record)):
        (x,) = replacement.record.inputs(i)
        x = x.float() if module.bias is None else x.float() + module.bias.float()
        if not x.numel():
            continue
        parts = x.unflatten(-1, (module.groups, -1)).movedim(-2, 0).flatten(1)
        low = [min(a, b) for a, b in zip(low, parts.amin(1).tolist(), strict=True)]
        high = [max(a, b) for a, b in zip(high, parts.amax(1).tolist(), strict=True)]
    return low, high


def _largest_error(replacement: Replacement) -> float:
    record, worst = replacement.record, 0.0
    with torch.no_grad():
        for i in range(len(record)):
            found = replacement.module(*record.inputs(i)).double()
            worst = max(worst, float((found - record.output(i)).abs().max()))
    return worst
