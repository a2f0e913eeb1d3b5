"""A Graph as a plain nn.Module: called like the original, trained like the original."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import fx, nn

from graphopt.errors import GraphOptError
from graphopt.frontends.torch import ModuleSource
from graphopt.graph import Graph, ValueSpec, attribute, check_value, set_attribute, set_buffer
from graphopt.subgraphs import SubgraphOperator


class Convention(Protocol):
    """How a lowered module is called."""

    @property
    def signature(self) -> inspect.Signature:
        """Of `forward`, without `self`."""

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], specs: tuple[ValueSpec, ...]) -> list[Any]:
        """From a call's arguments to the graph's inputs."""

    def unflatten(self, results: tuple[Any, ...]) -> Any:
        """From the graph's outputs to what the call returns."""


class LoweredModule(nn.Module):
    """Weights under their original names, and one function that computes with them.

    It shares the weights' memory with the graph, so training changes the graph's weights too, until `.to()`
    or a deep copy separates them. Its program is its own. `train()` and `eval()` set the flag only: what
    dropout and batch statistics do was settled when the graph was made.
    """

    def __init__(self, program: Callable[..., tuple[Any, ...]], convention: Convention, specs: tuple[ValueSpec, ...]):
        super().__init__()
        self._program = program
        self._convention = convention
        self._specs = specs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the graph computes.

        Raises:
            GraphOptError: the arguments differ from the exported call in structure, or a static size differs.
        """
        values = self._convention.flatten(args, kwargs, self._specs)
        return self._convention.unflatten(self._program(self, *values))

    def compile_program(self, **options: Any) -> None:
        """Put the computation, not the handling of arguments, through torch.compile."""
        self._program = torch.compile(self._program, **options)


class OnnxConvention:
    """Tensors by position or by input name; one tensor or a tuple back."""

    def __init__(self, graph: Graph) -> None:
        self.names = [spec.name for spec in graph.inputs]
        identifiers = [str(node.target) for node in graph.placeholders]
        self.signature = inspect.Signature(
            [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in identifiers]
        )
        # An ONNX name need not be an identifier: `input.1` is also taken as `input_1`.
        self._index = {name: i for names in (identifiers, self.names) for i, name in enumerate(names)}
        self._single = len(graph.outputs) == 1

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxConvention:
        return self  # immutable

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], specs: tuple[ValueSpec, ...]) -> list[Any]:
        """The arguments in the order of the inputs.

        Raises:
            GraphOptError: one is missing, unknown, given twice, or has the wrong rank or size.
        """
        expected = ", ".join(map(repr, self.names)) or "none"
        if len(args) > len(self.names):
            raise GraphOptError(f"expected {len(self.names)} inputs ({expected}), got {len(args)}")
        values = dict(enumerate(args))
        for name, value in kwargs.items():
            if name not in self._index:
                raise GraphOptError(f"the model has no input {name!r}; its inputs are {expected}")
            if self._index[name] in values:
                raise GraphOptError(f"input {name!r} was given twice")
            values[self._index[name]] = value
        for index, spec in enumerate(specs):
            if index not in values:
                raise GraphOptError(f"expected a value for input {spec}, but none was given")
            check_value(spec, values[index])
        return [values[index] for index in range(len(specs))]

    def unflatten(self, results: tuple[Any, ...]) -> Any:
        """The only output, or all of them as a tuple."""
        return results[0] if self._single else tuple(results)


def lower(graph: Graph) -> LoweredModule:
    """Build the module; see `LoweredModule` for what it shares with the graph."""
    source = graph.source
    convention: Convention = source.calling if isinstance(source, ModuleSource) else OnnxConvention(graph)
    program, targets = _program(graph)
    name = source.class_name if isinstance(source, ModuleSource) else "OnnxModule"
    module = _class(name, convention)(program, convention, graph.inputs)
    _share_state(graph, module, targets)
    module.train(graph.module.training)
    return module


def _class(name: str, convention: Convention) -> type[LoweredModule]:
    """A class of its own, for a printed name and a `forward` whose signature tools can inspect."""

    def forward(self: LoweredModule, *args: Any, **kwargs: Any) -> Any:
        return LoweredModule.forward(self, *args, **kwargs)

    self_parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = convention.signature.parameters.values()
    forward.__doc__ = LoweredModule.forward.__doc__
    forward.__signature__ = inspect.Signature([self_parameter, *parameters])  # type: ignore[attr-defined]  # typeshed lacks it
    return type(name, (LoweredModule,), {"forward": forward, "__module__": __name__})


def _program(graph: Graph) -> tuple[Callable[..., tuple[Any, ...]], list[tuple[str, fx.Node]]]:
    """The graph as a function of the module and flat inputs, and the names that it reads from the module."""
    twin = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    twin.graph_copy(graph.fx, mapping)
    twin.output(tuple(mapping[node] for node in graph.results))
    held = [(str(node.target), node) for node in graph.nodes if node.op in ("get_attr", "call_module")]
    for node in list(twin.nodes):
        node.meta = {}  # shapes and stack traces would keep the tracing session alive
        if node.op == "get_attr" and not node.users:
            twin.erase_node(node)
    compiled = fx.GraphModule(graph.module, twin)
    program: Callable[..., tuple[Any, ...]] = type(compiled).forward
    return program, held


def _share_state(graph: Graph, module: LoweredModule, held: list[tuple[str, fx.Node]]) -> None:
    """Register each weight under its name; a parameter of two names stays one."""
    shared: dict[int, nn.Parameter] = {}
    source = graph.source if isinstance(graph.source, ModuleSource) else None
    placed: dict[str, nn.Parameter] = {}
    for target, node in held:
        value = attribute(graph.module, target)
        if isinstance(value, nn.Parameter):
            if id(value) not in shared:
                shared[id(value)] = nn.Parameter(value.detach(), _trainable(source, target, node, value))
            placed[target] = value = shared[id(value)]
        elif isinstance(value, SubgraphOperator):
            value = _with_shared_weights(value, shared)
        _place(module, target, value, persistent=source is None or target not in source.transient)
    for names in source.tied if source else ():
        present = next((placed[name] for name in names if name in placed), None)
        for name in names:
            if present is not None and name not in placed:
                _place(module, name, present)


def _with_shared_weights(operator: SubgraphOperator, shared: dict[int, nn.Parameter]) -> SubgraphOperator:
    """An operator whose bodies use the module's parameters, so that they are trained with it."""
    twin = operator.copy()
    for name, body in list(twin.bodies.items()):
        if twin.is_call:
            body = body.copy()
            twin.set_body(name, body)
        for node in body.nodes:
            value = attribute(body.module, str(node.target)) if node.op in ("get_attr", "call_module") else None
            if isinstance(value, SubgraphOperator):
                body.module.set_submodule(str(node.target), _with_shared_weights(value, shared))
            elif isinstance(value, nn.Parameter):
                if id(value) not in shared:
                    shared[id(value)] = nn.Parameter(value.detach(), _trainable(None, str(node.target), node, value))
                set_attribute(body.module, str(node.target), shared[id(value)])
    return twin


def _trainable(source: ModuleSource | None, target: str, node: fx.Node, value: nn.Parameter) -> bool:
    if not (value.is_floating_point() or value.is_complex()):
        return False
    if source is not None:
        return value.requires_grad if target in source.names else True
    # Of an .onnx file: single numbers and `Constant` nodes are part of the formula, not weights.
    return value.ndim > 0 and "onnx" not in node.meta


def _place(module: nn.Module, target: str, value: Any, persistent: bool = True) -> None:
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        set_buffer(module, target, value, persistent)
    else:
        set_attribute(module, target, value)
