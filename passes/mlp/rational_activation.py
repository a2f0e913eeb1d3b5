"""A rational function in the place of an activation, or of nothing at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from graphopt.fit.activation import IDENTITY, exact, fit_activation
from graphopt.fit.rational import RationalFunction
from graphopt.ops import group_rational
from graphopt.rewrite import Replacement

if TYPE_CHECKING:
    from graphopt.rewrite.report import Status

Form = Literal["split", "pade"]
Denominator = Literal["abs_sum", "sum_abs"]

# The interval of a fit is the least power of two times this that holds what calibration saw, so that few intervals
# are fitted, and inputs somewhat beyond it are still inside. Form split is right beyond it only if the fit saw all of
# what vanishes: silu differs from relu by 3e-3 at 8, and by 4e-13 at 32. Form pade is off by what is left at its end.
_UNITS = {"split": 32.0, "pade": 8.0}
_FINEST = 1e-12
_STRAIGHT = 1e-6


def check_degrees(form: Form, m: int, n: int) -> None:
    """Check the degrees of numerator and denominator.

    Raises:
        ValueError: one is out of range, or they do not fit the form.
    """
    if not (0 <= m <= 7 and 0 <= n <= 7):
        raise ValueError(f"expected degrees m and n of 0 to 7, got {m} and {n}")
    if form == "split" and n <= m:
        raise ValueError(f"expected n above m for form=split, which vanishes far out, got m={m} and n={n}")


class RationalActivation(torch.nn.Module):
    """An activation [.., C] -> [.., C] with coefficients for each group of channels."""

    numerator: torch.nn.Parameter
    denominator: torch.nn.Parameter
    units_above: torch.Tensor | None
    units_below: torch.Tensor | None

    def __init__(
        self,
        function: str,
        degrees: tuple[int, int],
        groups: int,
        *,
        form: Form,
        denominator: Denominator,
        bias: torch.Tensor | None = None,
        shared: bool = False,
        scaled: bool = False,
    ) -> None:
        """Zero coefficients.

        Args:
            function: an activation's name, or `graphopt.fit.activation.IDENTITY`.
            degrees: m and n, of numerator and denominator.
            groups: G, how many groups of channels have coefficients of their own.
            form: `split`: relu minus a rational function that vanishes; `pade`: one rational function.
            denominator: see `graphopt.ops.group_rational.FORMS`.
            bias: is added first [C].
            shared: one numerator for all groups, as in KAT.
            scaled: the parameters are the coefficients of x / r, where [-r, r] is the interval of the fit. All are then
                of one order of magnitude, and steps of one size suit them all; as they are, a step that suits a_0 is
                r^i times too large for a_i.
        """
        super().__init__()
        self.function, self.form, self.safe, self.degrees, self.groups = function, form, denominator, degrees, groups
        self.numerator = torch.nn.Parameter(torch.zeros(1 if shared else groups, degrees[0] + 1))
        self.denominator = torch.nn.Parameter(torch.zeros(groups, degrees[1]))
        self.interval = (0.0, 0.0)
        self.slopes: tuple[float, ...] = (0.0, 0.0)
        self.bias = None if bias is None else torch.nn.Parameter(bias.clone(), requires_grad=False)
        for name, count in (("units_above", degrees[0] + 1), ("units_below", degrees[1])):
            self.register_buffer(name, torch.ones(count) if scaled else None)

    def fitted(self, low: float, high: float) -> RationalFunction:
        """The rational function for inputs in [low, high]."""
        unit = _UNITS[self.form]
        reach = unit * 2 ** max(0, math.ceil(math.log2(max(-low, high, _FINEST) / unit)))
        return fit_activation(self.function, reach, self.degrees, self.safe, split=self.form == "split")

    def set_functions(self, functions: Sequence[RationalFunction]) -> None:
        """Take one function per group; those of groups that share a numerator are the same."""
        reach = max(f.high for f in functions)
        with torch.no_grad():
            numerators = functions[: len(self.numerator)]
            self.numerator.copy_(torch.tensor([f.numerator for f in numerators]))
            self.denominator.copy_(torch.tensor([f.denominator for f in functions]))
            if self.units_above is not None and self.units_below is not None:
                powers = reach ** -torch.arange(8, dtype=torch.float64)
                self.units_above.copy_(powers[: self.degrees[0] + 1])
                self.units_below.copy_(powers[1 : self.degrees[1] + 1])
                self.numerator.div_(self.units_above)
                self.denominator.div_(self.units_below)
        self.interval = (-reach, reach)
        self.slopes = (_slope(self.function, -reach), _slope(self.function, reach))

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
        if below == above:
            return value + _times(x - inside, above) if above else value
        if above:
            value = value + _times(torch.relu(x - high), above)
        if below:
            value = value - _times(torch.relu(low - x), below)
        return value

    def _rational(self, x: torch.Tensor) -> torch.Tensor:
        a: torch.Tensor = self.numerator
        b: torch.Tensor = self.denominator
        if self.units_above is not None and self.units_below is not None:
            a, b = a * self.units_above, b * self.units_below
        value: torch.Tensor = group_rational(x, a, b, self.safe, split=self.form == "split")
        return value


def judged(replacement: Replacement, max_error: float, *, preserve: bool) -> tuple[Status, str]:
    """What becomes of a `RationalActivation` after `fit_to_record`, and what the report says of it.

    Args:
        replacement: fitted.
        max_error: largest error that is allowed.
        preserve: whether the original stays where that is missed.
    """
    module, (low, high, error) = replacement.module, (replacement.errors[k] for k in ("low", "high", "max_error"))
    assert isinstance(module, RationalActivation)
    form = "" if module.function == IDENTITY else f" as {module.form}"
    text = f"{module.function}{form} on [{low:.3g}, {high:.3g}], largest error {error:.2g}"
    if not error <= max_error and preserve:  # also true of NaN
        return "reverted", f"{text}, above max_error={max_error:.3g}; use higher degrees, or form=split"
    return "rewritten", text


def _slope(name: str, end: float) -> float:
    """Of the line that continues an activation behind `end`: the one it approaches, or where there is none its next."""
    points = end * np.array([1.0, 2.0, 100.0, 200.0, 1000.0, 2000.0])
    next_to, far, further = np.diff(exact(name)(points))[::2] / np.diff(points)[::2]
    if not abs(far - further) < _STRAIGHT:
        return float(next_to)
    # 0 and 1 cost no operator of their own.
    return float(round(further)) if abs(further - round(further)) < _STRAIGHT else float(further)


def _times(x: torch.Tensor, slope: float) -> torch.Tensor:
    return x if slope == 1 else x * slope


def fit_to_record(replacement: Replacement, *, together: bool = False) -> None:
    """Fit a `RationalActivation` on the interval that calibration saw, and note the largest error there.

    Args:
        replacement: gets `max_error`, `low` and `high` among its errors.
        together: one interval for all groups.
    """
    module = replacement.module
    assert isinstance(module, RationalActivation)
    low, high = _seen(replacement, module)
    if together:
        low, high = [min(low)] * len(low), [max(high)] * len(high)
    # Nothing is known of groups that no batch has values for: they take the smallest interval.
    intervals = [(a, b) if a <= b else (0.0, 0.0) for a, b in zip(low, high, strict=True)]
    module.set_functions([module.fitted(a, b) for a, b in intervals])
    replacement.errors["max_error"] = _largest_error(replacement)
    replacement.errors["low"], replacement.errors["high"] = (
        pick(e) for pick, e in zip((min, max), zip(*intervals, strict=True), strict=True)
    )


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
            if found.numel():
                worst = max(worst, float((found - record.output(i)).abs().max()))
    return worst
