"""What the softmax passes share: roles, accuracy in ulps, and leaving the runtime's own softmax where it is faster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

import graphopt.ops  # registers torch.ops.graphopt
from graphopt.errors import GraphOptError
from graphopt.passes.attention.softmax_speed import Speed, in_onnxruntime, in_torch
from graphopt.rewrite import Context, Replacement, SitePass, Tolerance
from graphopt.sites import SoftmaxSite
from graphopt.verification.numbers import ulps

if TYPE_CHECKING:
    from graphopt.graph import Graph
    from graphopt.rewrite.report import Status

_ = graphopt.ops
ROLES = ("attention", "vocabulary", "classifier", "other")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Both sides compute fp16 and bf16 in fp32 and round once: they differ where that rounding falls on the other side.
_TOLERANCES = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Probabilities below this count in its ulps, which are 2^-100 in fp32: that much is lost where exponentials below the
# normal numbers are flushed to zero.
_FLOOR = 2.0**-77
# The functions of the lowering select by condition, which came with opset 9.
_LOWEST_OPSET = 9


class SoftmaxReplacement(torch.nn.Module):
    """One of our softmax operators along one axis; `options` are its arguments behind the axis."""

    def __init__(self, operator: str, axis: int, dtype: torch.dtype | None) -> None:
        """Set up the call.

        Args:
            operator: its name in `torch.ops.graphopt`.
            axis: to normalise along.
            dtype: what the original converts its input to first, as torch.softmax(x, dim, dtype) does.
        """
        super().__init__()
        self.operator = operator
        self.axis = axis
        self.dtype = dtype
        self.options: tuple[float, ...] = ()

    def forward(self, x: Any) -> Any:
        """Probabilities in the shape of `x`."""
        wide = x if self.dtype is None else x.to(self.dtype)
        return getattr(torch.ops.graphopt, self.operator)(wide, self.axis, *self.options)


@dataclass(frozen=True)
class SoftmaxPass(SitePass):
    """Another way to compute the same softmax; subclasses name the operator."""

    kind: ClassVar[str] = "softmax"
    operator: ClassVar[str]
    """Name of the operator in `torch.ops.graphopt`."""

    roles: str = "all"
    """Which softmax to rewrite: attention, vocabulary, classifier, other, several joined by +, or all."""
    keep: Literal["faster", "never"] = "faster"
    """Keep the runtime's own softmax where it is measured to be faster, or never."""

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: `roles` names something else.
        """
        unknown = [role for role in self._roles() if role not in ROLES]
        if unknown or not self._roles():
            raise ValueError(f"expected roles to be all, or some of {', '.join(ROLES)} joined by +, got {self.roles!r}")

    def _roles(self) -> Sequence[str]:
        return ROLES if self.roles == "all" else [role.strip() for role in self.roles.split("+")]

    def tolerance(self, dtype: torch.dtype) -> Tolerance:
        """A few ulps of each type that has a softmax."""
        return Tolerance(_TOLERANCES.get(dtype, 0.0), f"another order of rounding in {dtype}")

    def check(self, site: SoftmaxSite) -> str | None:
        """Softmax of floats in one of the chosen roles."""
        if site.role not in self._roles():
            return f"its role is {site.role}, left as it is by roles={self.roles}"
        value = site.inputs[0].meta.get("val")
        found = value.dtype if isinstance(value, torch.Tensor) else None
        dtype = result_type(site) or found
        if dtype is not None and dtype not in _FLOATS:
            return f"it computes in {dtype}, which {self.operator} does not; it takes floats of 16, 32 and 64 bits"
        return None

    def build(self, site: SoftmaxSite, context: Context) -> SoftmaxReplacement:
        """The operator along the site's axis."""
        return SoftmaxReplacement(self.operator, site.axis, result_type(site))

    def expected(self, replacement: Replacement, index: int) -> torch.Tensor:
        """What the original gave, with zeros for rows of -inf alone, where it gives NaN."""
        return _with_zeros(replacement, index)

    def review(self, graph: Graph, replacement: Replacement, context: Context) -> tuple[Status, str]:
        """Measure ulps, and the time where the runtime's own softmax may stay."""
        if graph.onnx is not None and graph.onnx.opset() < _LOWEST_OPSET:
            return "refused", (
                f"expected opset {_LOWEST_OPSET} or later for its ONNX form, found {graph.onnx.opset()}; "
                "convert the model to a later opset first"
            )
        text = self.describe(replacement, context)
        if self.keep == "never":
            return "rewritten", text
        try:
            speed = self._speed(graph, replacement, context)
        except GraphOptError as error:
            return "refused", f"the runtime's own softmax stays, as its speed could not be measured: {error}"
        if speed.wrong:
            return "reverted", speed.wrong
        return ("rewritten" if speed.is_faster else "refused"), f"{speed.describe()}; {text}"

    def _speed(self, graph: Graph, replacement: Replacement, context: Context) -> Speed:
        (x,) = replacement.record.inputs(context.held_out()[0])
        assert isinstance(replacement.site, SoftmaxSite)
        if not x.numel():
            raise GraphOptError("expected values to measure on, found an empty input; calibrate with a larger one")
        if graph.onnx is None:
            return in_torch(replacement.module, replacement.site.axis, result_type(replacement.site), x)
        return in_onnxruntime(replacement.module, replacement.site.axis, x, graph.onnx.opset())

    def describe(self, replacement: Replacement, context: Context) -> str:
        """Largest distance from a softmax in fp64 over the held-out batches, ours and the original's, both in torch."""
        ours, original, empty = 0.0, 0.0, 0
        dtype = torch.float32
        with torch.no_grad():
            for i in context.held_out():
                x = replacement.record.inputs(i)
                exact, rows = _exact(replacement, i)
                found, given = replacement.module(*x), _with_zeros(replacement, i)
                dtype = found.dtype
                ours = max(ours, ulps(exact, found, _FLOOR))
                original = max(original, ulps(exact, given, _FLOOR))
                empty += rows
        replacement.errors |= {"ulps": ours, "ulps_original": original}
        text = (
            f"{ours:.2g} ulps of {str(dtype).removeprefix('torch.')} from an fp64 softmax, the original {original:.2g}"
        )
        return f"{text}; {empty} rows of -inf alone are 0, where the original may give NaN" if empty else text


def result_type(site: SoftmaxSite) -> torch.dtype | None:
    """The type that a torch softmax converts its input to; None where it keeps the input's."""
    anchor = site.anchor
    for value in (*anchor.args[1:], *anchor.kwargs.values()):
        if isinstance(value, torch.dtype):
            return value
    # aten._softmax(x, dim, half_to_float)
    return torch.float32 if len(anchor.args) > 2 and anchor.args[2] is True else None


def _rows(replacement: Replacement, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The input, and which of its rows hold -inf alone, as [.., 1, ..]."""
    (x,) = replacement.record.inputs(index)
    assert isinstance(replacement.site, SoftmaxSite)
    return x, (x == -torch.inf).all(replacement.site.axis, keepdim=True)


def _with_zeros(replacement: Replacement, index: int) -> torch.Tensor:
    _, empty = _rows(replacement, index)
    output: torch.Tensor = replacement.record.output(index)
    return output.masked_fill(empty, 0)


def _exact(replacement: Replacement, index: int) -> tuple[torch.Tensor, int]:
    """The softmax in fp64, and how many rows hold -inf alone."""
    x, empty = _rows(replacement, index)
    assert isinstance(replacement.site, SoftmaxSite)
    wide = torch.softmax(x.to(torch.float64), replacement.site.axis)
    return wide.masked_fill(empty, 0), int(empty.sum())
