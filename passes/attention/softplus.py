"""The `softplus` pass: attention by softplus of cosines, which holds beyond the length of the training texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

import graphopt.ops  # registers torch.ops.graphopt
from graphopt.fit.finetune import Objective
from graphopt.fit.lora import Targets
from graphopt.graph import Graph
from graphopt.passes.attention.adaptation import Adaptation
from graphopt.passes.attention.replacement import AttentionReplacement
from graphopt.passes.attention.selection import exposure, selected, slice_of
from graphopt.rewrite import Context, Equivalence, Replacement, SitePass
from graphopt.rewrite.rows import compute_last_rows_only
from graphopt.sites import AttentionSite, Findings, MaskKind

_ = graphopt.ops
_REFUSED_MASKS = {
    MaskKind.BIAS: "its bias depends on both positions (ALiBi, relative positions), which softplus of cosines lacks",
    MaskKind.SLIDING: "it sees only a sliding window, so its rows do not grow with the text",
    MaskKind.ARBITRARY: "its mask is neither causal nor one of keys",
}
# Exp of a mask value above which a key is no padding; masks of -10 and -100 hide too.
_SEEN = 1e-3


class SoftplusReplacement(AttentionReplacement):
    """Softplus attention in the place of a site; it has no parameters."""

    def __init__(self, site: AttentionSite, power: int) -> None:
        """Args: site: what it replaces. power: of the re-weighting; 0 leaves it out."""
        super().__init__(site)
        self.power = power

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_weight: torch.Tensor | None
    ) -> torch.Tensor:
        """See `AttentionReplacement.attend`."""
        out: torch.Tensor = torch.ops.graphopt.softplus_attention(q, k, v, key_weight, self.power, self.site.causal)
        return out

    def weight_of_keys(self, mask: torch.Tensor | None, k: torch.Tensor) -> torch.Tensor | None:
        """1 where a key is seen and 0 where it is padding [B, 1, S, 1]: keys are counted, so no other weight fits."""
        weight = super().weight_of_keys(mask, k)
        return None if weight is None else torch.gt(weight, _SEEN).to(torch.float32)


@dataclass(frozen=True)
class Softplus(SitePass):
    """softmax(s q k^T) v   ->   W v / sum W,   W = relu(N A - 1)^p,   A = softplus(log D log N cos(q, k)) / sum

    N is the number of keys that a row sees. It enters the scores, so that rows stay as sharp as they were when texts
    become longer than those of the training. Caches stay as they are. A key's mask value either hides it or means
    nothing.

    This is another function: a model needs training after the swap, or better from scratch with it.

    Gao & Spratling, "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models" (2025).
    """

    name: ClassVar[str] = "softplus"
    kind: ClassVar[str] = "attention"
    equivalence: ClassVar[Equivalence] = Equivalence.ARCHITECTURE
    needs_calibration: ClassVar[bool] = True

    reweight: int = 15
    """Power p that sharpens what exceeds the mean: 15 for long texts, 3 for short ones, 0 leaves it out (LSSA)."""
    layers: str = ":"
    """Which sites in the order of execution, as a slice: 2: leaves the first two as they are."""
    keep_every: int = 0
    """Leave every n-th of those sites as it is; 0 none."""
    train: Literal["full", "none"] = "full"
    """Train low-rank adapters on the layers around the sites, or nothing."""
    lora_steps: int | None = None
    """Steps of the fine-tuning with low-rank adapters; none means 200 for language models and 0 for others."""
    lora_rate: float = 0.003
    """Peak learning rate of the fine-tuning."""
    lora_rank: int = 8
    """Rank of the adapters; they are merged into the weights."""
    lora_alpha: float = 16.0
    """The adapters' change is scaled by alpha / rank."""
    lora_targets: Targets = "qkvo"
    """Which linear layers are adapted: those that feed and read the sites, or all."""
    objective: Objective = "teacher"
    """What fine-tuning learns: the original's next-token distribution, or the text."""

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: a number is out of range, or `layers` is no slice.
        """
        for option in ("reweight", "keep_every"):
            if getattr(self, option) < 0:
                raise ValueError(f"expected {option} to be at least 0, got {getattr(self, option)}")
        self._adaptation().require_valid()
        slice_of(self.layers)

    def find(self, graph: Graph) -> Findings:
        """The sites among `layers`; the others count as refused."""
        return selected(super().find(graph), self.layers, self.keep_every)

    def check(self, site: AttentionSite) -> str | None:
        """Sites whose mask hides keys, later positions, or nothing, and that expose nothing."""
        if reason := exposure(site):
            return reason
        if site.mask.kind in _REFUSED_MASKS:
            return f"{_REFUSED_MASKS[site.mask.kind]} ({site.mask.reason})"
        if site.softcap:
            return f"its scores are capped at {site.softcap:g}, while those of cosines are bounded by log D log N"
        if not (site.query_heads and site.kv_heads and site.head_dim):
            return "its number of heads or its head dimension is not static"
        return None

    def build(self, site: AttentionSite, context: Context) -> SoftplusReplacement:
        """The operator; nothing of it is trained."""
        return SoftplusReplacement(site, self.reweight)

    def finish(self, teacher: Graph, student: Graph, replacements: Sequence[Replacement], context: Context) -> Graph:
        """Keep of each mask only the row that is read; train the layers around the sites."""
        compute_last_rows_only(student)
        if self.train == "full" and context.fit_steps != 0:
            self._adaptation().run(teacher, student, replacements, (), context)
        beside = [r.site.name for r in replacements if r.site.anchor not in r.site.nodes]
        if beside:
            context.notes.append(
                f"the operators of {len(beside)} sites ({beside[0]}, ...) stay beside their replacements and cost what "
                "they did, since they write the caches too; export the model with caches joined by Concat"
            )
        return student

    def _adaptation(self) -> Adaptation:
        return Adaptation(
            self.lora_steps, self.lora_rate, self.lora_rank, self.lora_alpha, self.lora_targets, self.objective
        )
