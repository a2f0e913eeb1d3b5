"""Which model-local functions call which: none calls itself, and no chain of calls multiplies beyond measure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx

from graphopt.errors import GraphOptError

# The largest exports that we know of have some 10^5 nodes; runtimes inline every call.
MOST_NODES = 200_000
# Each level of a call costs a dozen Python frames when it runs, of the thousand that Python allows.
MOST_LEVELS = 50

Key = tuple[str, str, str]


def check_calls(proto: onnx.ModelProto) -> None:
    """Check that the functions of a model end.

    Raises:
        GraphOptError: a function calls itself, calls nest too deeply, or the model would unfold into too many nodes.
    """
    if not proto.functions:
        return
    functions = {_key(f.domain, f.name, f.overload): f for f in proto.functions}
    called = {key: [k for n in nodes_in(f.node) if (k := _of(n)) in functions] for key, f in functions.items()}
    own = {key: sum(1 for _ in nodes_in(f.node)) for key, f in functions.items()}
    sizes: dict[Key, int] = {}
    levels: dict[Key, int] = {}
    for key in _inner_first(called):
        # Cut off: the true number may have as many digits as the file has functions.
        sizes[key] = min(own[key] + sum(sizes[k] for k in called[key]), MOST_NODES + 1)
        levels[key] = 1 + max((levels[k] for k in called[key]), default=0)
    total = deepest = 0
    for node in nodes_in(proto.graph.node):
        total += 1 + sizes.get(_of(node), 0)
        deepest = max(deepest, levels.get(_of(node), 0))
    if total > MOST_NODES or deepest > MOST_LEVELS:
        raise GraphOptError(
            f"expected functions that unfold into at most {MOST_NODES} nodes, {MOST_LEVELS} calls deep, found "
            f"{'more nodes' if total > MOST_NODES else f'{deepest} calls'}; inline them before export"
        )


def _inner_first(called: dict[Key, list[Key]]) -> Iterator[Key]:
    """The functions, each behind those that it calls; without recursion, as the chain may be as long as the file."""
    done: set[Key] = set()
    for start in called:
        stack, path = [(start, iter(called[start]))], {start}
        while stack and start not in done:
            key, rest = stack[-1]
            inner = next((k for k in rest if k not in done), None)
            if inner is None:
                done.add(key)
                path.discard(key)
                stack.pop()
                yield key
            elif inner in path:
                raise GraphOptError(f"the function {key[1]!r} calls itself, which ONNX forbids; fix the model")
            else:
                path.add(inner)
                stack.append((inner, iter(called[inner])))


def _key(domain: str, name: str, overload: str) -> Key:
    return "" if domain == "ai.onnx" else domain, name, overload


def _of(node: onnx.NodeProto) -> Key:
    return _key(node.domain, node.op_type, node.overload)


def nodes_in(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes and those of their bodies."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs:
                yield from nodes_in(graph.node)
