"""Operators with bodies (If, Loop, Scan, ...) and calls of model-local functions: the bodies are graphs themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import onnx
import torch

from graphopt.opaque import OpaqueOperator

if TYPE_CHECKING:
    from graphopt.graph import Graph, ValueSpec

Run = Callable[["Graph", Sequence[Any]], tuple[Any, ...]]
"""Runs a graph on flat values."""


@dataclass(frozen=True)
class Body:
    """A body as the operator's function sees it: called with the formal inputs, returns a tuple of the outputs."""

    graph: Graph
    captured: tuple[Any, ...]
    run: Run

    @property
    def outputs(self) -> tuple[ValueSpec, ...]:
        """What the body declares of its outputs."""
        return self.graph.outputs

    def __call__(self, *values: Any) -> tuple[Any, ...]:
        """Run the body; formal inputs that are not given are empty."""
        formal = len(self.graph.inputs) - len(self.captured)
        missing = (None,) * (formal - len(values))
        return self.run(self.graph, (*values, *missing, *self.captured))


class SubgraphOperator(torch.nn.Module):
    """One ONNX node with bodies; its inputs are the node's inputs, then the values that its bodies capture.

    Each body is a `Graph`, which passes enter like any other. The last inputs of a body are what it captures from
    the scopes around it. Weights are no such inputs: those of an outer scope are visible in every body.
    """

    def __init__(
        self,
        proto: onnx.NodeProto,
        function: Callable[..., Any],
        attributes: Mapping[str, Any],
        bodies: Mapping[str, Graph] | Callable[[], Mapping[str, Graph]],
        captured: Sequence[str] = (),
        is_call: bool = False,
    ) -> None:
        """Set up the operator.

        Args:
            proto: the node.
            function: the operator's meaning; takes the bodies as keyword arguments beside the attributes.
            attributes: the keyword arguments that are no bodies.
            bodies: the graphs by attribute; a callable makes them on first use.
            captured: names of the captured values, in the order of the arguments behind the node's own inputs.
            is_call: whether the node calls a model-local function, whose body it shares with other calls.
        """
        super().__init__()
        self.proto = proto
        self.is_call = is_call
        self.edited = False
        """Whether a body is no longer what `proto` says."""
        self.captured = tuple(captured)
        self._function = function
        self._attributes = dict(attributes)
        self._bodies = bodies
        if not callable(bodies):
            self._register(bodies)

    def _register(self, bodies: Mapping[str, Graph]) -> None:
        for name, body in bodies.items():
            self.add_module(f"body_{name}", body.module)

    @property
    def bodies(self) -> Mapping[str, Graph]:
        """The graphs by attribute name (`then_branch`, `body`, ...)."""
        if callable(self._bodies):
            self._bodies = dict(self._bodies())
            self._register(self._bodies)
        return self._bodies

    def set_body(self, name: str, body: Graph) -> None:
        """Put another graph of the same inputs and outputs in the place of a body."""
        self._bodies = {**self.bodies, name: body}
        self._register({name: body})
        self.edited = True

    def redescribe(self, name: str, body: Graph) -> None:
        """Put in the same body with better known types and shapes of its inputs."""
        self._bodies = {**self.bodies, name: body}

    def extra_repr(self) -> str:
        """What a printed module shows."""
        return f"{self.proto.domain or 'ai.onnx'}::{self.proto.op_type}"

    def copy(self) -> SubgraphOperator:
        """An operator with bodies of its own that share the weights; a function's body is the model's, not a call's."""
        bodies = self._bodies
        if not callable(bodies) and not self.is_call:
            bodies = {name: body.copy() for name, body in bodies.items()}
        return self._with(bodies)

    def _with(self, bodies: Any) -> SubgraphOperator:
        twin = SubgraphOperator(self.proto, self._function, self._attributes, bodies, self.captured, self.is_call)
        twin.edited = self.edited
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> SubgraphOperator:
        # The file behind the graphs is not copied: it is never changed.
        bodies = {n: replace(b, module=copy.deepcopy(b.module, memo)) for n, b in self.bodies.items()}
        return self._with(bodies)

    def forward(self, *values: Any) -> Any:
        """Run the node; one value, or a tuple where it declares several outputs."""
        return self.evaluate(values, lambda graph, inner: graph.module(*inner))

    def evaluate(self, values: Sequence[Any], run: Run) -> Any:
        """Run the node, its bodies by `run`."""
        own = len(self.proto.input)
        outer = dict(zip(self.captured, values[own:], strict=True))
        bodies = {}
        for name, body in self.bodies.items():
            taken = tuple(outer[spec.name] for spec in body.inputs if spec.name in body.captured)
            bodies[name] = Body(body, taken, run)
        return self._function(*values[:own], **self._attributes, **bodies)


def node_proto(module: torch.nn.Module) -> onnx.NodeProto | None:
    """The ONNX node that a module of an imported graph stands for: opaque, or with bodies."""
    return module.proto if isinstance(module, (OpaqueOperator, SubgraphOperator)) else None


def call_function(*values: Any, body: Body, outputs: int) -> Any:
    """Call a model-local function: its body on the arguments."""
    results = body(*values)
    return results[0] if outputs == 1 else results


def bodies_of(graph: Graph) -> list[tuple[SubgraphOperator, str, Graph]]:
    """The bodies of a graph's control flow nodes, one level deep: the operator, the attribute, the body.

    Bodies of model-local functions are not among them: a function is shared by its calls.
    """
    found = []
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        module = graph.module.get_submodule(str(node.target))
        if isinstance(module, SubgraphOperator) and not module.is_call:
            found += [(module, name, body) for name, body in module.bodies.items()]
    return found


def walk(graph: Graph) -> Iterator[Graph]:
    """The graph, and the bodies of its control flow nodes at any depth."""
    yield graph
    for _, _, body in bodies_of(graph):
        yield from walk(body)


def weights_of_bodies(graph: Graph) -> set[str]:
    """ONNX names of the weights that the bodies of a graph use: they know them by name, without an edge."""
    found: set[str] = set()
    for _, _, body in bodies_of(graph):
        for level in walk(body):
            found.update(n.meta["onnx_name"] for n in level.nodes if n.op == "get_attr" and "onnx_name" in n.meta)
    return found
