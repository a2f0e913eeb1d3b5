"""Linear layers: every product with a constant matrix, with its bias.

`inputs` of a site is `(x,)`. `weight` and `bias` are the stored tensors (`get_attr` nodes), before a cast if there
is one; a bias has the shape [out] or [1, out]. Where an exporter flattened x for the product and restored its shape
behind it, the site covers both reshapes and x is the unflattened value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from graphopt.sites import vocabulary
from graphopt.sites.base import Findings, LinearSite, Refusal
from graphopt.sites.regions import Scope, same_value, stored
from graphopt.sites.vocabulary import kind

if TYPE_CHECKING:
    from graphopt.graph import Graph

_QUANTISED = frozenset(
    {"mat_mul_nbits", "mat_mul_bnb4", "mat_mul_fp_q4", "mat_mul_integer", "mat_mul_integer_to_float"}
    | {"dynamic_quantize_mat_mul", "qlinear_mat_mul", "qgemm"}
)


@dataclass(frozen=True)
class _Product:
    """The operands of a product as they stand in the graph."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None = None
    transposed: bool = True
    """The operand `weight` is [in, out]."""
    reason: str = ""
    """Why it is no plain linear layer."""


@dataclass(frozen=True)
class _Layer:
    """A product with a stored weight, while its region grows."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool
    sizes: tuple[int, int]
    members: frozenset[fx.Node]
    output: fx.Node


def find(graph: Graph) -> Findings:
    """All linear layers of `graph`, and the products with a constant that are none."""
    return search(Scope(graph))


def search(scope: Scope) -> Findings:
    """`find` for a finder that has a scope already."""
    sites, refusals = [], []
    for node in scope.graph.nodes:
        found = _read(scope, node)
        if isinstance(found, str):
            refusals.append(Refusal("linear", vocabulary.name_of(node), found))
        elif found is not None:
            sites.append(_site(scope, node, found))
    return Findings(tuple(sites), tuple(refusals))


def _site(scope: Scope, node: fx.Node, layer: _Layer) -> LinearSite:
    nodes = scope.region(layer.members, layer.output)
    assert not isinstance(nodes, str), "every step checked that nothing inside is used outside"
    return LinearSite(
        scope.unique_name(node),
        node,
        nodes,
        (layer.x,),
        x=layer.x,
        weight=layer.weight,
        bias=layer.bias,
        transposed=layer.transposed,
        in_features=layer.sizes[0],
        out_features=layer.sizes[1],
    )


def _read(scope: Scope, node: fx.Node) -> _Layer | str | None:
    """The layer, the reason why it is none, or None for a node that does not look like one."""
    if kind(node) in _QUANTISED and not all(n in scope.constants for n in node.all_input_nodes):
        return f"its weight is quantised already ({kind(node)})"
    product = _product(node)
    if product is None or (product.weight in scope.constants) == (product.x in scope.constants):
        return None
    if product.x in scope.constants:
        return "its constant is the left operand; a linear layer has it on the right"
    if product.reason:
        return product.reason
    weight = _stored_weight(scope, product.weight)
    if isinstance(weight, str):
        return weight
    value = scope.graph.weight(weight[0])
    transposed = product.transposed != weight[1]
    inner, outer = (int(size) for size in (value.shape if transposed else reversed(value.shape)))
    layer = _Layer(product.x, weight[0], None, transposed, (inner, outer), frozenset((node,)), node)
    if product.bias is not None:
        bias = _stored_bias(scope, product.bias, outer)
        if isinstance(bias, str):
            return bias
        layer = _with(layer, bias=bias)
    return _with_added_bias(scope, _unflattened(scope, _with_added_bias(scope, layer)))


def _product(node: fx.Node) -> _Product | None:
    name = kind(node)
    if node.op != "call_function" or name not in ("matmul", "linear", "gemm", "fused_matmul"):
        return None
    operands = vocabulary.operands(node)
    if name == "gemm" and isinstance(node.target, torch._ops.OpOverload):  # aten.addmm(bias, x, weight)
        operands = (*operands[1:3], operands[0])
    x, weight, bias = (*operands, None, None, None)[:3]
    if x is None or weight is None:
        return None
    attributes = vocabulary.attributes(node)
    scaled = {key: value for key in ("alpha", "beta") if (value := attributes.get(key, 1)) != 1}
    if bias is None:
        scaled.pop("beta", None)
    reason = ""
    if scaled:
        reason = "it scales its result: " + ", ".join(f"{key} is {value:g}" for key, value in scaled.items())
    if any(attributes.get(key) for key in ("transA", "transBatchA", "transBatchB")):
        reason = "it transposes its left operand or a batch axis"
    transposed = name != "linear" and not attributes.get("transB", 0)
    return _Product(node, x, weight, bias, transposed, reason)


def _stored_weight(scope: Scope, node: fx.Node) -> tuple[fx.Node, bool] | str:
    """The stored matrix and whether it is transposed on the way to the product; or why there is none."""
    turns = []
    while node.op != "get_attr":
        given = vocabulary.source(node)
        if kind(node) == "dequantize_linear":
            return "its weight is quantised already (dequantize_linear)"
        if given is None or not (same_value(node) or kind(node) == "transpose"):
            return f"its weight is computed by {kind(node)}, not stored"
        turns += [node] if kind(node) == "transpose" else []
        node = given
    value = scope.graph.weight(node)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return f"its weight is of type {getattr(value, 'dtype', type(value).__name__)}, no float"
    if value.ndim != 2:
        return f"its weight has {value.ndim} dimensions ({list(value.shape)}), expected a matrix"
    turned = [vocabulary.permutation(turn, 2) == (1, 0) for turn in turns]
    return node, sum(turned) % 2 == 1


def _stored_bias(scope: Scope, node: fx.Node, features: int) -> fx.Node | str:
    if node not in scope.constants:
        return "its bias depends on an input of the model"
    found = stored(node)
    if found.op != "get_attr":
        return f"its bias is computed by {kind(node)}, not stored"
    shape = scope.constant_shape(found)
    if shape not in ((features,), (1, features)):
        return f"its bias has the shape {list(shape or ())}, expected [{features}]"
    return found


def _with_added_bias(scope: Scope, layer: _Layer) -> _Layer:
    """The layer with the bias that the only user of its output adds, if it has none yet."""
    users = scope.live_users(layer.output)
    if layer.bias is not None or len(users) != 1 or kind(users[0]) != "add":
        return layer
    add = users[0]
    if len(add.args) != 2 or add.kwargs.get("alpha", 1) != 1:
        return layer
    bias = next((a for a in vocabulary.operands(add) if a is not None and a is not layer.output), None)
    found = None if bias is None else _stored_bias(scope, bias, layer.sizes[1])
    if not isinstance(found, fx.Node) or scope.constant_shape(found) != (layer.sizes[1],):
        return layer
    return _with(layer, bias=found, output=add, members=(add,))


def _unflattened(scope: Scope, layer: _Layer) -> _Layer:
    """The layer on x of any rank, where x is flattened before the product and restored behind it."""
    wide = vocabulary.source(layer.x) if kind(layer.x) == "reshape" else None
    users = scope.live_users(layer.output)
    if wide is None or len(users) != 1 or kind(users[0]) != "reshape" or users[0].args[0] is not layer.output:
        return layer
    restored = users[0]
    before, after = scope.shape(wide), scope.shape(restored)
    if not before or not after or (*before[:-1], layer.sizes[1]) != after or before[-1] != layer.sizes[0]:
        return layer
    members: tuple[fx.Node, ...] = (restored,)
    if all(user in layer.members for user in scope.live_users(layer.x)):
        members = (layer.x, restored)
    wider = _with(layer, x=wide, output=restored, members=members)
    return layer if isinstance(scope.region(wider.members, restored), str) else wider


def _with(
    layer: _Layer,
    *,
    x: fx.Node | None = None,
    bias: fx.Node | None = None,
    output: fx.Node | None = None,
    members: tuple[fx.Node, ...] = (),
) -> _Layer:
    return _Layer(
        x or layer.x,
        layer.weight,
        bias or layer.bias,
        layer.transposed,
        layer.sizes,
        layer.members | set(members),
        output or layer.output,
    )
