"""An ONNX model as a Graph: each ONNX node becomes one fx node that remembers where it came from."""

from __future__ import annotations

import keyword
import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import networkx as nx
import onnx
import onnx.helper
import torch
from torch import fx

from graphopt import dialect
from graphopt.dialect.binding import accepts, parameter_name
from graphopt.errors import GraphOptError
from graphopt.graph import Dim, Graph, Origin, ValueSpec, attribute, set_attribute
from graphopt.onnxfile import OnnxFile, TensorReader, read
from graphopt.onnxfile.scopes import captured
from graphopt.onnxfile.tensors import TORCH_DTYPES
from graphopt.opaque import OpaqueOperator, as_constant

# Attributes that every module has; a weight of such a name would hide one.
_RESERVED = frozenset(dir(torch.nn.Module()))


def load_onnx(source: str | Path | OnnxFile) -> Graph:
    """Read an .onnx file into a Graph; weights stay on disk until they are used.

    Raises:
        GraphOptError: the file is no readable ONNX model.
    """
    file = source if isinstance(source, OnnxFile) else read(source)
    return _Importer(file).run()


class _Importer:
    def __init__(self, file: OnnxFile) -> None:
        self.file = file
        self.graph = fx.Graph()
        self.root = torch.nn.Module()
        self.reader = TensorReader(file.folder)
        self.values: dict[str, fx.Node] = {}
        self.opsets = {("" if o.domain == "ai.onnx" else o.domain): o.version for o in file.proto.opset_import}
        self.functions = {(f.domain, f.name) for f in file.proto.functions}
        # The bytes behind each constant, for nodes that run on onnxruntime.
        self.constants: dict[fx.Node, tuple[Any, onnx.TensorProto]] = {}
        self.taken: set[str] = set()

    def run(self) -> Graph:
        proto = self.file.proto.graph
        weights = {t.name for t in proto.initializer} | {s.values.name for s in proto.sparse_initializer}
        fed = [i for i in proto.input if i.name not in weights]
        for value in fed:
            node = self.graph.placeholder(_identifier(value.name))
            node.meta["onnx_name"] = value.name
            self.values[value.name] = node
        for tensor in proto.initializer:
            self._weight(tensor.name, tensor)
        for sparse in proto.sparse_initializer:
            self._store(sparse.values.name, _densify(sparse, self.reader))
        for index in _order(proto.node, set(self.values)):
            self._node(index, proto.node[index])
        results = tuple(self._value(o.name, "the graph's output") for o in proto.output)
        self.graph.output(results)
        module = fx.GraphModule(self.root, self.graph, class_name="OnnxModule")
        return Graph(module, tuple(map(_spec, fed)), tuple(map(_spec, proto.output)), self.file)

    def _value(self, name: str, user: str) -> fx.Node:
        if name not in self.values:
            raise GraphOptError(f"value {name!r} is used by {user}, but nothing in the model defines it")
        return self.values[name]

    def _weight(self, name: str, tensor: onnx.TensorProto) -> fx.Node:
        value = self.reader.value(tensor)
        node = self._store(name, value)
        self.constants[node] = (attribute(self.root, str(node.target)), tensor)
        return node

    def _store(self, name: str, value: Any) -> fx.Node:
        target = self._attribute_name(name)
        set_attribute(self.root, target, value)
        node = self.graph.create_node("get_attr", target, name=_identifier(name))
        node.meta["onnx_name"] = name
        self.values[name] = node
        return node

    def _attribute_name(self, name: str) -> str:
        """The weight's own dotted name where torch can hold it, else a flat one."""
        parts = name.split(".")
        prefixes = {".".join(parts[:i]) for i in range(1, len(parts))}
        # fx writes a weight's name into Python source.
        dotted = all(parts) and not any(p in _RESERVED or keyword.iskeyword(p) for p in parts)
        clash = prefixes & self.taken or any(t.startswith(name + ".") for t in self.taken)
        target = name if dotted and not clash else "weight_" + name.replace(".", "_")
        while target in self.taken:
            target += "_"
        self.taken.add(target)
        return target

    def _node(self, index: int, proto: onnx.NodeProto) -> None:
        if proto.op_type == "Constant" and proto.domain in ("", "ai.onnx"):
            node = self._constant(proto)
            node.meta["onnx"] = Origin(proto, index, node.target, {})
            return
        args = [self._value(name, f"node {proto.name!r}") if name else None for name in proto.input]
        known, outer = self._known(proto, args), captured(proto)
        if known is None:
            args += [self._value(name, f"a subgraph of node {proto.name!r}") for name in outer]
        node = known if known is not None else self._opaque(index, proto, args, outer)
        node.meta["onnx"] = Origin(proto, index, node.target, dict(node.kwargs), outer)
        self._bind_outputs(node, proto)

    def _constant(self, proto: onnx.NodeProto) -> fx.Node:
        attribute = proto.attribute[0]
        name = proto.output[0]
        if attribute.type == onnx.AttributeProto.TENSOR:
            return self._weight(name, attribute.t)
        if attribute.type == onnx.AttributeProto.SPARSE_TENSOR:
            return self._store(name, _densify(attribute.sparse_tensor, self.reader))
        value = onnx.helper.get_attribute_value(attribute)
        kind = {"value_float": torch.float32, "value_floats": torch.float32}.get(attribute.name, torch.int64)
        if "string" in attribute.name:
            import numpy as np

            return self._store(name, np.array(value, dtype=object))
        return self._store(name, torch.tensor(value, dtype=kind))

    def _known(self, proto: onnx.NodeProto, args: list[Any]) -> fx.Node | None:
        """The node as a call of its torch function, or None where it has none."""
        if (proto.domain, proto.op_type) in self.functions:
            return None
        domain = "" if proto.domain == "ai.onnx" else proto.domain
        entry = dialect.lookup(domain, proto.op_type, self.opsets.get(domain, 1))
        if entry is None or self._makes_packed(proto, args):
            return None
        kwargs: dict[str, Any] = {}
        for field in proto.attribute:
            if field.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) or field.ref_attr_name:
                return None
            kwargs[parameter_name(field.name)] = self._attribute(proto, field)
        if entry.counted:
            kwargs["outputs"] = len(proto.output)
        if not accepts(entry, len(args), kwargs):
            return None
        name = _identifier(proto.name or (proto.output[0] if proto.output else proto.op_type))
        return self.graph.create_node("call_function", entry.function, tuple(args), kwargs, name=name)

    def _makes_packed(self, proto: onnx.NodeProto, args: list[Any]) -> bool:
        """Whether the node produces 2- or 4-bit values, for whose rounding and range torch has no type."""
        types = {a.i for a in proto.attribute if a.name in ("to", "output_dtype", "dtype")}
        if proto.op_type in ("QuantizeLinear", "CastLike"):
            types |= {self.constants[a][1].data_type for a in args[1:] if a in self.constants}
        return any(kind not in TORCH_DTYPES and kind != onnx.TensorProto.STRING for kind in types - {0})

    def _attribute(self, proto: onnx.NodeProto, attribute: onnx.AttributeProto) -> Any:
        if attribute.type == onnx.AttributeProto.TENSOR:
            target = self._attribute_name(f"attribute_{proto.output[0]}_{attribute.name}")
            set_attribute(self.root, target, self.reader.value(attribute.t))
            return self.graph.get_attr(target)
        value = onnx.helper.get_attribute_value(attribute)
        if attribute.type == onnx.AttributeProto.STRING:
            return value.decode(errors="surrogateescape")
        if attribute.type == onnx.AttributeProto.STRINGS:
            return [v.decode(errors="surrogateescape") for v in value]
        return list(value) if attribute.type in (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS) else value

    def _opaque(self, index: int, proto: onnx.NodeProto, args: list[Any], outer: Iterable[str]) -> fx.Node:
        names = [*proto.input, *outer]
        known = {
            i: (self.constants[arg][0], as_constant(names[i], self.constants[arg][1], self.constants[arg][0]))
            for i, arg in enumerate(args)
            if arg in self.constants
        }
        model = self.file.proto
        target = f"opaque_{index}_{_identifier(proto.op_type)}"
        self.root.add_module(target, OpaqueOperator(proto, tuple(outer), model.opset_import, model.functions, known))
        return self.graph.create_node("call_module", target, tuple(args))

    def _bind_outputs(self, node: fx.Node, proto: onnx.NodeProto) -> None:
        if len(proto.output) == 1:
            node.meta["onnx_name"] = proto.output[0]
            self.values[proto.output[0]] = node
            return
        for i, name in enumerate(proto.output):
            if not name:
                continue
            item = self.graph.create_node("call_function", operator.getitem, (node, i), name=_identifier(name))
            item.meta["onnx_name"] = name
            self.values[name] = item


def _order(nodes: Iterable[onnx.NodeProto], defined: set[str]) -> list[int]:
    """An order in which every producer comes first: the file's own where it is one.

    Raises:
        GraphOptError: the nodes form a cycle.
    """
    nodes = list(nodes)
    uses = [[n for n in (*node.input, *captured(node)) if n] for node in nodes]
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


def _identifier(name: str) -> str:
    """A readable Python identifier for an ONNX name; fx makes it unique."""
    text = "".join(c if c.isascii() and c.isalnum() else "_" for c in name).strip("_") or "value"
    return f"v{text}" if text[0].isdigit() else text


def _spec(value: onnx.ValueInfoProto) -> ValueSpec:
    if value.type.WhichOneof("value") != "tensor_type":
        return ValueSpec(value.name, value.type.WhichOneof("value"), None)
    tensor = value.type.tensor_type
    dtype: torch.dtype | str | None = TORCH_DTYPES.get(tensor.elem_type)
    if dtype is None and tensor.elem_type:
        dtype = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    if not tensor.HasField("shape"):
        return ValueSpec(value.name, dtype, None)
    return ValueSpec(value.name, dtype, tuple(_dim(d) for d in tensor.shape.dim))


def _dim(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    which = dim.WhichOneof("value")
    if which == "dim_value":
        return int(dim.dim_value) if dim.dim_value >= 0 else None  # some exporters write -1 for unknown
    return dim.dim_param or None if which == "dim_param" else None


def _densify(sparse: onnx.SparseTensorProto, reader: TensorReader) -> torch.Tensor:
    values, indices = reader.value(sparse.values), reader.value(sparse.indices)
    assert isinstance(values, torch.Tensor)
    assert isinstance(indices, torch.Tensor)
    dense = torch.zeros(list(sparse.dims), dtype=values.dtype)
    if indices.ndim == 1:
        dense.view(-1)[indices] = values
    else:
        dense[tuple(indices.T)] = values
    return dense
