"""Training a rewritten graph as a whole: weights and new parameters together, towards the teacher or the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F

from graphopt.decoders.interface import Interface
from graphopt.errors import CheckFailed, GraphOptError
from graphopt.execute import execute
from graphopt.fit.distill import Outputs, output_loss
from graphopt.fit.layerwise import optimizer_for, shuffled
from graphopt.graph import Graph
from graphopt.rewrite.context import Context

Objective = Literal["teacher", "text"]
_CLIP = 1.0
Values = Sequence[Any]


class Trained(Protocol):
    """Weights that are trained beside a graph: `graphopt.fit.lora.Adapters`, `graphopt.fit.weights.Weights`."""

    def parameters(self) -> list[torch.nn.Parameter]:
        """What there is to train."""

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights by name, as they are now; differentiable."""

    def merge(self) -> None:
        """Make them the graph's own."""


def finetune(
    teacher: Graph,
    student: Graph,
    trained: Trained,
    others: Sequence[torch.nn.Parameter],
    *,
    steps: int,
    learning_rate: float,
    objective: Objective,
    context: Context,
) -> None:
    """Train weights of `student`, and `others`, then make these weights its own.

    Args:
        teacher: the original graph.
        student: the rewritten graph.
        trained: the student's weights.
        others: parameters that the rewrite brought; empty leaves them as they are.
        steps: one calibration batch each; 0 trains nothing.
        learning_rate: peak rate of AdamW; linear warm-up, then cosine to zero.
        objective: `teacher`: Kullback-Leibler divergence from the teacher's next-token distribution (of other models:
            the outputs' relative error); `text`: cross-entropy of the text itself.
        context: calibration data, seed, progress bar.

    Raises:
        GraphOptError: the objective is `text` and the model is no language model, or no gradient reaches anything.
        CheckFailed: the loss became NaN or infinite.
    """
    parameters = [*trained.parameters(), *(p for p in others if p.requires_grad)]
    if not steps or not parameters:
        return
    loss_of = objective_for(teacher, objective)
    optimizer, schedule = optimizer_for(parameters, learning_rate, steps)
    batches = context.calibration.batches
    order = shuffled(context.training(), context.generator())
    for _ in context.track(range(steps), steps, "Fine-tuning"):
        index = next(order)
        found = execute(student, batches[index], weights=trained.weights())
        loss = loss_of(index, batches[index], found)
        if not loss.requires_grad:
            raise GraphOptError("no output depends differentiably on the rewritten sites; train for 0 steps")
        if not bool(torch.isfinite(loss)):
            raise CheckFailed("fine-tuning diverged; lower its rate")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    trained.merge()


def language_model(graph: Graph) -> Interface | None:
    """The roles of a model that scores the next token; None for others."""
    try:
        roles = Interface.of(graph)
    except GraphOptError:
        return None
    return roles if roles.writes_text else None


def objective_for(teacher: Graph, objective: Objective) -> Callable[[int, Values, Values], torch.Tensor]:
    """The loss of (batch index, inputs, found outputs)."""
    roles = language_model(teacher)
    if roles is None:
        if objective == "text":
            raise GraphOptError("expected a language model for objective=text, found none; use objective=teacher")
        kept = Outputs(teacher)
        return lambda index, values, found: output_loss(kept.of(index, values), found)
    inputs, outputs = [s.name for s in teacher.inputs], [s.name for s in teacher.outputs]
    tokens, logits = inputs.index(roles.tokens.name), outputs.index(roles.logits.name)
    mask = None if roles.attention_mask is None else inputs.index(roles.attention_mask.name)

    def real(values: Values) -> torch.Tensor:
        """[B, T]: which tokens are no padding."""
        text: torch.Tensor = values[tokens]
        return torch.ones(text.shape) if mask is None else values[mask][:, -text.shape[1] :].float()

    def next_token(index: int, values: Values, found: Values) -> torch.Tensor:
        weight = real(values)[:, 1:]
        loss = F.cross_entropy(
            found[logits][:, :-1].float().transpose(1, 2), values[tokens][:, 1:].long(), reduction="none"
        )
        return (loss * weight).sum() / weight.sum()

    if objective == "text":
        return next_token
    kept = Outputs(teacher, (logits,))

    def divergence(index: int, values: Values, found: Values) -> torch.Tensor:
        wanted = torch.log_softmax(kept.of(index, values)[0].float(), -1)
        given = torch.log_softmax(found[logits].float(), -1)
        loss = F.kl_div(given, wanted, reduction="none", log_target=True).sum(-1)
        weight = real(values)
        return (loss * weight).sum() / weight.sum()

    return divergence
