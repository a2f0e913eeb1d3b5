"""The table of rewrites: pattern, replacement, and why the two have the same bits for every input.

"Every input" includes NaN (its payload aside), infinities, -0, subnormals, and tensors without elements. An identity of
real numbers that is none of floating-point numbers is no rule here: x + 0 (turns -0 into 0), x * 0, x - x, x / x, any
reassociation, folding a normalisation into a convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from . import algebra, aten, layout, shape_rules
from .operators import operation
from .workspace import Workspace


@dataclass(frozen=True)
class Rule:
    """One rewrite of one node."""

    name: str
    operators: tuple[str, ...]
    """The operators of the node that the rule looks at (see `operators.operation`)."""
    pattern: str
    replacement: str
    identity: str
    """Why the replacement is exact."""
    apply: Callable[[Workspace, fx.Node], fx.Node | None]
    """The replacement (an earlier value, or a node made with the workspace), or None where the rule does not fit."""
    every_output: bool = False
    """The rule is shown the `getitem` nodes of operators with several outputs too."""


_RESHAPES = tuple(sorted(layout.RESHAPES))

RULES: tuple[Rule, ...] = (
    Rule("identity", ("Identity", "aten.alias.default"), "Identity(x)", "x",
         "it returns its operand", layout.keep_operand),
    Rule("dropout", ("Dropout",), "Dropout(x), not in training or with ratio 0", "x",
         "the standard defines the output as the input", layout.dropout, every_output=True),
    Rule("single-operand", ("Concat", "Sum", "Mean", "Max", "Min"), "Concat(x), Sum(x), Mean(x), Max(x), Min(x)", "x",
         "nothing to join, add or compare; the mean divides by 1", layout.only_operand),
    Rule("unbounded-clip", ("Clip",), "Clip(x) without limits", "x",
         "no element is beyond a limit that is not there; NaN passes", algebra.unbounded_clip),
    # Types.
    Rule("cast-same-type", ("Cast", "CastLike"), "Cast(x: T, to=T)", "x",
         "a conversion to the same type keeps every bit; float8 is left out, as its cast saturates",
         layout.same_type),
    Rule("cast-cast", ("Cast",), "Cast(Cast(x: A, to=B), to=C), B holds all values of A", "Cast(x, to=C); x if C is A",
         "the inner cast changes no value (and keeps -0, infinities, NaN), so the outer one rounds the same number; "
         "only among floats or among integers, as float to integer is undefined out of range", layout.cast_of_cast),
    # Layout: elements are moved, never computed.
    Rule("no-reshape", (*_RESHAPES, "Expand", "Split"),
         "Reshape, Flatten, Squeeze, Unsqueeze, Expand, Split of x to shape(x)", "x",
         "elements stay in row-major order, and the shape is the same for all inputs", layout.no_reshape),
    Rule("reshape-round-trip", _RESHAPES, "reshapes of x that end in shape(x)", "x",
         "each keeps the elements in row-major order", layout.round_trip),
    Rule("squeeze-unsqueeze", ("Squeeze", "Unsqueeze"),
         "Squeeze(Unsqueeze(x, axes), axes), and the other way round", "x",
         "axes of size one are inserted and removed at the same places", layout.squeeze_of_unsqueeze),
    Rule("reshape-reshape", ("Reshape",), "Reshape(reshape(x), s), s constant and copying no size", "Reshape(x, s)",
         "the result's shape depends on s and the number of elements alone", layout.reshape_of_reshape),
    Rule("no-transpose", ("Transpose",), "Transpose(x, identity)", "x",
         "every axis stays in place", layout.no_transpose),
    Rule("transpose-transpose", ("Transpose",), "Transpose(Transpose(x, p), q)", "Transpose(x, p[q]), or x",
         "permutations compose", layout.transpose_of_transpose),
    Rule("no-tile", ("Tile",), "Tile(x, ones)", "x", "each axis is repeated once", layout.no_tile),
    Rule("no-pad", ("Pad",), "Pad(x, zeros)", "x", "nothing is added in any mode", layout.no_pad),
    Rule("no-slice", ("Slice",), "Slice(x) with step 1 to shape(x)", "x",
         "a contiguous range as long as its axis is the axis", layout.no_slice),
    Rule("slice-concat", ("Slice",), "Slice(Concat(a, b, ...)) within b", "b, or Slice(b)",
         "the same elements, counted from where b begins", layout.slice_of_concat),
    # Arithmetic with constants; the constant must not broadcast x to another shape.
    Rule("times-one", ("Mul",), "x * 1", "x",
         "IEEE 754: the exact product is x itself, also for -0, infinities, NaN", algebra.neutral(algebra.all_ones)),
    Rule("divided-by-one", ("Div",), "x / 1", "x",
         "IEEE 754: the exact quotient is x itself", algebra.neutral(algebra.all_ones, right_only=True)),
    Rule("plus-zero", ("Add",), "x + 0 for integers, x + (-0) for floats", "x",
         "-0 is neutral when rounding to nearest; +0 is not: -0 + 0 = 0", algebra.neutral(algebra.neutral_for_sum)),
    Rule("minus-zero", ("Sub",), "x - 0", "x",
         "x - 0 = x + (-0), and -0 is neutral; x - (-0) is not a match",
         algebra.neutral(algebra.all_zero, right_only=True)),
    Rule("and-true", ("And",), "x and true", "x", "Boolean algebra", algebra.neutral(algebra.all_true)),
    Rule("or-false", ("Or", "Xor"), "x or false, x xor false", "x",
         "Boolean algebra", algebra.neutral(algebra.all_false)),
    Rule("involution", ("Neg", "Not"), "-(-x), not not x", "x",
         "the sign bit is flipped twice; integers wrap twice; Boolean algebra", algebra.involution),
    Rule("idempotent", ("Abs", "Floor", "Ceil", "Round"), "f(f(x))", "f(x)",
         "results of Abs have no sign; results of the others are integers (-0 among them), infinite or NaN: "
         "fixed points", algebra.idempotent),
    Rule("where-constant", ("Where",), "Where(true, x, y), Where(false, y, x), Where(c, x, x)", "x",
         "selection copies bits; x has the result's shape already", algebra.decided_where),
    Rule("if-constant", ("If",), "If(constant)", "the nodes of the branch",
         "the branch that runs is known", algebra.decided_if, every_output=True),
    # Shape arithmetic: integers only.
    Rule("shape-of-same", ("Shape", "Size"), "Shape(f(x)) where f keeps the shape", "Shape(x)",
         "the two shapes are equal for all inputs", shape_rules.shape_of_same),
    Rule("constant-target", ("Reshape",), "Reshape(x, computed), all but one size known or a size of x",
         "Reshape(x, constant)", "0 copies the size whatever it is, also 0; -1 is what the number of elements leaves, "
         "and stands beside no size that could be 0", shape_rules.constant_target),
    # ATen: the same identities; strides stay as they are, since a later view may need them.
    Rule("dropout", ("aten.dropout.default", "aten.feature_dropout.default", "aten.alpha_dropout.default"),
         "dropout(x, p, train=False)", "x", "nothing is dropped and nothing scaled", aten.idle_dropout),
    Rule("no-reshape",
         ("aten.view.default", "aten.expand.default", "aten._unsafe_view.default", "aten.reshape.default"),
         "view(x, shape(x))", "x", "the same elements in the same order", aten.same_view),
    Rule("cast-same-type",
         ("aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten._to_copy.default", "aten.type_as.default"),
         "x.to(x.dtype)", "x", "a conversion to the same type keeps every bit", aten.same_conversion),
    Rule("no-transpose", ("aten.permute.default",), "permute(x, identity)", "x",
         "every axis stays in place", aten.same_order),
    Rule("transpose-transpose", ("aten.transpose.int",), "transpose(transpose(x, i, j), i, j)", "x",
         "an exchange undoes itself", aten.swap_of_swap),
    Rule("no-slice", ("aten.slice.Tensor",), "x[:]", "x", "the whole axis", aten.whole_slice),
    Rule("times-one", ("aten.mul.Tensor", "aten.mul.Scalar"), "x * 1", "x",
         "IEEE 754: the exact product is x itself", aten.times_one),
    Rule("divided-by-one", ("aten.div.Tensor", "aten.div.Scalar"), "x / 1 for floats", "x",
         "IEEE 754: the exact quotient is x itself", aten.times_one),
    Rule("minus-zero", ("aten.sub.Tensor", "aten.sub.Scalar"), "x - 0", "x",
         "-0 is neutral when rounding to nearest", aten.minus_zero),
    Rule("plus-zero", ("aten.add.Tensor", "aten.add.Scalar"), "x + 0 for integers", "x",
         "integers have one zero", aten.plus_zero),
)  # fmt: skip

WHOLE_GRAPH = ("fold", "cse", "shape-cse", "merge-weights", "dead-node")
"""Rewrites that are no rule about one node: see `folding`, `cse` and `sweep`."""


def names() -> tuple[str, ...]:
    """All that the options `rules` and `skip` may name."""
    return tuple(dict.fromkeys((*(rule.name for rule in RULES), *WHOLE_GRAPH)))


def by_operator(chosen: Sequence[str]) -> dict[str, list[Rule]]:
    """The chosen rules, in the order of the table, under each operator that they look at."""
    table: dict[str, list[Rule]] = {}
    for rule in RULES:
        if rule.name in chosen:
            for name in rule.operators:
                table.setdefault(name, []).append(rule)
    return table


def matching(table: dict[str, list[Rule]], node: fx.Node) -> Sequence[Rule]:
    """The rules that look at this node."""
    name = operation(node)
    if name == "getitem":
        call = node.args[0]
        found = table.get(operation(call), ()) if isinstance(call, fx.Node) else ()
        return [rule for rule in found if rule.every_output]
    rules = table.get(name, ())
    if rules and any(operation(user) == "getitem" for user in node.users):
        return ()  # its value is a tuple
    return rules
