"""Putting the bodies of model-local functions in the place of their calls."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import fx

from graphopt.frontends.onnx.scope import opsets_of
from graphopt.rewrite.base import Equivalence, Pass
from graphopt.rewrite.inlining import inline, obstacle, take_name
from graphopt.rewrite.report import SiteReport
from graphopt.rewrite.splice import erase_dead
from graphopt.sites.vocabulary import name_of
from graphopt.subgraphs import SubgraphOperator

if TYPE_CHECKING:
    from graphopt.graph import Graph
    from graphopt.rewrite.context import Context


@dataclass(frozen=True)
class Inline(Pass):
    """f(x), f a model-local function   ->   the nodes of f on x

    Other passes leave functions alone, since all calls share one body; what is inlined they can rewrite. Functions
    that call functions are opened up too, also inside of loops and branches. A call of a function that imports another
    operator set version than the model stays: the same node could mean something else there.
    """

    name: ClassVar[str] = "inline"
    equivalence: ClassVar[Equivalence] = Equivalence.EXACT
    is_proven: ClassVar[bool] = True

    functions: tuple[str, ...] = ()
    """Names of the functions to inline; empty means all."""
    most_nodes: int = 1_000_000
    """Stop where the graph would have more nodes than this: functions that call functions can grow without bound."""

    def __post_init__(self) -> None:
        if self.most_nodes < 1:
            raise ValueError(f"expected most_nodes of 1 or more, got {self.most_nodes}")

    def run(self, graph: Graph, context: Context) -> tuple[Graph, Sequence[SiteReport]]:
        """See `Pass.run`."""
        twin = graph.copy()
        reports: list[SiteReport] = []
        pending = deque(node for node in twin.nodes if self._wanted(twin, node, context))
        size = len(twin.fx.nodes)
        while pending:
            node = pending.popleft()
            operator = twin.module.get_submodule(str(node.target))
            assert isinstance(operator, SubgraphOperator)
            body = operator.bodies["body"]
            values = (*node.args, *(None,) * (len(body.inputs) - len(node.args)))
            reason = obstacle(body, values) or _other_opset(twin, body)
            size += len(body.fx.nodes)
            if size > self.most_nodes:
                reason = f"the graph would have more than most_nodes={self.most_nodes} nodes"
            name, kind = name_of(node), operator.proto.op_type
            if reason is not None:
                reports.append(SiteReport(name, kind, "refused", f"function {kind!r} is not inlined: {reason}"))
                continue
            new = _replace(twin, node, body, values)
            reports.append(SiteReport(name, kind, "rewritten", f"call of {kind!r} -> its {len(new)} nodes"))
            pending += [n for n in new if self._wanted(twin, n, context)]
        if not any(report.status == "rewritten" for report in reports):
            return graph, reports
        twin.module.delete_all_unused_submodules()
        twin.module.recompile()
        return twin, reports

    def _wanted(self, graph: Graph, node: fx.Node, context: Context) -> bool:
        if node.op != "call_module":
            return False
        operator = graph.module.get_submodule(str(node.target))
        if not isinstance(operator, SubgraphOperator) or not operator.is_call:
            return False
        named = not self.functions or operator.proto.op_type in self.functions
        return named and (not context.only or name_of(node) in context.only)


def _replace(graph: Graph, node: fx.Node, body: Graph, values: Sequence[Any]) -> list[fx.Node]:
    results, new = inline(graph, node, body, values)
    calls = {node: 0} if len(results) == 1 else {user: int(user.args[1]) for user in node.users}  # type: ignore[arg-type]  # an index
    made = set(new)
    for call, index in calls.items():
        call.replace_all_uses_with(results[index])
        if results[index] in made:
            take_name(call, results[index])
    erase_dead(graph, calls)
    return new


def _other_opset(graph: Graph, body: Graph) -> str | None:
    assert graph.onnx is not None, "only ONNX models have functions"
    assert body.onnx is not None
    functions = {f.domain for f in graph.onnx.proto.functions}
    imported = opsets_of(graph.onnx.proto.opset_import)
    for domain, wanted in opsets_of(body.onnx.proto.opset_import).items():
        found = imported.get(domain)
        if domain in functions or wanted == (found or 1):
            continue
        has = f"the model version {found}" if found else "which the model does not import"
        return f"it imports version {wanted} of {domain or 'ai.onnx'}, {has}"
    return None
