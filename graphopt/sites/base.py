"""What a finder yields: a site with its meaning, or a refusal with its reason."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx


@dataclass(frozen=True, eq=False)
class Site:
    """A region of the graph that computes one known thing.

    The region is convex: it reads `inputs`, writes `output`, and nothing else inside it is used outside of it, save
    what an attention site lists as `exposed`.
    """

    kind: ClassVar[str] = ""
    name: str
    """Unique in the graph and stable between runs: the source's own node name where it has one."""
    anchor: fx.Node
    """The node that the finder started from."""
    nodes: tuple[fx.Node, ...]
    """Every node that the region covers, producers first; the last one is `output`."""
    inputs: tuple[fx.Node, ...]
    """The values that enter the region, without repetition."""

    @property
    def output(self) -> fx.Node:
        """The value that leaves the region."""
        return self.nodes[-1]


@dataclass(frozen=True, eq=False)
class EdgeSite(Site):
    """A value on its way to some of its readers; what a pass puts there, only they read.

    It covers no node: `inputs` is the value alone, and `output` is the same value.
    """

    readers: tuple[fx.Node, ...] = field(kw_only=True)
    of: str = field(kw_only=True)
    """Name of the site that the readers belong to; who selects that one selects this too."""

    @property
    def output(self) -> fx.Node:
        """The value itself."""
        return self.inputs[0]


@dataclass(frozen=True)
class Refusal:
    """A node that looked like a site of `kind`, and why it is none."""

    kind: str
    node: str
    reason: str


@dataclass(frozen=True)
class Findings:
    """All sites of one kind in a graph, in execution order, and the refusals."""

    sites: tuple[Any, ...] = ()
    refusals: tuple[Refusal, ...] = ()


class MaskKind(enum.Enum):
    """What a mask does, decided by evaluating it on sample inputs."""

    NONE = "none"
    CAUSAL = "causal"
    """Query i sees keys up to i + (S - T); nothing else."""
    PADDING = "padding"
    """Every query sees the same keys; which, depends on the inputs. Finite per-key biases count too."""
    CAUSAL_PADDING = "causal and padding"
    SLIDING = "sliding window"
    """Causal, and only the last `window` keys; perhaps with padding."""
    BIAS = "bias"
    """Finite and dependent on both positions: ALiBi, relative positions."""
    ARBITRARY = "arbitrary"
    """Anything else, or it could not be evaluated."""


@dataclass(frozen=True, eq=False)
class Mask:
    """The mask of an attention site.

    `value` broadcasts against scores [B, H, T, S] and is added (`additive`), or is true where a key is visible.
    """

    kind: MaskKind
    value: fx.Node | None = None
    additive: bool = True
    window: int | None = None
    reason: str = ""
    """How the kind was decided, for `explain`."""


@dataclass(frozen=True)
class AttentionValues:
    """The operands of one attention in canonical layout; Hq is a multiple of Hkv.

    Attributes:
        q: [B, Hq, T, D], unscaled (`AttentionSite.scale` applies to q k^T).
        k: [B, Hkv, S, D].
        v: [B, Hkv, S, Dv].
        mask: as `Mask.value` describes, broadcastable to [B, H, T, S]; None where the site has no mask value.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Source:
    """A value outside of a site, and how it becomes [B, H, T, D]; `read` runs on tensors and on fx proxies."""

    node: fx.Node
    read: Callable[[Any], Any]


@dataclass(frozen=True, eq=False)
class AttentionSite(Site):
    """softcap(scale q k^T) masked, softmax over keys, times v; read through `split`, written through `merge`.

    `split(*values of inputs)` gives the canonical operands and `merge(y)` turns a result [B, Hq, T, Dv] into the
    value of `output`. Both consist of transpose, reshape, unflatten, flatten and linear maps only, run on tensors and
    on fx proxies, and are differentiable, so a pass never sees the layout that an exporter chose.
    """

    kind: ClassVar[str] = "attention"
    split: Callable[..., AttentionValues] = field(kw_only=True)
    merge: Callable[[torch.Tensor], torch.Tensor] = field(kw_only=True)
    scale: float = field(kw_only=True)
    mask: Mask = field(kw_only=True)
    softcap: float = field(default=0.0, kw_only=True)
    query_heads: int | None = field(default=None, kw_only=True)
    kv_heads: int | None = field(default=None, kw_only=True)
    head_dim: int | None = field(default=None, kw_only=True)
    value_dim: int | None = field(default=None, kw_only=True)
    dtype: torch.dtype = field(default=torch.float32, kw_only=True)
    """Element type of the canonical operands and of the result."""
    rope: bool = field(default=False, kw_only=True)
    """q and k are rotated right before the site."""
    sources: tuple[Source, Source] | None = field(default=None, kw_only=True)
    """Queries, and keys without those of a cache, before their rotation."""
    unrotated: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = field(default=None, kw_only=True)
    """Of a site that `with_unrotated` made: q [B, Hq, T, D] and k [B, Hkv, T, D] before their rotation."""
    past: tuple[fx.Node, fx.Node] | None = field(default=None, kw_only=True)
    """Cached keys and values that are joined to the new ones right before or inside the site."""
    exposed: tuple[fx.Node, ...] = field(default=(), kw_only=True)
    """Values inside the region that are also used outside of it (scores, weights); they stay when a pass replaces the
    output, so that replacing saves none of their cost. Where one operator returns them beside the output, that
    operator and they stay outside of `nodes`."""
    form: str = field(default="", kw_only=True)
    """What was recognised: `matmul-softmax-matmul`, `scaled_dot_product_attention`, `com.microsoft::Attention` ..."""

    @property
    def causal(self) -> bool:
        """Whether no query sees a later key."""
        return self.mask.kind in (MaskKind.CAUSAL, MaskKind.CAUSAL_PADDING, MaskKind.SLIDING)

    def with_unrotated(self) -> AttentionSite:
        """This site with `sources` among its inputs and `unrotated` to read them; itself where there are none."""
        if self.sources is None:
            return self
        q, k = self.sources
        inputs = tuple(dict.fromkeys((*self.inputs, q.node, k.node)))
        at = inputs.index(q.node), inputs.index(k.node)
        return replace(self, inputs=inputs, unrotated=lambda *values: (q.read(values[at[0]]), k.read(values[at[1]])))


@dataclass(frozen=True, eq=False)
class SoftmaxSite(Site):
    """softmax along one axis; `role` says where: `attention`, `classifier`, `vocabulary` or `other`."""

    kind: ClassVar[str] = "softmax"
    axis: int = field(default=-1, kw_only=True)
    role: str = field(default="other", kw_only=True)
    length: int | str | None = field(default=None, kw_only=True)
    """Size of the axis."""


@dataclass(frozen=True, eq=False)
class LinearSite(Site):
    """x W^T + b with a constant W: Linear, Gemm, or MatMul and Add. `weight` is stored [in, out] if `transposed`."""

    kind: ClassVar[str] = "linear"
    x: fx.Node = field(kw_only=True)
    weight: fx.Node = field(kw_only=True)
    bias: fx.Node | None = field(default=None, kw_only=True)
    transposed: bool = field(default=False, kw_only=True)
    in_features: int = field(kw_only=True)
    out_features: int = field(kw_only=True)


@dataclass(frozen=True, eq=False)
class MlpSite(Site):
    """down(act(up(x))) or, gated, down(act(gate(x)) * up(x))."""

    kind: ClassVar[str] = "mlp"
    up: LinearSite = field(kw_only=True)
    down: LinearSite = field(kw_only=True)
    gate: LinearSite | None = field(default=None, kw_only=True)
    activation: str = field(kw_only=True)
    """`relu`, `gelu`, `gelu_tanh`, `silu`, ..."""
    activation_nodes: tuple[fx.Node, ...] = field(kw_only=True)


@dataclass(frozen=True, eq=False)
class NormSite(Site):
    """LayerNorm or RMSNorm over the last axis; scale and bias may be missing."""

    kind: ClassVar[str] = "norm"
    form: str = field(kw_only=True)
    """`layer` or `rms`."""
    x: fx.Node = field(kw_only=True)
    weight: fx.Node | None = field(default=None, kw_only=True)
    bias: fx.Node | None = field(default=None, kw_only=True)
    epsilon: float = field(kw_only=True)


Finder = Callable[[Any], Findings]
