"""Two linear layers with an activation between them, plain or gated.

The activation is recognised by what it computes, not by how it is spelled: the nodes between the layers are evaluated
on a grid of numbers and compared with the known functions. `inputs` of a site is `(up.x,)`.

A bias that the activation's own operator adds (BiasGelu, FastGelu) is `up.bias`, though `up.output` lacks it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import fx

from graphopt.sites import linear, vocabulary
from graphopt.sites.base import Findings, LinearSite, MlpSite, Refusal
from graphopt.sites.regions import Scope, evaluate, same_value, stored, strip
from graphopt.sites.vocabulary import kind

if TYPE_CHECKING:
    from graphopt.graph import Graph

Function = Callable[[torch.Tensor], torch.Tensor]

_PLAIN: dict[str, Function] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "mish": F.mish,
    "relu6": F.relu6,
    "relu_squared": lambda x: torch.relu(x) ** 2,
}
# Families: the function of x and p, and p from the values at -1 and 1.
_FAMILIES: dict[str, tuple[Callable[[torch.Tensor, float], torch.Tensor], Function]] = {
    "leaky_relu": (F.leaky_relu, lambda y: -y[0]),
    "elu": (F.elu, lambda y: y[0] / (torch.exp(-torch.ones_like(y[0])) - 1)),
    "swish": (lambda x, p: x * torch.sigmoid(p * x), lambda y: torch.logit(y[1])),
}
_GRID = torch.linspace(-8.0, 8.0, 129, dtype=torch.float64)
# Constants in half precision move an activation by about 1e-4; gelu and its tanh form are 4.7e-4 apart.
_TOLERANCE = 3e-4
_MOST_MEMBERS = 80

_ARITHMETIC = (
    "add sub rsub mul div neg pow square sqrt rsqrt reciprocal abs exp expm1 log log1p erf sin cos atan where cast "
    "greater greater_equal less less_equal equal not and or clip clamp_min clamp_max max min maximum minimum"
)
_ACTIVATIONS = (
    "tanh sigmoid relu gelu fast_gelu bias_gelu quick_gelu silu swish leaky_relu prelu elu celu selu hard_sigmoid "
    "hardsigmoid hard_swish hardswish hardtanh softplus softsign mish relu6 thresholded_relu threshold shrink"
)
_POINTWISE = frozenset(f"{_ARITHMETIC} {_ACTIVATIONS}".split())
_LAYOUT = frozenset({"reshape", "squeeze", "unsqueeze"})
_WITH_BIAS = frozenset({"bias_gelu", "fast_gelu"})
_PIECES = frozenset({"split", "getitem", "slice"})


def activation(name: str) -> Function:
    """The function that `MlpSite.activation` names: `gelu`, `leaky_relu`, `leaky_relu(0.2)` ...

    Raises:
        KeyError: there is no activation of that name.
    """
    stem, _, rest = name.partition("(")
    if not rest:
        return _PLAIN[stem]
    function, parameter = _FAMILIES[stem][0], float(rest.rstrip(")"))
    return lambda x: function(x, parameter)


def find(graph: Graph, *, overlapping: bool = False) -> Findings:
    """All MLPs of `graph`, and what looked like one.

    Args:
        graph: the model.
        overlapping: of three layers in a row with activations between them, the last two are an MLP as well as the
            first two; otherwise no node belongs to more than one.
    """
    scope = Scope(graph)
    layers = linear.search(scope).sites
    by_output = {layer.output: layer for layer in layers}
    sites: list[MlpSite] = []
    refusals: list[Refusal] = []
    owners: dict[fx.Node, str] = {}
    for down in layers:
        found = _Reader(scope, by_output, down).read()
        if isinstance(found, MlpSite):
            shared = next((owners[n] for n in found.nodes if n in owners), None)
            if shared is not None and not overlapping:
                found = f"its first layer belongs to the MLP {shared!r} already"
            else:
                sites.append(found)
                owners.update(dict.fromkeys(found.nodes, found.name))
        if isinstance(found, str):
            refusals.append(Refusal("mlp", down.name, found))
    return Findings(tuple(sites), tuple(refusals))


@dataclass
class _Between:
    """What stands between linear layers and one value."""

    members: set[fx.Node] = field(default_factory=set)
    layers: list[LinearSite] = field(default_factory=list)
    pieces: dict[fx.Node, LinearSite] = field(default_factory=dict)
    """Parts of a layer's output, and that layer."""
    unknown: fx.Node | None = None

    def acts(self) -> bool:
        return any(not _passes(n) for n in self.members)


class _Reader:
    """Reads the MLP that ends in one linear layer."""

    def __init__(self, scope: Scope, by_output: dict[fx.Node, LinearSite], down: LinearSite) -> None:
        self.scope = scope
        self.by_output = by_output
        self.down = down

    def read(self) -> MlpSite | str | None:
        """The site, the reason why it is none, or None for what does not look like one."""
        between = self._between(self.down.x)
        if between is None:
            return None
        if between.pieces:
            return self._cut(between)
        if not between.acts() or not 1 <= len(between.layers) <= 2:
            return None
        if between.unknown is not None:
            return f"its activation is unknown: {_described(between.unknown)}"
        if len(between.layers) == 1:
            return self._assemble(between.members, between, between.layers[0], None)
        return self._gated(between)

    def _between(self, node: fx.Node) -> _Between | None:
        """Walk from `node` back to linear layers; None where it meets an operator that is not pointwise."""
        found = _Between()
        pending = [node]
        while pending:
            node = pending.pop()
            if node in found.members or node in self.scope.constants:
                continue
            if node in self.by_output:
                layer = self.by_output[node]
                found.layers += [layer] if layer not in found.layers else []
                continue
            if kind(node) in _PIECES and not same_value(node):
                whole = self._whole(node)
                if whole is None:
                    return None
                found.pieces[node] = whole
                continue
            found.members.add(node)
            if len(found.members) > _MOST_MEMBERS:
                return None
            if _passes(node):
                given = vocabulary.source(node)
                pending += [] if given is None else [given]
                continue
            operands = self.scope.varying(node)
            if kind(node) not in _POINTWISE:
                if not _may_activate(node) or len(operands) != 1:
                    return None
                found.unknown = node
            pending += operands
        return found

    def _whole(self, node: fx.Node) -> LinearSite | None:
        """The layer whose output `node` is a part of."""
        while node not in self.by_output:
            given = vocabulary.source(node)
            if given is None or not (kind(node) in _PIECES or _passes(node)):
                return None
            node = given
        return self.by_output[node]

    def _cut(self, between: _Between) -> str | None:
        names = {layer.name for layer in between.pieces.values()}
        if len(names) != 1 or len(between.pieces) != 2 or between.layers or kind(strip(self.down.x)) != "mul":
            return None
        return f"gate and up are one projection, {names.pop()!r}, whose result is cut in two"

    def _gated(self, between: _Between) -> MlpSite | str | None:
        product = self.down.x
        while _passes(product) and product not in self.by_output:
            given = vocabulary.source(product)
            assert given is not None, "a member that passes its operand on has one"
            product = given
        sides = [self._between(n) for n in self.scope.varying(product)]
        if kind(product) != "mul" or len(sides) != 2:
            return None
        a, b = sides
        if a is None or b is None or len(a.layers) != 1 or len(b.layers) != 1 or a.layers == b.layers:
            return None
        if a.acts() and b.acts():
            return "both of the factors that it multiplies have an activation"
        if not a.acts() and not b.acts():
            return "it multiplies two linear layers without an activation"
        act, plain = (a, b) if a.acts() else (b, a)
        if act.layers[0].x is not plain.layers[0].x:
            return "gate and up read different values"
        return self._assemble(act.members, between, plain.layers[0], act.layers[0])

    def _assemble(
        self, acting: set[fx.Node], between: _Between, up: LinearSite, gate: LinearSite | None
    ) -> MlpSite | str | None:
        layer = up if gate is None else gate
        layer, acting, entry = self._entered(layer, acting)
        nodes = sorted(acting, key=self.scope.order.__getitem__)
        while nodes and _passes(nodes[-1]):
            nodes.pop()
        layer, known, reason = self._biased(layer, nodes)
        if reason:
            return reason
        try:
            values = evaluate(self.scope, nodes, {entry: _GRID, **known})[nodes[-1]]
        except ValueError as error:
            return f"its activation is unknown: {error}"
        name = _recognised(values)
        if name is None:
            return f"its activation is unknown: {', '.join(dict.fromkeys(kind(n) for n in nodes))}"
        if name == "":
            return None
        up, gate = (layer, None) if gate is None else (up, layer)
        if any(kind(n) in _LAYOUT for n in between.members) and not self._same_rows(up):
            return "its values are reshaped between the layers in a way that is not known to keep the rows"
        if not self._same_type(up):
            return "its result is of another type than its input"
        members = {*between.members, *up.nodes, *self.down.nodes, *(gate.nodes if gate is not None else ())}
        region = self.scope.region(members, self.down.output)
        if isinstance(region, str):
            return region
        return MlpSite(
            self.down.name,
            self.down.anchor,
            region,
            (up.x,),
            up=up,
            down=self.down,
            gate=gate,
            activation=name,
            activation_nodes=tuple(nodes),
        )

    def _entered(self, layer: LinearSite, acting: set[fx.Node]) -> tuple[LinearSite, set[fx.Node], fx.Node]:
        """Drop what stands between the layer and its activation: reshapes, casts, and a bias behind them."""
        entry, acting = layer.output, set(acting)
        while True:
            users = [n for n in entry.users if n in acting]
            if len(users) != 1:
                return layer, acting, entry
            bias = None if layer.bias is not None else self._added(layer, users[0])
            if not _passes(users[0]) and bias is None:
                return layer, acting, entry
            layer = layer if bias is None else replace(layer, bias=bias)
            entry = users[0]
            acting.discard(entry)

    def _added(self, layer: LinearSite, node: fx.Node) -> fx.Node | None:
        if kind(node) != "add" or len(node.all_input_nodes) != 2 or node.kwargs.get("alpha", 1) != 1:
            return None
        return next((stored(n) for n in node.all_input_nodes if self._is_bias(layer, n)), None)

    def _is_bias(self, layer: LinearSite, node: fx.Node) -> bool:
        return node in self.scope.constants and self.scope.constant_shape(node) == (layer.out_features,)

    def _biased(
        self, layer: LinearSite, nodes: Iterable[fx.Node]
    ) -> tuple[LinearSite, dict[fx.Node, torch.Tensor], str]:
        """The layer with the bias that its activation adds, and zeros in its place; or why that cannot be."""
        known: dict[fx.Node, torch.Tensor] = {}
        for node in nodes:
            for operand in node.all_input_nodes:
                shape = self.scope.constant_shape(operand) if operand in self.scope.constants else ()
                if shape is not None and all(size == 1 for size in shape):
                    continue
                if kind(node) not in _WITH_BIAS or not self._is_bias(layer, operand):
                    return layer, {}, f"its activation is unknown: {_described(node)} has a constant per channel"
                if layer.bias is not None:
                    return layer, {}, f"its first layer has a bias, and {_described(node)} adds another one"
                layer = replace(layer, bias=stored(operand))
                known[operand] = torch.zeros((), dtype=torch.float64)
        return layer, known, ""

    def _same_type(self, up: LinearSite) -> bool:
        before, after = self.scope.shapes.dtype(up.x), self.scope.shapes.dtype(self.down.output)
        return before is None or after is None or before == after

    def _same_rows(self, up: LinearSite) -> bool:
        before, after = self.scope.shape(up.output), self.scope.shape(self.down.x)
        return before is not None and before == after


def _passes(node: fx.Node) -> bool:
    return kind(node) in _LAYOUT or same_value(node)


def _may_activate(node: fx.Node) -> bool:
    """Whether an operator that is not known could be an activation: of another domain, or a custom one."""
    return node.op == "call_module" or "::" in kind(node)


def _described(node: fx.Node) -> str:
    return f"{kind(node)} in {vocabulary.name_of(node)!r}"


def _recognised(values: object) -> str | None:
    """The function with these values on the grid by name; empty if it is linear, None if it is unknown."""
    if not isinstance(values, torch.Tensor) or values.shape != _GRID.shape:
        return None
    values = values.double()
    middle, ends = _GRID.numel() // 2, values[[_at(-1.0), _at(1.0)]]
    straight = values[middle] + (ends[1] - values[middle]) * _GRID
    if _distance(values, straight) < _TOLERANCE:
        return ""
    errors = {name: _distance(values, function(_GRID)) for name, function in _PLAIN.items()}
    name = min(errors, key=errors.__getitem__)
    if errors[name] < _TOLERANCE:
        return name
    for family, (function, parameter) in _FAMILIES.items():
        p = float(parameter(ends))
        if _distance(values, function(_GRID, p)) < _TOLERANCE:
            return f"{family}({p:.6g})"
    return None


def _at(x: float) -> int:
    return int((_GRID - x).abs().argmin())


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    distance = float((a - b).abs().max())
    return distance if distance == distance else float("inf")
