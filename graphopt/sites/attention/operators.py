"""Fused attention operators of ONNX and onnxruntime."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import fx

from graphopt.sites import vocabulary
from graphopt.sites.attention import region
from graphopt.sites.attention.assemble import Merge, decide
from graphopt.sites.attention.fused import result_of
from graphopt.sites.attention.history import rotated
from graphopt.sites.attention.layout import Program
from graphopt.sites.attention.unpack import (
    Grouped,
    MicrosoftAttention,
    MultiHead,
    OnnxAttention,
    Unpacked,
    packed_heads,
)
from graphopt.sites.attention.unrotated import sources_of
from graphopt.sites.attention.view import RefusedError, View
from graphopt.sites.base import AttentionSite, Mask, MaskKind
from graphopt.sites.vocabulary import attributes, name_of

_JOIN = Program((("permute", (0, 2, 1, 3)), ("flatten", 2, 3)))


@dataclass(frozen=True)
class _Operator:
    """The names of an operator's inputs in order, and which further outputs hold the cache, and scores or weights."""

    form: str
    inputs: str
    caches: tuple[int, ...]
    scores: tuple[int, ...] = ()


_ONNX = _Operator("Attention", "q k v attn_mask past_key past_value nonpad", (1, 2), (3,))
_MICROSOFT = _Operator("com.microsoft::Attention", "x weights bias mask past attention_bias past_length", (1,))
_MULTI_HEAD = _Operator(
    "com.microsoft::MultiHeadAttention",
    "q k v bias mask attention_bias past_key past_value past_length cache_indirection",
    (1, 2),
)
_GROUPED = _Operator(
    "com.microsoft::GroupQueryAttention",
    "q k v past_key past_value lengths total cos sin position_ids attention_bias sink k_scale v_scale",
    (1, 2),
)
_OTHERS = {
    "quantised_attention": "multiplies quantised weights",
    "packed_attention": "removes the padding from its operands",
    "packed_multi_head_attention": "removes the padding from its operands",
    "decoder_masked_self_attention": "works on a cache that it shares between steps",
    "decoder_masked_multi_head_attention": "works on a cache that it shares between steps",
    "decoder_attention": "works on a cache that it shares between steps",
    "longformer_attention": "attends within windows and globally",
    "sparse_attention": "attends to blocks of a sparse layout",
    "paged_attention": "works on a paged cache",
    "_native_multi_head_attention": "projects and attends in one operator",
    "_transformer_encoder_layer_fwd": "is a whole layer in one operator",
}


def _given(node: fx.Node, operator: _Operator) -> dict[str, fx.Node]:
    return {name: n for name, n in zip(operator.inputs.split(), node.args, strict=False) if isinstance(n, fx.Node)}


def _refuse(node: fx.Node, given: Mapping[str, fx.Node], names: Mapping[str, str]) -> None:
    for name, text in names.items():
        if name in given:
            raise RefusedError(f"{name_of(node)} {text}, which is not expressible as a site")


def onnx_attention(view: View, node: fx.Node) -> AttentionSite:
    """The site of an ai.onnx Attention.

    Raises:
        RefusedError: its mask is shorter than the keys by a number that is not static.
    """
    given, options = _given(node, _ONNX), attributes(node)
    packed = view.rank(given["q"]) == 3
    heads = options.get("q_num_heads"), options.get("kv_num_heads")
    split = OnnxAttention(
        packed_heads(int(heads[0] or 1)) if packed else Program(),
        packed_heads(int(heads[1] or 1)) if packed else Program(),
        boolean=_is_boolean(view, given.get("attn_mask")),
        causal=bool(options.get("is_causal", 0)),
        left=int(options.get("left_window_size", -1)),
        right=int(options.get("right_window_size", -1)),
        missing=_missing(view, given),
    )
    return _site(view, node, _ONNX, given, split, packed)


def microsoft_attention(view: View, node: fx.Node) -> AttentionSite:
    """The site of a com.microsoft Attention: its projection belongs to the site.

    Raises:
        RefusedError: it rotates, shares its cache buffer, or has an unknown form of mask.
    """
    given, options = _given(node, _MICROSOFT), attributes(node)
    if options.get("do_rotary") or options.get("past_present_share_buffer"):
        raise RefusedError(f"{name_of(node)} rotates queries and keys, or shares its cache buffer")
    _refuse(node, given, {"past_length": "has a cache of given length"})
    total = view.shapes(given["weights"])[0][-1]
    widths = tuple(options.get("qkv_hidden_sizes") or (total // 3,) * 3)
    split = MicrosoftAttention(
        packed_heads(int(options["num_heads"])),
        packed_heads(int(options["num_heads"])),
        causal=bool(options.get("unidirectional", 0)),
        widths=widths,
        mask_form=_mask_form(view, given, given["x"]),
    )
    return _site(view, node, _MICROSOFT, given, split, packed=True)


def multi_head(view: View, node: fx.Node) -> AttentionSite:
    """The site of a com.microsoft MultiHeadAttention.

    Raises:
        RefusedError: it shares its cache buffer, or has an unknown form of mask.
    """
    given, options = _given(node, _MULTI_HEAD), attributes(node)
    _refuse(node, given, {"past_length": "shares its cache buffer", "cache_indirection": "searches with beams"})
    ranks = tuple(view.rank(given[n]) if n in given else 0 for n in ("q", "k", "v"))
    heads = int(options["num_heads"])
    width = view.shapes(given["q"])[0][-1] * (heads if ranks[0] == 5 else 1)
    total = view.shapes(given["bias"])[0][0] if "bias" in given else 3 * width
    split = MultiHead(
        packed_heads(heads),
        packed_heads(heads),
        causal=bool(options.get("unidirectional", 0)),
        widths=(width, width, total - 2 * width),
        ranks=(ranks[0], ranks[1], ranks[2]),
        mask_form=_mask_form(view, given, given["q"]),
    )
    return _site(view, node, _MULTI_HEAD, given, split, packed=True)


def grouped(view: View, node: fx.Node) -> AttentionSite:
    """The site of a com.microsoft GroupQueryAttention.

    Raises:
        RefusedError: it rotates, quantises its cache, or uses a sink.
    """
    given, options = _given(node, _GROUPED), attributes(node)
    if options.get("do_rotary"):
        raise RefusedError(f"{name_of(node)} rotates queries and keys itself, which is not expressible as a site")
    if options.get("smooth_softmax", -1) > 0 or "sink" in given:
        raise RefusedError(f"{name_of(node)} has an attention sink: the weights do not add up to one")
    if len(node.args) > len(_GROUPED.inputs.split()) or any(
        options.get(f"{x}_quant_type", "NONE") != "NONE" for x in ("k", "v")
    ):
        raise RefusedError(f"{name_of(node)} normalises its operands or quantises its cache")
    if options.get("sliding_window_cache"):
        raise RefusedError(f"{name_of(node)} keeps a window of its cache, whose rows are no absolute positions")
    if not options.get("causal", 1):
        raise RefusedError(f"{name_of(node)} is not causal and has a cache")
    heads, kv_heads = int(options["num_heads"]), int(options["kv_num_heads"])
    width = view.shapes(given["q"])[0][-1] // (heads if "k" in given else heads + 2 * kv_heads)
    split = Grouped(
        packed_heads(heads),
        packed_heads(kv_heads),
        causal=True,
        widths=(heads * width, kv_heads * width, kv_heads * width),
        left=int(options.get("local_window_size", -1)) - 1,
    )
    return _site(view, node, _GROUPED, given, split, packed=True)


def _missing(view: View, given: Mapping[str, fx.Node]) -> int:
    """How many keys a mask is too short; more than one key of it, since one is broadcast."""
    if "attn_mask" not in given:
        return 0
    masks = [s[-1] for s in view.shapes(given["attn_mask"])]
    keys = [s[-2] for s in view.shapes(given["k"])]
    if "past_key" in given:
        keys = [n + s[-2] for n, s in zip(keys, view.shapes(given["past_key"]), strict=True)]
    amounts = {max(0, n - m) if m > 1 else 0 for n, m in zip(keys, masks, strict=True)}
    if len(amounts) > 1:
        raise RefusedError("its mask is shorter than the keys by a number that is not static")
    return amounts.pop()


def _unreadable(reason: str) -> Callable[[View, fx.Node], AttentionSite]:
    def read(view: View, node: fx.Node) -> AttentionSite:
        raise RefusedError(f"{name_of(node)} {reason}, which is not expressible as a site")

    return read


def _is_boolean(view: View, node: fx.Node | None) -> bool:
    return node is not None and str(view.samples[0].dtypes.get(node)) == "torch.bool"


def _mask_form(view: View, given: Mapping[str, fx.Node], x: fx.Node) -> str:
    """How a padding mask is to be read: `keys` [B, S], `queries` [B, T, S], `ends` [B], `ranges` [2 B]."""
    if "mask" not in given:
        return ""
    shapes = view.shapes(given["mask"])
    rank = len(shapes[0])
    if rank in (2, 3):
        return "keys" if rank == 2 else "queries"
    counts = {s[0] / b[0] for s, b in zip(shapes, view.shapes(x), strict=True)} if rank == 1 else set()
    if counts in ({1.0}, {2.0}):
        return "ends" if counts == {1.0} else "ranges"
    raise RefusedError(f"its mask has the shape {shapes[0]}, which is none that is known")


def _site(
    view: View,
    node: fx.Node,
    operator: _Operator,
    given: Mapping[str, fx.Node],
    split: Unpacked,
    packed: bool,
) -> AttentionSite:
    output, options = result_of(view, node, operator.caches + operator.scores), attributes(node)
    names = [n for n in given if n in split.used]
    inputs = tuple(dict.fromkeys(given[n] for n in names))
    split = replace(split, names=tuple((n, inputs.index(given[n])) for n in names))
    shapes = [split.shapes([s.shapes[n] for n in inputs]) for s in view.samples if all(n in s.shapes for n in inputs)]
    if not shapes:
        raise RefusedError(f"the shapes of its operands are not known: {_first_error(view)}")
    q, k, v = shapes[0]
    widths = {q[3] for q, _, _ in shapes}
    if len(widths) > 1:
        raise RefusedError("the size of a head is not static")
    bare = split.causal and split.only_causal and all(split.ends_aligned(q, k) for q, k, _ in shapes)
    split = replace(split, bare=bare)
    mask_only = "attn_mask" if operator is _ONNX else "attention_bias"
    rope = all(n in given and rotated(view, given[n]) for n in ("q", "k"))
    past = (given.get("past_key", given.get("past")), given.get("past_value", given.get("past")))
    site = AttentionSite(
        name=name_of(node),
        anchor=node,
        # The operator stays where its cache or scores are used elsewhere; only its first result is replaced then.
        nodes=tuple(dict.fromkeys((node, output))) if _only_result(view, node) else (output,),
        inputs=inputs,
        split=split,
        merge=Merge(_JOIN if packed else Program()),
        scale=float(options.get("scale") or 0.0) or 1 / math.sqrt(q[3]),
        mask=Mask(MaskKind.CAUSAL if bare else MaskKind.NONE),
        softcap=float(options.get("softcap") or 0.0),
        query_heads=q[1],
        kv_heads=k[1],
        head_dim=q[3],
        value_dim=v[3],
        dtype=view.samples[0].dtypes[given["q" if "q" in given else "x"]],
        rope=rope,
        sources=sources_of(view, given["q"], given["k"], (split.q_heads, split.kv_heads)) if rope else None,
        past=None if past[0] is None or past[1] is None else (past[0], past[1]),
        exposed=tuple(u for u in view.users(node) if _index(u) in operator.scores and view.users(u)),
        form=operator.form,
    )
    region.check(view, site)
    if bare:
        return replace(site, mask=Mask(MaskKind.CAUSAL, reason="the operator is causal"))
    whole = given.get(mask_only) if split.whole_mask == mask_only else None
    return replace(site, mask=decide(view, site, whole, not split.boolean_mask))


def _only_result(view: View, node: fx.Node) -> bool:
    return all(_index(u) == 0 for u in view.users(node))


def _index(user: fx.Node) -> int:
    """Which output of an operator `user` is."""
    return int(str(user.args[1])) if vocabulary.kind(user) == "getitem" else 0


def _first_error(view: View) -> str:
    return next((e.splitlines()[0] for s in view.samples for e in s.errors.values()), "an input could not run")


READERS: dict[str, Callable[[View, fx.Node], AttentionSite]] = {
    "onnx_attention": onnx_attention,
    "microsoft_attention": microsoft_attention,
    "multi_head_attention": multi_head,
    "group_query_attention": grouped,
    **{name: _unreadable(reason) for name, reason in _OTHERS.items()},
}
