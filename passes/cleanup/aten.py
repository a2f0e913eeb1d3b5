"""Rules for graphs of ATen operators, which torch.export makes of an nn.Module."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import fx

from .layout import same_shape, source
from .workspace import Workspace


def _argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _same(w: Workspace, node: fx.Node) -> bool:
    given = source(node)
    return same_shape(w, node, given) and w.fact(given).dtype == w.fact(node).dtype is not None


def _contiguous(node: fx.Node) -> bool:
    """Strides decide whether a later `view` is possible, so they have to stay as they are."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_contiguous()


def idle_dropout(w: Workspace, node: fx.Node) -> fx.Node | None:
    """Dropout outside of training."""
    return source(node) if _argument(node, 2, "train") is False else None


def same_view(w: Workspace, node: fx.Node) -> fx.Node | None:
    """A view of the same shape has the same strides."""
    return source(node) if _same(w, node) else None


def same_conversion(w: Workspace, node: fx.Node) -> fx.Node | None:
    """A conversion to the type, device and strides that the value has already."""
    given, found = source(node).meta.get("val"), node.meta.get("val")
    if not isinstance(given, torch.Tensor) or not isinstance(found, torch.Tensor):
        return None
    alike = given.device == found.device and given.stride() == found.stride()
    return source(node) if alike and _same(w, node) else None


def same_order(w: Workspace, node: fx.Node) -> fx.Node | None:
    """A permutation that leaves every axis in place."""
    given = w.shape(source(node))
    if given is None:
        return None
    order = [int(a) % max(len(given), 1) for a in _argument(node, 1, "dims")]
    return source(node) if order == sorted(order) else None


def swap_of_swap(w: Workspace, node: fx.Node) -> fx.Node | None:
    """Exchanging the same two axes twice."""
    inner = source(node)
    if inner.target is not node.target:
        return None
    shape = w.shape(source(inner))
    if shape is None:
        return None
    pairs = [{int(_argument(n, i, f"dim{i - 1}")) % len(shape) for i in (1, 2)} for n in (node, inner)]
    return source(inner) if pairs[0] == pairs[1] else None


def whole_slice(w: Workspace, node: fx.Node) -> fx.Node | None:
    """All of an axis."""
    start, end = _argument(node, 2, "start"), _argument(node, 3, "end")
    to_the_end = end is None or (isinstance(end, int) and end >= sys.maxsize)
    whole = start in (None, 0) and to_the_end and _argument(node, 4, "step", 1) == 1
    return source(node) if whole and _same(w, node) else None


def _scalar(node: fx.Node) -> float | None:
    value = node.args[1] if len(node.args) == 2 and not node.kwargs else None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _kept(w: Workspace, node: fx.Node) -> fx.Node | None:
    return source(node) if _same(w, node) and _contiguous(node) and _contiguous(source(node)) else None


def times_one(w: Workspace, node: fx.Node) -> fx.Node | None:
    """Multiplied or divided by the Python number 1."""
    return _kept(w, node) if _scalar(node) == 1 else None


def minus_zero(w: Workspace, node: fx.Node) -> fx.Node | None:
    """The Python number 0 subtracted."""
    number = _scalar(node)
    return _kept(w, node) if number == 0 and math.copysign(1, number) > 0 else None


def plus_zero(w: Workspace, node: fx.Node) -> fx.Node | None:
    """The Python number 0 added to integers."""
    dtype = w.fact(node).dtype
    integral = dtype is not None and not dtype.is_floating_point and not dtype.is_complex
    return _kept(w, node) if _scalar(node) == 0 and integral else None
