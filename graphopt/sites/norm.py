"""LayerNorm and RMSNorm over the last axis, as one operator or spelled out.

A norm that is spelled out is anchored at its square root. The site is the largest region around it that computes
scale * normalised(x) + bias, as evaluating it on random rows, scales and biases shows.

`inputs` is `(x,)`, but for operators that add a skip connection themselves: those normalise the sum of two `inputs`,
of which x is the first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphopt.sites import vocabulary
from graphopt.sites.base import Findings, NormSite, Refusal
from graphopt.sites.regions import Scope, evaluate, same_value, stored, strip
from graphopt.sites.vocabulary import kind

if TYPE_CHECKING:
    from graphopt.graph import Graph

_OPERATORS = {"layer_norm": "layer", "rms_norm": "rms", "skip_layer_norm": "layer", "skip_rms_norm": "rms"}
_ROOTS = {"sqrt": 0.5, "rsqrt": -0.5}
_GROWING = frozenset({"add", "sub", "rsub", "mul", "div", "neg", "reciprocal"})
_MOST_MEMBERS = 60
_ANY_LENGTH = 8

_Affine = tuple[fx.Node | None, fx.Node | None]
"""The constants that scale and shift the normalised value."""


def find(graph: Graph) -> Findings:
    """All norms of `graph` over the last axis, and what looked like one."""
    scope = Scope(graph)
    sites: list[NormSite] = []
    refusals = []
    for node in graph.nodes:
        found = _operator(scope, node) if kind(node) in _OPERATORS else _spelled(scope, node)
        if isinstance(found, NormSite):
            sites.append(found)
        elif found is not None:
            refusals.append(Refusal("norm", vocabulary.name_of(node), found))
    sites.sort(key=lambda site: scope.order[site.output])
    return Findings(tuple(sites), tuple(refusals))


def _operator(scope: Scope, node: fx.Node) -> NormSite | str:
    """A norm that is one operator."""
    operands = vocabulary.operands(node)
    aten = isinstance(node.target, torch._ops.OpOverload)
    if aten:  # the second argument is the list of normalised sizes
        sizes = node.args[1]
        operands = tuple(a if isinstance(a, fx.Node) else None for a in (node.args[0], *node.args[2:4]))
        operands = operands if kind(node) == "layer_norm" else operands[:2]
        if not isinstance(sizes, (list, tuple)) or len(sizes) != 1:
            return f"it normalises the last {len(sizes) if isinstance(sizes, (list, tuple)) else '?'} axes"
    elif not _last_axis(scope, node):
        return f"it normalises from axis {vocabulary.axis(node)} on, not over the last axis alone"
    x, *rest = operands
    skip = rest.pop(0) if kind(node).startswith("skip") else None
    weight, bias, extra = (*rest, None, None, None)[:3]
    if kind(node) == "skip_rms_norm":
        bias, extra = None, bias
    if x is None or x in scope.constants:
        return "it depends on no input of the model"
    if extra is not None:
        return "it adds a bias to its input too"
    if kind(node).startswith("skip") and (skip is None or skip is x or skip in scope.constants):
        return "it adds no second value of the model to its input"
    for role, value in (("scale", weight), ("bias", bias)):
        if value is not None and not scope.is_vector(value, (scope.constant_shape(value) or (0,))[-1]):
            return f"its {role} is no constant vector"
    output = _first_output(scope, node)
    if isinstance(output, str):
        return output
    region = scope.region({node, output}, output)
    if isinstance(region, str):
        return region
    inputs = (x,) if skip is None else (x, skip)
    return _site(scope, node, region, inputs, _OPERATORS[kind(node)], (weight, bias), _epsilon(node))


def _site(
    scope: Scope,
    anchor: fx.Node,
    nodes: tuple[fx.Node, ...],
    inputs: tuple[fx.Node, ...],
    form: str,
    affine: _Affine,
    epsilon: float,
) -> NormSite:
    name = scope.unique_name(anchor)
    x = inputs[0]
    weight, bias = (None if value is None else stored(value) for value in affine)
    return NormSite(name, anchor, nodes, inputs, form=form, x=x, weight=weight, bias=bias, epsilon=epsilon)


def _first_output(scope: Scope, node: fx.Node) -> fx.Node | str:
    """The normalised value, where nothing else that the operator returns is used."""
    items = [user for user in node.users if kind(user) == "getitem"]
    if not items:
        return node
    others = [n for n in items if n.args[1] != 0 and scope.live_users(n)]
    if others:
        return f"its extra output {vocabulary.name_of(others[0])!r} is used"
    return next((n for n in items if n.args[1] == 0), node)


def _last_axis(scope: Scope, node: fx.Node) -> bool:
    axis = vocabulary.attributes(node).get("axis", -1)
    shape = scope.shape(vocabulary.operands(node)[0]) if axis >= 0 else None  # type: ignore[arg-type]  # x is there
    return axis == -1 or (shape is not None and axis == len(shape) - 1)


def _epsilon(node: fx.Node) -> float:
    if isinstance(node.target, torch._ops.OpOverload):
        position = 4 if kind(node) == "layer_norm" else 3
        given = vocabulary.argument(node, position, "eps")
        if given is not None:
            return float(given)
        value = node.meta.get("val")
        dtype = value.dtype if isinstance(value, torch.Tensor) else torch.float32
        return 1e-5 if kind(node) == "layer_norm" else torch.finfo(dtype).eps
    return float(vocabulary.attributes(node).get("epsilon", 1e-12 if kind(node).startswith("skip") else 1e-5))


@dataclass(frozen=True)
class _Core:
    """The square root of a mean of squares of x, or of x less its mean."""

    root: fx.Node
    x: fx.Node
    form: str
    epsilon: float
    axes: fx.Node
    """The mean whose axes are those of the norm."""


def _spelled(scope: Scope, node: fx.Node) -> NormSite | str | None:
    """The norm around the square root `node`."""
    core = _core(scope, node)
    if core is None:
        return None
    x = core.x
    if not _over_last(scope, core.axes, x):
        axes = _axes(scope, core.axes)
        return f"it normalises over {'all axes' if axes is None else f'axes {axes}'}, not over the last one"
    found = _largest(scope, core, x)
    given = vocabulary.source(x)
    if kind(x) == "cast" and same_value(x) and given is not None and scope.shapes.dtype(given) is not None:
        # The cast to a wider type belongs to the norm if the region casts back behind it.
        whole = _largest(scope, core, given)
        if not isinstance(whole, str) and (isinstance(found, str) or len(whole[0]) > len(found[0])):
            x, found = given, whole
    if isinstance(found, str):
        return found
    return _site(scope, node, found[0], (x,), core.form, found[1], core.epsilon)


def _core(scope: Scope, node: fx.Node) -> _Core | None:
    exponent = _ROOTS.get(kind(node))
    if kind(node) == "pow":
        exponent = vocabulary.scalar(scope.graph, node.args[1])
    given = vocabulary.source(node)
    if exponent not in (0.5, -0.5) or given is None or given in scope.constants:
        return None
    total, epsilon = strip(given), 0.0
    if kind(total) == "add":
        numbers = [vocabulary.scalar(scope.graph, a) for a in total.args[:2]]
        constants = [n for n in numbers if n is not None]
        terms = scope.varying(total)
        if len(constants) != 1 or len(terms) != 1:
            return None
        total, epsilon = strip(terms[0]), constants[0]
    read = _second_moment(scope, total)
    if read is None:
        return None
    return _Core(node, read[0], read[1], epsilon, total)


def _second_moment(scope: Scope, node: fx.Node) -> tuple[fx.Node, str] | None:
    """What is normalised and in which form, if `node` is a mean of squares or of squared deviations."""
    if kind(node) == "var":
        given = vocabulary.source(node)
        biased = node.kwargs.get("correction") == 0 or vocabulary.argument(node, 2, "unbiased") is False
        return (given, "layer") if given is not None and biased else None
    given = vocabulary.source(node)
    if given is None or kind(node) != "mean":
        return None
    square = strip(given)
    factors = [strip(n) for n in scope.varying(square)]
    squared = kind(square) == "pow" and vocabulary.scalar(scope.graph, square.args[1]) == 2
    if len(set(factors)) != 1 or not (squared or (kind(square) == "mul" and len(square.args) == 2)):
        return None
    if kind(square) == "mul" and any(n in scope.constants for n in square.all_input_nodes):
        return None
    x = scope.varying(square)[0]
    deviation = strip(x)
    terms = scope.varying(deviation) if kind(deviation) == "sub" else []
    for value, mean in (terms, terms[::-1]) if len(terms) == 2 else ():
        given = vocabulary.source(strip(mean))
        if kind(strip(mean)) == "mean" and given is not None and strip(given) is strip(value):
            return value, "layer"
    return x, "rms"


def _axes(scope: Scope, node: fx.Node) -> list[int] | None:
    """The axes that a mean or variance goes over, as they are written."""
    axes: Any = node.kwargs.get("axes", node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None))
    if isinstance(axes, fx.Node):
        value = scope.value(axes)
        axes = None if value is None else value.reshape(-1).tolist()
    return [axes] if isinstance(axes, int) else list(axes) if axes else None


def _over_last(scope: Scope, mean: fx.Node, x: fx.Node) -> bool:
    axes = _axes(scope, mean)
    if axes is None or len(axes) != 1 or not _keeps(mean):
        return False
    shape = scope.shape(x) if axes[0] != -1 else None
    return axes[0] == -1 or (shape is not None and axes[0] == len(shape) - 1)


def _keeps(mean: fx.Node) -> bool:
    if isinstance(mean.target, torch._ops.OpOverload):
        return bool(vocabulary.argument(mean, 3 if kind(mean) == "var" else 2, "keepdim", False))
    return bool(vocabulary.attributes(mean).get("keepdims", 1))


def _largest(scope: Scope, core: _Core, x: fx.Node) -> tuple[tuple[fx.Node, ...], _Affine] | str:
    """The largest region around the core that is a norm of `x`, with its scale and bias; or why there is none."""
    members = _grown(scope, core, x)
    reason = "what is done with the normalised value is not understood"
    for output in sorted(members, key=scope.order.__getitem__, reverse=True):
        closure = _closure(output, members)
        if core.root not in closure or not _same_type(scope, x, output):
            continue
        roles = _fitted(scope, core, x, closure, output)
        if roles is None:
            continue
        region = scope.region(closure, output)
        if isinstance(region, str):
            reason = region
            continue
        return region, roles
    return reason


def _grown(scope: Scope, core: _Core, x: fx.Node) -> set[fx.Node]:
    """What leads from `x` to the root, and all that depends on nothing but that, `x`, and constants."""
    members: set[fx.Node] = set()
    pending = [core.root]
    while pending:
        node = pending.pop()
        if node is not x and node not in members and node not in scope.constants:
            members.add(node)
            pending += scope.varying(node)
    frontier = {x, *members}
    while frontier and len(members) < _MOST_MEMBERS:
        users = {user for node in frontier for user in node.users if user not in members and user is not x}
        frontier = {user for user in users if _joins(scope, core, user, members, x)}
        members |= frontier
    return members


def _joins(scope: Scope, core: _Core, node: fx.Node, members: set[fx.Node], x: fx.Node) -> bool:
    operands = scope.varying(node)
    if not all(n in members or n is x for n in operands):
        return False
    if kind(node) == "mean":
        return _over_last(scope, node, core.x)
    if same_value(node):
        return True
    return kind(node) in _GROWING and any(n in members for n in operands)


def _closure(output: fx.Node, members: set[fx.Node]) -> set[fx.Node]:
    return vocabulary.ancestors([output], stop=lambda n: n not in members) & members


def _same_type(scope: Scope, x: fx.Node, output: fx.Node) -> bool:
    before, after = scope.shapes.dtype(x), scope.shapes.dtype(output)
    return before is None or after is None or before == after


def _fitted(scope: Scope, core: _Core, x: fx.Node, closure: Iterable[fx.Node], output: fx.Node) -> _Affine | None:
    """Scale and bias, if the region computes scale * normalised(x) + bias for any x and any such vectors."""
    nodes = sorted(closure, key=scope.order.__getitem__)
    constants = {n for node in nodes for n in node.all_input_nodes if n in scope.constants}
    vectors = [n for n in constants if scope.is_vector(n)]
    generator = torch.Generator().manual_seed(0)
    length = _ANY_LENGTH if not vectors else (scope.constant_shape(vectors[0]) or (0,))[-1]
    if any(not scope.is_vector(n, length) for n in vectors) or len(vectors) > 2:
        return None
    known = {n: torch.randn(length, generator=generator, dtype=torch.float64) for n in vectors}
    # Small and large rows, so that the epsilon counts in some and not in others.
    sizes = torch.tensor([max(core.epsilon, 1e-12) ** 0.5, 1.0, 3.0, 30.0], dtype=torch.float64)
    rows = (torch.randn(4, length, generator=generator, dtype=torch.float64) + 0.5) * sizes[:, None]
    # Axes may be counted from the front, so the rows need the rank of x.
    rank = len(scope.shape(x) or (0, 0))
    rows = rows.reshape(*(1,) * (rank - 2), 4, length)
    try:
        found = evaluate(scope, nodes, {x: rows, **known})[output]
    except ValueError:
        return None
    centred = rows - rows.mean(-1, keepdim=True) if core.form == "layer" else rows
    normal = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + core.epsilon)
    return _affine(normal, found, known)


def _affine(normal: torch.Tensor, found: torch.Tensor, known: dict[fx.Node, torch.Tensor]) -> _Affine | None:
    """Which of the known vectors (or 1 and 0) make `found` from `normal`."""
    if found.shape != normal.shape:
        return None
    for scale in (None, *known):
        for bias in (None, *known):
            scaled = normal if scale is None else normal * known[scale]
            shifted = scaled if bias is None else scaled + known[bias]
            if torch.allclose(shifted, found, rtol=1e-6, atol=1e-9):
                return scale, bias
    return None
