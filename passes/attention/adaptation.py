"""Fine-tuning a model around its rewritten attention sites: low-rank adapters on the layers that feed and read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphopt.fit.finetune import Objective, finetune, language_model
from graphopt.fit.lora import Adapters, Targets, layers_around
from graphopt.graph import Graph
from graphopt.rewrite import Context, Replacement

# Enough for a small model to recover; `lora_steps` asks for more.
_STEPS = 200


@dataclass(frozen=True)
class Adaptation:
    """The options of the same names.

    Attributes:
        steps: one calibration batch each; None means 200 for language models and 0 for others.
        rate: peak learning rate.
        rank: of the adapters.
        alpha: their change is scaled by alpha / rank.
        targets: which linear layers are adapted.
        objective: what is learned.
    """

    steps: int | None
    rate: float
    rank: int
    alpha: float
    targets: Targets
    objective: Objective

    def require_valid(self) -> None:
        """Check the options.

        Raises:
            ValueError: a number is out of range.
        """
        if self.steps is not None and self.steps < 0:
            raise ValueError(f"expected lora_steps to be at least 0, got {self.steps}")
        for option, value in (("lora_rate", self.rate), ("lora_rank", self.rank), ("lora_alpha", self.alpha)):
            if not value > 0:
                raise ValueError(f"expected {option} to be above 0, got {value}")

    def run(
        self,
        teacher: Graph,
        student: Graph,
        replacements: Sequence[Replacement],
        parameters: Sequence[torch.nn.Parameter],
        context: Context,
    ) -> None:
        """Train `student` towards `teacher`, or on the text, and merge the adapters.

        Args:
            teacher: the original graph.
            student: the rewritten graph, changed in place.
            replacements: what was put in.
            parameters: of those, what is to be trained too.
            context: calibration data, seed, progress bar.
        """
        steps = self.steps
        if steps is None:
            steps = _STEPS if language_model(teacher) else 0
        if not steps:
            return
        layers = layers_around(student, [r.site.name for r in replacements], self.targets)
        adapters = Adapters(student, layers, self.rank, self.alpha, context.seed)
        finetune(
            teacher,
            student,
            adapters,
            parameters,
            steps=steps,
            learning_rate=self.rate,
            objective=self.objective,
            context=context,
        )
