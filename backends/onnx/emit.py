"""From a Graph back to an ONNX model: untouched nodes verbatim, rewritten regions lowered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx.helper
import torch
from torch import fx

from graphopt.backends.onnx.assemble import Emitted, assemble, finish, keep_unknown_fields, live_weights
from graphopt.backends.onnx.builder import Builder, ModelParts, need
from graphopt.backends.onnx.dialect_nodes import dialect_node
from graphopt.backends.onnx.naming import Naming, picks_output
from graphopt.backends.onnx.table import Call, function_name, lookup
from graphopt.dialect import operator_of
from graphopt.dialect.binding import parameter_name
from graphopt.errors import GraphOptError
from graphopt.frontends.onnx.specs import value_spec
from graphopt.graph import Graph, Origin, ValueSpec
from graphopt.onnxfile.scopes import captured, defined_within, rename, rename_shards, stored
from graphopt.onnxfile.tensors import to_tensor_proto
from graphopt.subgraphs import SubgraphOperator

_STANDARD = ("", "ai.onnx")


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
    parts = ModelParts(source, target)
    parts.rebuild = rebuild
    model = onnx.ModelProto()
    keep_unknown_fields(model, source.proto)
    if Emitter(graph, source.proto.graph, parts).run(model.graph) is source.proto.graph:
        return source.proto
    finish(model, parts)
    return model


class Emitter:
    """Emits one graph: the main one, or the body of an operator."""

    def __init__(
        self,
        graph: Graph,
        proto: onnx.GraphProto,
        parts: ModelParts,
        outer: Mapping[str, str] | None = None,
        weights: Mapping[str, str] | None = None,
    ) -> None:
        """Set up one graph's emission.

        Args:
            graph: what to emit.
            proto: what it was read from.
            parts: what lowering adds to the model.
            outer: new names of captured values by old ones.
            weights: new names of the weights of the scopes around it, by old ones.
        """
        self.graph = graph
        self.proto = proto
        self.parts = parts
        self.moved = graph.source is not parts.source
        own = stored(proto)
        self.weights = {old: new for old, new in (weights or {}).items() if old not in own}
        """New names of weights that bodies in here see, by old ones."""
        self.names = Naming(graph, proto, parts.names, outer or {}, self.weights, moved=self.moved)
        self.nodes: list[onnx.NodeProto] = []
        self.places: list[int] = []
        """Of each emitted node, its index in the graph that was read; -1 for a new one."""
        self.changed = False

    def run(self, into: onnx.GraphProto) -> onnx.GraphProto:
        """The graph, written to `into`; where nothing was rewritten, the very one that was read."""
        for node in self.graph.nodes:
            if node.op == "get_attr":
                self._weight(node)
            elif node.op in ("call_function", "call_module", "call_method"):
                self._call(node)
        self._emit_outputs()
        live = live_weights(self.graph, self.names.of, self.nodes, self.parts)
        in_place = sorted(self.places) == list(range(len(self.proto.node)))
        if in_place and not self.changed and live >= stored(self.proto) and not self.parts.rebuild:
            return self.proto
        front = self.parts.constants if self.graph.body is None else ()
        emitted = Emitted(
            self.nodes,
            self.places,
            self.names.outputs,
            live,
            front,
            self._added(self.graph.inputs, self.proto.input),
            self._added(self.graph.outputs, self.proto.output),
            self._resized(),
        )
        assemble(into, self.proto, emitted)
        return into

    def _added(self, specs: Sequence[ValueSpec], declared: Sequence[onnx.ValueInfoProto]) -> list[ValueSpec]:
        """What a pass has put behind the inputs or outputs that were read; that of a body is given otherwise."""
        known = {value.name for value in declared}
        return [] if self.graph.body is not None else [spec for spec in specs if spec.name not in known]

    def _resized(self) -> dict[str, ValueSpec]:
        """Outputs to which a pass has given other sizes than those that were read."""
        if self.graph.body is not None:
            return {}
        read = {value.name: value_spec(value).shape for value in self.proto.output}
        return {s.name: s for s in self.graph.outputs if s.name in read and s.shape != read[s.name]}

    def add(self, node: onnx.NodeProto, place: int = -1) -> None:
        """Put a node behind those that there are."""
        self.nodes.append(node)
        self.places.append(place)

    def _weight(self, node: fx.Node) -> None:
        origin = node.meta.get("onnx")
        if origin is not None:
            (old,), new = origin.proto.output, self.names.value(node)
            self.weights[old] = new
            self._keep(origin, (), {old: new})
            return
        if "onnx_name" in node.meta or not node.users:
            return
        if all(user.op != "output" and node in user.kwargs.values() for user in node.users):
            return  # the value of a tensor attribute
        if "onnx_brought" in node.meta:
            self.names.of[node] = self.parts.bring(node.meta["onnx_brought"], node.meta["onnx_stem"])
            return
        value = self.graph.weight(node)
        need(isinstance(value, (torch.Tensor, np.ndarray)), f"weight {node.target} is no tensor")
        self.names.of[node] = self._name_of_weight(node)
        self.parts.initializers.append(to_tensor_proto(self.names.of[node], value))

    def _name_of_weight(self, node: fx.Node) -> str:
        """A trained weight keeps the name of the one that it replaces, where nothing needs that one any more."""
        name = node.meta.get("onnx_replaces")
        if name is None or self._is_needed(name):
            return self.parts.names.fresh(str(node.target))
        return str(name)

    def _is_needed(self, weight: str) -> bool:
        """Whether something still refers to a weight that was read."""
        if weight in self.parts.pinned or any(weight in captured(n) for n in self.proto.node):
            return True
        return any(n.op == "get_attr" and n.users and n.meta.get("onnx_name") == weight for n in self.graph.nodes)

    def _call(self, node: fx.Node) -> None:
        if picks_output(node):
            self.names.value(node)
            return
        origin = node.meta.get("onnx")
        if origin is not None and origin.holds_for(node):
            self._require(node, origin)
            inputs = self._aliased(origin, [self.names.argument(a) for a in node.args])
            self._keep(origin, inputs, self.names.renamed(node, origin), self._bodies(node, origin, inputs))
            return
        self.changed = True
        entry = operator_of(node.target)  # type: ignore[arg-type]  # a call_function's target is callable
        if entry is None:
            self._lower(node)
            return
        made = dialect_node(self.graph, node, self.names.argument, self.names.results(node))
        made.name = self.parts.names.fresh(node.name)
        if entry.domain:
            self.parts.require(entry.domain)
        same = origin is not None and (origin.proto.op_type, origin.proto.domain) == (made.op_type, made.domain)
        self.add(_changed(origin.proto, made) if origin is not None and same else made)

    def _require(self, node: fx.Node, origin: Origin) -> None:
        """Import the domain of a node that came from a function, which may import more than the model."""
        domain = origin.proto.domain
        if domain in _STANDARD or not (self.moved or origin.index < 0):
            return
        assert self.graph.onnx is not None
        self.parts.require(domain, node.meta.get("onnx_version", self.graph.onnx.opset(domain)))

    def _lower(self, node: fx.Node) -> None:
        lowering = lookup(node, self.parts.target)
        need(lowering is not None, f"no ONNX form of {function_name(node)!r} is registered (node {node.name})")
        assert lowering is not None
        builder = Builder(self.parts, str(node.meta.get("graphopt_site", "graphopt")))
        args = fx.map_arg(node.args, self.names.argument)
        kwargs = fx.map_arg(node.kwargs, self.names.argument)
        found = lowering(Call(builder, node, tuple(args), dict(kwargs)))
        if isinstance(found, str):
            self._adopt(builder, node, found)
        else:
            for item in filter(picks_output, node.users):
                index = int(item.args[1])  # type: ignore[arg-type]  # what an output is picked by
                found[index] = self._adopt(builder, item, found[index])
        for made in builder.nodes:
            self.add(made)

    def _adopt(self, builder: Builder, node: fx.Node, found: str) -> str:
        """Let a value that a lowering gives carry the fx node's name where the outside expects one; its name."""
        if node not in self.names.of:
            self.names.of[node] = found
            return found
        wanted = self.names.of[node]
        producer = next((n for n in builder.nodes if found in n.output), None)
        if producer is None:
            builder.op("Identity", found, outputs=[wanted])
            return found
        producer.output[list(producer.output).index(found)] = wanted
        for other in builder.nodes:
            for i, name in enumerate(other.input):
                if name == found:
                    other.input[i] = wanted
        return wanted

    def _aliased(self, origin: Origin, inputs: list[str]) -> list[str]:
        """Operands of a node, those under another name whose new name means something else in the node's bodies."""
        count = len(origin.proto.input)
        for i, (old, new) in enumerate(zip(origin.captured, inputs[count:], strict=True), count):
            if old == new or new not in defined_within(origin.proto):
                continue
            inputs[i] = self.parts.names.fresh(f"{new}/outer")
            name = self.parts.names.fresh(f"{inputs[i]}/identity")
            self.add(onnx.helper.make_node("Identity", [new], [inputs[i]], name=name))
        return inputs

    def _bodies(self, node: fx.Node, origin: Origin, inputs: Sequence[str]) -> dict[str, onnx.GraphProto]:
        """The node's bodies, by attribute, as far as they are not what was read."""
        module = self.graph.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, SubgraphOperator) or module.is_call:
            return {}
        outer = dict(zip(origin.captured, inputs[len(origin.proto.input) :], strict=True))
        found: dict[str, onnx.GraphProto] = {}
        for name, body in module.bodies.items():
            assert body.body is not None, "a body remembers what it was read from"
            emitted = Emitter(body, body.body, self.parts, outer, self.weights).run(onnx.GraphProto())
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
        inlined = origin.index < 0
        if direct == list(proto.input) and not moved_in and not moved_out and not bodies and not inlined:
            self.add(proto, origin.index)
            return
        self.changed = True
        twin = rename(proto, moved_in)
        rename_shards(twin, {**dict(zip(proto.input, direct, strict=True)), **moved_out})
        for i, name in enumerate(direct):
            twin.input[i] = name
        for i, name in enumerate(twin.output):
            twin.output[i] = moved_out.get(name, name)
        for attribute in twin.attribute:
            body = (bodies or {}).get(parameter_name(attribute.name))
            if body is not None:
                attribute.g.CopyFrom(body)
        if inlined and twin.name:  # a body may have been put in several times, and node names are unique
            twin.name = self.parts.names.fresh(twin.name)
        self.add(twin, origin.index)

    def _emit_outputs(self) -> None:
        for name, result in dict(zip(self.names.outputs, self.graph.results, strict=True)).items():
            if self.names.value(result) == name:
                continue
            self.changed = True
            node = self.parts.names.fresh(f"{name}/identity")
            self.add(onnx.helper.make_node("Identity", [self.names.value(result)], [name], name=node))


def _changed(old: onnx.NodeProto, made: onnx.NodeProto) -> onnx.NodeProto:
    """The node `made` with all that was said of the one that it has taken the place of."""
    twin = onnx.NodeProto()
    twin.CopyFrom(old)
    rename_shards(twin, dict(zip((*old.input, *old.output), (*made.input, *made.output), strict=False)))
    for field in ("input", "output", "attribute"):
        del getattr(twin, field)[:]
    twin.input.extend(made.input)
    twin.output.extend(made.output)
    described = {a.name: a for a in old.attribute}
    for attribute in made.attribute:
        twin.attribute.append(attribute)
        if attribute.name in described and described[attribute.name].HasField("doc_string"):
            twin.attribute[-1].doc_string = described[attribute.name].doc_string
    return twin
