"""The `kat` pass: MLPs as layers of the Kolmogorov-Arnold transformer, with rational functions before both matrices."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from scipy.integrate import quad

from graphopt.fit.activation import IDENTITY, is_relu_and_even
from graphopt.fit.finetune import finetune
from graphopt.fit.weights import Weights, replace_weight
from graphopt.graph import Graph
from graphopt.passes.mlp.activation import ActivationSite, activations
from graphopt.passes.mlp.rational_activation import (
    Denominator,
    Form,
    RationalActivation,
    check_degrees,
    fit_to_record,
    judged,
)
from graphopt.rewrite import Context, Equivalence, Replacement, SitePass, Tolerance
from graphopt.sites import EdgeSite, Findings, LinearSite, MlpSite
from graphopt.sites.mlp import activation

if TYPE_CHECKING:
    from graphopt.rewrite.report import Status

FormOption = Literal["auto", "pade", "split"]
WeightsOption = Literal["keep", "train", "draw"]
_SPLIT_DEGREES = (4, 6)


@dataclass(frozen=True, eq=False)
class _Input(EdgeSite):
    """What an MLP reads, on its way into the MLP."""

    kind = "mlp"
    mlp: MlpSite = field(kw_only=True)


@dataclass(frozen=True)
class Kat(SitePass):
    """W2 act(W1 x)   ->   W2 R_act(W1 R_id(x)),   at the start R_id(x) = x and R_act = act

    Each group of channels has a rational function of its own, which training can move; numerators are shared. Nothing
    is lost at the start, and the weights keep their names: train the module that comes out as the one that went in, or
    let `distill_steps` train it towards the original.

    Yang & Wang, "Kolmogorov-Arnold Transformer" (2024).
    """

    name: ClassVar[str] = "kat"
    kind: ClassVar[str] = "mlp"
    equivalence: ClassVar[Equivalence] = Equivalence.TRAINED
    needs_calibration: ClassVar[bool] = True

    groups: int = 8
    """Groups of channels with a denominator of their own."""
    form: FormOption = "auto"
    """Of R_act. pade: one rational function, as published; split: relu minus a rational function of |x| that vanishes,
    which is close on any range, but whose two sides training moves together; auto: pade where it keeps `max_error`."""
    denominator: Denominator = "abs_sum"
    """1 + |b_1 x + .. + b_n x^n|, or 1 + |b_1| |x| + .. + |b_n| |x|^n."""
    m: int = 5
    """Degree of the numerators, 1 to 7; where auto takes split it is 4."""
    n: int = 4
    """Degree of the denominators, up to 7; of form split at least m + 1, where auto takes it 6."""
    max_error: float = 0.01
    """Largest error of an activation at the start, on what calibration saw."""
    preserve: bool = True
    """Leave an activation that misses `max_error` as it was; false keeps it, as a start for training."""
    weights: WeightsOption = "keep"
    """Of the MLPs: keep; train: `distill_steps` trains them too; draw: anew, with the variance-preserving gains of the
    paper, for training from scratch."""
    distill_steps: int = 0
    """Steps through the whole model towards the original's outputs; one calibration batch each."""
    distill_rate: float = 1e-3
    """Peak learning rate of these."""

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: a number is out of range, or options exclude each other.
        """
        check_degrees("split" if self.form == "split" else "pade", self.m, self.n)
        if self.m < 1:
            raise ValueError(f"expected m of at least 1, which the identity needs, got {self.m}")
        if self.groups < 1:
            raise ValueError(f"expected groups of at least 1, got {self.groups}")
        if not self.max_error > 0 or not self.distill_rate > 0:
            raise ValueError(
                f"expected max_error and distill_rate above 0, got {self.max_error} and {self.distill_rate}"
            )
        if self.distill_steps < 0:
            raise ValueError(f"expected distill_steps of at least 0, got {self.distill_steps}")
        if self.weights == "draw" and self.distill_steps:
            raise ValueError("expected distill_steps=0 with weights=draw: new weights are trained from scratch")

    def tolerance(self, dtype: torch.dtype) -> Tolerance:
        """The start is judged by `max_error`, at the site's own scale."""
        return Tolerance(math.inf, "option max_error")

    def find(self, graph: Graph) -> Findings:
        """Two sites for each MLP: its activation, and what enters it, save where that is another one's activation."""
        found = activations(graph)
        seconds = {act.mlp.down.output for act in found.sites}
        sites: list[EdgeSite | ActivationSite] = []
        for act in found.sites:
            if act.mlp.up.output not in seconds:
                sites.append(_entry(act.mlp))
            sites.append(act)
        return Findings(tuple(sites), found.refusals)

    def check(self, site: ActivationSite | _Input) -> str | None:
        """Groups have to divide the channels of both sites; `split` needs an even remainder."""
        mlp = site.mlp
        layer = mlp.gate if mlp.gate is not None else mlp.up
        for text, channels in (("inputs", layer.in_features), ("hidden units", layer.out_features)):
            if channels % self.groups:
                fits = max(g for g in range(1, self.groups) if layer.in_features % g == layer.out_features % g == 0)
                return f"its {channels} {text} are no multiple of groups={self.groups}; use groups={fits}"
        if self.form == "split" and not is_relu_and_even(mlp.activation):
            return f"{mlp.activation} is not relu minus an even function that vanishes; use form=pade"
        return None

    def build(self, site: ActivationSite | _Input, context: Context) -> RationalActivation:
        """The rational function; `fit` gives it its coefficients."""
        return self._make(site, "split" if self.form == "split" else "pade", (self.m, self.n))

    def _make(self, site: ActivationSite | _Input, form: Form, degrees: tuple[int, int]) -> RationalActivation:
        is_input = isinstance(site, _Input)
        return RationalActivation(
            IDENTITY if is_input else site.mlp.activation,
            degrees,
            self.groups,
            form="pade" if is_input else form,
            denominator=self.denominator,
            bias=None if isinstance(site, _Input) else site.bias,
            shared=True,
            scaled=True,
        )

    def fit(self, replacements: Sequence[Replacement], context: Context) -> None:
        """The identity and the activations on the intervals that calibration saw."""
        for replacement in context.track(replacements, len(replacements), "Fitting rational functions"):
            fit_to_record(replacement, together=True)
            site = replacement.site
            if self.form != "auto" or not isinstance(site, ActivationSite) or not is_relu_and_even(site.function):
                continue
            if not replacement.errors["max_error"] <= self.max_error:
                replacement.module = self._make(site, "split", _SPLIT_DEGREES)
                fit_to_record(replacement, together=True)

    def review(self, graph: Graph, replacement: Replacement, context: Context) -> tuple[Status, str]:
        """Hold the largest error of an activation against `max_error`."""
        allowed = self.max_error
        if isinstance(replacement.site, _Input):
            # The identity's error is rounding, which grows with what the model sends through it.
            allowed = max(allowed, 1e-5 * max(-replacement.errors["low"], replacement.errors["high"]))
        return judged(replacement, allowed, preserve=self.preserve)

    def finish(self, teacher: Graph, student: Graph, replacements: Sequence[Replacement], context: Context) -> Graph:
        """Draw new weights, or train towards the original."""
        mlps = [r.site.mlp for r in replacements if isinstance(r.site, ActivationSite)]
        if self.weights == "draw":
            _draw(student, mlps, context.generator())
            context.notes.append(f"the weights of {len(mlps)} MLPs were drawn anew: the model has to be trained")
            return student
        if not self.distill_steps or context.fit_steps == 0:
            return student
        finetune(
            teacher,
            student,
            Weights(student, _weights(mlps) if self.weights == "train" else ()),
            [p for r in replacements for p in r.module.parameters()],
            steps=self.distill_steps,
            learning_rate=self.distill_rate,
            objective="teacher",
            context=context,
        )
        return student


def _entry(mlp: MlpSite) -> _Input:
    (value,) = mlp.inputs
    readers = tuple(node for node in mlp.nodes if value in node.all_input_nodes)
    return _Input(f"{mlp.name}.input", mlp.anchor, (), (value,), readers=readers, of=mlp.name, mlp=mlp)


def _layers(mlp: MlpSite) -> list[LinearSite]:
    return [layer for layer in (mlp.gate, mlp.up, mlp.down) if layer is not None]


def _weights(mlps: Sequence[MlpSite]) -> list[torch.fx.Node]:
    layers = [layer for mlp in mlps for layer in _layers(mlp)]
    return [node for layer in layers for node in (layer.weight, layer.bias) if node is not None]


@functools.cache
def variance_gain(function: str) -> float:
    """1 / E[F(z)^2] with a standard normal z: weights of variance gain / d_in keep the variance of what they are given.

    Args:
        function: an activation's name, as `graphopt.sites.mlp.activation` takes it.
    """
    act = activation(function)

    def weighted(z: float) -> float:
        density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        return float(act(torch.tensor(z, dtype=torch.float64))) ** 2 * density

    # In two parts, because many activations bend at 0; beyond 12 the density is below 1e-32.
    return 1 / float(quad(weighted, -12, 0)[0] + quad(weighted, 0, 12)[0])


def _draw(graph: Graph, mlps: Sequence[MlpSite], generator: torch.Generator) -> None:
    """Normal weights with the gains of the function before them, and no biases."""
    for mlp in mlps:
        for layer in _layers(mlp):
            gain = variance_gain(mlp.activation) if layer is mlp.down else 1.0
            old = graph.weight(layer.weight)
            new = torch.randn(old.shape, generator=generator) * math.sqrt(gain / layer.in_features)
            replace_weight(graph, layer.weight, new.to(old.dtype))
            if layer.bias is not None:
                replace_weight(graph, layer.bias, torch.zeros_like(graph.weight(layer.bias)))
