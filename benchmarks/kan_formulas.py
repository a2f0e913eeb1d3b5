"""Known formulas, learned by an MLP, and read back out of it by the pass `kan`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import sympy
import torch
from torch import nn

import graphopt
from benchmarks.common import show, store
from graphopt.fit.formula import variables
from graphopt.passes.mlp.kan import Kan

x, y = variables(2)
FORMULAS: dict[str, tuple[sympy.Expr, int]] = {
    "sin(pi x) + y^2": (sympy.sin(sympy.pi * x) + y**2, 3),
    "exp(sin(pi x) + y^2)": (sympy.exp(sympy.sin(sympy.pi * x) + y**2), 3),
    "x y": (x * y, 3),
    "sqrt(x^2 + y^2)": (sympy.sqrt(x**2 + y**2), 3),
    "x exp(y)": (x * sympy.exp(y), 3),
    "tanh(2 x + y)": (sympy.tanh(2 * x + y), 3),
    "exp(x y)": (sympy.exp(x * y), 3),  # a product within a function takes a layer more than the pass has
}
"""By name, with the number of hidden nodes that the pass may use; how many it needs, it is not told."""
SEEDS = 3
_SAMPLES, _HELD_OUT, _WIDTH = 4000, 1000, 64
_STEPS = 3000
_CLOSE = 1e-2


def run() -> None:
    """Train, rewrite, and compare on points that nothing was fitted on."""
    rows = [row(name, seed) for name in FORMULAS for seed in range(SEEDS)]
    columns = ["formula", "seed", "recovered", "found", "MLP to truth", "to truth", "to MLP", "numbers", "seconds"]
    keys = (
        "formula",
        "seed",
        "recovered",
        "found",
        "mlp_to_truth",
        "to_truth",
        "to_mlp",
        "parameters_after",
        "seconds",
    )
    show("Largest difference on held-out points of [-1, 1]^2", columns, [[r[key] for key in keys] for r in rows])
    store("kan_formulas", {"samples": _SAMPLES, "width": _WIDTH, "options": str(options(3)), "rows": rows})


def options(hidden: int) -> Kan:
    """The pass as it is measured."""
    return Kan(hidden=hidden, grow=True, symbolic=True)


def row(name: str, seed: int) -> dict[str, Any]:
    """One formula and one seed."""
    expression, hidden = FORMULAS[name]
    truth = _function(expression)
    model, batches = trained(truth, seed)
    started = time.perf_counter()
    result = graphopt.load(model, batches[0]).apply([options(hidden)], calibration=batches, seed=seed)
    seconds = time.perf_counter() - started
    site = result.report.passes[0].sites[0]
    points = 2 * torch.rand(_HELD_OUT, 2, generator=torch.Generator().manual_seed(1000 + seed)) - 1
    with torch.no_grad():
        wanted, learned = truth(points), model(points)
        found = result.graph.execute(points)[0]
    text = site.reason.partition("y_0 = ")[2]
    return {
        "formula": name,
        "seed": seed,
        "status": site.status,
        "report": site.reason,
        "found": text or "no formula",
        "recovered": bool(text) and is_recovered(text, expression),
        "mlp_to_truth": float((learned - wanted).abs().max()),
        "to_truth": float((found - wanted).abs().max()),
        "to_mlp": float((found - learned).abs().max()),
        "parameters_before": site.errors.get("parameters_before"),
        "parameters_after": site.errors.get("parameters_after"),
        "seconds": seconds,
    }


def trained(truth: Callable[[torch.Tensor], torch.Tensor], seed: int) -> tuple[nn.Module, list[Any]]:
    """An MLP 2 -> 64 -> 1 that has learned a function, and its training points as calibration batches."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, _WIDTH), nn.SiLU(), nn.Linear(_WIDTH, 1))
    points = 2 * torch.rand(_SAMPLES, 2) - 1
    wanted = truth(points)
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=_STEPS, history_size=30, line_search_fn="strong_wolfe", tolerance_change=1e-12
    )

    def loss() -> float:
        optimizer.zero_grad()
        value = (model(points) - wanted).square().mean()
        value.backward()
        return float(value.detach())

    optimizer.step(loss)
    return model.eval(), [(part,) for part in points.split(200)]


def is_recovered(text: str, truth: sympy.Expr) -> bool:
    """Whether a formula is the true one once each constant is moved by at most 1e-2 to a simple number."""
    found = sympy.sympify(text, locals={s.name: s for s in (x, y)})
    moved = {
        f: next((n for n in _simple(float(f)) if abs(float(n) - f) <= _CLOSE), f) for f in found.atoms(sympy.Float)
    }
    return bool(sympy.simplify(sympy.expand(found.xreplace(moved) - truth)) == 0)


def _simple(value: float) -> list[sympy.Expr]:
    return [sympy.Rational(round(2 * value), 2), round(value / np.pi) * sympy.pi]


def _function(expression: sympy.Expr) -> Callable[[torch.Tensor], torch.Tensor]:
    compiled = sympy.lambdify((x, y), expression, "numpy")
    return lambda points: torch.from_numpy(compiled(*points.double().numpy().T)).float().unsqueeze(1)
