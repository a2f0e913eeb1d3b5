"""Rules about shape arithmetic: integers that exporters compute from Shape although less would do."""

from __future__ import annotations

from torch import fx

from .dims import equal
from .layout import same_shape, source
from .workspace import Workspace


def shape_of_same(w: Workspace, node: fx.Node) -> fx.Node | None:
    """Shape, or Size, of the earliest value of that shape: the later one need not be computed for it."""
    start = value = source(node)
    while (earlier := next((a for a in value.all_input_nodes if same_shape(w, a, value)), None)) is not None:
        value = earlier
    return None if value is start else w.again(node, (value,))


def constant_target(w: Workspace, node: fx.Node) -> fx.Node | None:
    """A computed target of a Reshape as a constant: 0 copies a size of the operand, -1 is what remains."""
    view = w.view(node)
    sizes, given = view.elements(1), view.shape(0)
    if view.since < 5 or sizes is None or view.argument(1).value is not None:
        return None
    literal = bool(view.attribute("allowzero", 0))
    target: list[int] = []
    open_sizes = 0
    copied = False
    for axis, size in enumerate(sizes):
        if isinstance(size, int):
            target.append(size)
            copied |= size == 0
        elif given is not None and axis < len(given) and not literal and equal(size, given[axis]):
            target.append(0)
            copied = True
        else:
            target.append(-1)
            open_sizes += 1
    # Beside a copied size, which may be 0 when the model runs, a new -1 would have no definite value.
    if open_sizes and (copied or target.count(-1) > 1):
        return None
    return w.again(node, (source(node), w.integers(node, target), *node.args[2:]))
