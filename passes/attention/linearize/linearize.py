"""The `linearize` pass: which sites, which options, which training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from graphopt.fit.distill import distill
from graphopt.fit.layerwise import fit_layerwise
from graphopt.graph import Graph
from graphopt.passes.attention.linearize.hedgehog import HedgehogAttention, attention_transfer_loss
from graphopt.rewrite import Context, Equivalence, Replacement, SitePass, Tolerance
from graphopt.rewrite.rows import compute_last_rows_only
from graphopt.sites import AttentionSite, MaskKind
from graphopt.sites.vocabulary import name_of

_REFUSED_MASKS = {
    MaskKind.BIAS: "its bias depends on both positions (ALiBi, relative positions), which no feature map can carry",
    MaskKind.SLIDING: "it sees only a sliding window, so it is linear in the length already",
    MaskKind.ARBITRARY: "its mask is neither causal nor one of keys",
}


@dataclass(frozen=True)
class Linearize(SitePass):
    """softmax(s q k^T + mask) v   ->   phi(q) (phi(k)^T v) / phi(q) (phi(k)^T 1)

    phi(x) = [softmax(x W + b), softmax(-x W - b)] is learned per head to reproduce the original attention's output
    on calibration data (attention transfer), layer by layer, then optionally through the whole model.

    Zhang et al., "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry" (2024).
    """

    name: ClassVar[str] = "linearize"
    kind: ClassVar[str] = "attention"
    equivalence: ClassVar[Equivalence] = Equivalence.TRAINED
    needs_calibration: ClassVar[bool] = True

    method: Literal["hedgehog"] = "hedgehog"
    """Which published method: its feature map and its training."""
    feature_map: Literal["softmax", "exp"] = "softmax"
    """Activation of the feature map; exp is faster and may overflow on outliers."""
    features: int = 0
    """Width of the feature map per sign; 0 means the head dimension."""
    fit_steps: int = 200
    """Layer-wise training steps, one calibration batch each; 0 leaves the initial maps."""
    learning_rate: float = 0.03
    """Peak learning rate of the layer-wise training."""
    distill_steps: int = 0
    """Steps of end-to-end distillation of the whole model after the layer-wise training."""
    distill_rate: float = 0.003
    """Peak learning rate of the end-to-end distillation."""
    max_error: float = 0.8
    """Largest relative RMS error of a site's output that is kept; other sites are left as they were."""

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: a number is out of range.
        """
        for option in ("features", "fit_steps", "distill_steps"):
            if getattr(self, option) < 0:
                raise ValueError(f"expected {option} to be at least 0, got {getattr(self, option)}")
        for option in ("learning_rate", "distill_rate", "max_error"):
            if not getattr(self, option) > 0:
                raise ValueError(f"expected {option} to be above 0, got {getattr(self, option)}")

    def tolerance(self, dtype: torch.dtype) -> Tolerance:
        """A trained site is held against `max_error`."""
        return Tolerance(self.max_error, "option max_error")

    def check(self, site: AttentionSite) -> str | None:
        """Sites whose mask hides keys, later positions, or nothing, and that carry no cache and expose nothing."""
        if site.exposed:
            by = _first_user(site)
            return f"its scores or weights are used outside (by {by}), so replacing it would save nothing"
        if site.mask.kind in _REFUSED_MASKS:
            return f"{_REFUSED_MASKS[site.mask.kind]} ({site.mask.reason})"
        if site.past is not None:
            return "it reads a key-value cache, which method hedgehog has no recurrent form for"
        if not (site.query_heads and site.kv_heads and site.head_dim):
            return "its number of heads or its head dimension is not static"
        return None

    def build(self, site: AttentionSite, context: Context) -> HedgehogAttention:
        """The replacement with its initial maps."""
        return HedgehogAttention(site, self.features or site.head_dim or 0, self.feature_map, context.generator())

    def fit(self, replacements: Sequence[Replacement], context: Context) -> None:
        """Attention transfer: each site learns its own output from its own inputs."""
        steps = self.fit_steps if context.fit_steps is None else context.fit_steps
        fit_layerwise(replacements, attention_transfer_loss, steps, self.learning_rate, context)

    def finish(self, teacher: Graph, student: Graph, replacements: Sequence[Replacement], context: Context) -> None:
        """Keep of each mask only the row that is read, then distil the maps end to end."""
        compute_last_rows_only(student)
        steps = self.distill_steps if context.fit_steps != 0 else 0
        parameters = [p for r in replacements for p in r.module.parameters()]
        distill(teacher, student, parameters, steps, self.distill_rate, context)


def _first_user(site: AttentionSite) -> str:
    users = [u for n in site.exposed for u in n.users if u not in site.nodes]
    return "an output of the model" if users[0].op == "output" else name_of(users[0])
