"""Decoders: caches that grow become a window of bounded length, and what leaves it lives on in a state.

    past [B, Hkv, P, D], present [B, Hkv, P + T, D]   ->   the same names, with P and P + T cut to sinks + window,
                                                           and past_state, present_state [B, H, F, V] beside them

A driver feeds the model what it returned, as before; states begin at zero and caches empty.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from graphopt.decoders.generate import logits
from graphopt.decoders.interface import Interface, Memory
from graphopt.errors import CheckFailed, GraphOptError
from graphopt.graph import Graph, State, ValueSpec
from graphopt.passes.attention.linearize.replacement import LinearReplacement
from graphopt.rewrite import Context, Replacement
from graphopt.rewrite.splice import erase_dead
from graphopt.sites import AttentionSite
from graphopt.sites.vocabulary import ancestors, kind

_OPERATORS = (torch.ops.graphopt.windowed_linear_attention, torch.ops.graphopt.linear_attention)
_STATE_ARGUMENT = {_OPERATORS[0]: 7, _OPERATORS[1]: 5}
_WINDOW_DIM = "window_length"
# Two orders of summation in fp32, through all layers.
_AGREE = 1e-3


def carry_states(graph: Graph, replacements: Sequence[Replacement], window: int, sinks: int, context: Context) -> Graph:
    """Give a decoder with caches a window and states in their place; other graphs are handed back.

    Args:
        graph: the rewritten graph, changed in place.
        replacements: what was put in.
        window: positions that the caches keep besides the sinks.
        sinks: first positions that they keep.
        context: gives the text on which prefill and decoding are compared.

    Raises:
        GraphOptError: the caches cannot be told apart, or belong to an nn.Module.
        CheckFailed: prefill and decoding disagree, as where positions are counted from the length of the cache.
    """
    cached = [r for r in replacements if isinstance(r.site, AttentionSite) and r.site.past is not None]
    if not cached:
        return graph
    if graph.onnx is None or graph.body is not None:
        raise GraphOptError(
            "expected a decoder with caches as an .onnx file, since rewriting adds inputs for its states, but this is "
            "an nn.Module or a body; export it first"
        )
    roles = Interface.of(graph)
    memories = {m.past.name: m for m in roles.caches}
    names = [_names_of(graph, r.site) for r in cached]
    editor = _Editor(graph, roles)
    for index, replacement in enumerate(cached):
        pair = [memories.get(name) for name in names[index]]
        if None in pair:
            raise GraphOptError(f"the outputs that continue the cache of {replacement.site.name!r} were not found")
        for memory, which in zip(pair, ("k", "v"), strict=True):
            assert memory is not None
            editor.cut(memory, replacement, which, window, sinks)
        editor.add_state(index, replacement)
    result = editor.finish()
    _require_agreement(result, context)
    context.notes.append(_how_to_feed(result, sinks + window))
    return result


def _how_to_feed(graph: Graph, kept: int) -> str:
    sums = [s.past for s in graph.states if s.kind == "sum"]
    rest = f", and what leaves them lives on in {len(sums)} states ({sums[0]}, ...)" if sums else ""
    zeros = " and states of zeros" if sums else ""
    return (
        f"the model's caches now keep at most {kept} positions{rest}: begin with caches of length 0{zeros}, and give "
        "each present* back as the past* of the same name; attention_mask covers the cached and the new positions"
    )


def _names_of(graph: Graph, site: Any) -> list[str]:
    """The inputs that hold the cached keys and values of a site."""
    names = {node: spec.name for node, spec in zip(graph.placeholders, graph.inputs, strict=True)}
    assert site.past is not None
    found = []
    for node in site.past:
        behind = [n for n in ancestors([node]) if n in names]
        found.append(names[node] if node in names else names[behind[0]] if len(behind) == 1 else "")
    return found


class _Editor:
    """Changes the graph and its interface together."""

    def __init__(self, graph: Graph, roles: Interface) -> None:
        self.graph = graph
        self._batch = roles.tokens.shape[0] if roles.tokens.shape else None
        self.inputs, self.outputs = list(graph.inputs), list(graph.outputs)
        self.states: list[State] = []
        self.results = list(graph.results)
        self._output = next(n for n in graph.nodes if n.op == "output")

    def cut(self, memory: Memory, replacement: Replacement, which: str, window: int, sinks: int) -> None:
        """Let the output that continues a cache keep no more than the sinks and the window."""
        if memory.axis != 2:
            raise GraphOptError(f"expected caches [B, H, P, D], found {memory.past}")
        place = next(i for i, spec in enumerate(self.outputs) if spec.name == memory.present.name)
        old = self.results[place]
        with self.graph.fx.inserting_before(self._output):
            joined = old if kind(old) == "concat" else self._joined(replacement, which)
            kept = self._kept(joined, window, sinks, memory)
        self.results[place] = kept
        shape = memory.present.shape
        assert shape is not None
        self.outputs[place] = replace(self.outputs[place], shape=(shape[0], shape[1], _WINDOW_DIM, shape[3]))
        self.states.append(State(memory.past.name, memory.present.name, "window"))

    def _joined(self, replacement: Replacement, which: str) -> fx.Node:
        """All keys or values [B, Hkv, P + T, D], where one operator both joined and attended."""
        site = replacement.site
        assert isinstance(site, AttentionSite)
        before = set(self.graph.nodes)
        tracer = fx.proxy.GraphAppendingTracer(self.graph.fx)
        operands = site.split(*(fx.Proxy(n, tracer) for n in site.inputs))
        joined: fx.Node = getattr(operands, which).node
        made = [n for n in self.graph.nodes if n not in before]
        _annotate(made, dict(zip(site.inputs, replacement.record.inputs(0), strict=True)))
        erase_dead(self.graph, [n for n in made if n is not joined and not n.users])
        return joined

    def _kept(self, joined: fx.Node, window: int, sinks: int, memory: Memory) -> fx.Node:
        def rows(x: fx.Node, start: int | None, stop: int | None) -> fx.Node:
            index = (slice(None), slice(None), slice(start, stop))
            return self._noted(self.graph.fx.call_function(operator.getitem, (x, index)), memory.past)

        if not window:
            return rows(joined, None, sinks)
        if not sinks:
            return rows(joined, -window, None)
        last = rows(rows(joined, sinks, None), -window, None)
        first = rows(joined, None, sinks)
        return self._noted(self.graph.fx.call_function(torch.cat, ([first, last], 2)), memory.past)

    def _noted(self, node: fx.Node, spec: ValueSpec) -> fx.Node:
        node.meta.update(dtype=spec.dtype, rank=4, graphopt_site="graphopt")
        return node

    def add_state(self, index: int, replacement: Replacement) -> None:
        """A new input for the operator's state, and a new output for what becomes of it."""
        module, site = replacement.module, replacement.site
        assert isinstance(module, LinearReplacement)
        nodes = [n for n in self.graph.nodes if n.meta.get("graphopt_site") == site.name]
        call = next((n for n in nodes if n.target in _OPERATORS), None)
        if call is None:
            return  # a window alone carries nothing else
        shape = (self._batch, *module.state_shape())
        past, present = (ValueSpec(f"{word}_state.{index}", torch.float32, shape) for word in ("past", "present"))
        last = self.graph.placeholders[-1]
        with self.graph.fx.inserting_after(last):
            placeholder = self.graph.fx.placeholder(f"past_state_{index}")
        placeholder.meta.update(onnx_name=past.name, dtype=past.dtype, rank=4, shape=(1, *module.state_shape()))
        arguments = list(call.args)
        arguments[_STATE_ARGUMENT[call.target]] = placeholder  # type: ignore[index]  # one of the two
        call.args = tuple(arguments)
        with self.graph.fx.inserting_after(call):
            result = self.graph.fx.call_function(operator.getitem, (call, 1))
        result.meta.update(placeholder.meta, graphopt_site=site.name)
        result.meta.pop("onnx_name")
        self.inputs.append(past)
        self.outputs.append(present)
        self.results.append(result)
        self.states.append(State(past.name, present.name, "sum"))

    def finish(self) -> Graph:
        """The graph with its new interface."""
        old = self.graph.results
        self._output.args = (tuple(self.results),)
        erase_dead(self.graph, [n for n in old if n not in self.results])
        self.graph.module.recompile()
        return replace(
            self.graph,
            inputs=tuple(self.inputs),
            outputs=tuple(self.outputs),
            states=(*self.graph.states, *self.states),
        )


def _annotate(nodes: Sequence[fx.Node], known: dict[fx.Node, Any]) -> None:
    """Note type, rank and shape of new nodes from example values; lowering asks for them."""
    values = dict(known)
    with torch.no_grad():
        for node in nodes:
            if any(n not in values for n in node.all_input_nodes):
                continue
            arguments, options = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "call_method":
                value = getattr(arguments[0], str(node.target))(*arguments[1:], **options)
            else:
                value = node.target(*arguments, **options)  # type: ignore[operator]  # a function's target is callable
            values[node] = value
            if isinstance(value, torch.Tensor):
                node.meta.update(dtype=value.dtype, rank=value.ndim, shape=tuple(value.shape))


def _require_agreement(graph: Graph, context: Context) -> None:
    """Run a text at once, and then in parts and token by token: the scores have to be the same."""
    roles = Interface.of(graph)
    place = [spec.name for spec in graph.inputs].index(roles.tokens.name)
    text = next(iter(context.calibration))[place][:1]
    if text.shape[1] < 2:
        return
    split = max(1, text.shape[1] - 4)
    whole = logits(graph, text)
    try:
        found = abs(whole - logits(graph, text, split=split)).max()
        problem = f"scores differ by {found:.3g}"
    except GraphOptError as error:
        found, problem = float("inf"), str(error)
    if not found <= _AGREE * max(1.0, abs(whole).max()):
        raise CheckFailed(
            f"expected decoding with states to give what one run over the text gives, but {problem}: its positions or "
            "its mask seem to be computed from the length of the cache; export the model with position_ids and "
            "attention_mask as inputs"
        )
