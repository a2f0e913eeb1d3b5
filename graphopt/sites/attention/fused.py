"""Fused attention operators of ATen: scaled_dot_product_attention and its variants."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from graphopt.sites.attention.assemble import Draft, assemble
from graphopt.sites.attention.layout import Batch, Program, batches
from graphopt.sites.attention.operands import Canonical, head_counts, operand
from graphopt.sites.attention.region import Closure
from graphopt.sites.attention.scores import Term
from graphopt.sites.attention.view import RefusedError, View, is_output
from graphopt.sites.base import AttentionSite
from graphopt.sites.vocabulary import kind, name_of


def read(view: View, node: fx.Node) -> AttentionSite:
    """The site of a `scaled_dot_product_attention`.

    Raises:
        RefusedError: it drops weights at random, or its operands have an unknown layout.
    """
    given = named_arguments(node)
    if float(given.get("dropout_p") or 0.0):
        raise RefusedError(f"{name_of(node)} drops weights at random: export the model in eval mode")
    output = result_of(view, node)
    q, k, v = given["query"], given["key"], given["value"]
    mask = given.get("attn_mask", given.get("attn_bias"))
    shapes, width = view.shapes(q), view.shapes(q)[0][-1]
    scale = given.get("scale")
    closed = Closure(view, output, [] if mask is None else [mask])
    reasons: list[RefusedError] = []
    for batch in batches(shapes, head_counts(view, [q, output], [width, width]), grouped=False):
        try:
            draft = Draft(
                anchor=node,
                output=output,
                q=operand(view, q, _canonical(view, q, batch), closed),
                k=operand(view, k, _canonical(view, q, batch), closed),
                v=operand(view, v, _canonical(view, q, batch), closed),
                operands=(q, k, v),
                terms=() if mask is None else (_term(view, node, mask, batch),),
                core=tuple(dict.fromkeys((node, output))),
                merge=batch.backward,
                scale=1 / math.sqrt(width) if scale is None else float(scale),
                softcap=0.0,
                form="scaled_dot_product_attention",
                causal=bool(given.get("is_causal")),
            )
            return assemble(view, draft)
        except RefusedError as refused:
            reasons.append(refused)
    raise reasons[0] if reasons else RefusedError(f"operands of rank {len(shapes[0])} are not read")


def named_arguments(node: fx.Node) -> Mapping[str, Any]:
    """The arguments of an ATen call by the names of its schema."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    names = [a.name for a in target._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def result_of(view: View, node: fx.Node, kept: tuple[int, ...] = ()) -> fx.Node:
    """The attention's result among the values that `node` returns.

    Args:
        view: the graph.
        node: the operator.
        kept: further results that may be used outside: what they hold is no part of the attention itself.

    Raises:
        RefusedError: the result is not used, or another one is.
    """
    items = {u.args[1]: u for u in view.users(node) if kind(u) == "getitem"}
    if not items:
        return node
    for index, item in items.items():
        if index != 0 and index not in kept and view.users(item):
            by = "the model returns it" if is_output(item) else f"{name_of(view.users(item)[0])} uses it"
            raise RefusedError(f"output {index} of {name_of(node)} is used outside of the attention: {by}")
    if 0 not in items:
        raise RefusedError(f"nothing uses the result of {name_of(node)}")
    return items[0]


def _canonical(view: View, q: fx.Node, batch: Batch) -> Canonical:
    """[..., rows, D] as [B, Hq, rows, D], with the heads of keys and values repeated as often as need be."""
    wanted = [tuple(s[:-2]) for s in view.shapes(q)]

    def bring(sample: int, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = batch.forward(x.expand(*wanted[sample][:-1], -1, -1, -1) if x.dim() == 4 else x)
        heads = batch.forward(torch.empty(*wanted[sample], 1, 1, device="meta")).shape[1]
        return y.repeat_interleave(heads // y.shape[1], 1) if y.shape[1] not in (0, heads) else y

    return bring


def _term(view: View, node: fx.Node, mask: fx.Node, batch: Batch) -> tuple[Term, Program]:
    boolean = view.samples[0].dtypes.get(mask) == torch.bool
    term = Term("keep" if boolean else "add", mask, node)
    shapes = view.shapes(mask)
    rank = len(shapes[0])
    apart = batch.rank == 3 and rank == 3 and any(s[0] != 1 for s in shapes)
    return term, batch.forward if apart else Program()
