"""Layer-wise training: each replacement learns its site's recorded output from its recorded inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from graphopt.errors import CheckFailed
from graphopt.rewrite.context import Context, Replacement

Loss = Callable[[torch.nn.Module, tuple[Any, ...], torch.Tensor], torch.Tensor]
_WARMUP = 0.05
_CLIP = 1.0


def fit_layerwise(
    replacements: Sequence[Replacement], loss: Loss, steps: int, learning_rate: float, context: Context
) -> None:
    """Train all replacements side by side, one recorded batch a step; they do not depend on each other.

    Args:
        replacements: modules with the records of their sites.
        loss: (module, inputs, expected output) -> scalar.
        steps: number of steps; 0 trains nothing.
        learning_rate: peak rate of AdamW; linear warm-up, then cosine to zero.
        context: seed and progress bar.

    Raises:
        CheckFailed: a loss became NaN or infinite.
    """
    parameters = [p for r in replacements for p in r.module.parameters() if p.requires_grad]
    if not steps or not parameters:
        return
    optimizer, schedule = optimizer_for(parameters, learning_rate, steps)
    order = shuffled(context.training(), context.generator())
    for _ in context.track(range(steps), steps, "Fitting layer by layer"):
        index = next(order)
        optimizer.zero_grad()
        for replacement in replacements:
            value = loss(replacement.module, replacement.record.inputs(index), replacement.record.output(index))
            if not bool(torch.isfinite(value)):
                raise CheckFailed(f"fitting site {replacement.site.name!r} diverged; lower learning_rate")
            value.backward()
            torch.nn.utils.clip_grad_norm_(replacement.module.parameters(), _CLIP)
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()


def optimizer_for(
    parameters: Sequence[torch.nn.Parameter], learning_rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW without weight decay, 5 % linear warm-up, cosine to zero."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    warmup = max(1, round(_WARMUP * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def shuffled(indices: Sequence[int], generator: torch.Generator) -> Iterator[int]:
    """`indices` in a new random order in each round, forever."""
    while True:
        for i in torch.randperm(len(indices), generator=generator).tolist():
            yield indices[i]
