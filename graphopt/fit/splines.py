"""Kolmogorov-Arnold networks: layers whose edges are functions of one variable, as cubic B-splines on uniform grids.

Liu et al., "KAN: Kolmogorov-Arnold Networks" (2024); the layout of the coefficients is that of efficient-kan.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ORDER = 3
"""Of the splines: cubic."""
_MARGIN = 0.02
"""How much wider than its samples a grid is, on each side, relative to their range."""
_NARROWEST = 1e-3
_RIDGE = 1e-10
_NOISE = 1.0
"""Deviation of random coefficients: curves that bend, from which half of all short trainings end well."""
_TINY = 1e-12


def cubic_basis(u: Tensor, intervals: int) -> Tensor:
    """All cubic B-splines on the knots .., -1, 0, 1, .. that reach into [0, intervals], straight outside of it.

    In closed form: B3(t) = (relu(2 - |t|)^3 - 4 relu(1 - |t|)^3) / 6, centred at -1, 0, .., intervals + 1. Beyond the
    ends each spline goes on with the value and the slope that it has there, so their sum is 1 everywhere.

    Args:
        u: positions in units of the knots' distance [..].
        intervals: how many the grid has.

    Returns:
        [.., intervals + 3].
    """
    centres = torch.arange(-1.0, intervals + 2.0, dtype=u.dtype, device=u.device)
    return _basis(u, centres, *_slopes(intervals, u.dtype, u.device))


def _basis(u: Tensor, centres: Tensor, left: Tensor, right: Tensor) -> Tensor:
    intervals = float(len(centres) - ORDER)
    wide = u.unsqueeze(-1)
    distance = torch.abs(torch.clamp(wide, 0.0, intervals) - centres)
    outer, inner = torch.relu(2.0 - distance), torch.relu(1.0 - distance)
    value = (outer * outer * outer - inner * inner * inner * 4.0) * (1.0 / 6.0)
    # An MLP is straight far out; splines that vanish would drop to silu alone right behind the calibrated range.
    return value + torch.relu(wide - intervals) * right - torch.relu(0.0 - wide) * left


def _slopes(intervals: int, dtype: torch.dtype, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Slope of each spline at the first and at the last knot [K]."""
    left = torch.zeros(intervals + ORDER, dtype=dtype, device=device)
    left[0], left[2] = -0.5, 0.5
    return left, -left.flip(0)


class SplineLayer(nn.Module):
    """y_j = sum_i mask_ij (w_ij silu(x_i) + sum_k c_ijk B3((x_i - t_k) / h_i)): [.., I] -> [.., O].

    Outside of an input's grid its splines are continued by straight lines with the value and slope of their end.
    """

    low: Tensor
    scale: Tensor
    centres: Tensor
    left: Tensor
    right: Tensor
    mask: Tensor

    def __init__(
        self, low: Tensor, high: Tensor, outputs: int, grid: int = 5, generator: torch.Generator | None = None
    ) -> None:
        """Random functions of about unit variance in total.

        Args:
            low: where the grid of each input begins [I].
            high: where it ends [I].
            outputs: O.
            grid: intervals per grid; K = grid + 3 splines per edge.
            generator: of the functions; without one they are zero.
        """
        super().__init__()
        inputs, splines = len(low), grid + ORDER
        self.grid = grid
        self.folded = False
        self.register_buffer("low", low.clone())
        self.register_buffer("scale", grid / (high - low))
        self.register_buffer("centres", torch.arange(-1.0, grid + 2.0, dtype=low.dtype))
        left, right = _slopes(grid, low.dtype)
        self.register_buffer("left", left)
        self.register_buffer("right", right)
        self.register_buffer("mask", torch.ones(outputs, inputs, dtype=low.dtype))
        base = torch.zeros(outputs, inputs)
        noise = torch.zeros(outputs, inputs, splines)
        if generator is not None:
            base = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
            noise = _NOISE * torch.randn(outputs, inputs, splines, generator=generator) / inputs**0.5
        self.base = nn.Parameter(base.to(low.dtype))
        self.coefficients = nn.Parameter(noise.to(low.dtype))

    @property
    def inputs(self) -> int:
        """I."""
        return self.base.shape[1]

    @property
    def outputs(self) -> int:
        """O."""
        return self.base.shape[0]

    @property
    def high(self) -> Tensor:
        """Where the grids end [I]."""
        return self.low + self.grid / self.scale

    def basis(self, x: Tensor) -> Tensor:
        """Values of the splines at x [.., I]: [.., I, K]."""
        return _basis((x - self.low) * self.scale, self.centres, self.left, self.right)

    def forward(self, x: Tensor) -> Tensor:
        """The sums over the edges, for x [.., I]."""
        splines: Tensor = self.coefficients
        base: Tensor = self.base
        if not self.folded:
            splines, base = splines * self.mask.unsqueeze(-1), base * self.mask
        return F.linear(self.basis(x).flatten(-2), splines.flatten(1)) + F.linear(F.silu(x), base)

    @torch.no_grad()
    def fold(self) -> None:
        """Write the mask into the coefficients, so that inference need not multiply by it; ends the training."""
        self.coefficients.mul_(self.mask.unsqueeze(-1))
        self.base.mul_(self.mask)
        self.folded = True

    def edges(self, x: Tensor) -> Tensor:
        """What each edge adds at x [N, I]: [N, O, I]."""
        splines = torch.einsum("nik,oik->noi", self.basis(x), self.coefficients)
        values: Tensor = (splines + F.silu(x).unsqueeze(1) * self.base) * self.mask
        return values

    @torch.no_grad()
    def importance(self, x: Tensor) -> Tensor:
        """Standard deviation of each edge's values at x [N, I] over that of its node's sums [O, I]."""
        node: Tensor = self(x).std(0, correction=0).clamp(min=_TINY)
        return self.edges(x).std(0, correction=0) / node.unsqueeze(1)

    @torch.no_grad()
    def solve(self, x: Tensor, y: Tensor, ridge: float = _RIDGE) -> None:
        """The coefficients of all kept edges that minimise the squared error at x [N, I], y [N, O]; nothing is trained.

        Args:
            x: inputs.
            y: wanted sums.
            ridge: weight of the squared coefficients relative to the mean square of a column. The constants that edges
                can exchange have no other ground to stand on.
        """
        # silu in front of the splines of each input: a row of the solution is a row of [base | coefficients].
        columns = torch.cat([F.silu(x).unsqueeze(-1), self.basis(x)], dim=-1).flatten(1).double()
        width = self.centres.numel() + 1
        gram, mixed = columns.T @ columns, columns.T @ y.double()
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        for kept, rows in _same_rows(self.mask):
            index = torch.cat([torch.arange(i * width, (i + 1) * width) for i in kept])
            found = torch.linalg.solve(gram[index][:, index], mixed[index][:, rows])
            parts = found.T.unflatten(1, (len(kept), width)).to(self.base.dtype)
            for row, part in zip(rows, parts, strict=True):
                self.base[row, kept] = part[:, 0]
                self.coefficients[row, kept] = part[:, 1:]

    @torch.no_grad()
    def add_constants(self, constants: Tensor) -> None:
        """Add numbers [O] to the sums: the splines of an edge sum to 1, so each goes into one edge's coefficients."""
        rows, kept = torch.arange(self.outputs), self.mask.argmax(1)
        self.coefficients[rows, kept] += (constants * self.mask.amax(1)).unsqueeze(1)

    @torch.no_grad()
    def regrid(self, x: Tensor) -> None:
        """Lay the grids around x [N, I] anew; the edges' splines are fitted to what they were."""
        low, high = bounds(x)
        points = torch.linspace(0.0, 1.0, 20 * self.grid, dtype=x.dtype).unsqueeze(1)
        # The samples weigh the fit where they are, the even points hold it where there are none.
        samples = torch.cat([x, low + (high - low) * points])
        wanted = torch.einsum("nik,oik->ino", self.basis(samples), self.coefficients)
        self.low.copy_(low)
        self.scale.copy_(self.grid / (high - low))
        design = self.basis(samples).transpose(0, 1)
        self.coefficients.copy_(torch.linalg.lstsq(design, wanted).solution.permute(2, 0, 1))


class SplineNetwork(nn.Module):
    """Spline layers one after the other: [.., d_0] -> [.., d_L]."""

    def __init__(self, layers: Sequence[SplineLayer]) -> None:
        """Args: layers: each takes as many inputs as the one before has outputs."""
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._edges_at_first = sum(layer.mask.numel() for layer in layers)

    @classmethod
    def around(cls, x: Tensor, widths: Sequence[int], grid: int, generator: torch.Generator) -> SplineNetwork:
        """Random functions on grids that hold x and what becomes of it.

        Args:
            x: samples of the input [N, d_0].
            widths: d_1 .. d_L.
            grid: intervals per grid.
            generator: of the functions.
        """
        layers: list[SplineLayer] = []
        with torch.no_grad():
            for width in widths:
                layers.append(SplineLayer(*bounds(x), width, grid, generator))
                x = layers[-1](x)
        return cls(layers)

    def forward(self, x: Tensor) -> Tensor:
        """The network's value at x [.., d_0]."""
        for layer in self.layers:
            x = layer(x)
        return x

    @torch.no_grad()
    def values(self, x: Tensor) -> list[Tensor]:
        """What enters each layer, and the result: L + 1 tensors [N, d]."""
        found = [x]
        for layer in self.layers:
            found.append(layer(found[-1]))
        return found

    @property
    def edges(self) -> tuple[int, int]:
        """How many edges are kept, and how many there were before nodes were taken out."""
        return int(sum(layer.mask.sum().item() for layer in self.spline_layers())), self._edges_at_first

    @torch.no_grad()
    def importance(self, x: Tensor) -> list[Tensor]:
        """Of each edge at samples x [N, d_0]: its share in its node, times what the node is worth behind it.

        A node of the last layer is worth 1, another one as much as the most important edge that leaves it.
        """
        found: list[Tensor] = []
        worth = torch.ones(self.spline_layers()[-1].outputs, dtype=x.dtype)
        for layer, entering in zip(reversed(self.spline_layers()), reversed(self.values(x)[:-1]), strict=True):
            found.insert(0, layer.importance(entering) * worth.unsqueeze(1))
            worth = found[0].amax(0)
        return found

    @torch.no_grad()
    def prune(self, x: Tensor, threshold: float) -> None:
        """Cut the edges whose importance at x [N, d_0] is below `threshold`, and the hidden nodes left without edges.

        A cut edge leaves its mean behind, and every node of the last layer keeps its most important edge.
        """
        entering = self.values(x)
        for index, (layer, score) in enumerate(zip(self.spline_layers(), self.importance(x), strict=True)):
            kept = (score >= threshold) & (layer.mask > 0)
            if index == len(self.layers) - 1:
                kept[torch.arange(layer.outputs), score.argmax(1)] = True
            lost = (layer.edges(entering[index]).mean(0) * ~kept).sum(1)
            layer.mask.copy_(kept.to(layer.mask.dtype))
            layer.add_constants(lost)
        self._drop_nodes()

    def _drop_nodes(self) -> None:
        """Take out the hidden nodes that nothing reaches or that nothing reads."""
        layers = self.spline_layers()
        for before, after in zip(reversed(layers[:-1]), reversed(layers[1:]), strict=True):
            dead = (before.mask.sum(1) == 0) | (after.mask.sum(0) == 0)
            kept = (~dead).nonzero().flatten()
            if not len(kept):  # a constant: one node that stays says so
                kept = kept.new_zeros(1)
            if len(kept) == len(dead):
                continue
            # A node without edges is the number 0.
            constants = after.edges(torch.zeros(1, after.inputs, dtype=after.low.dtype))[0]
            gone = torch.ones_like(dead).index_fill(0, kept, False)
            before.mask = before.mask[kept]
            before.base = nn.Parameter(before.base.detach()[kept])
            before.coefficients = nn.Parameter(before.coefficients.detach()[kept])
            lost = constants[:, gone].sum(1)
            after.mask = after.mask[:, kept]
            after.base = nn.Parameter(after.base.detach()[:, kept])
            after.coefficients = nn.Parameter(after.coefficients.detach()[:, kept])
            after.low, after.scale = after.low[kept], after.scale[kept]
            after.add_constants(lost)

    def regrid(self, x: Tensor) -> None:
        """Lay the grids of all layers but the first around what x [N, d_0] has become."""
        for index, layer in enumerate(self.spline_layers()):
            if index:
                layer.regrid(self.values(x)[index])

    def spline_layers(self) -> list[SplineLayer]:
        """The layers, first to last."""
        return list(self.layers)  # type: ignore[arg-type]  # a ModuleList is one of modules


def bounds(x: Tensor) -> tuple[Tensor, Tensor]:
    """The interval of each column of x [N, I], a little wider: two of [I]."""
    low, high = x.amin(0), x.amax(0)
    margin = (_MARGIN * (high - low)).clamp(min=_NARROWEST)
    return low - margin, high + margin


def _same_rows(mask: Tensor) -> list[tuple[list[int], list[int]]]:
    """Kept inputs, and the outputs that keep just these: they are solved for together."""
    found: dict[tuple[int, ...], list[int]] = {}
    for row, kept in enumerate(mask > 0):
        found.setdefault(tuple(kept.nonzero().flatten().tolist()), []).append(row)
    return [(list(kept), rows) for kept, rows in found.items() if kept]
