"""The `snnk` pass: a whole MLP as random features and one linear layer, fitted in closed form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from graphopt.rewrite import Context, Equivalence, Replacement, SitePass, Tolerance
from graphopt.sites import MlpSite

if TYPE_CHECKING:
    from graphopt.graph import Graph
    from graphopt.rewrite.report import Status


@dataclass(frozen=True)
class Snnk(SitePass):
    """W2 f(W1 x + b1) + b2   ->   A relu(G x + g) + B x + c,   G and g random, A, B, c by ridge regression

    A network's layer is a kernel of its weights and its input, and random features of the input stand for it: the two
    layers of an MLP collapse into one matrix. With m features it has m (d_in + d_out) parameters in place of
    h (d_in + d_out), and as many multiplications; G comes from a seed and is not trained.

    Sehanobish et al., "Scalable Neural Network Kernels" (2024), fitted after training rather than with it.
    """

    name: ClassVar[str] = "snnk"
    kind: ClassVar[str] = "mlp"
    equivalence: ClassVar[Equivalence] = Equivalence.TRAINED
    needs_calibration: ClassVar[bool] = True

    features: int = 0
    """m, how many random features; 0 means half of the hidden width."""
    skip: bool = True
    """Beside the features, the input itself: B x."""
    ridge: float = 1e-4
    """Weight of the squared coefficients, relative to the mean square of a feature."""
    max_error: float = 0.5
    """Largest relative RMS error of an MLP's output that is kept; other sites are left as they were."""

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: a number is out of range.
        """
        if self.features < 0:
            raise ValueError(f"expected features of at least 0, got {self.features}")
        for option in ("ridge", "max_error"):
            if not getattr(self, option) > 0:
                raise ValueError(f"expected {option} above 0, got {getattr(self, option)}")

    def tolerance(self, dtype: torch.dtype) -> Tolerance:
        """A fitted MLP is held against `max_error`."""
        return Tolerance(self.max_error, "option max_error")

    def check(self, site: MlpSite) -> str | None:
        """More features than hidden units would save nothing."""
        if self.features >= site.up.out_features:
            return f"its hidden width is {site.up.out_features}, so features={self.features} would save nothing"
        return None

    def build(self, site: MlpSite, context: Context) -> RandomFeatures:
        """Random features and zeros behind them; `fit` solves for these."""
        count = self.features or site.up.out_features // 2
        return RandomFeatures(site.up.in_features, site.down.out_features, count, self.skip, context.generator())

    def fit(self, replacements: Sequence[Replacement], context: Context) -> None:
        """Ridge regression of each MLP's output on its features, over all tokens of the training batches."""
        for replacement in context.track(replacements, len(replacements), "Fitting random features"):
            module = replacement.module
            assert isinstance(module, RandomFeatures)
            batches = context.training()
            record = replacement.record
            # One batch at a time: what was recorded may not fit into memory.
            module.standardise(_tokens(record.inputs(i)[0]) for i in batches)
            pairs = ((_tokens(record.inputs(i)[0]), _tokens(record.output(i))) for i in batches)
            module.solve(pairs, self.ridge)

    def review(self, graph: Graph, replacement: Replacement, context: Context) -> tuple[Status, str]:
        """Say what was saved."""
        site, module = replacement.site, replacement.module
        assert isinstance(site, MlpSite)
        layers = [layer for layer in (site.up, site.gate, site.down) if layer is not None]
        before = sum(layer.in_features * layer.out_features for layer in layers)
        after = sum(p.numel() for p in (*module.parameters(), *module.buffers()))
        replacement.errors |= {"parameters_before": float(before), "parameters_after": float(after)}
        return "rewritten", f"{before:,} weights become {after:,}"


class RandomFeatures(torch.nn.Module):
    """A relu(G x + g) + B x + c: [.., d_in] -> [.., d_out]."""

    directions: torch.Tensor
    offsets: torch.Tensor

    def __init__(self, inputs: int, outputs: int, features: int, skip: bool, generator: torch.Generator) -> None:
        """Random directions, zero coefficients.

        Args:
            inputs: d_in.
            outputs: d_out.
            features: m.
            skip: whether there is a B.
            generator: gives the directions.
        """
        super().__init__()
        self.register_buffer("directions", torch.randn(inputs, features, generator=generator))
        self.register_buffer("offsets", torch.randn(features, generator=generator))
        self.coefficients = torch.nn.Parameter(torch.zeros(features, outputs))
        self.skip = torch.nn.Parameter(torch.zeros(inputs, outputs)) if skip else None
        self.constant = torch.nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The fitted function of x [.., d_in], in the type of x."""
        wide = x.to(torch.float32)
        y = torch.relu(wide @ self.directions + self.offsets) @ self.coefficients + self.constant
        if self.skip is not None:
            y = y + wide @ self.skip
        return y.to(x.dtype)

    @torch.no_grad()
    def standardise(self, batches: Iterable[torch.Tensor]) -> None:
        """Give each direction a product with the inputs [N, d_in], in parts, of deviation 1, and centre it."""
        count, total, squares = 0, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        for x in batches:
            products = (x @ self.directions).double()
            count += len(products)
            total, squares = total + products.sum(0), squares + products.square().sum(0)
        mean = total / count
        variance = (squares - count * mean.square()) / max(1, count - 1)
        deviation = variance.clamp(min=0).sqrt().float().clamp(min=1e-6)
        self.offsets -= mean.float() / deviation
        self.directions /= deviation

    @torch.no_grad()
    def solve(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], ridge: float) -> None:
        """The coefficients that minimise the squared error over x [N, d_in], y [N, d_out] in parts; fp64 sums."""
        size = self.coefficients.shape[0] + (0 if self.skip is None else self.skip.shape[0]) + 1
        gram = torch.zeros(size, size, dtype=torch.float64)
        mixed = torch.zeros(size, self.constant.shape[0], dtype=torch.float64)
        for x, y in pairs:
            columns = [torch.relu(x @ self.directions + self.offsets)]
            columns += [] if self.skip is None else [x]
            design = torch.cat([*columns, torch.ones(len(x), 1)], dim=1).double()
            gram += design.T @ design
            mixed += design.T @ y.double()
        strength = ridge * gram.diagonal().mean()
        gram.diagonal()[:-1].add_(strength)  # the constant is free
        found = torch.linalg.solve(gram + 1e-12 * strength * torch.eye(size, dtype=torch.float64), mixed)
        m = self.coefficients.shape[0]
        self.coefficients.copy_(found[:m])
        if self.skip is not None:
            self.skip.copy_(found[m:-1])
        self.constant.copy_(found[-1])


def _tokens(value: Any) -> torch.Tensor:
    """[.., d] -> [N, d] in fp32."""
    flat: torch.Tensor = value.to(torch.float32).flatten(0, -2)
    return flat
