"""The `linearize` pass: which sites, which method and options, which training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from graphopt.errors import GraphOptError
from graphopt.fit.distill import distill
from graphopt.fit.layerwise import fit_layerwise
from graphopt.fit.lora import Targets
from graphopt.graph import Graph
from graphopt.passes.attention.adaptation import Adaptation
from graphopt.passes.attention.linearize.methods import Method, is_causal_only, make, sees_all_only
from graphopt.passes.attention.linearize.replacement import LinearReplacement
from graphopt.passes.attention.linearize.states import carry_states
from graphopt.passes.attention.linearize.transnormer import BlockSite
from graphopt.passes.attention.selection import exposure, selected, slice_of
from graphopt.rewrite import Context, Equivalence, Replacement, SitePass, Tolerance
from graphopt.rewrite.rows import compute_last_rows_only
from graphopt.sites import AttentionSite, Findings, MaskKind

_REFUSED_MASKS = {
    MaskKind.BIAS: "its bias depends on both positions (ALiBi, relative positions), which no feature map can carry",
    MaskKind.SLIDING: "it sees only a sliding window, so it is linear in the length already",
    MaskKind.ARBITRARY: "its mask is neither causal nor one of keys",
}


@dataclass(frozen=True)
class Linearize(SitePass):
    """softmax(s q k^T + mask) v   ->   phi(q) (phi(k)^T v) / phi(q) (phi(k)^T 1)

    In causal sites a window of exact softmax joins it, and what lies before the window is carried in a state of fixed
    size. New parameters first learn each site's output (attention transfer), then low-rank adapters on the layers
    around the sites learn the whole model's.

    Zhang et al., "LoLCATs" (2024) and "The Hedgehog & the Porcupine" (2024); Lan et al., "Liger" (2025); and the papers
    that each method's own file names.
    """

    name: ClassVar[str] = "linearize"
    kind: ClassVar[str] = "attention"
    equivalence: ClassVar[Equivalence] = Equivalence.TRAINED
    needs_calibration: ClassVar[bool] = True

    method: Method = "auto"
    """Which published method; auto is lolcats for causal sites and hedgehog for the others."""
    window: int = 64
    """How many keys a causal site sees exactly; 0 none. Methods without a window ignore it."""
    sinks: int = 0
    """How many of the first keys every query sees exactly besides."""
    feature_map: Literal["softmax", "exp"] = "softmax"
    """Activation of the feature map; exp is faster and may overflow on outliers."""
    features: int = 0
    """Width of the feature map per sign; 0 means the head dimension."""
    tied: bool = False
    """One key map per key head instead of per query head: a smaller state where heads are grouped."""
    negative: bool = False
    """Of method delta: strengths up to 2, so that eigenvalues lie in [-1, 1]."""
    landmarks: int = 49
    """Of method soft: how many means of keys stand for all keys."""
    grid: int = 0
    """Of method inline: side of the square of image tokens, for a 3x3 convolution of the values; 0 leaves it out."""
    block_layers: int = 0
    """Of method transnormer: how many of the first sites keep the softmax, within blocks of `window` tokens."""
    branches: Literal["both", "window", "linear"] = "both"
    """Of method lolcats: leave one part away, to see what the other contributes."""
    start: Literal["window", "identity"] = "window"
    """Of methods with a window: begin as the window alone, with a faint linear part, or as published."""
    layers: str = ":"
    """Which sites in the order of execution, as a slice: 2: leaves the first two as they are."""
    keep_every: int = 0
    """Leave every n-th of those sites as it is; 0 none."""
    train: Literal["full", "transfer", "none"] = "full"
    """How far to train: attention transfer and adapters, attention transfer alone, or not at all."""
    fit_steps: int = 200
    """Steps of the attention transfer, one calibration batch each."""
    learning_rate: float = 0.03
    """Peak learning rate of the attention transfer."""
    transfer: Literal["output", "weights"] = "output"
    """What the maps learn: the site's output by squared error, or its weights by cross-entropy."""
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
    objective: Literal["teacher", "text"] = "teacher"
    """What fine-tuning learns: the original's next-token distribution, or the text."""
    train_maps: bool = True
    """Let fine-tuning change the new parameters too."""
    distill_steps: int = 0
    """Steps of end-to-end distillation of the new parameters alone, on all outputs."""
    distill_rate: float = 0.003
    """Peak learning rate of the end-to-end distillation."""
    max_error: float = 0.8
    """Largest relative RMS error of a site's output that is kept; other sites are left as they were."""

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: a number is out of range, or `layers` is no slice.
        """
        for option in ("window", "sinks", "features", "keep_every", "fit_steps", "distill_steps"):
            if getattr(self, option) < 0:
                raise ValueError(f"expected {option} to be at least 0, got {getattr(self, option)}")
        for option in ("learning_rate", "distill_rate", "max_error"):
            if not getattr(self, option) > 0:
                raise ValueError(f"expected {option} to be above 0, got {getattr(self, option)}")
        self._adaptation().require_valid()
        if self.branches == "window" and not self.window:
            raise ValueError("expected a window above 0 for branches=window, got 0")
        if self.landmarks < 1 or self.grid < 0 or self.block_layers < 0:
            raise ValueError(
                "expected landmarks to be at least 1, grid and block_layers at least 0, "
                f"got {self.landmarks}, {self.grid} and {self.block_layers}"
            )
        if self.block_layers and not self.window:
            raise ValueError("expected a window above 0 for block_layers, got 0")
        slice_of(self.layers)

    def tolerance(self, dtype: torch.dtype) -> Tolerance:
        """A trained site is held against `max_error`."""
        return Tolerance(self.max_error, "option max_error")

    def find(self, graph: Graph) -> Findings:
        """The sites among `layers`; the others count as refused."""
        found = selected(super().find(graph), self.layers, self.keep_every)
        sites = tuple(self._extended(site) for site in found.sites)
        if self.method == "transnormer":
            blocks = self.block_layers
            sites = (*(BlockSite.of(site) for site in sites[:blocks]), *sites[blocks:])
        return Findings(sites, found.refusals)

    def _extended(self, site: AttentionSite) -> AttentionSite:
        """With what the method reads besides; Liger's recurrence takes queries and keys before their rotation."""
        return site.with_unrotated() if self.method == "liger" and site.rope else site

    def check(self, site: AttentionSite) -> str | None:
        """Sites whose mask hides keys, later positions, or nothing, and that expose nothing."""
        if reason := exposure(site):
            return reason
        if site.mask.kind in _REFUSED_MASKS:
            return f"{_REFUSED_MASKS[site.mask.kind]} ({site.mask.reason})"
        if not (site.query_heads and site.kv_heads and site.head_dim):
            return "its number of heads or its head dimension is not static"
        if is_causal_only(self.method) and not site.causal:
            return f"method {self.method} carries a state from token to token, but its mask is not causal"
        if sees_all_only(self.method) and site.causal:
            return f"method {self.method} looks at all tokens at once, but its mask is causal"
        if isinstance(site, BlockSite) and site.past is not None:
            return (
                "a softmax within blocks needs each token's place in its block, which a cache of bounded length "
                "does not tell; use block_layers=0"
            )
        if self.method == "liger" and site.rope and site.unrotated is None:
            return "method liger needs queries and keys before their rotation, which were not found"
        return None

    def build(self, site: AttentionSite, context: Context) -> LinearReplacement:
        """The replacement with its initial parameters."""
        return make(self, site, context.generator())

    def fit(self, replacements: Sequence[Replacement], context: Context) -> None:
        """Attention transfer: each site learns its own output from its own inputs.

        Raises:
            GraphOptError: no calibration sequence is longer than the window.
        """
        self._require_length(replacements)
        steps = self.fit_steps if context.fit_steps is None else context.fit_steps
        if self.train != "none":
            fit_layerwise(replacements, _loss, steps, self.learning_rate, context)

    def finish(self, teacher: Graph, student: Graph, replacements: Sequence[Replacement], context: Context) -> Graph:
        """Keep of each mask only the row that is read; train through the whole model; carry states for the caches."""
        compute_last_rows_only(student)
        if self.train == "full" and context.fit_steps != 0:
            parameters = [p for r in replacements for p in r.module.parameters()]
            distill(teacher, student, parameters, self.distill_steps, self.distill_rate, context)
            trained = parameters if self.train_maps else ()
            self._adaptation().run(teacher, student, replacements, trained, context)
        return carry_states(student, replacements, self._kept(), self.sinks, context)

    def _kept(self) -> int:
        """How many of the last positions a cache keeps."""
        return 0 if self.method in ("hedgehog", "transnormer") or self.branches == "linear" else self.window

    def _adaptation(self) -> Adaptation:
        return Adaptation(
            self.lora_steps, self.lora_rate, self.lora_rank, self.lora_alpha, self.lora_targets, self.objective
        )

    def _require_length(self, replacements: Sequence[Replacement]) -> None:
        windowed = [r for r in replacements if getattr(r.module, "window", 0)]
        for replacement in windowed[:1]:
            record, site = replacement.record, replacement.site
            assert isinstance(site, AttentionSite)
            longest = max(int(site.split(*record.inputs(i)).k.shape[2]) for i in range(len(record)))
            if longest <= self.window + self.sinks:
                raise GraphOptError(
                    f"expected calibration sequences longer than the window of {self.window + self.sinks} keys "
                    f"(window + sinks), found at most {longest}; give longer ones or a smaller window"
                )


def _loss(module: torch.nn.Module, inputs: tuple[Any, ...], expected: torch.Tensor) -> torch.Tensor:
    assert isinstance(module, LinearReplacement)
    return module.loss(inputs, expected)
