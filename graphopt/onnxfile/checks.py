"""Whether a parsed file has the structure of a model; what comes after may rely on it.

An .onnx file is untrusted. `onnx.checker` refuses many models that runtimes accept and users have (unnamed graphs,
unsorted nodes), and accepts some that would never end (functions that call functions many times over).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx

from graphopt.errors import GraphOptError
from graphopt.onnxfile.calls import check_calls
from graphopt.onnxfile.signatures import Signature, signature_of
from graphopt.onnxfile.tensor_checks import DENSE_LIMIT, check_sparse, check_tensor, sparse_in

_A = onnx.AttributeProto
_FIELDS: dict[int, str] = {
    _A.FLOAT: "f", _A.INT: "i", _A.STRING: "s", _A.TENSOR: "t", _A.GRAPH: "g", _A.SPARSE_TENSOR: "sparse_tensor",
    _A.TYPE_PROTO: "tp", _A.FLOATS: "floats", _A.INTS: "ints", _A.STRINGS: "strings", _A.TENSORS: "tensors",
    _A.GRAPHS: "graphs", _A.SPARSE_TENSORS: "sparse_tensors", _A.TYPE_PROTOS: "type_protos",
}  # fmt: skip
_MESSAGES = frozenset({"t", "g", "sparse_tensor", "tp"})
_BESIDE = frozenset({"name", "type", "doc_string", "ref_attr_name"})
_TYPES = frozenset(onnx.TensorProto.DataType.values())
# Bodies inside bodies: protobuf itself parses no more than this.
_DEEPEST = 33
_MOST_INDEX = (1 << 31) - 1


def check_model(proto: onnx.ModelProto) -> None:
    """Check the structure of a model: names, attributes, tensors, functions. Linear in the size of the protobuf.

    External data, cycles of nodes, and values that nothing defines are not looked at here.

    Raises:
        GraphOptError: the file is corrupt, or made to do harm.
    """
    if proto.ir_version < 1:
        raise GraphOptError(f"expected an IR version of 1 or more, found {proto.ir_version}; the file is corrupt")
    for text in (proto.producer_name, proto.producer_version, proto.domain, proto.doc_string):
        _text(text)
    opsets = _opsets(proto.opset_import)
    functions = {(_domain(f.domain), f.name, f.overload) for f in proto.functions}
    if len(functions) < len(proto.functions):
        raise GraphOptError("two functions of the model have the same name and domain; the file is corrupt")
    checker = _Checker(opsets, functions)
    checker.graph(proto.graph, 0)
    for training in proto.training_info:
        checker.graph(training.initialization, 0)
        checker.graph(training.algorithm, 0)
    for function in proto.functions:
        own = _Checker(_opsets(function.opset_import), functions, inside=True)
        own.function(function)
        checker.dense += own.dense
    if checker.dense > DENSE_LIMIT:
        raise GraphOptError(
            f"expected sparse tensors of at most {DENSE_LIMIT} bytes when they are written out, found {checker.dense}; "
            "store them densely"
        )
    check_calls(proto)


class _Checker:
    """Checks the nodes of one model, or of one function, which has opsets of its own."""

    def __init__(
        self, opsets: Mapping[str, int], functions: set[tuple[str, str, str]], *, inside: bool = False
    ) -> None:
        self.dense = 0
        self._opsets = opsets
        self._functions = functions
        self._inside = inside
        self._known: dict[tuple[str, str], Signature | None] = {}

    def function(self, function: onnx.FunctionProto) -> None:
        """Check a function: its signature and its nodes."""
        label = f"the function {_text(function.name)!r}"
        for text in (function.domain, function.overload, *function.attribute):
            _text(text)
        _distinct(function.input, f"an input of {label}")
        _distinct(function.output, f"an output of {label}")
        for attribute in function.attribute_proto:
            self._attribute(attribute, label, 0)
        self._nodes(function.node, function.input, 0)

    def graph(self, graph: onnx.GraphProto, depth: int) -> None:
        """Check a graph and the bodies in it."""
        if depth > _DEEPEST:
            raise GraphOptError(f"expected bodies nested at most {_DEEPEST} deep, found more; simplify the model")
        _text(graph.name)
        _text(graph.doc_string)
        weights = [t.name for t in graph.initializer] + [s.values.name for s in graph.sparse_initializer]
        inputs = [value.name for value in graph.input]
        _distinct(inputs, "an input of a graph")
        _distinct(weights, "an initialiser")
        for value in (*graph.input, *graph.output, *graph.value_info):
            _type(value)
        if not all(value.name for value in graph.output):
            raise GraphOptError("an output of a graph has no name; the file is corrupt")
        for tensor in graph.initializer:
            check_tensor(tensor)
        for sparse in graph.sparse_initializer:
            self.dense += check_sparse(sparse)
        self._nodes(graph.node, {*inputs, *weights}, depth)

    def _nodes(self, nodes: Iterable[onnx.NodeProto], defined: Iterable[str], depth: int) -> None:
        defined = set(defined)
        for node in nodes:
            if not _text(node.op_type):
                raise GraphOptError(f"node {node.name!r} has no operator type; the file is corrupt")
            _text(node.name)
            for name in node.input:
                _text(name)
            for name in node.output:
                if _text(name) in defined:
                    raise GraphOptError(f"value {_short(name)!r} is defined more than once in one graph; fix the model")
                if name:
                    defined.add(name)
            self._node(node, depth)

    def _node(self, node: onnx.NodeProto, depth: int) -> None:
        signature = self._signature(node)
        label = f"node {_short(node.name)!r} ({_short(node.op_type)})"
        given: set[str] = set()
        for attribute in node.attribute:
            name = _text(attribute.name)
            if not name or name in given:
                raise GraphOptError(f"attribute {_short(name)!r} of {label} has no name of its own; fix the model")
            given.add(name)
            wanted = attribute.type if signature is None else signature.attributes.get(name, attribute.type)
            if wanted != attribute.type:
                raise GraphOptError(
                    f"expected attribute {name!r} of {label} to be of type {_A.AttributeType.Name(wanted)}, found "
                    f"{_kind(attribute.type)}; fix the model"
                )
            self._attribute(attribute, label, depth)
        # In opsets that this onnx package does not know, too: what follows stores its value in the graph.
        if node.op_type == "Constant" and not _domain(node.domain) and len(node.input):
            raise GraphOptError(f"expected no inputs of {label}, found {len(node.input)}; fix the model")
        if signature is None:
            return
        _check_indices(node, label)
        for name in signature.required:
            if name not in given:
                raise GraphOptError(f"expected attribute {name!r} at {label}, found none of that name; fix the model")
        signature.inputs.check(node.input, f"inputs of {label}")
        signature.outputs.check(node.output, f"outputs of {label}")

    def _attribute(self, attribute: onnx.AttributeProto, label: str, depth: int) -> None:
        field = _FIELDS.get(attribute.type)
        held = [f.name for f, _ in attribute.ListFields() if f.name not in _BESIDE]
        refers = bool(_text(attribute.ref_attr_name))
        if refers and not (self._inside and not held):
            raise GraphOptError(
                f"{label} refers to an attribute outside of a function, or beside a value; fix the model"
            )
        if refers:
            return
        if field is None or any(name != field for name in held) or (field in _MESSAGES and not held):
            raise GraphOptError(
                f"expected attribute {_short(attribute.name)!r} of {label} to hold a value of its type "
                f"{_kind(attribute.type)}, found {held or 'none'}; the file is corrupt"
            )
        if field == "t":
            check_tensor(attribute.t)
        elif field == "tensors":
            for tensor in attribute.tensors:
                check_tensor(tensor)
        elif field in ("g", "graphs"):
            for graph in [attribute.g] if field == "g" else attribute.graphs:
                self.graph(graph, depth + 1)
        else:
            self.dense += sum(map(check_sparse, sparse_in(attribute)))

    def _signature(self, node: onnx.NodeProto) -> Signature | None:
        """What ONNX says of the operator, if it knows it and the model does not define it anew."""
        domain = _domain(node.domain)
        if (domain, node.op_type, _text(node.overload)) in self._functions:
            return None
        key = (domain, node.op_type)
        if key not in self._known:
            self._known[key] = signature_of(node.op_type, self._opsets.get(domain, 1), domain)
        return self._known[key]


def _check_indices(node: onnx.NodeProto, label: str) -> None:
    """Refuse what onnx and onnxruntime cut to 32 bits before they look at it: the one crashes, the other hangs."""
    for attribute in node.attribute:
        value = attribute.i
        wrong = attribute.name == "axis" and not -_MOST_INDEX <= value <= _MOST_INDEX
        wrong = wrong or (attribute.name == "num_scan_inputs" and not 0 < value <= len(node.input))
        if wrong and not attribute.ref_attr_name:
            raise GraphOptError(f"expected an index in {attribute.name!r} of {label}, found {value}; fix the model")


def _opsets(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    found: dict[str, int] = {}
    for each in imports:
        domain = _domain(each.domain)
        if each.version < 1 or found.setdefault(domain, each.version) != each.version:
            raise GraphOptError(
                f"expected one opset version of 1 or more for domain {domain or 'ai.onnx'!r}, found {each.version}"
                f"{f' beside {found[domain]}' if domain in found else ''}; fix the model"
            )
    return found


def _domain(domain: str) -> str:
    return "" if _text(domain) == "ai.onnx" else domain


def _text(value: str) -> str:
    """The text itself; protobuf hands out what is no UTF-8 as bytes, which no code expects."""
    if not isinstance(value, str):
        raise GraphOptError(f"expected names in UTF-8, found the bytes {value[:40]!r}; the file is corrupt")
    return value


def _short(name: str) -> str:
    """The name as one line of a sentence can hold it."""
    name = name if len(name) <= 100 else f"{name[:97]}..."
    return name if name.isprintable() else repr(name)[1:-1]


def _kind(code: int) -> str:
    return str(_A.AttributeType.Name(code)) if code in _A.AttributeType.values() else f"number {code}"


def _distinct(names: Iterable[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if not _text(name) or name in seen:
            raise GraphOptError(f"expected a name of its own for {what}, found {_short(name)!r} again; fix the model")
        seen.add(name)


def _type(value: onnx.ValueInfoProto) -> None:
    _text(value.name)
    kind = value.type
    while kind.WhichOneof("value") in ("sequence_type", "optional_type", "map_type"):
        which = kind.WhichOneof("value")
        kind = kind.map_type.value_type if which == "map_type" else getattr(kind, which).elem_type
    tensor = kind.sparse_tensor_type if kind.HasField("sparse_tensor_type") else kind.tensor_type
    if tensor.elem_type not in _TYPES:
        raise GraphOptError(f"expected an element type for {_short(value.name)!r}, found the number {tensor.elem_type}")
    for dim in tensor.shape.dim:
        _text(dim.dim_param)
