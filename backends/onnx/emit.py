"""From a Graph back to an ONNX model: untouched nodes verbatim, rewritten regions lowered."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx
import torch
from torch import fx

from graphopt.backends.onnx.builder import Builder, ModelParts, Names, need
from graphopt.backends.onnx.dialect_nodes import dialect_node
from graphopt.backends.onnx.table import Call, function_name, lookup
from graphopt.dialect import operator_of
from graphopt.dialect.binding import parameter_name
from graphopt.errors import GraphOptError
from graphopt.graph import Graph, Origin
from graphopt.onnxfile.read import graphs
from graphopt.onnxfile.scopes import captured, rename
from graphopt.onnxfile.tensors import to_tensor_proto
from graphopt.subgraphs import SubgraphOperator


def to_proto(graph: Graph, target: str = "onnx", *, rebuild: bool = False) -> onnx.ModelProto:
    """The ONNX model of a graph that came from ONNX; where nothing was rewritten, the very same model.

    Args:
        graph: the graph.
        target: `onnx` for standard operators and model-local functions, `onnxruntime` for contrib operators too.
        rebuild: put the model together from the graph's nodes even where nothing was rewritten.

    Raises:
        GraphOptError: a new node has no ONNX form.
    """
    source = graph.onnx
    if source is None:
        raise GraphOptError("this graph came from an nn.Module; export it with graphopt.backends.onnx.export first")
    proto = source.proto
    parts = ModelParts(source.opset(), Names(set(_all_names(proto))), target)
    parts.rebuild = rebuild
    model = onnx.ModelProto()
    if _Emitter(graph, proto.graph, parts).run(model.graph) is proto.graph:
        return proto
    _finish(model, proto, parts)
    return model


class _Emitter:
    """Emits one graph: the main one, or the body of an operator."""

    def __init__(
        self, graph: Graph, proto: onnx.GraphProto, parts: ModelParts, outer: Mapping[str, str] | None = None
    ) -> None:
        """Args: graph: what to emit. proto: what it was read from. outer: new names of captured values by old ones."""
        self.graph = graph
        self.proto = proto
        self.parts = parts
        self.outer = outer or {}
        self.names: dict[fx.Node, str] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.kept: list[int] = []
        self.changed = False
        self.moved: list[onnx.NodeProto] = []
        """Nodes that came out of a body, perhaps several times."""
        self.taken: set[str] = set()
        """Names of outputs that another value has now than in the graph that was loaded."""

    def run(self, into: onnx.GraphProto) -> onnx.GraphProto:
        """The graph, written to `into`; where nothing was rewritten, the very one that was read."""
        self._name_values()
        for node in self.graph.nodes:
            if node.op == "get_attr":
                self._weight(node)
            elif node.op in ("call_function", "call_module", "call_method"):
                self._call(node)
        self._outputs()
        whole = not self.changed and sorted(self.kept) == list(range(len(self.proto.node))) and self._weights_kept()
        if whole and not self.parts.rebuild:
            return self.proto
        self._assemble(into)
        return into

    def _name_values(self) -> None:
        """ONNX names for values that have one; a new value that is a graph output takes the output's name."""
        captured = set(self.graph.captured)
        for node in self.graph.nodes:
            name = node.meta.get("onnx_name")
            if name is not None:
                self.names[node] = self.outer.get(name, name) if node.op == "placeholder" and name in captured else name
        for spec, result in zip(self.graph.outputs, self.graph.results, strict=True):
            if self.names.get(result) == spec.name:
                continue
            self.taken.add(spec.name)
            for other, name in self.names.items():
                if name == spec.name:  # the value that had the output's name is still needed: it steps aside
                    self.names[other] = self.parts.names.fresh(f"{name}/original")
            if result not in self.names and result.op != "get_attr":
                self.names[result] = spec.name

    def _name(self, node: fx.Node) -> str:
        if node not in self.names:
            scope = node.meta.get("graphopt_site", "graphopt")
            self.names[node] = self.parts.names.fresh(f"{scope}/{node.name}")
        return self.names[node]

    def _weight(self, node: fx.Node) -> None:
        origin = node.meta.get("onnx")
        if origin is not None:
            self._keep(origin, (), {origin.proto.output[0]: self.names[node]})
            return
        if "onnx_name" in node.meta or not node.users:
            return
        if all(user.op != "output" and node in user.kwargs.values() for user in node.users):
            return  # the value of a tensor attribute
        value = self.graph.weight(node)
        need(isinstance(value, torch.Tensor), f"weight {node.target} is no tensor")
        name = self.parts.names.fresh(str(node.target))
        self.names[node] = name
        self.parts.initializers.append(to_tensor_proto(name, value))

    def _call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            self._name(node)
            return
        origin = node.meta.get("onnx")
        if origin is not None and origin.holds_for(node):
            inputs = [self._argument(a) for a in node.args]
            self._keep(origin, inputs, self._renamed_outputs(node, origin.proto), self._bodies(node, origin, inputs))
            return
        self.changed = True
        if operator_of(node.target) is not None:  # type: ignore[arg-type]  # a call_function's target is callable
            self.nodes.append(dialect_node(self.graph, node, self._argument, self._output_names(node)))
            return
        self._lower(node)

    def _lower(self, node: fx.Node) -> None:
        lowering = lookup(node, self.parts.target)
        need(lowering is not None, f"no ONNX form of {function_name(node)!r} is registered (node {node.name})")
        assert lowering is not None
        builder = Builder(self.parts, str(node.meta.get("graphopt_site", "graphopt")))
        args = fx.map_arg(node.args, self._argument)
        kwargs = fx.map_arg(node.kwargs, self._argument)
        found = lowering(Call(builder, node, tuple(args), dict(kwargs)))
        self._adopt(builder, node, found)
        self.nodes += builder.nodes

    def _adopt(self, builder: Builder, node: fx.Node, found: str) -> None:
        """Let the last value of a lowering carry the fx node's name where the outside expects one."""
        if node not in self.names:
            self.names[node] = found
            return
        wanted = self.names[node]
        producer = next((n for n in builder.nodes if found in n.output), None)
        if producer is None:
            builder.op("Identity", found, outputs=[wanted])
            return
        producer.output[list(producer.output).index(found)] = wanted
        for other in builder.nodes:
            for i, name in enumerate(other.input):
                if name == found:
                    other.input[i] = wanted

    def _argument(self, value: Any) -> str:
        return self._name(value) if isinstance(value, fx.Node) else ""

    def _output_names(self, node: fx.Node) -> list[str]:
        items = _items(node)
        if not items:
            return [self._name(node)]
        return [self._name(items[i]) if i in items else "" for i in range(max(items) + 1)]

    def _renamed_outputs(self, node: fx.Node, proto: onnx.NodeProto) -> dict[str, str]:
        if len(proto.output) == 1:
            return {proto.output[0]: self._name(node)}
        items = _items(node)
        renamed = {proto.output[i]: self._name(item) for i, item in items.items() if proto.output[i]}
        # What nothing reads any more still has to be called something where it may not be left out.
        lost = [name for i, name in enumerate(proto.output) if i not in items and name in self.taken]
        return {**renamed, **{name: self.parts.names.fresh(f"{name}/original") for name in lost}}

    def _bodies(self, node: fx.Node, origin: Origin, inputs: Sequence[str]) -> dict[str, onnx.GraphProto]:
        """The node's bodies, by attribute, as far as they are not what was read."""
        module = self.graph.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, SubgraphOperator) or module.is_call:
            return {}
        outer = dict(zip(origin.captured, inputs[len(origin.proto.input) :], strict=True))
        found: dict[str, onnx.GraphProto] = {}
        for name, body in module.bodies.items():
            assert body.body is not None, "a body remembers what it was read from"
            emitted = _Emitter(body, body.body, self.parts, outer).run(onnx.GraphProto())
            if emitted is not body.body:
                found[name] = emitted
        return found

    def _keep(
        self,
        origin: Origin,
        inputs: Sequence[str],
        outputs: Mapping[str, str],
        bodies: Mapping[str, onnx.GraphProto] | None = None,
    ) -> None:
        """Emit a node verbatim, or a copy with that replaced which changed.

        Inputs are renamed by position: a pass may have rewired only one of two equal ones.
        """
        proto = origin.proto
        direct, outer = list(inputs[: len(proto.input)]), inputs[len(proto.input) :]
        moved_in = {old: new for old, new in zip(origin.captured, outer, strict=True) if old != new}
        moved_out = {old: new for old, new in outputs.items() if old != new}
        self.kept.append(origin.index)
        moved = origin.index < 0
        if moved and proto.domain not in ("", "ai.onnx"):
            self.parts.require(proto.domain)  # it came from a body that may import more than the model
        if direct == list(proto.input) and not moved_in and not moved_out and not bodies and not moved:
            self.nodes.append(proto)
            return
        self.changed = True
        twin = rename(proto, moved_in)
        for i, name in enumerate(direct):
            twin.input[i] = name
        for i, name in enumerate(twin.output):
            twin.output[i] = moved_out.get(name, name)
        for attribute in twin.attribute:
            body = (bodies or {}).get(parameter_name(attribute.name))
            if body is not None:
                attribute.g.CopyFrom(body)
        self.nodes.append(twin)
        if moved:
            self.moved.append(twin)

    def _outputs(self) -> None:
        for spec, result in zip(self.graph.outputs, self.graph.results, strict=True):
            if self._name(result) != spec.name:
                self.changed = True
                node = onnx.helper.make_node(
                    "Identity",
                    [self._name(result)],
                    [spec.name],
                    name=self.parts.names.fresh(f"{spec.name}/identity"),
                )
                self.nodes.append(node)

    def _live_weights(self) -> set[str]:
        """Weights of this graph's own that are in use, in the bodies below it too."""
        own = {n.meta["onnx_name"] for n in self.graph.nodes if n.op == "get_attr" and "onnx_name" in n.meta}
        return own.union(*(captured(node) for node in self.nodes))

    def _weights_kept(self) -> bool:
        live = self._live_weights()
        return all(t.name in live for t in self.proto.initializer)

    def _assemble(self, new: onnx.GraphProto) -> None:
        old, live = self.proto, self._live_weights()
        self._tell_apart()
        for descriptor, value in old.ListFields():
            if descriptor.name not in ("node", "initializer", "sparse_initializer", "value_info", "input"):
                _set(new, descriptor.name, value)
        new.node.extend([*self._revived(live), *self.nodes])
        stored = {t.name for t in old.initializer} | {s.values.name for s in old.sparse_initializer}
        new.initializer.extend(t for t in old.initializer if t.name in live)
        new.sparse_initializer.extend(s for s in old.sparse_initializer if s.values.name in live)
        # Before IR 4 every initialiser also stands among the inputs.
        new.input.extend(i for i in old.input if i.name not in stored or i.name in live)
        # Some files describe values that nothing defines; only what was removed here loses its description.
        defined = {name for n in new.node for name in n.output}
        gone = {name for n in old.node for name in n.output} - defined | (stored - live)
        new.value_info.extend(v for v in old.value_info if v.name not in gone)

    def _tell_apart(self) -> None:
        """Node names are unique, though a body may have been put in several times."""
        moved = set(map(id, self.moved))
        seen = {node.name for node in self.nodes if id(node) not in moved}
        for node in self.moved:
            if node.name and node.name in seen:
                self.parts.names.taken.add(node.name)
                node.name = self.parts.names.fresh(node.name)
            seen.add(node.name)

    def _revived(self, live: set[str]) -> list[onnx.NodeProto]:
        """Constant nodes that only bodies use: they see them by name, without an edge in this graph."""
        emitted = {name for node in self.nodes for name in node.output}
        return [
            node
            for node in self.proto.node
            if node.op_type == "Constant" and not emitted.intersection(node.output) and live.intersection(node.output)
        ]


def _finish(model: onnx.ModelProto, proto: onnx.ModelProto, parts: ModelParts) -> None:
    """Give the model with the new graph everything else that the old one has."""
    for descriptor, value in proto.ListFields():
        if descriptor.name != "graph":
            _set(model, descriptor.name, value)
    model.graph.initializer.extend(parts.initializers)
    model.functions.extend(parts.functions.values())
    _stamp(model, parts)


def _stamp(model: onnx.ModelProto, parts: ModelParts) -> None:
    """Import what was used, and drop no import: other tools look for theirs."""
    present = {o.domain for o in model.opset_import}
    for domain in sorted(parts.domains - present):
        model.opset_import.add(domain=domain, version=1)
    if parts.functions:
        model.ir_version = max(model.ir_version, 8)  # the first IR version with model-local functions


def _items(node: fx.Node) -> dict[int, fx.Node]:
    """The values that are taken out of a node with several outputs, by output."""
    return {int(u.args[1]): u for u in node.users if u.target is operator.getitem}  # type: ignore[arg-type]  # an index


def _set(message: Any, name: str, value: Any) -> None:
    field = getattr(message, name)
    if hasattr(field, "extend"):
        field.extend(value)
    elif hasattr(field, "CopyFrom"):
        field.CopyFrom(value)
    else:
        setattr(message, name, value)


def _all_names(proto: onnx.ModelProto) -> Iterator[str]:
    for graph in graphs(proto):
        yield from (i.name for i in graph.input)
        yield from (o.name for o in graph.output)
        yield from (t.name for t in graph.initializer)
        yield from (s.values.name for s in graph.sparse_initializer)
        for node in graph.node:
            yield node.name
            yield from node.output
