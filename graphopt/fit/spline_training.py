"""Training spline networks on all samples at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.errors import CheckFailed
from graphopt.fit.splines import SplineNetwork

_CHUNK = 10
"""Steps of L-BFGS between two looks at the loss."""
_TINY = 1e-12
_RIDGE = 1e-10
_START_RIDGE = 1e-6
"""Random inputs of a last layer may be nearly alike; what is trained next should not start with huge numbers."""


def fit_network(
    network: SplineNetwork,
    x: Tensor,
    y: Tensor,
    steps: int,
    learning_rate: float = 1.0,
    sparsity: float = 0.0,
) -> float:
    """Train on all samples at once with L-BFGS; the loss is the squared error over the variance of y.

    Args:
        network: trained in place; give it in fp64.
        x: inputs [N, d_0].
        y: wanted values [N, d_L].
        steps: iterations of L-BFGS.
        learning_rate: length of the first step of each line search.
        sparsity: weight of the L1 norm of the edges and of its entropy (Liu et al., 2024, section 2.5).

    Returns:
        The last loss.

    Raises:
        CheckFailed: the loss became NaN or infinite.
    """
    variance = (y - y.mean(0)).square().mean().clamp(min=_TINY)
    optimizer = torch.optim.LBFGS(
        network.parameters(),
        lr=learning_rate,
        max_iter=_CHUNK,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
    )
    scales = [v.std(0, correction=0).clamp(min=_TINY) for v in network.values(x)[1:]]

    def loss() -> float:
        optimizer.zero_grad()
        value = (network(x) - y).square().mean() / variance
        if sparsity:
            value = value + sparsity * _density(network, x, scales)
        value.backward()
        return float(value.detach())

    last = float("nan")
    for _ in range(0, steps, _CHUNK):
        last = optimizer.step(loss)
        if not last < float("inf"):
            raise CheckFailed(
                "fitting splines diverged; lower learning_rate, or raise the number of calibration batches"
            )
    optimizer.zero_grad()
    return last


def _density(network: SplineNetwork, x: Tensor, scales: Sequence[Tensor]) -> Tensor:
    """L1 norm of the edges' mean deviations, and their entropy within each layer."""
    total = x.new_zeros(())
    for layer, scale in zip(network.spline_layers(), scales, strict=True):
        values = layer.edges(x)
        size = (values - values.mean(0)).abs().mean(0)
        share = size / size.sum().clamp(min=_TINY)
        entropy = -(share * (share + _TINY).log()).sum()
        total = total + (size / scale.unsqueeze(1)).sum() + entropy
        x = values.sum(-1)
    return total


def best_of(
    starts: int,
    x: Tensor,
    y: Tensor,
    widths: Sequence[int],
    grid: int,
    steps: int,
    learning_rate: float,
    generator: torch.Generator,
) -> SplineNetwork:
    """Of several networks, each trained a little from its own random functions, the one with the least error.

    About half of all starts of a network with few nodes end in a poor local minimum; which, shows early.

    Args:
        starts: how many networks.
        x: inputs [N, d_0].
        y: wanted values [N, d_L].
        widths: d_1 .. d_L; with one layer there is nothing to choose, it is solved for.
        grid: intervals per grid.
        steps: iterations for each of them.
        learning_rate: see `fit_network`.
        generator: of the random functions.
    """
    found: list[tuple[float, SplineNetwork]] = []
    for _ in range(starts if len(widths) > 1 else 1):
        network = SplineNetwork.around(x, widths, grid, generator)
        network.spline_layers()[-1].solve(network.values(x)[-2], y, _START_RIDGE if len(widths) > 1 else _RIDGE)
        if steps and len(widths) > 1:
            fit_network(network, x, y, steps, learning_rate)
            network.regrid(x)
        with torch.no_grad():
            found.append((float((network(x) - y).square().mean()), network))
    return min(found, key=lambda pair: pair[0])[1]
