"""Putting a module in the place of a site: its fx nodes go into the graph, its weights beside the model's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.graph import Graph, attribute, fresh_attribute, set_attribute, set_buffer
from graphopt.sites import EdgeSite, Site


class _FlatTracer(fx.Tracer):
    """Traces through every submodule, so that only functions and weights remain; takes a stated number of values."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self._inputs = inputs

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        # A replacement is written as forward(*values): how many there are, only the site knows.
        proxies = [self.create_proxy("placeholder", f"value_{i}", (), {}) for i in range(self._inputs)]
        return root_fn, [self.root, *proxies]

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return False


def splice(graph: Graph, site: Site, module: torch.nn.Module, stem: str, example: Sequence[Any] = ()) -> fx.Node:
    """Replace `site` by `module` in place and return the new output node.

    Args:
        graph: changed in place; a pass works on its own copy.
        site: a site of this very graph.
        module: from the values of `site.inputs` to the value of `site.output`.
        stem: dotted name below which the module's weights are stored.
        example: values of `site.inputs`; the new nodes remember type and shape that they give (lowering asks).
    """
    traced = _FlatTracer(len(site.inputs)).trace(module)
    parameters = [n for n in traced.nodes if n.op == "placeholder"]
    if example:
        _annotate(module, traced, example)
    mapping: dict[fx.Node, Any] = dict(zip(parameters, site.inputs, strict=True))
    weights: dict[str, str] = {}
    for parameter, value in zip(parameters, site.inputs, strict=True):
        value.meta.update(_observed(parameter))
    order = {node: i for i, node in enumerate(graph.nodes)}
    place = min(site.readers, key=order.__getitem__) if isinstance(site, EdgeSite) else site.output
    with graph.fx.inserting_before(place):
        for node in traced.nodes:
            if node.op == "get_attr":
                mapping[node] = _weight(graph, module, str(node.target), stem, weights)
                mapping[node].meta = _observed(node)
            elif _is_type(node):
                # `y.to(x.dtype)`: what type that is, is known here, and ONNX has to be told.
                mapping[node] = node.all_input_nodes[0].meta["dtype"]
            elif node.op not in ("placeholder", "output"):
                mapping[node] = graph.fx.node_copy(node, lambda n: mapping[n])
                mapping[node].meta = {"graphopt_site": site.name, **_observed(node)}
    returned = next(n for n in traced.nodes if n.op == "output").args[0]
    assert isinstance(returned, fx.Node), "a replacement returns one value"
    new: fx.Node = mapping[returned]
    # Of an edge all other readers, the new nodes among them, keep the value as it is.
    readers = site.readers if isinstance(site, EdgeSite) else None
    site.output.replace_all_uses_with(new, lambda user: readers is None or user in readers)
    erase_dead(graph, site.nodes)
    graph.module.recompile()
    return new


def _is_type(node: fx.Node) -> bool:
    if node.target is not getattr or node.args[1] != "dtype":
        return False
    return isinstance(node.args[0], fx.Node) and "dtype" in node.args[0].meta


def _annotate(module: torch.nn.Module, traced: fx.Graph, example: Sequence[Any]) -> None:
    class Observer(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor):
                n.meta.update(dtype=value.dtype, rank=value.ndim, shape=tuple(value.shape))
            return value

    with torch.no_grad():
        Observer(module, graph=traced).run(*example)


def _observed(node: fx.Node) -> dict[str, Any]:
    return {key: node.meta[key] for key in ("dtype", "rank", "shape") if key in node.meta}


def _weight(graph: Graph, module: torch.nn.Module, target: str, stem: str, weights: dict[str, str]) -> fx.Node:
    if target not in weights:
        weights[target] = fresh_attribute(graph.module, f"{stem}.{target}")
        value = attribute(module, target)
        # What a replacement holds as a buffer is no weight: whoever trains the result is not to move it.
        is_buffer = isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter)
        (set_buffer if is_buffer else set_attribute)(graph.module, weights[target], value)
    return graph.fx.create_node("get_attr", weights[target])


def erase_dead(graph: Graph, nodes: Iterable[fx.Node]) -> None:
    """Erase those of `nodes` that nothing uses any more, and what only they used."""
    pending = list(nodes)
    erased: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node in erased or node.users or node.op in ("placeholder", "output"):
            continue
        pending += node.all_input_nodes
        graph.fx.erase_node(node)
        erased.add(node)
