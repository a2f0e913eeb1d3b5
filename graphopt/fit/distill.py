"""End-to-end distillation: the rewritten graph learns the original's outputs as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from graphopt.errors import CheckFailed, GraphOptError
from graphopt.fit.layerwise import optimizer_for, shuffled
from graphopt.graph import Graph
from graphopt.rewrite.context import Context

_CLIP = 1.0
# The original's outputs are computed once and kept up to this many bytes; beyond it they are computed anew.
_CACHE_LIMIT = 1_000_000_000


def distill(
    teacher: Graph,
    student: Graph,
    parameters: Sequence[torch.nn.Parameter],
    steps: int,
    learning_rate: float,
    context: Context,
) -> None:
    """Train `parameters` of `student` so that its float outputs approach the teacher's on calibration data.

    The loss of each output is its squared error relative to its mean square, plus 1 - cosine along the last axis:
    the first keeps the size, the second the direction, and neither depends on the output's units.

    Args:
        teacher: the original graph.
        student: the rewritten graph, which holds `parameters`.
        parameters: what to train.
        steps: number of steps; 0 trains nothing.
        learning_rate: peak rate of AdamW; linear warm-up, then cosine to zero.
        context: calibration data, seed, progress bar.

    Raises:
        GraphOptError: no gradient reaches the parameters from any output.
        CheckFailed: the loss became NaN or infinite.
    """
    if not steps:
        return
    optimizer, schedule = optimizer_for(parameters, learning_rate, steps)
    batches = context.calibration.batches
    order = shuffled(context.training(), context.generator())
    outputs = Outputs(teacher)
    for _ in context.track(range(steps), steps, "Distilling end to end"):
        index = next(order)
        expected = outputs.of(index, batches[index])
        found = student.execute(*batches[index])
        loss = output_loss(expected, found)
        if not loss.requires_grad:
            raise GraphOptError("no output depends differentiably on the rewritten sites; use distill_steps=0")
        if not bool(torch.isfinite(loss)):
            raise CheckFailed("end-to-end distillation diverged; lower distill_rate")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()


class Outputs:
    """The teacher's outputs by batch, kept while there is room."""

    def __init__(self, teacher: Graph, chosen: Sequence[int] | None = None) -> None:
        """Args: teacher: the original graph. chosen: which outputs, in order; None is all."""
        self._teacher = teacher
        self._chosen = chosen
        self._kept: dict[int, tuple[Any, ...]] = {}
        self._free = _CACHE_LIMIT

    def of(self, index: int, values: Sequence[Any]) -> tuple[Any, ...]:
        """The outputs on batch `index`, whose inputs are `values`."""
        if index in self._kept:
            return self._kept[index]
        with torch.no_grad():
            found = self._teacher.execute(*values)
        if self._chosen is not None:
            found = tuple(found[i] for i in self._chosen)
        size = sum(t.numel() * t.element_size() for t in found if isinstance(t, torch.Tensor))
        if size <= self._free:
            self._free -= size
            self._kept[index] = found
        return found


def output_loss(expected: Sequence[Any], found: Sequence[Any]) -> torch.Tensor:
    """Sum over the float outputs of relative squared error and 1 - cosine along the last axis."""
    total = torch.zeros(())
    for wanted, value in zip(expected, found, strict=True):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.numel() == 0:
            continue
        a, b = wanted.float(), value.float()
        total = total + F.mse_loss(b, a) / a.square().mean().clamp(min=1e-12)
        if a.ndim:
            total = total + (1 - F.cosine_similarity(a, b, dim=-1)).mean()
    return total
