"""Running a graph node by node: frees values early, and falls back to onnxruntime where torch has no answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import fx

from graphopt.dialect.control import start_run
from graphopt.errors import GraphOptError
from graphopt.opaque import OpaqueOperator
from graphopt.subgraphs import SubgraphOperator

if TYPE_CHECKING:
    from graphopt.graph import Graph

# Of a name in a message; in a corrupt file it may be megabytes long.
_LONGEST = 100
Observer = Callable[[fx.Node, Any], None]
Enter = Callable[["Graph", Sequence[Any]], None]


class GraphInterpreter(fx.Interpreter):
    """Interprets an fx graph and reports each node's value to an observer, and each call of a body to another."""

    def __init__(
        self,
        graph: Graph,
        observe: Observer | None = None,
        enter: Enter | None = None,
        weights: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(graph.module, garbage_collect_values=True)
        self.extra_traceback = False  # fx would add several lines of its own to every error
        self._graph = graph
        self._observe = observe
        self._enter = enter
        self._weights = weights or {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; an operator that its torch function does not cover runs on onnxruntime."""
        try:
            try:
                name = str(n.meta.get("onnx_name", n.target)) if n.op == "get_attr" else ""
                value = self._weights[name] if name in self._weights else super().run_node(n)
            except NotImplementedError:
                value = self._on_onnxruntime(n)
        except GraphOptError:
            raise
        except Exception as error:  # whatever torch says of operands that do not fit
            raise GraphOptError(_failure(n, error)) from error
        if self._observe is not None:
            self._observe(n, value)
        return value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module; the nodes inside an operator's bodies are interpreted like all others."""
        module = self.fetch_attr(target)
        if isinstance(module, SubgraphOperator):
            return module.evaluate(args, self._run_body)
        return module(*args, **kwargs)

    def _run_body(self, body: Graph, values: Sequence[Any]) -> tuple[Any, ...]:
        if self._enter is not None:
            self._enter(body, values)
        return execute(body, values, self._observe, self._enter)

    def _on_onnxruntime(self, n: fx.Node) -> Any:
        origin, source = n.meta.get("onnx"), self._graph.onnx
        if origin is None or source is None or not origin.holds_for(n):
            raise
        args, _ = self.fetch_args_kwargs_from_env(n)
        types: Any = n.kwargs.get("types", ())  # of the functions to which int4 is not int8
        operator = OpaqueOperator(origin.proto, (), source.proto.opset_import, source.proto.functions, {}, types)
        return operator(*args)


def _failure(node: fx.Node, error: Exception) -> str:
    """One sentence about a node that cannot be computed."""
    origin = node.meta.get("onnx")
    operator = origin.proto.op_type if origin is not None else getattr(node.target, "__name__", str(node.target))
    name = (origin.proto.name if origin is not None else "") or node.meta.get("onnx_name", node.name)
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return f"node {name[:_LONGEST]!r} ({operator[:_LONGEST]}) cannot be computed on these values: {reason[:300]}"


def execute(
    graph: Graph,
    values: Sequence[Any],
    observe: Observer | None = None,
    enter: Enter | None = None,
    weights: Mapping[str, Any] | None = None,
    interpreter: type[GraphInterpreter] = GraphInterpreter,
) -> tuple[Any, ...]:
    """Run `graph` on flat values and return its outputs flat.

    Args:
        graph: what to run.
        values: one per input, in order.
        observe: called with each node and its value, right after the node ran; with those in bodies too.
        enter: called with each body and the values that it is run on.
        weights: values that take the place of the model's own, by ONNX name or, where it has none, by attribute.
        interpreter: what runs the nodes of `graph` itself.

    Raises:
        GraphOptError: the number of values differs from the number of inputs.
    """
    if len(values) != len(graph.inputs):
        raise GraphOptError(f"expected {len(graph.inputs)} inputs, got {len(values)}")
    if graph.body is None:
        start_run()
    result = interpreter(graph, observe, enter, weights).run(*values, enable_io_processing=False)
    flat: list[Any] = []

    def collect(item: Any) -> None:
        if isinstance(item, dict):
            for each in item.values():
                collect(each)
        elif isinstance(item, (tuple, list)) and len(flat) < len(graph.outputs):
            for each in item:
                collect(each)
        else:
            flat.append(item)

    if graph.onnx is not None:  # an ONNX output may itself be a sequence: do not look into it
        return tuple(result)
    collect(result)
    return tuple(flat)
