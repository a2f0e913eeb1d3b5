"""Rules about arithmetic and logic with constants, and about operators that undo or repeat themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from graphopt.rewrite.inlining import take_name
from graphopt.subgraphs import SubgraphOperator

from .dims import broadcast
from .layout import producer, source
from .operators import operation
from .workspace import Workspace

Test = Callable[[torch.Tensor], bool]


def keeps_shape(w: Workspace, kept: fx.Node, *others: fx.Node) -> bool:
    """Whether broadcasting `kept` against the others leaves its shape as it is."""
    shapes = [w.shape(n) for n in others]
    if all(s == () for s in shapes):
        return True
    shape = w.shape(kept)
    if shape is None:
        return False
    # The symbol of an undecided axis equals nothing, so that a size which might change counts as changed.
    undecided = object()
    return broadcast([shape, *shapes], lambda axis: undecided) == shape


def all_ones(value: torch.Tensor) -> bool:
    """1 in every element."""
    return bool((value == 1).all())


def all_zero(value: torch.Tensor) -> bool:
    """0 in every element, none of them -0."""
    return bool((value == 0).all()) and not _signed(value).any()


def neutral_for_sum(value: torch.Tensor) -> bool:
    """-0 in every element, or the integer 0: adding +0 would turn -0 into +0."""
    if value.is_floating_point():
        return bool((value == 0).all()) and bool(_signed(value).all())
    return bool((value == 0).all())


def all_true(value: torch.Tensor) -> bool:
    """True in every element."""
    return value.dtype == torch.bool and bool(value.all())


def all_false(value: torch.Tensor) -> bool:
    """False in every element."""
    return value.dtype == torch.bool and not bool(value.any())


def _signed(value: torch.Tensor) -> torch.Tensor:
    return torch.signbit(value) if value.is_floating_point() else torch.zeros_like(value, dtype=torch.bool)


def neutral(test: Test, *, right_only: bool = False) -> Callable[[Workspace, fx.Node], fx.Node | None]:
    """The rule for a binary operator with a constant operand that changes nothing."""

    def rule(w: Workspace, node: fx.Node) -> fx.Node | None:
        if len(node.args) != 2 or w.view(node).since < 7:
            return None
        for kept, given in (node.args, node.args[::-1])[: 1 if right_only else 2]:
            assert isinstance(kept, fx.Node)
            assert isinstance(given, fx.Node)
            value = w.constant(given)
            if value is None or value.is_complex() or value.numel() == 0 or not test(value):
                continue
            if keeps_shape(w, kept, given) and w.fact(kept).dtype in (None, value.dtype):
                return kept
        return None

    return rule


def involution(w: Workspace, node: fx.Node) -> fx.Node | None:
    """An operator that undoes itself."""
    inner = producer(node, operation(node))
    return None if inner is None else source(inner)


def idempotent(w: Workspace, node: fx.Node) -> fx.Node | None:
    """An operator whose results it maps to themselves."""
    return producer(node, operation(node))


def unbounded_clip(w: Workspace, node: fx.Node) -> fx.Node | None:
    """Clip without limits; before opset 11 the limits have defaults, and infinities are clipped to those."""
    view = w.view(node)
    return None if view.since < 11 or view.has(1) or view.has(2) else source(node)


def decided_where(w: Workspace, node: fx.Node) -> fx.Node | None:
    """Where with a condition that is the same everywhere, or with equal branches."""
    condition, yes, no = node.args
    assert isinstance(condition, fx.Node)
    assert isinstance(yes, fx.Node)
    assert isinstance(no, fx.Node)
    if yes is no:
        return yes if keeps_shape(w, yes, condition) else None
    value = w.constant(condition)
    if value is None or value.numel() == 0:
        return None
    if all_true(value):
        return yes if keeps_shape(w, yes, condition, no) else None
    return no if all_false(value) and keeps_shape(w, no, condition, yes) else None


def decided_if(w: Workspace, node: fx.Node) -> fx.Node | None:
    """If with a constant condition: the nodes of the branch that runs."""
    call, index = (source(node), int(node.args[1])) if operation(node) == "getitem" else (node, 0)  # type: ignore[arg-type]  # an index
    operator, condition = w.module.get_submodule(str(call.target)), w.constant(call.args[0])
    if not isinstance(operator, SubgraphOperator) or condition is None or condition.numel() != 1 or w.may_act(call):
        return None
    branch = operator.bodies["then_branch" if bool(condition) else "else_branch"]
    outer = dict(zip(operator.captured, call.args[len(operator.proto.input) :], strict=True))
    taken = w.inlined(call, branch, [outer[spec.name] for spec in branch.inputs])[index]
    if w.made_by_inlining(taken):
        take_name(node, taken)
    return taken
