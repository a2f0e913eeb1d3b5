"""The `kan` pass: a small MLP as a Kolmogorov-Arnold network of splines, pruned, and as formulas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import sympy
import torch
from torch import Tensor, nn

from graphopt.fit.formula import Formula, formulas
from graphopt.fit.formula_search import find_formulas
from graphopt.fit.spline_training import best_of, fit_network
from graphopt.fit.splines import ORDER, SplineLayer, SplineNetwork
from graphopt.rewrite import Context, Equivalence, Replacement, SitePass, Tolerance
from graphopt.sites import MlpSite
from graphopt.verification.numbers import difference

if TYPE_CHECKING:
    from graphopt.graph import Graph
    from graphopt.rewrite.report import Status

LARGEST = 20_000
"""Coefficients of a network that is fitted."""
WIDEST = 4096
"""Coefficients of one output of a network without hidden nodes: a dense system of this size is solved."""
MOST_SYMBOLIC = 64
"""Edges that are looked up in the library."""
_SAMPLES = 4096
_START_STEPS = 50
_WITHIN = 3.0
"""Fewer hidden nodes may have this many times the error of more: where they are enough, the grid decides the rest."""
_LONGEST = 400
"""Characters of the formulas in a report."""


@dataclass(frozen=True)
class Kan(SitePass):
    """W2 f(W1 x + b1) + b2   ->   y_j = sum_i phi_ij(x_i), or two such layers, phi a cubic spline or a formula

    Each edge of a Kolmogorov-Arnold network is a function of one variable, w silu(x) + sum_k c_k B3((x - t_k) / h), on
    a grid that holds what calibration saw; straight lines continue it outside. Unimportant edges are cut. With
    `symbolic` the edges are replaced by functions out of a library and their constants refined together, and the
    report has the formula.

    Liu et al., "KAN: Kolmogorov-Arnold Networks" (2024).
    """

    name: ClassVar[str] = "kan"
    kind: ClassVar[str] = "mlp"
    equivalence: ClassVar[Equivalence] = Equivalence.TRAINED
    needs_calibration: ClassVar[bool] = True

    hidden: int = 5
    """Nodes between two layers of edges; 0 is one layer, which is solved for and not trained."""
    grow: bool = False
    """Use fewer hidden nodes, or none, where they do: up to three times the error of more."""
    grid: int = 5
    """Intervals of each edge's grid; an edge has grid + 4 coefficients."""
    fit_steps: int = 200
    """Steps of L-BFGS; half as many for the sparse phase, and for the refit after pruning."""
    learning_rate: float = 1.0
    """Length of the first step of each line search."""
    starts: int = 8
    """Random networks that are trained a little, of which the best is trained on."""
    sparsity: float = 1e-3
    """Weight of the edges' L1 norm and entropy in the second phase; 0 leaves it out."""
    prune: float = 0.02
    """Edges of less importance are cut: share in their node's deviation, times what the node is worth."""
    symbolic: bool = False
    """Replace edges by functions out of a library, and write out the formula."""
    least_r2: float = 0.98
    """Share of its variance that a function has to explain to replace an edge; others stay splines."""
    max_error: float = 0.05
    """Largest relative RMS error of an MLP's output that is kept; other sites are left as they were."""

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: a number is out of range.
        """
        for option, least in (("hidden", 0), ("grid", 1), ("fit_steps", 0), ("starts", 1), ("sparsity", 0)):
            if getattr(self, option) < least:
                raise ValueError(f"expected {option} of at least {least}, got {getattr(self, option)}")
        for option in ("learning_rate", "max_error"):
            if not getattr(self, option) > 0:
                raise ValueError(f"expected {option} above 0, got {getattr(self, option)}")
        for option in ("prune", "least_r2"):
            if not 0 <= getattr(self, option) < 1:
                raise ValueError(f"expected {option} of at least 0 and below 1, got {getattr(self, option)}")

    def tolerance(self, dtype: torch.dtype) -> Tolerance:
        """A fitted MLP is held against `max_error`."""
        return Tolerance(self.max_error, "option max_error")

    def check(self, site: MlpSite) -> str | None:
        """A KAN has some ten numbers where an MLP has one."""
        inputs, outputs = site.up.in_features, site.down.out_features
        edges = (inputs + outputs) * self.hidden if self.hidden else inputs * outputs
        each = self.grid + ORDER + 1
        if edges * each > LARGEST:
            advice = "a smaller grid" if self.hidden == 0 else "fewer hidden nodes or a smaller grid"
            return f"{edges:,} edges of {each:,} coefficients are more than {LARGEST:,}; use {advice}, or another pass"
        if not self.hidden and inputs * each > WIDEST:
            return f"{inputs:,} inputs with {each:,} coefficients each are more than {WIDEST:,}; use hidden nodes"
        return None

    def build(self, site: MlpSite, context: Context) -> nn.Module:
        """A network that gives 0; `fit` puts a fitted one in its place, once it has seen what enters the site."""
        ones = torch.ones(site.up.in_features)
        return Distilled(SplineNetwork([SplineLayer(-ones, ones, site.down.out_features, self.grid)]))

    def fit(self, replacements: Sequence[Replacement], context: Context) -> None:
        """Distil each MLP on up to 4,096 tokens of the training batches."""
        steps = self.fit_steps if context.fit_steps is None else context.fit_steps
        for replacement in context.track(replacements, len(replacements), "Fitting splines"):
            x, y = _samples(replacement, context)
            replacement.module = self.distil(x, y, context.generator(), steps)

    def distil(
        self, x: Tensor, y: Tensor, generator: torch.Generator | None = None, steps: int | None = None
    ) -> Distilled:
        """The network, or the formulas, for samples of a function; `graphopt.fit.formula.formulas` reads it.

        Args:
            x: inputs [N, d_in].
            y: outputs [N, d_out].
            generator: of the random starts; seed 0 without one.
            steps: in place of `fit_steps`.

        Raises:
            CheckFailed: the training diverged.
        """
        steps = self.fit_steps if steps is None else steps
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        dtype = y.dtype
        x, y = x.double(), y.double()
        # Coefficients of about 1 whatever the units of the outputs.
        centre, scale = y.mean(0), y.std(0, correction=0).clamp(min=1e-12)
        network = self._trained(x, (y - centre) / scale, generator, steps)
        _rescale(network, centre, scale)
        if not self.symbolic:
            return Distilled(network, dtype=dtype)
        if network.edges[0] > MOST_SYMBOLIC:
            return Distilled(network, None, dtype, f"{network.edges[0]} edges are too many for formulas")
        found = Distilled(network, find_formulas(network, x, y, self.least_r2).module, dtype)
        # The search has seen some of the samples, in fp64.
        error = difference(y, found(x.to(dtype))).rel_rms
        if not error <= self.max_error:  # also true of NaN
            return Distilled(network, None, dtype, f"the splines stay: the formula's relative RMS error is {error:.3g}")
        return found

    def _trained(self, x: Tensor, y: Tensor, generator: torch.Generator, steps: int) -> SplineNetwork:
        smallest = 0 if x.shape[1] * (self.grid + ORDER + 1) <= WIDEST else 1
        sizes = range(min(smallest, self.hidden), self.hidden + 1) if self.grow else (self.hidden,)
        found = [self._network(hidden, x, y, generator, steps) for hidden in sizes]
        with torch.no_grad():
            errors = [float((network(x) - y).square().mean().sqrt()) for network in found]
        network = next(n for n, error in zip(found, errors, strict=True) if error <= _WITHIN * min(errors))
        deep = len(network.layers) > 1
        if deep and self.sparsity:
            fit_network(network, x, y, steps // 2, self.learning_rate, self.sparsity)
        if self.prune:
            network.prune(x, self.prune)
        if not deep:
            network.spline_layers()[0].solve(x, y)
        elif self.sparsity or self.prune:
            fit_network(network, x, y, steps // 2, self.learning_rate)
        return network

    def _network(self, hidden: int, x: Tensor, y: Tensor, generator: torch.Generator, steps: int) -> SplineNetwork:
        widths = (hidden, y.shape[1]) if hidden else (y.shape[1],)
        first = min(steps, _START_STEPS)
        network = best_of(self.starts, x, y, widths, self.grid, first, self.learning_rate, generator)
        if hidden:
            fit_network(network, x, y, steps - first, self.learning_rate)
        return network

    def review(self, graph: Graph, replacement: Replacement, context: Context) -> tuple[Status, str]:
        """Say what it became."""
        site, module = replacement.site, replacement.module
        assert isinstance(site, MlpSite)
        assert isinstance(module, Distilled)
        layers = [layer for layer in (site.up, site.gate, site.down) if layer is not None]
        before = sum((x.in_features + (x.bias is not None)) * x.out_features for x in layers)
        after = module.numbers
        replacement.errors |= {
            "parameters_before": float(before),
            "parameters_after": float(after),
            "edges": float(module.edges[0]),
            "edges_before": float(module.edges[1]),
        }
        text = f"{before:,} parameters become {after:,}, {module.edges[0]:,} of {module.edges[1]:,} edges are kept"
        if module.formula is None:
            return "rewritten", f"{text}; {module.reason}" if module.reason else text
        return "rewritten", f"{text}; {shown(formulas(module))}"


class Distilled(nn.Module):
    """A spline network, or the formulas that took its place: [.., d_in] -> [.., d_out]; computed in fp32."""

    def __init__(
        self,
        network: SplineNetwork,
        formula: Formula | None = None,
        dtype: torch.dtype = torch.float32,
        reason: str = "",
    ) -> None:
        """Keep what computes the output, in fp32.

        Args:
            network: the fitted network.
            formula: what takes its place.
            dtype: of the output.
            reason: why there is none although one was asked for.
        """
        super().__init__()
        self.edges = network.edges
        self.formula = None if formula is None else formula.float()
        self.network = None if formula is not None else network.float()
        self.dtype = dtype
        self.reason = reason
        for layer in self.modules():
            if isinstance(layer, SplineLayer):
                layer.fold()

    @property
    def numbers(self) -> int:
        """Parameters, and the numbers in formulas."""
        stored = sum(p.numel() for p in self.parameters())
        if self.formula is None:
            return stored
        kinds = (sympy.Number, sympy.NumberSymbol)
        return stored + len({number for e in self.formula.expressions for number in e.atoms(*kinds)})

    def forward(self, x: Tensor) -> Tensor:
        """The fitted function of x [.., d_in]."""
        wide = x.to(torch.float32)
        value: Tensor = self.network(wide) if self.formula is None else self.formula(wide)  # type: ignore[misc]
        return value.to(self.dtype)


def shown(expressions: Sequence[sympy.Expr], digits: int = 5) -> str:
    """Expressions in one line, their constants with a few digits."""
    parts = []
    for index, expression in enumerate(expressions):
        short = expression.xreplace({f: sympy.Float(f, digits) for f in expression.atoms(sympy.Float)})
        parts.append(f"y_{index} = {short}")
    text = "; ".join(parts)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _samples(replacement: Replacement, context: Context) -> tuple[Tensor, Tensor]:
    """Tokens [N, d_in] and [N, d_out] of the training batches, as many of each batch."""
    batches = context.training()
    share = -(-_SAMPLES // len(batches))
    generator, kept = context.generator(), []
    for index in batches:
        x, y = replacement.record.inputs(index)[0].flatten(0, -2), replacement.record.output(index).flatten(0, -2)
        chosen = torch.randperm(len(x), generator=generator)[:share]
        kept.append((x[chosen], y[chosen]))
    return torch.cat([x for x, _ in kept]), torch.cat([y for _, y in kept])


@torch.no_grad()
def _rescale(network: SplineNetwork, centre: Tensor, scale: Tensor) -> None:
    """Let a network of standardised outputs give them in their own units."""
    last = network.spline_layers()[-1]
    last.base.mul_(scale.unsqueeze(1))
    last.coefficients.mul_(scale[:, None, None])
    last.add_constants(centre)
