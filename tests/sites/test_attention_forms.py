"""Attention in every spelling that people write, as nn.Modules: recognised, described, numerically right."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.execute import execute
from graphopt.graph import Graph
from graphopt.sites import AttentionSite, MaskKind, find
from graphopt.sites.attention import compare
from graphopt.sites.samples import sample_inputs
from graphopt.sites.vocabulary import kind

B, H, T, D = 2, 3, 5, 4
Attend = Callable[..., Tensor]


class Functional(nn.Module):
    """A function of the inputs as a module."""

    def __init__(self, function: Attend, **weights: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in weights.items():
            self.register_buffer(name, value)

    def forward(self, *values: Tensor) -> Tensor:
        return self.function(*values, **dict(self.named_buffers()))


def graph_of(function: Attend | nn.Module, *inputs: Tensor, dynamic: Any = None, **weights: Tensor) -> Graph:
    module = function if isinstance(function, nn.Module) else Functional(function, **weights)
    return graphopt.load(module.eval(), inputs, dynamic)


def the_site(graph: Graph) -> AttentionSite:
    findings = find(graph, "attention")
    assert not findings.refusals
    assert len(findings.sites) == 1
    site = findings.sites[0]
    check(graph, site)
    return site


def check(graph: Graph, site: AttentionSite) -> None:
    """The site is a region, and means what the graph computes; masks hold zeros and ones."""
    inside = set(site.nodes)
    for node in site.nodes[:-1]:
        assert (set(node.users) <= inside) == (node not in site.exposed)
    assert not inside & set(site.inputs)
    assert len(set(site.inputs)) == len(site.inputs)
    seen: dict[Any, Any] = {}
    execute(graph, sample_inputs(graph, 3), lambda node, value: seen.update({node: value}))
    assert compare(site, [seen[n] for n in site.inputs], seen[site.output]) < 1e-4


def heads(*shape: int) -> Tensor:
    return torch.randn(*shape)


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return heads(B, H, T, D), heads(B, H, T, D), heads(B, H, T, D)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(D), -1) @ v


def keys_transposed_already(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k / math.sqrt(D), -1) @ v


def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = k @ (q / math.sqrt(D)).transpose(-1, -2)
    return v.transpose(-1, -2) @ torch.softmax(scores, -2)


def scale_both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    root = D**-0.25
    return torch.softmax((q * root) @ (k * root).transpose(-1, -2), -1) @ v


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) * 0.5, -1)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


def einsum_positions_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(torch.einsum("bihd,bjhd->bhij", q, k) * 0.5, -1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def batch_and_heads_in_one_axis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    weights = torch.softmax(torch.bmm(q * 0.5, k.transpose(1, 2)), -1)
    return torch.bmm(weights, v).reshape(B, H, T, D)


def softcapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(2.0 * torch.tanh(q @ k.transpose(-1, -2) * 0.5 / 2.0), -1) @ v


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(torch.softmax(q @ k.transpose(-1, -2), -1), 0.1, training=False) @ v


def softmax_in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.half(), k.half(), v.half()
    weights = torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1, dtype=torch.float32).half()
    return weights @ v


def cleaned_up(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1)
    return torch.where(torch.isnan(weights), torch.zeros_like(weights), weights) @ v


FORMS = {
    "plain": (plain, qkv, {"scale": 0.5}),
    "keys transposed already": (
        keys_transposed_already,
        lambda: (heads(B, H, T, D), heads(B, H, D, T), heads(B, H, T, D)),
        {"scale": 0.5},
    ),
    "keys first": (keys_first, qkv, {"scale": 0.5}),
    "scale on both": (scale_both, qkv, {"scale": 0.5}),
    "einsum": (einsum, qkv, {"scale": 0.5}),
    "einsum, positions first": (
        einsum_positions_first,
        lambda: (heads(B, T, H, D), heads(B, T, H, D), heads(B, T, H, D)),
        {"scale": 0.5, "query_heads": H},
    ),
    "batch and heads in one axis": (batch_and_heads_in_one_axis, qkv, {"scale": 0.5, "query_heads": H}),
    "soft cap": (softcapped, qkv, {"scale": 0.5, "softcap": 2.0}),
    "dropout": (dropped, qkv, {"scale": 1.0}),
    "NaN clean-up": (cleaned_up, qkv, {"scale": 0.5}),
    "one sample, no batch axes": (plain, lambda: (heads(T, D), heads(T, D), heads(T, D)), {"query_heads": 1}),
    "one head": (plain, lambda: (heads(B, T, D), heads(B, T, D), heads(B, T, D)), {"query_heads": 1}),
    "cross attention": (
        plain,
        lambda: (heads(B, H, T, D), heads(B, H, 7, D), heads(B, H, 7, 6)),
        {"head_dim": D, "value_dim": 6},
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_spelled_out(name: str) -> None:
    function, inputs, expected = FORMS[name]
    site = the_site(graph_of(function, *inputs()))
    assert site.form == "matmul-softmax-matmul"
    assert site.mask.kind is MaskKind.NONE
    for field, value in expected.items():
        assert getattr(site, field) == pytest.approx(value), field


def test_half_precision_with_a_float32_softmax() -> None:
    graph = graph_of(softmax_in_float32, *qkv())
    findings = find(graph, "attention")
    assert [s.scale for s in findings.sites] == [0.5]
    assert findings.sites[0].output.op == "call_function"


# Masks


def tokens_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) + (1.0 - mask[:, None, None, :].float()) * -10000.0
    return torch.softmax(scores, -1) @ v


def filled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).masked_fill(mask[:, None, None, :] == 0, float("-inf"))
    return torch.softmax(scores, -1) @ v


def causal_buffer(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    scores = torch.where(seen[: q.shape[2], : k.shape[2]], q @ k.transpose(-1, -2), -1e4)
    return torch.softmax(scores, -1) @ v


def causal_and_padding(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    scores = (q @ k.transpose(-1, -2)).masked_fill(~seen, -1e9)
    return torch.softmax(scores + (1.0 - mask[:, None, None, :].float()) * -1e9, -1) @ v


def multiplied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = torch.ones(q.shape[2], k.shape[2]).tril()
    scores = (q @ k.transpose(-1, -2)) * seen - 1e4 * (1 - seen)
    return torch.softmax(scores, -1) @ v


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    behind = torch.arange(T)[:, None] - torch.arange(T)[None]
    scores = (q @ k.transpose(-1, -2)).masked_fill((behind < 0) | (behind >= 2), float("-inf"))
    return torch.softmax(scores, -1) @ v


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    distance = (torch.arange(T)[None] - torch.arange(T)[:, None]).abs().float()
    return torch.softmax(q @ k.transpose(-1, -2) - distance * torch.tensor([0.5, 0.25, 0.125])[:, None, None], -1) @ v


def alibi_on_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) + 0.5 * torch.arange(T).float(), -1) @ v


def learned_bias(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) + table, -1) @ v


def strange(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.eye(T, dtype=torch.bool)
    return torch.softmax((q @ k.transpose(-1, -2)).masked_fill(hidden, float("-inf")), -1) @ v


def token_ids() -> Tensor:
    return torch.ones(B, T, dtype=torch.int64)


MASKS: dict[str, tuple[Attend, tuple[Tensor, ...], dict[str, Tensor], MaskKind]] = {
    "additive padding": (tokens_mask, (token_ids(),), {}, MaskKind.PADDING),
    "filled padding": (filled, (token_ids(),), {}, MaskKind.PADDING),
    "causal": (causal_buffer, (), {"seen": torch.ones(9, 9, dtype=torch.bool).tril()}, MaskKind.CAUSAL),
    "causal and padding": (causal_and_padding, (token_ids(),), {}, MaskKind.CAUSAL_PADDING),
    "multiplied and added": (multiplied, (), {}, MaskKind.CAUSAL),
    "window": (window, (), {}, MaskKind.SLIDING),
    "alibi": (alibi, (), {}, MaskKind.BIAS),
    "bias of keys": (alibi_on_keys, (), {}, MaskKind.PADDING),
    "learned bias": (learned_bias, (), {"table": torch.randn(H, T, T)}, MaskKind.BIAS),
    "not oneself": (strange, (), {}, MaskKind.ARBITRARY),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    function, more, weights, kind = MASKS[name]
    site = the_site(graph_of(function, *qkv(), *more, **weights))
    assert site.mask.kind is kind, site.mask.reason
    assert site.mask.reason
    assert (site.mask.window == 2) == (kind is MaskKind.SLIDING)


# scaled_dot_product_attention

SDPA: dict[str, tuple[dict[str, Any], MaskKind, float]] = {
    "plain": ({}, MaskKind.NONE, 0.5),
    "scaled": ({"scale": 0.25}, MaskKind.NONE, 0.25),
    "causal": ({"is_causal": True}, MaskKind.CAUSAL, 0.5),
    "boolean mask": ({"attn_mask": torch.ones(T, T, dtype=torch.bool).tril()}, MaskKind.CAUSAL, 0.5),
    "additive mask": ({"attn_mask": torch.randn(T, T)}, MaskKind.BIAS, 0.5),
}


@pytest.mark.parametrize("name", SDPA)
def test_scaled_dot_product_attention(name: str) -> None:
    options, kind, scale = SDPA[name]
    site = the_site(graph_of(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options), *qkv()))
    assert site.form == "scaled_dot_product_attention"
    assert site.mask.kind is kind
    assert site.scale == scale
    assert (site.query_heads, site.kv_heads, site.head_dim, site.value_dim) == (H, H, D, D)


def grouped_operands() -> tuple[Tensor, Tensor, Tensor]:
    return heads(B, 6, T, D), heads(B, 2, T, D), heads(B, 2, T, D)


GROUPED: dict[str, Attend] = {
    "enable_gqa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    "repeat_interleave": lambda q, k, v: plain(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)),
    "expand": lambda q, k, v: plain(q, *(x[:, :, None].expand(B, 2, 3, T, D).reshape(B, 6, T, D) for x in (k, v))),
    "groups of queries": lambda q, k, v: plain(q.reshape(B, 2, 3, T, D), k[:, :, None], v[:, :, None]),
    "gather": lambda q, k, v: plain(q, *(torch.index_select(x, 1, torch.tensor([0, 0, 0, 1, 1, 1])) for x in (k, v))),
}


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_queries(name: str) -> None:
    site = the_site(graph_of(GROUPED[name], *grouped_operands()))
    assert (site.query_heads, site.kv_heads) == (6, 2)


def test_heads_that_repeat_in_another_order_stay_repeated() -> None:
    site = the_site(graph_of(lambda q, k, v: plain(q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1)), *grouped_operands()))
    assert (site.query_heads, site.kv_heads) == (6, 6)


def test_one_head_for_all_queries() -> None:
    site = the_site(graph_of(plain, heads(B, H, T, D), heads(B, 1, T, D), heads(B, 1, T, D)))
    assert (site.query_heads, site.kv_heads) == (H, 1)


# Whole modules


class Packed(nn.Module):
    """One projection for queries, keys and values, cut along the last axis or along an axis of three."""

    def __init__(self, cut: str) -> None:
        super().__init__()
        self.project, self.cut = nn.Linear(H * D, 3 * H * D), cut

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(x)
        if self.cut == "chunk":
            q, k, v = (part.unflatten(-1, (H, D)).transpose(1, 2) for part in y.chunk(3, -1))
        else:
            q, k, v = y.unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4).unbind(0)
        return plain(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("cut", ["chunk", "unbind"])
def test_one_projection_for_all(cut: str) -> None:
    length = torch.export.Dim.DYNAMIC
    graph = graph_of(Packed(cut), torch.randn(B, T, H * D), dynamic=({0: length, 1: length},))
    site = the_site(graph)
    assert (site.query_heads, site.kv_heads, site.head_dim) == (H, H, D)
    assert not site.rope
    assert site.past is None


@pytest.mark.parametrize("weights", [False, True])
def test_torch_multi_head_attention(weights: bool) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(H * D, H, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.attention(x, x, x, need_weights=weights)[0]
            return result

    site = the_site(graph_of(Own(), torch.randn(B, T, H * D)))
    assert site.query_heads == H


class Rotary(nn.Module):
    """Rotates queries and keys, and puts cached keys and values in front."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
        angle = torch.arange(T)[:, None].float() * torch.tensor([1.0, 0.1])
        cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)

        def turn(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return x * cos + torch.cat([-b, a], -1) * sin

        return plain(turn(q), torch.cat([past_k, turn(k)], 2), torch.cat([past_v, v], 2))


def test_rotary_embedding_and_cache() -> None:
    site = the_site(graph_of(Rotary(), *qkv(), heads(B, H, 3, D), heads(B, H, 3, D)))
    assert site.rope
    assert site.past is not None
    assert [n.op for n in site.past] == ["placeholder", "placeholder"]


# Scores and weights that are used outside too


def weights_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(q @ k.transpose(-1, -2), -1)
    return weights @ v, weights


def scores_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = (q * 0.5) @ k.transpose(-1, -2)
    return torch.softmax(scores, -1) @ v, scores


def scores_and_weights_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    scores = q @ k.transpose(-1, -2)
    scaled = scores * 0.5
    weights = torch.softmax(scaled, -1)
    return weights @ v, scores, scaled, weights


def masked_scores_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = (q @ k.transpose(-1, -2)).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -1e9)
    return torch.softmax(scores, -1) @ v, scores


def weights_averaged(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(q @ k.transpose(-1, -2), -1)
    mean = weights.mean(1)
    return weights @ v, mean


def weights_rolled_out(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(q @ k.transpose(-1, -2), -1)
    return weights @ v, weights.transpose(-1, -2) @ weights


def two_kinds_of_values(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(q @ k.transpose(-1, -2), -1)
    return weights @ v, weights @ (v * v)


EXPOSED: dict[str, tuple[Attend, list[str]]] = {
    "weights": (weights_returned, ["softmax"]),
    "scores": (scores_returned, ["matmul"]),
    "scores and weights": (scores_and_weights_returned, ["matmul", "mul", "softmax"]),
    "masked scores": (masked_scores_returned, ["masked_fill"]),
    "mean of weights": (weights_averaged, ["softmax"]),
    "product of weights": (weights_rolled_out, ["softmax"]),
    "two kinds of values": (two_kinds_of_values, ["softmax"]),
}


@pytest.mark.parametrize("name", EXPOSED)
def test_scores_and_weights_that_are_used_outside(name: str) -> None:
    function, expected = EXPOSED[name]
    site = the_site(graph_of(function, *qkv()))
    assert [kind(n) for n in site.exposed] == expected
    assert [n.op for n in site.inputs[:3]] == ["placeholder"] * 3


def test_averaged_weights_of_torch_multi_head_attention() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(H * D, H, batch_first=True)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            result: tuple[Tensor, Tensor] = self.attention(x, x, x)
            return result

    site = the_site(graph_of(Own(), torch.randn(B, T, H * D)))
    assert site.query_heads == H
    assert len(site.exposed) == 1


# Near misses: refused, each with its reason


def classifier(x: Tensor, w: Tensor) -> Tensor:
    return torch.softmax(x @ w, -1)


def mixture(x: Tensor, w: Tensor, experts: Tensor) -> Tensor:
    return torch.softmax(x @ w, -1) @ experts


def check_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(q @ k.transpose(-1, -2), -1)
    unseen = torch.isnan(weights)
    return torch.where(unseen, torch.zeros_like(weights), weights) @ v, unseen


def weights_scaled_per_head(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return (torch.softmax(q @ k.transpose(-1, -2), -1) * gate) @ v


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2), -2) @ v


def with_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat([q @ k.transpose(-1, -2), torch.zeros(B, H, T, 1)], -1)
    return torch.softmax(scores, -1)[..., :-1] @ v


def squared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q @ k.transpose(-1, -2)) ** 2, -1) @ v


def half_hidden(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    return torch.softmax(torch.where(seen, q @ k.transpose(-1, -2), -1.0), -1) @ v


def temperature_per_head(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
    return torch.softmax((q @ k.transpose(-1, -2)) * t, -1) @ v


NEAR_MISSES: dict[str, tuple[Attend, tuple[Tensor, ...], dict[str, Tensor], str]] = {
    "classifier": (
        classifier,
        (torch.randn(B, 4),),
        {"w": torch.randn(4, 7)},
        "feeds no product with values",
    ),
    "mixture": (
        mixture,
        (torch.randn(B, 4),),
        {"w": torch.randn(4, 7), "experts": torch.randn(7, 3)},
        "constant operand",
    ),
    "a check of the weights returned": (
        check_returned,
        qkv(),
        {},
        r"\(isnan\) is used outside of the attention as an output of the model",
    ),
    "weights scaled": (
        weights_scaled_per_head,
        qkv(),
        {"gate": torch.rand(H, 1, 1)},
        r"feeds no product with values, but .* \(mul\)",
    ),
    "over queries": (over_queries, qkv(), {}, "computes something else than attention"),
    "sink": (with_sink, qkv(), {}, "with an attention sink"),
    "squared": (squared, qkv(), {}, r"come from .* \(pow\)"),
    "half hidden": (half_hidden, qkv(), {}, "by a value that does not hide them"),
    "temperature": (temperature_per_head, qkv(), {"t": torch.rand(H, 1, 1)}, "not one number"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_refused_with_a_reason(name: str) -> None:
    function, inputs, weights, reason = NEAR_MISSES[name]
    findings = find(graph_of(function, *inputs, **weights), "attention")
    assert not findings.sites
    assert len(findings.refusals) == 1
    assert re.search(reason, findings.refusals[0].reason), findings.refusals[0].reason


def test_a_graph_without_softmax_has_neither_sites_nor_refusals() -> None:
    findings = find(graph_of(torch.relu, torch.randn(3)), "attention")
    assert findings.sites == findings.refusals == ()


def test_names_are_unique_and_stable() -> None:
    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain(plain(q, k, v), k, v)

    names = [[s.name for s in find(graph_of(twice, *qkv()), "attention").sites] for _ in range(2)]
    assert names[0] == names[1]
    assert len(set(names[0])) == 2


def traced(site: AttentionSite) -> torch.fx.GraphModule:
    """`merge(softmax(scale q k^T + mask) v)` on fx proxies, as a pass writes it."""
    graph = torch.fx.Graph()
    tracer = torch.fx.proxy.GraphAppendingTracer(graph)
    proxies = [torch.fx.Proxy(graph.placeholder(f"x{i}"), tracer) for i in range(len(site.inputs))]
    values = site.split(*proxies)
    scores = site.scale * values.q @ values.k.transpose(-1, -2)
    if values.mask is not None:
        scores = scores + values.mask
    y: Any = site.merge(torch.softmax(scores, -1) @ values.v)
    graph.output(y.node)
    return torch.fx.GraphModule(nn.Module(), graph)


@pytest.mark.parametrize("function", [plain, keys_first, batch_and_heads_in_one_axis, causal_and_padding])
def test_split_and_merge_trace_and_are_differentiable(function: Attend) -> None:
    more = (token_ids(),) if function is causal_and_padding else ()
    graph = graph_of(function, *qkv(), *more)
    site = the_site(graph)
    seen: dict[Any, Any] = {}
    execute(graph, sample_inputs(graph, pattern="ones"), lambda node, value: seen.update({node: value}))
    values = [seen[n].detach() for n in site.inputs]
    floats = [v.requires_grad_() for v in values[:3]]
    result = traced(site)(*values)
    torch.testing.assert_close(result, seen[site.output])
    result.sum().backward()
    assert all(x.grad is not None for x in floats)
