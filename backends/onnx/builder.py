"""Making ONNX nodes: names, constants, model-local functions, and the operator sets they need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx.helper
import torch

from graphopt.errors import GraphOptError
from graphopt.onnxfile import OnnxFile
from graphopt.onnxfile.read import graphs
from graphopt.onnxfile.scopes import mentioned, stored
from graphopt.onnxfile.tensors import ONNX_DTYPES, to_tensor_proto

DOMAIN = "graphopt"
"""Operator domain of the model-local functions."""
Weight = onnx.TensorProto | onnx.SparseTensorProto | onnx.NodeProto
"""What defines a weight: an initialiser, or a Constant node."""


@dataclass
class Names:
    """Names that are taken anywhere in the model, subgraphs included."""

    taken: set[str] = field(default_factory=set)
    _counts: dict[str, int] = field(default_factory=dict)

    def fresh(self, stem: str) -> str:
        """A free name that starts with `stem`."""
        name, count = stem, self._counts.get(stem, 0)
        while name in self.taken:
            count += 1
            name = f"{stem}_{count}"
        self._counts[stem] = count
        self.taken.add(name)
        return name


class Builder:
    """Collects the nodes that one fx node lowers to, in a graph or in a function's body."""

    def __init__(self, owner: ModelParts, scope: str, *, names: Names | None = None, in_function: bool = False) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.owner = owner
        self.opset = owner.opset
        self._scope = scope
        self._names = names or owner.names
        self._in_function = in_function

    def op(
        self,
        op_type: str,
        *inputs: str,
        outputs: int | Sequence[str] = 1,
        domain: str = "",
        **attributes: Any,
    ) -> Any:
        """Add a node; returns its output name, or a list of names where it has several."""
        stem = f"{self._scope}/{op_type}"
        declared = [self._names.fresh(stem) for _ in range(outputs)] if isinstance(outputs, int) else list(outputs)
        name = self._names.fresh(f"{stem}_node")
        node = onnx.helper.make_node(op_type, list(inputs), declared, name=name, domain=domain or None, **attributes)
        self.nodes.append(node)
        if domain:
            self.owner.require(domain)
        return declared[0] if len(declared) == 1 else declared

    def constant(self, value: torch.Tensor, hint: str = "constant") -> str:
        """A constant: an initialiser of the graph, or a Constant node in a function's body."""
        if self._in_function:
            output = self._names.fresh(f"{self._scope}/{hint}")
            proto = to_tensor_proto(output, value)
            self.nodes.append(onnx.helper.make_node("Constant", [], [output], name=f"{output}_node", value=proto))
            return output
        return self.owner.initializer(f"{self._scope}/{hint}", value)

    def ints(self, *values: int) -> str:
        """An int64 vector constant."""
        return self.constant(torch.tensor(values, dtype=torch.int64), "ints")

    def cast(self, value: str, dtype: torch.dtype) -> str:
        """`value` as `dtype`."""
        return str(self.op("Cast", value, to=ONNX_DTYPES[dtype]))

    def number(self, value: float, dtype: torch.dtype = torch.int64) -> str:
        """A scalar constant."""
        return self.constant(torch.tensor(value, dtype=dtype), "number")

    def size(self, value: str, axis: int) -> str:
        """One size of a value, as a vector of one element."""
        return self.slice(str(self.op("Shape", value)), 0, axis, axis + 1)

    def sum(self, value: str, axis: int) -> str:
        """Sum along one axis, kept; the axes became an input in opset 13."""
        if self.opset >= 13:
            return str(self.op("ReduceSum", value, self.ints(axis), keepdims=1))
        return str(self.op("ReduceSum", value, axes=[axis], keepdims=1))

    def largest(self, value: str) -> str:
        """Maximum over the last axis, kept; the axes became an input in opset 18."""
        if self.opset >= 18:
            return str(self.op("ReduceMax", value, self.ints(-1), keepdims=1))
        return str(self.op("ReduceMax", value, axes=[-1], keepdims=1))

    def unsqueeze(self, value: str, axis: int) -> str:
        """Insert an axis of size 1."""
        if self.opset >= 13:
            return str(self.op("Unsqueeze", value, self.ints(axis)))
        return str(self.op("Unsqueeze", value, axes=[axis]))

    def squeeze(self, value: str, axis: int) -> str:
        """Remove an axis of size 1."""
        if self.opset >= 13:
            return str(self.op("Squeeze", value, self.ints(axis)))
        return str(self.op("Squeeze", value, axes=[axis]))

    def slice(self, value: str, axis: int, start: int, end: int) -> str:
        """value[start:end] along `axis`."""
        if self.opset >= 10:
            return str(self.op("Slice", value, self.ints(start), self.ints(end), self.ints(axis)))
        return str(self.op("Slice", value, starts=[start], ends=[end], axes=[axis]))

    def function(
        self,
        name: str,
        inputs: Sequence[str],
        body: Body,
        outputs: int = 1,
    ) -> Any:
        """Call a model-local function, defining it on first use; `name` tells its structure apart.

        Returns:
            Its output name, or a list of names where it has several.
        """
        defined = self.owner.define(name, len(inputs), body)
        return self.op(defined, *inputs, domain=DOMAIN, outputs=outputs)

    def graph(
        self,
        name: str,
        body: Body,
        inputs: Sequence[str] = (),
        dtype: torch.dtype = torch.float32,
        types: Mapping[str, torch.dtype] | None = None,
    ) -> onnx.GraphProto:
        """The graph of a branch or a loop's body, which sees every value that is defined so far.

        Args:
            name: of the graph.
            body: from the names of the inputs to the names of the outputs.
            inputs: what the graph's inputs are to be called, more or less.
            dtype: element type of the inputs and outputs; their shapes stay open.
            types: of the inputs that have another one.
        """
        inner = Builder(self.owner, self._scope, names=self._names, in_function=self._in_function)
        taken = [self._names.fresh(f"{self._scope}/{i}") for i in inputs]
        found = body(inner, taken)
        given = [found] if isinstance(found, str) else list(found)
        # A graph's output has to be made by one of its own nodes, and be no other output too.
        given = [str(inner.op("Identity", x)) for x in given]
        kinds = [(types or {}).get(i, dtype) for i in inputs]
        return onnx.helper.make_graph(
            inner.nodes, name, list(map(_typed, taken, kinds)), [_typed(name, dtype) for name in given]
        )


def _typed(name: str, dtype: torch.dtype) -> onnx.ValueInfoProto:
    """A value of any shape."""
    return onnx.helper.make_value_info(name, onnx.helper.make_tensor_type_proto(ONNX_DTYPES[dtype], None))


Body = Callable[[Builder, list[str]], str | Sequence[str]]
"""Makes the nodes of a function or of an inner graph: from the names of its inputs to those of its outputs."""


class ModelParts:
    """What lowering adds to a model beside nodes: weights, functions, operator sets."""

    def __init__(self, source: OnnxFile, target: str) -> None:
        """Args: source: the model that was read. target: `onnx` or `onnxruntime`."""
        self.source = source
        self.opset = source.opset()
        self.names = Names(set(_all_names(source.proto)))
        self.target = target
        self.rebuild = False
        """Put every graph together anew, also those where nothing was rewritten."""
        self.pinned = mentioned(source.proto) | _overridable(source.proto)
        """Names of weights that stay, whether or not a node uses them."""
        self.initializers: list[onnx.TensorProto] = []
        self.sparse_initializers: list[onnx.SparseTensorProto] = []
        self.constants: list[onnx.NodeProto] = []
        self.functions: dict[str, onnx.FunctionProto] = {}
        self.domains: dict[str, int] = {}
        self._shared: dict[tuple[Any, ...], str] = {}
        self._brought: dict[int, str] = {}
        self._called: dict[str, str] = {}
        self._existing = {f.name: f for f in source.proto.functions if f.domain == DOMAIN}

    def require(self, domain: str, version: int = 1) -> None:
        """Import an operator domain.

        Raises:
            GraphOptError: another version of it is needed elsewhere.
        """
        if self.domains.setdefault(domain, version) != version:
            raise GraphOptError(
                f"cannot lower to ONNX: versions {self.domains[domain]} and {version} of the domain {domain!r} are "
                "needed in one model"
            )

    def initializer(self, stem: str, value: torch.Tensor) -> str:
        """Store a constant; small equal ones are shared."""
        key = (value.dtype, tuple(value.shape), tuple(value.flatten().tolist())) if value.numel() <= 16 else None
        if key is not None and key in self._shared:
            return self._shared[key]
        name = self.names.fresh(stem)
        self.initializers.append(to_tensor_proto(name, value))
        if key is not None:
            self._shared[key] = name
        return name

    def bring(self, message: Weight, stem: str) -> str:
        """Put a weight that came out of a body, once, where everything sees it; its new name.

        Args:
            message: what defined it there: an initialiser, or a Constant node; the same object for all of its users.
            stem: the name to give it, or to start from.
        """
        if id(message) not in self._brought:
            name = self.names.fresh(stem)
            self._brought[id(message)] = name
            twin = type(message)()
            twin.CopyFrom(message)
            if isinstance(twin, onnx.NodeProto):
                twin.output[0] = name
                if twin.name:
                    twin.name = self.names.fresh(twin.name)
                self.constants.append(twin)
            elif isinstance(twin, onnx.SparseTensorProto):
                twin.values.name = name
                self.sparse_initializers.append(twin)
            else:
                twin.name = name
                self.initializers.append(twin)
        return self._brought[id(message)]

    def define(self, name: str, arity: int, body: Body) -> str:
        """Define a model-local function once; its name tells apart everything that its body depends on.

        Returns:
            The name to call it by: another one where the model has a different function of that name.
        """
        if name in self._called:
            return self._called[name]
        inputs = [f"x{i}" for i in range(arity)]
        builder = Builder(self, "f", names=Names(set(inputs)), in_function=True)
        found = body(builder, inputs)
        outputs = [found] if isinstance(found, str) else list(found)
        opsets = [onnx.helper.make_opsetid("", self.opset)]
        opsets += [onnx.helper.make_opsetid(d, 1) for d in sorted(set(_domains(builder.nodes)) - {""})]
        self.require(DOMAIN)
        made = onnx.helper.make_function(DOMAIN, name, inputs, outputs, builder.nodes, opsets)
        stem, count = name, 0
        while self._existing.get(made.name, made) != made:
            count += 1
            made.name = f"{stem}_{count}"
        if made.name not in self._existing:
            self.functions[made.name] = made
        self._called[name] = made.name
        return self._called[name]


def need(condition: bool, what: str) -> None:
    """Raise a GraphOptError where a lowering meets what it cannot express."""
    if not condition:
        raise GraphOptError(f"cannot lower to ONNX: {what}")


def _domains(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """Domains of the operators, inner graphs included."""
    for node in nodes:
        yield node.domain
        for attribute in node.attribute:
            yield from _domains(attribute.g.node)


def _overridable(proto: onnx.ModelProto) -> set[str]:
    """Initialisers that are inputs too; before IR 4 all had to be, and none could be fed."""
    return stored(proto.graph) & {i.name for i in proto.graph.input} if proto.ir_version >= 4 else set()


def _all_names(proto: onnx.ModelProto) -> Iterator[str]:
    for graph in graphs(proto):
        for values in (graph.input, graph.output, graph.value_info, graph.initializer):
            yield from (value.name for value in values)
        yield from stored(graph)
        for node in graph.node:
            yield node.name
            yield from node.output
    yield from (annotation.tensor_name for annotation in proto.graph.quantization_annotation)
