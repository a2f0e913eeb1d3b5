"""The one intermediate representation: a torch.fx graph beside the thing that it was made from."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from onnx import GraphProto, NodeProto
from torch import fx
from torch.fx import Node

# Writes and compiles a graph's Python code when it is first called, which loading and rewriting never do: that is a
# third of the time to load a model.
from torch.fx._lazy_graph_module import _LazyGraphModule

from graphopt.errors import GraphOptError
from graphopt.feeds import check_value as check_value
from graphopt.feeds import from_feed
from graphopt.onnxfile import OnnxFile
from graphopt.onnxfile.tensors import element_type, to_numpy
from graphopt.subgraphs import SubgraphOperator

GraphModule = _LazyGraphModule
# Before, every initialiser had to stand among the inputs, and none could be fed.
_IR_OF_DEFAULTS = 4

if TYPE_CHECKING:
    from graphopt.rewrite.report import Result
    from graphopt.sites.base import Refusal, Site

Dim = int | str | None
"""A static size, the name of a symbolic one, or unknown."""


@dataclass(frozen=True)
class ValueSpec:
    """Name, element type and shape of a graph input or output."""

    name: str
    dtype: torch.dtype | str | None
    shape: tuple[Dim, ...] | None

    def __str__(self) -> str:
        dims = "?" if self.shape is None else ", ".join("?" if d is None else str(d) for d in self.shape)
        return f"{self.name}: {str(self.dtype).removeprefix('torch.')}[{dims}]"


@dataclass(frozen=True)
class State:
    """What a decoder carries from call to call: the output `present` of one is the input `past` of the next."""

    past: str
    present: str
    kind: Literal["sum", "window"]
    """`sum` starts at zero and keeps its size; `window` starts empty and keeps the last positions of a cache."""


@dataclass(frozen=True, eq=False)
class Origin:
    """The ONNX node that an fx node stands for; kept verbatim until a pass changes the fx node.

    `target` and `kwargs` are what the importer made of the node: while they still hold, export re-emits
    `proto` (with inputs renamed where they come from new producers).
    """

    proto: NodeProto
    index: int
    target: Any
    kwargs: Mapping[str, Any]
    captured: tuple[str, ...] = ()
    """Names that the node's subgraphs take from the outer scope; they are extra arguments behind the inputs."""

    def holds_for(self, node: fx.Node) -> bool:
        """Whether `node` still means what `proto` says."""
        arity = len(self.proto.input) + len(self.captured)
        return (
            node.target == self.target
            and len(node.args) == arity
            and node.kwargs.keys() == self.kwargs.keys()
            and all(_same(node.kwargs[key], value) for key, value in self.kwargs.items())
        )


def _moved(value: Any, mapping: Mapping[Node, Node]) -> Any:
    return mapping.get(value, value) if isinstance(value, Node) else value


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and not isinstance(a, fx.Node) and bool(a == b))


@dataclass(frozen=True)
class TorchSource:
    """What a graph from an nn.Module remembers of it."""

    example_args: tuple[Any, ...]
    example_kwargs: Mapping[str, Any]
    dynamic_shapes: Any = None
    class_name: str = "Module"


@dataclass(frozen=True)
class Graph:
    """One model: an executable, differentiable fx graph, its interface, and its source.

    Values run through it flat, in the order of `inputs` and `outputs`. Weights of an .onnx file are mapped from the
    file and shared between copies; a pass replaces a weight, it never writes into one.
    """

    module: fx.GraphModule
    inputs: tuple[ValueSpec, ...]
    outputs: tuple[ValueSpec, ...]
    source: OnnxFile | TorchSource
    notes: tuple[str, ...] = field(default=())
    """What the user should know about how the graph was read."""
    states: tuple[State, ...] = ()
    """What a pass has made of a decoder's caches."""
    body: GraphProto | None = None
    """Of a body of an operator (a branch of If, ...): the subgraph that it was read from; None for a main graph."""
    captured: tuple[str, ...] = ()
    """Names of a body's last inputs, which it takes from the scopes around it."""

    @property
    def fx(self) -> fx.Graph:
        """The fx graph."""
        return self.module.graph

    @property
    def nodes(self) -> Iterable[Node]:
        """All fx nodes, producers first."""
        return self.module.graph.nodes

    @property
    def onnx(self) -> OnnxFile | None:
        """The ONNX file behind the graph, if there is one."""
        return self.source if isinstance(self.source, OnnxFile) else None

    @property
    def proto(self) -> GraphProto | None:
        """The ONNX graph that this one was read from: of a body, the subgraph."""
        if self.body is not None:
            return self.body
        return None if self.onnx is None else self.onnx.proto.graph

    @property
    def defaults(self) -> dict[str, ValueSpec]:
        """Inputs of an .onnx file that need not be fed, since initialisers of the same name give their values."""
        if self.onnx is None or self.body is not None or self.onnx.proto.ir_version < _IR_OF_DEFAULTS:
            return {}
        from graphopt.frontends.onnx.specs import value_spec

        proto = self.onnx.proto.graph
        stored = {t.name for t in proto.initializer} | {s.values.name for s in proto.sparse_initializer}
        return {value.name: value_spec(value) for value in proto.input if value.name in stored}

    @property
    def placeholders(self) -> tuple[Node, ...]:
        """The input nodes, in the order of `inputs`."""
        return tuple(n for n in self.nodes if n.op == "placeholder")

    @property
    def results(self) -> tuple[Node, ...]:
        """The nodes whose values are the outputs, in the order of `outputs`."""
        return tuple(output_values(self.module.graph))

    def weight(self, node: Node) -> Any:
        """The value behind a `get_attr` node."""
        return attribute(self.module, str(node.target))

    def execute(self, *values: Any) -> tuple[Any, ...]:
        """Run on flat torch values; differentiable, frees each intermediate after its last use."""
        from graphopt.execute import execute

        return execute(self, values)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run on arrays by input name and return arrays by output name.

        An input that has a default in the model may be left out. Types that numpy lacks are those of ml_dtypes; those
        of fewer than 8 bits are also taken as int8, uint8 or float8_e4m3fn. Text is an object array of `str`, a
        sequence a list, an empty optional None.

        Raises:
            GraphOptError: an input is missing, unknown, or has the wrong type or rank.
        """
        from graphopt.execute import execute

        defaults = self.defaults
        replaced = {name: feeds[name] for name in feeds if name in defaults}
        for name, value in replaced.items():
            check_value(defaults[name], value)
        values = [from_feed(v) for v in self.ordered({k: v for k, v in feeds.items() if k not in replaced})]
        with torch.no_grad():
            results = execute(self, values, weights={name: from_feed(v) for name, v in replaced.items()})
        named = zip(self.outputs, results, strict=True)
        return {spec.name: to_numpy(value, element_type(spec.dtype)) for spec, value in named}

    def ordered(self, feeds: Mapping[str, Any]) -> list[Any]:
        """The feeds in input order, checked against the interface.

        Raises:
            GraphOptError: see `run`.
        """
        names = [spec.name for spec in self.inputs]
        for name in feeds:
            if name not in names:
                raise GraphOptError(f"the model has no input {name!r}; its inputs are {', '.join(map(repr, names))}")
        for spec in self.inputs:
            if spec.name not in feeds:
                raise GraphOptError(f"expected a value for input {spec}, but none was given")
            check_value(spec, feeds[spec.name])
        return [feeds[name] for name in names]

    def copy(self) -> Graph:
        """An independent graph that shares the weights."""
        twin = fx.Graph(tracer_cls=self.fx._tracer_cls)
        mapping: dict[Node, Node] = {}
        result = twin.graph_copy(self.fx, mapping)
        for node in twin.nodes:
            if "onnx" in node.meta:
                origin = node.meta["onnx"]
                node.meta["onnx"] = replace(origin, kwargs={k: _moved(v, mapping) for k, v in origin.kwargs.items()})
        output = next(n for n in self.nodes if n.op == "output")
        node = twin.output(result)
        node.meta = dict(output.meta)
        twin.set_codegen(copy.deepcopy(self.fx._codegen))
        module = GraphModule(self.module, twin, class_name=self.module.__class__.__name__)
        module.meta = dict(self.module.meta)
        module.train(self.module.training)
        for target in {str(n.target) for n in twin.nodes if n.op == "call_module"}:
            operator = module.get_submodule(target)
            if isinstance(operator, SubgraphOperator):
                module.set_submodule(target, operator.copy())
        return replace(self, module=module)

    def lint(self) -> None:
        """Check that the fx graph is well formed and that every weight it names exists."""
        self.fx.lint()
        for node in self.nodes:
            if node.op == "get_attr":
                attribute(self.module, str(node.target))

    def apply(self, passes: str | Sequence[Any], *, calibration: Any = None, seed: int = 0, **options: Any) -> Result:
        """Run passes and verify each rewrite; this graph is left as it is.

        Args:
            passes: `"cleanup"`, `"linearize{window=64}"`, a pass object, or a sequence of those.
            calibration: an iterable of input dicts, a DataLoader, a path to .npz, a number of random inputs, or
                `"self"` for text that a language model writes itself.
            seed: for everything random.
            options: see `graphopt.rewrite.manager.apply`.
        """
        from graphopt.rewrite.manager import apply

        return apply(self, passes, calibration=calibration, seed=seed, **options)

    def sites(self, kind: str) -> list[Site]:
        """What there is to rewrite of `kind` (`attention`, `softmax`, `mlp`, `linear`, `norm`), in bodies too."""
        from graphopt.sites import find_everywhere

        return list(find_everywhere(self, kind).sites)

    def refusals(self, kind: str) -> list[Refusal]:
        """What looked like a site of `kind` and is none, each with the reason."""
        from graphopt.sites import find_everywhere

        return list(find_everywhere(self, kind).refusals)

    def save(self, path: str | Path, *, target: str = "onnx", **options: Any) -> None:
        """Lower to `target` (`onnx`, `onnxruntime`, ...) and write the file atomically."""
        from graphopt.registry import backend

        backend(target).save(self, Path(path), **options)

    def to_module(self) -> torch.nn.Module:
        """A plain trainable nn.Module with the original parameter names."""
        from graphopt.registry import backend

        module: torch.nn.Module = backend("torch").lower(self)
        return module


def output_values(graph: fx.Graph) -> list[fx.Node]:
    """The values that the output node returns, flat."""
    output = next(n for n in graph.nodes if n.op == "output")
    flat: list[fx.Node] = []

    def collect(argument: Any) -> None:
        if isinstance(argument, dict):
            for item in argument.values():
                collect(item)
        elif isinstance(argument, (list, tuple)):
            for item in argument:
                collect(item)
        else:
            flat.append(argument)

    collect(output.args[0])
    return flat


def attribute(module: torch.nn.Module, target: str) -> Any:
    """Look up a dotted attribute."""
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def set_attribute(module: torch.nn.Module, target: str, value: Any) -> None:
    """Store a weight under a dotted name, making the modules on the way; floats become parameters."""
    owner, last = _owner(module, target)
    if isinstance(value, torch.nn.Parameter):
        owner.register_parameter(last, value)
    elif isinstance(value, torch.Tensor) and value.is_floating_point():
        owner.register_parameter(last, torch.nn.Parameter(value, requires_grad=False))
    elif isinstance(value, torch.Tensor):
        owner.register_buffer(last, value)
    else:
        setattr(owner, last, value)


def set_buffer(module: torch.nn.Module, target: str, value: torch.Tensor, persistent: bool = True) -> None:
    """Store what is no weight, and is not trained, under a dotted name; a parameter of this name makes room."""
    owner, last = _owner(module, target)
    owner._parameters.pop(last, None)
    owner.register_buffer(last, value, persistent=persistent)


def _owner(module: torch.nn.Module, target: str) -> tuple[torch.nn.Module, str]:
    """The module that holds what a dotted name stands for, and the last part of the name."""
    *path, last = target.split(".")
    owner = module
    for part in path:
        if not isinstance(getattr(owner, part, None), torch.nn.Module):
            owner.add_module(part, torch.nn.Module())
        owner = getattr(owner, part)
    return owner, last


def fresh_attribute(module: torch.nn.Module, stem: str) -> str:
    """A dotted name that starts with `stem`, is not taken, and leads through modules alone."""
    owner: Any = module
    found: list[str] = []
    *path, last = stem.split(".")
    for part in path:
        while hasattr(owner, part) and not isinstance(getattr(owner, part), torch.nn.Module):
            part += "_"  # a weight, or one of the attributes that every module has
        found.append(part)
        owner = getattr(owner, part, None)
    name, count = last, 0
    while hasattr(owner, name):
        count += 1
        name = f"{last}_{count}"
    return ".".join([*found, name])
