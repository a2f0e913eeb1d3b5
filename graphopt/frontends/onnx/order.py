"""The order in which a graph's nodes can run."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import networkx as nx
import onnx

from graphopt.errors import GraphOptError
from graphopt.onnxfile.scopes import Memo, captured


def order(nodes: Sequence[onnx.NodeProto], defined: Collection[str], memo: Memo) -> list[int]:
    """An order in which every producer comes first: the file's own where it is one.

    Args:
        nodes: of one graph.
        defined: names that stand before the first node.
        memo: see `graphopt.onnxfile.scopes.captured`.

    Raises:
        GraphOptError: the nodes form a cycle.
    """
    uses = [[n for n in (*node.input, *captured(node, memo)) if n] for node in nodes]
    known = set(defined)
    for node, used in zip(nodes, uses, strict=True):
        if not known.issuperset(used):
            break
        known.update(node.output)
    else:
        return list(range(len(nodes)))
    producers = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    structure: nx.DiGraph[int] = nx.DiGraph()
    structure.add_nodes_from(range(len(nodes)))
    structure.add_edges_from((producers[n], i) for i, used in enumerate(uses) for n in used if n in producers)
    try:
        return list(nx.lexicographical_topological_sort(structure))
    except nx.NetworkXUnfeasible as error:
        raise GraphOptError("the model's nodes form a cycle, so no order can run them; the file is corrupt") from error
