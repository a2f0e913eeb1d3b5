"""Spline layers and networks: the closed basis, least squares, grids, and pruning."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.interpolate import BSpline

from graphopt.fit.spline_training import best_of, fit_network
from graphopt.fit.splines import SplineLayer, SplineNetwork, bounds, cubic_basis

CLOSE = 1e-12  # fp64, sums of a few dozen terms of about 1


def samples(count=300, inputs=3, seed=0):
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(inputs=3, outputs=2, grid=4, seed=1):
    low = torch.linspace(-2.0, -1.0, inputs, dtype=torch.float64)
    return SplineLayer(low, low + 3.5, outputs, grid, torch.Generator().manual_seed(seed))


def network(x, *widths, seed=1):
    return SplineNetwork.around(x, widths, 4, torch.Generator().manual_seed(seed))


def scipy_spline(grid, index):
    return BSpline(np.arange(-3.0, grid + 4.0), np.eye(grid + 3)[index], 3)


@pytest.mark.parametrize("grid", [1, 2, 5])
def test_the_basis_is_that_of_scipy(grid):
    u = np.linspace(0, grid, 61)
    expected = np.stack([scipy_spline(grid, k)(u) for k in range(grid + 3)], axis=1)
    np.testing.assert_allclose(cubic_basis(torch.from_numpy(u), grid).numpy(), expected, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("grid", [1, 5])
def test_beyond_its_grid_each_spline_is_the_tangent_of_its_end(grid):
    far = np.array([0.0, 0.5, 40.0])
    found = [cubic_basis(torch.from_numpy(u), grid).numpy() for u in (-far, grid + far)]
    for k in range(grid + 3):
        spline = scipy_spline(grid, k)
        for end, values, sign in ((0.0, found[0], -1.0), (float(grid), found[1], 1.0)):
            slope = float(spline.derivative()(end))
            np.testing.assert_allclose(values[:, k], float(spline(end)) + sign * far * slope, rtol=0, atol=CLOSE)


def test_a_layer_is_the_sum_of_its_edges():
    module, x = layer(), samples(40)
    x[0] = 9.0  # outside of all grids
    with torch.no_grad():
        module.mask[0, 1] = 0
    expected = np.zeros((40, 2))
    for o in range(2):
        for i in range(3):
            if (o, i) == (0, 1):
                continue
            low, high = float(module.low[i]), float(module.high[i])
            u = (x[:, i].numpy() - low) / (high - low) * module.grid
            inside = np.clip(u, 0, module.grid)
            for k, c in enumerate(module.coefficients[o, i].tolist()):
                spline = scipy_spline(module.grid, k)
                expected[:, o] += c * (spline(inside) + spline.derivative()(inside) * (u - inside))
            expected[:, o] += module.base[o, i].item() * F.silu(x[:, i]).numpy()
    with torch.no_grad():
        np.testing.assert_allclose(module(x).numpy(), expected, rtol=0, atol=1e-10)  # up to 40 steps outside
        torch.testing.assert_close(module.edges(x).sum(-1), module(x))
        before = module(x)
        module.fold()
        torch.testing.assert_close(module(x), before)


def test_gradients():
    module = layer()
    x = samples(5).requires_grad_()

    def value(x, base, coefficients):
        return torch.func.functional_call(module, {"base": base, "coefficients": coefficients}, (x,))

    assert torch.autograd.gradcheck(value, (x, module.base, module.coefficients))


def test_nan_stays_nan():
    x = samples(2)
    x[0, 0] = float("nan")
    found = layer()(x)
    assert bool(found[0].isnan().all())
    assert bool(found[1].isfinite().all())


def test_solving_reaches_the_least_squares_minimum():
    x = samples()
    y = torch.stack([x.prod(1), torch.sin(x[:, 0])], 1)
    module = SplineLayer(*bounds(x), 2, 4)
    module.mask[1, 2] = 0
    module.solve(x, y)
    columns = torch.cat([F.silu(x).unsqueeze(-1), module.basis(x)], -1).numpy()
    for o, kept in ((0, [0, 1, 2]), (1, [0, 1])):
        design = columns[:, kept].reshape(len(x), -1)
        best = design @ np.linalg.lstsq(design, y[:, o].numpy(), rcond=None)[0]
        # The ridge of 1e-10 moves the directions of little weight.
        np.testing.assert_allclose(module(x)[:, o].detach().numpy(), best, rtol=0, atol=1e-4)


def test_a_new_grid_keeps_the_functions():
    x = samples()
    module = layer(grid=20)
    inner = x.clamp(-0.8, 0.8)
    with torch.no_grad():  # a smooth curve, which splines on another grid come close to
        knots = module.centres / module.grid * 3.5 + module.low[:, None]
        module.coefficients.copy_(torch.sin(knots).expand(2, 3, -1))
        before = module(inner)
        module.regrid(inner)
        assert float((module(inner) - before).abs().max()) < 1e-4  # h^4 / 384 with h = 3.5 / 20 is 2e-6 for each edge
    torch.testing.assert_close(torch.stack([module.low, module.high]), torch.stack(bounds(inner)))


def test_importance_is_the_share_of_the_deviation():
    x = samples(2000, 2)
    module = network(x, 3, 1)
    with torch.no_grad():
        module.layers[1].mask[0, 2] = 0
    entering = module.layers[0](x).detach()
    first, second = module.importance(x)
    with torch.no_grad():
        values = module.layers[1].edges(entering)
        expected = values.std(0) / values.sum(-1).std(0)[:, None]
        torch.testing.assert_close(second, expected)
        inner = module.layers[0].edges(x)
        torch.testing.assert_close(first, inner.std(0) / inner.sum(-1).std(0)[:, None] * expected[0][:, None])
    assert float(first[2].max()) == 0


def test_pruning_cuts_what_does_nothing_and_leaves_the_rest():
    x = samples(500, 3)
    module = network(x, 4, 2)
    first, second = module.layers
    with torch.no_grad():
        first.coefficients[1, 2] = 0.7  # a constant
        first.base[1, 2] = 0
        first.coefficients[2] = 0.3  # a node that is constant
        first.base[2] = 0
        second.coefficients[:, 3] = 0.1  # a node that adds constants alone
        second.base[:, 3] = 0
        before = module(x)
        kept = first.edges(x)[:, 0]
        module.prune(x, 1e-6)
        torch.testing.assert_close(module(x), before)
    assert [(m.outputs, m.inputs) for m in module.layers] == [(2, 3), (2, 2)]
    assert module.edges == (9, 20)
    with torch.no_grad():
        torch.testing.assert_close(module.layers[0].edges(x)[:, 0], kept)


def test_pruning_everything_leaves_one_edge_per_output():
    x = samples(200, 3)
    module = network(x, 2)
    mean = module(x).mean(0).detach()
    module.prune(x, 10.0)
    assert module.layers[0].mask.sum(1).tolist() == [1, 1]
    torch.testing.assert_close(module(x).mean(0).detach(), mean)


def test_training_lowers_the_error_and_sparsity_the_number_of_edges():
    x = samples(400, 3).clamp(-2, 2)
    y = (x[:, :1] * x[:, 1:2] + 0.5 * x[:, 1:2]).double()
    y = (y - y.mean()) / y.std()
    module = best_of(3, x, y, (3, 1), 4, 20, 1.0, torch.Generator().manual_seed(0))
    start = fit_network(module, x, y, 10)
    assert fit_network(module, x, y, 60) < 0.5 * start
    fit_network(module, x, y, 60, sparsity=3e-3)
    module.prune(x, 0.02)
    # x_2 does nothing.
    assert float(module.layers[0].mask[:, 2].sum()) == 0
    assert fit_network(module, x, y, 30) < 0.01
