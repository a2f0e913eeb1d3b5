"""One ONNX graph, or one body of an operator, as a Graph; names that it does not define come from around it."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx.helper
import torch
from torch import fx

from graphopt import dialect
from graphopt.dialect.binding import accepts, parameter_name
from graphopt.errors import GraphOptError
from graphopt.frontends.onnx.functions import Functions, body, check_call
from graphopt.frontends.onnx.names import AttributeNames, InputNames, identifier
from graphopt.frontends.onnx.order import order
from graphopt.frontends.onnx.specs import value_spec
from graphopt.frontends.onnx.types import ElementTypes
from graphopt.frontends.onnx.weights import constant_value, densify
from graphopt.graph import Graph, GraphModule, Origin, ValueSpec, attribute, set_attribute
from graphopt.onnxfile import OnnxFile, TensorReader
from graphopt.onnxfile.scopes import Memo, captured, free, is_constant, trained
from graphopt.opaque import OpaqueOperator
from graphopt.subgraphs import SubgraphOperator, call_function

_BODIES = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
# Types are what an empty optional declares; values need no declaration here.
_UNUSED = (*_BODIES, onnx.AttributeProto.TYPE_PROTO, onnx.AttributeProto.TYPE_PROTOS)


@dataclass(frozen=True)
class Shared:
    """What all scopes of one model have in common."""

    file: OnnxFile
    reader: TensorReader
    functions: Functions
    opsets: Mapping[str, int]
    captured: Memo = field(default_factory=dict)
    bodies: dict[Any, Graph] = field(default_factory=dict)
    """Of functions, by everything that a call decides about them."""


def opsets_of(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    """Versions by domain; `""` is ai.onnx."""
    return {("" if o.domain == "ai.onnx" else o.domain): o.version for o in imports}


class Scope:
    """Imports one graph."""

    def __init__(self, shared: Shared, proto: onnx.GraphProto, outer: Scope | None = None) -> None:
        """Args: shared: see there. proto: the graph. outer: the scope around a body; None for a main graph."""
        self.shared = shared
        self.proto = proto
        self.outer = outer
        self.graph = fx.Graph()
        self.root = torch.nn.Module()
        self.values: dict[str, fx.Node] = {}
        # What lies behind each constant, for bodies, and for nodes that run on onnxruntime.
        self.weights: dict[str, tuple[Any, onnx.TensorProto | None]] = {}
        self.constants: dict[fx.Node, str] = {}
        self.types: ElementTypes = ElementTypes(outer.types if outer is not None else None)
        self.declared: dict[str, onnx.TypeProto] = {
            v.name: v.type for v in (*proto.value_info, *proto.output, *proto.input)
        }
        self.attributes = AttributeNames()
        self.inputs = InputNames()
        # Initialisers that are inputs too are only defaults; before IR 4 every initialiser stood among the inputs.
        self.overridable = {i.name for i in proto.input} if shared.file.proto.ir_version >= 4 else set()
        if outer is None:
            self.overridable |= trained(shared.file.proto)

    def run(self) -> Graph:
        """The graph.

        Raises:
            GraphOptError: something uses a value that nothing defines, or the nodes form a cycle.
        """
        proto = self.proto
        for value in proto.input:
            self.types.set(value.name, 0)  # whatever a value of that name is outside
        for values in (proto.value_info, proto.input, proto.output):
            self.types.declare(values)
        weights = {t.name for t in proto.initializer} | {s.values.name for s in proto.sparse_initializer}
        fed = [i for i in proto.input if i.name not in weights]
        for each in fed:
            self._input(each.name)
        inputs = [*map(value_spec, fed), *self._captures()]
        for tensor in proto.initializer:
            self._weight(tensor.name, tensor).meta["onnx_tensor"] = tensor
        for sparse in proto.sparse_initializer:
            dense = densify(sparse, self.shared.reader)
            self._store(sparse.values.name, dense).meta["onnx_tensor"] = sparse
        for index in order(proto.node, self.values.keys(), self.shared.captured):
            self._node(index, proto.node[index])
        self.graph.output(tuple(self._value(o.name, "the graph's output") for o in proto.output))
        module = GraphModule(self.root, self.graph, class_name="OnnxModule")
        names = tuple(spec.name for spec in inputs[len(fed) :])
        outputs = tuple(map(value_spec, proto.output))
        return Graph(module, tuple(inputs), outputs, self.shared.file, body=self._body(), captured=names)

    def _body(self) -> onnx.GraphProto | None:
        return None if self.proto is self.shared.file.proto.graph else self.proto

    def _input(self, name: str) -> None:
        node = self.graph.placeholder(self.inputs.claim(name))
        node.meta["onnx_name"] = name
        self.values[name] = node

    def _captures(self) -> list[ValueSpec]:
        """Take over what the body uses from outside: weights are shared, all else becomes an input."""
        if self.outer is None:
            return []
        names = list(dict.fromkeys(free(self.proto, self.shared.captured)))
        taken = [name for name in names if self.outer.weight_of(name) is None]
        for name in taken:
            self._input(name)
        for name in names:
            known = self.outer.weight_of(name)
            if known is not None:
                self._store(name, known[0], known[1])
        return [self._captured(name) for name in taken]

    def _captured(self, name: str) -> ValueSpec:
        declared = self._declared(name)
        return value_spec(onnx.ValueInfoProto(name=name, type=declared)) if declared else ValueSpec(name, None, None)

    def weight_of(self, name: str) -> tuple[Any, onnx.TensorProto | None] | None:
        """The constant behind a name that is visible here, if it is one."""
        if name in self.values:
            return None if name in self.overridable else self.weights.get(name)
        return self.outer.weight_of(name) if self.outer is not None else None

    def _value(self, name: str, user: str) -> fx.Node:
        if name not in self.values:
            raise GraphOptError(f"value {name!r} is used by {user}, but nothing in the model defines it")
        return self.values[name]

    def _weight(self, name: str, tensor: onnx.TensorProto) -> fx.Node:
        self.types.set(name, tensor.data_type)
        return self._store(name, self.shared.reader.value(tensor), tensor)

    def _store(self, name: str, value: Any, tensor: onnx.TensorProto | None = None) -> fx.Node:
        target = self.attributes.claim(name)
        set_attribute(self.root, target, value)
        node = self.graph.create_node("get_attr", target, name=identifier(name))
        node.meta["onnx_name"] = name
        self.values[name] = node
        self.weights[name] = (attribute(self.root, target), tensor)
        self.constants[node] = name
        return node

    def _node(self, index: int, proto: onnx.NodeProto) -> None:
        if is_constant(proto):
            node = self._constant(proto)
            node.meta["onnx"] = Origin(proto, index, node.target, {})
            return
        args = [self._value(name, f"node {proto.name!r}") if name else None for name in proto.input]
        outer = captured(proto, self.shared.captured)
        for name in outer:
            self._value(name, f"a subgraph of node {proto.name!r}")
        # Bodies see weights by themselves; onnxruntime has to be given them.
        dynamic = tuple(name for name in outer if self.weight_of(name) is None)
        known = self._torch(proto, args) or self._with_bodies(index, proto, args, dynamic)
        outer = outer if known is None else dynamic
        node = known or self._opaque(index, proto, args, outer)
        node.meta["onnx"] = Origin(proto, index, node.target, dict(node.kwargs), outer)
        self.types.follow(proto)
        self._bind_outputs(node, proto)

    def _constant(self, proto: onnx.NodeProto) -> fx.Node:
        if len(proto.attribute) != 1 or len(proto.output) != 1:
            raise GraphOptError(
                f"expected one attribute and one output at the Constant node {proto.name!r}, found "
                f"{len(proto.attribute)} and {len(proto.output)}; the file is corrupt"
            )
        found = proto.attribute[0]
        name = proto.output[0]
        if found.type == onnx.AttributeProto.TENSOR:
            return self._weight(name, found.t)
        if found.type == onnx.AttributeProto.SPARSE_TENSOR:
            return self._store(name, densify(found.sparse_tensor, self.shared.reader))
        return self._store(name, constant_value(found))

    def _entry(self, proto: onnx.NodeProto) -> dialect.Operator | None:
        if self.shared.functions.of(proto) is not None:
            return None
        domain = "" if proto.domain == "ai.onnx" else proto.domain
        return dialect.lookup(domain, proto.op_type, self.shared.opsets.get(domain, 1))

    def _torch(self, proto: onnx.NodeProto, args: list[Any]) -> fx.Node | None:
        """The node as a call of its torch function, or None where it has none or has bodies."""
        entry = self._entry(proto)
        if entry is None or any(a.type in _BODIES or a.ref_attr_name for a in proto.attribute):
            return None
        kwargs = self._keywords(entry, proto)
        if not accepts(entry, len(args), kwargs):
            return None
        kwargs = {key: self._as_node(proto, key, value) for key, value in kwargs.items()}
        name = identifier(proto.name or (proto.output[0] if proto.output else proto.op_type))
        return self.graph.create_node("call_function", entry.function, tuple(args), kwargs, name=name)

    def _keywords(self, entry: dialect.Operator, proto: onnx.NodeProto) -> dict[str, Any]:
        # `consumed_inputs` is of opset 1 only: which inputs may be overwritten, which nothing here ever does.
        given = [a for a in proto.attribute if a.type not in _UNUSED and a.name != "consumed_inputs"]
        kwargs = {parameter_name(a.name): _plain(a) for a in given}
        for key, value in kwargs.items():
            if isinstance(value, onnx.TensorProto):
                kwargs[key] = self.shared.reader.value(value)
        if entry.counted:
            kwargs["outputs"] = len(proto.output)
        if entry.typed:
            kwargs["types"] = tuple(self.types[name] if name else 0 for name in proto.input)
        return kwargs

    def _as_node(self, proto: onnx.NodeProto, key: str, value: Any) -> Any:
        """A keyword argument as fx can hold it: tensors lie in the module."""
        if not hasattr(value, "shape"):
            return value
        target = self.attributes.claim(
            f"attribute_{identifier(proto.output[0] if proto.output else proto.op_type)}_{key}"
        )
        set_attribute(self.root, target, value)
        return self.graph.get_attr(target)

    def _with_bodies(
        self, index: int, proto: onnx.NodeProto, args: list[Any], outer: tuple[str, ...]
    ) -> fx.Node | None:
        """The node as an operator whose bodies are graphs, or None where it has none or no torch function."""
        function = self.shared.functions.of(proto)
        if function is not None:
            operator = self._call(function, proto)
            return self._module(index, proto, operator, args)
        entry = self._entry(proto)
        bodies = [a for a in proto.attribute if a.type == onnx.AttributeProto.GRAPH]
        if entry is None or not bodies or any(a.ref_attr_name or len(a.graphs) for a in proto.attribute):
            return None
        kwargs = self._keywords(entry, proto)
        names = {a.name: parameter_name(a.name) for a in bodies}
        if not accepts(entry, len(args), [*kwargs, *names.values()]):
            return None
        graphs = {names[a.name]: Scope(self.shared, a.g, self).run() for a in bodies}
        operator = SubgraphOperator(proto, entry.function, kwargs, graphs, outer)
        return self._module(index, proto, operator, [*args, *(self.values[name] for name in outer)])

    def _call(self, function: onnx.FunctionProto, proto: onnx.NodeProto) -> SubgraphOperator:
        """A call of a model-local function; its body is read when it is first needed.

        Functions that call functions many times over would fill the memory otherwise.
        """
        check_call(function, proto)

        def bodies() -> Mapping[str, Graph]:
            types = tuple(self.types[name] if name else 0 for name in proto.input)
            attributes = tuple(a.SerializeToString(deterministic=True) for a in proto.attribute)
            key = (function.domain, function.name, function.overload, attributes, len(proto.output), types)
            if key not in self.shared.bodies:
                self.shared.bodies[key] = imported(types)
            return {"body": self.shared.bodies[key]}

        def imported(types: Sequence[int]) -> Graph:
            graph = body(function, proto)
            imports = function.opset_import or self.shared.file.proto.opset_import
            source = onnx.ModelProto(ir_version=self.shared.file.proto.ir_version, opset_import=imports)
            file = OnnxFile(source, self.shared.file.path)
            opsets = opsets_of(imports)
            shared = Shared(file, self.shared.reader, self.shared.functions, opsets, bodies=self.shared.bodies)
            scope = Scope(shared, graph)
            for formal, code in zip(function.input, types, strict=False):
                scope.types.set(formal, code)
            return scope.run()

        attributes = {"outputs": len(proto.output)}
        return SubgraphOperator(proto, call_function, attributes, bodies, is_call=True)

    def _module(self, index: int, proto: onnx.NodeProto, module: torch.nn.Module, args: list[Any]) -> fx.Node:
        target = f"node_{index}_{identifier(proto.op_type)}"
        self.root.add_module(target, module)
        return self.graph.create_node("call_module", target, tuple(args))

    def _opaque(self, index: int, proto: onnx.NodeProto, args: list[Any], outer: tuple[str, ...]) -> fx.Node:
        args = [*args, *(self.values[name] for name in outer)]
        known = {}
        for i, arg in enumerate(args):
            value, tensor = self.weights[self.constants[arg]] if arg in self.constants else (None, None)
            if tensor is not None:
                known[i] = (value, tensor)
        model = self.shared.file.proto
        names = [*proto.input, *outer]
        operator = OpaqueOperator(
            proto,
            outer,
            model.opset_import,
            self.shared.functions.all,
            known,
            [self.types[name] if name else 0 for name in names],
            [self._declared(name) for name in names],
        )
        return self._module(index, proto, operator, args)

    def _declared(self, name: str) -> onnx.TypeProto | None:
        """The type that the file declares for a value."""
        if name in self.declared:
            return self.declared[name]
        return self.outer._declared(name) if self.outer is not None else None

    def _bind_outputs(self, node: fx.Node, proto: onnx.NodeProto) -> None:
        if len(proto.output) == 1:
            node.meta["onnx_name"] = proto.output[0]
            self._define(proto.output[0], node)
            return
        for i, name in enumerate(proto.output):
            if not name:
                continue
            item = self.graph.create_node("call_function", operator.getitem, (node, i), name=identifier(name))
            item.meta["onnx_name"] = name
            self._define(name, item)

    def _define(self, name: str, node: fx.Node) -> None:
        self.values[name] = node
        self.weights.pop(name, None)  # a redeclared name


def _plain(attribute: onnx.AttributeProto) -> Any:
    """An attribute as a Python value; tensors stay protobufs."""
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.type == onnx.AttributeProto.STRING:
        return value.decode(errors="surrogateescape")
    if attribute.type == onnx.AttributeProto.STRINGS:
        return [v.decode(errors="surrogateescape") for v in value]
    return list(value) if attribute.type in (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS) else value
