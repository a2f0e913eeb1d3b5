"""Equal values computed or stored several times: subexpressions, shape arithmetic, initialisers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable
from typing import Any

import onnx
import torch
from torch import fx

from graphopt.graph import attribute
from graphopt.subgraphs import SubgraphOperator

from .dims import static
from .operators import opaque_proto, pure
from .workspace import Workspace, digest

# Tensors of one shape are told apart by a few elements before all of their bytes are hashed.
_SAMPLE = 16


def merge_equal(w: Workspace, chosen: Collection[str]) -> None:
    """Let each node that repeats an earlier one give way to it.

    cse: the same pure function of the same operands has the same value; operands are merged before users.
    shape-cse: integers with the same symbolic form are equal for all inputs.
    """
    functions = () if w.graph.onnx is None else tuple(w.graph.onnx.proto.functions)
    first: dict[Any, fx.Node] = {}
    for node in list(w.graph.nodes):
        if node.op in ("placeholder", "output"):
            continue
        w.facts.learn(node)
        for rule, key in (("cse", _key(node, functions)), ("shape-cse", _elements(w, node))):
            if key is None or rule not in chosen:
                continue
            earlier = first.setdefault((rule, key), node)
            if earlier is node or not w.allows(rule, node):
                continue
            if w.replace(rule, node, earlier, f"same value as {w.name(earlier)}"):
                break


def _elements(w: Workspace, node: fx.Node) -> Hashable | None:
    fact = w.fact(node)
    if not fact.elements or static(fact.elements) or fact.shape is None:
        return None
    return fact.dtype, fact.shape, fact.elements


def _key(node: fx.Node, functions: tuple[onnx.FunctionProto, ...]) -> Hashable | None:
    if node.op == "get_attr":
        return ("get_attr", node.target) if _is_operand(node) else None
    if not pure(node, functions):
        return None
    proto = opaque_proto(node)
    target: Any = node.target if proto is None else (_anonymous(proto), _edited(node))
    try:
        key = (target, _frozen(node.args), _frozen(_attributes(node)))
        hash(key)
    except TypeError:  # an argument without a hash
        return None
    return key


def _edited(node: fx.Node) -> Hashable:
    """Sets an operator apart whose bodies another pass has changed: its proto no longer says all."""
    module = node.graph.owning_module
    assert module is not None
    operator = module.get_submodule(str(node.target))
    return id(operator) if isinstance(operator, SubgraphOperator) and operator.edited else None


def _is_operand(node: fx.Node) -> bool:
    """Not so the tensor attribute of an ONNX node, which has to stay that node's own."""
    return not any(node in user.kwargs.values() for user in node.users)


def _attributes(node: fx.Node) -> dict[str, Any]:
    """Keyword arguments; a tensor attribute is known by its bytes."""
    module = node.graph.owning_module
    assert module is not None
    found: dict[str, Any] = {}
    for name, value in node.kwargs.items():
        if isinstance(value, fx.Node) and value.op == "get_attr":
            tensor = attribute(module, str(value.target))
            found[name] = _content(tensor) if isinstance(tensor, torch.Tensor) else value
        else:
            found[name] = value
    return found


def _content(tensor: torch.Tensor) -> Hashable:
    return str(tensor.dtype), tuple(tensor.shape), digest(tensor)


def _frozen(value: Any) -> Hashable:
    """A hashable form that tells 1 from 1.0 and from True, and 0.0 from -0.0."""
    if isinstance(value, (list, tuple)):
        return type(value).__name__, tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple(sorted((key, _frozen(item)) for key, item in value.items()))
    if isinstance(value, slice):
        return "slice", _frozen((value.start, value.stop, value.step))
    if isinstance(value, float):
        return "float", repr(value)
    if isinstance(value, fx.Node):
        return "node", id(value)
    return type(value).__name__, value


def _anonymous(proto: onnx.NodeProto) -> bytes:
    """An opaque node without the names of its operands and results, only which of them there are."""
    twin = onnx.NodeProto()
    twin.CopyFrom(proto)
    for field in ("name", "doc_string", "metadata_props"):
        twin.ClearField(field)
    for names in (twin.input, twin.output):
        present = ["x" if name else "" for name in names]
        del names[:]
        names.extend(present)
    return bytes(twin.SerializeToString(deterministic=True))


def merge_weights(w: Workspace) -> None:
    """Store equal initialisers once; not for an nn.Module, whose equal parameters may be trained apart."""
    if w.graph.onnx is None:
        return
    groups: dict[Hashable, list[fx.Node]] = defaultdict(list)
    for node in w.graph.nodes:
        value = w.fact(node).value if node.op == "get_attr" else None
        if value is not None and _is_operand(node):
            groups[value.dtype, tuple(value.shape), _sample(value)].append(node)
    for group in groups.values():
        first: dict[bytes, fx.Node] = {}
        for node in group if len(group) > 1 else ():
            value = w.fact(node).value
            assert value is not None
            earlier = first.setdefault(digest(value), node)
            # An opaque node embeds its constant operands, so it has to keep its own ones.
            own = any(user.op == "call_module" for user in node.users)
            if earlier is not node and not own and w.allows("merge-weights", node):
                w.replace("merge-weights", node, earlier, f"same bytes as {w.name(earlier)}")


def _sample(value: torch.Tensor) -> Hashable:
    """The bytes of a few elements, spread over the tensor."""
    flat = value.reshape(-1)
    return digest(flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE])
