"""Dynamic sizes: how torch.export takes them, and what their symbols are called."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch.export import Dim
from torch.utils import _pytree as pytree

from graphopt.frontends.calling import Calling


def export_shapes(shapes: Any) -> Any:
    """Dynamic shapes as torch.export takes them: a string, which only names a size, becomes `Dim.DYNAMIC`."""
    if isinstance(shapes, str):
        return Dim.DYNAMIC
    if isinstance(shapes, Mapping):
        return {key: export_shapes(value) for key, value in shapes.items()}
    if isinstance(shapes, (list, tuple)):
        return type(shapes)(export_shapes(value) for value in shapes)
    return shapes


def complete_shapes(shapes: Any, signature: inspect.Signature, bound: Mapping[str, Any]) -> Any:
    """Dynamic shapes as torch.export wants them: with every argument, where the user names the dynamic ones.

    Args:
        shapes: what the user gave.
        signature: of `forward`.
        bound: the example's arguments by parameter.
    """
    if not isinstance(shapes, Mapping):
        return shapes
    complete = dict(shapes)
    for parameter in signature.parameters.values():
        # torch's own spelling of what falls into `**kwargs`: a dict under that name.
        if parameter.kind is parameter.VAR_KEYWORD and parameter.name not in bound:
            complete.update(complete.pop(parameter.name, None) or {})
    for name, value in bound.items():
        complete.setdefault(name, _static(value))
    return complete


def _static(value: Any) -> Any:
    """No dynamic size anywhere in `value`; torch.export takes a plain None only for a leaf."""
    if isinstance(value, Mapping):
        return {key: _static(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_static(inner) for inner in value] if isinstance(value, list) else tuple(map(_static, value))
    return None


def size_of(size: int | torch.SymInt, symbols: Mapping[Any, str]) -> int | str:
    """A static size, or an expression in the names of the dynamic ones."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    if expression.is_number:
        return int(expression)
    renamed = {symbol: sympy.Symbol(name, integer=True, positive=True) for symbol, name in symbols.items()}
    return str(expression.xreplace(renamed))


def symbol_names(
    module: fx.GraphModule, calling: Calling, args: Iterable[Any], kwargs: Mapping[str, Any], shapes: Any
) -> dict[Any, str]:
    """From the symbols in the graph's input shapes to the names that the user gave them."""
    if callable(getattr(shapes, "dynamic_shapes", None)):  # ShapesCollection and AdditionalInputs
        return {}
    bound = calling.signature.bind(*args, **kwargs).arguments
    if isinstance(shapes, (list, tuple)):
        shapes = dict(zip(bound, shapes, strict=False))
    declared: dict[int, Any] = {}
    _declared_sizes(dict(bound), shapes, declared)
    leaves = calling.in_spec.flatten_up_to((tuple(args), dict(kwargs)))
    varying = [leaf for leaf, name in zip(leaves, calling.inputs, strict=True) if name is not None]
    names: dict[Any, str] = {}
    for leaf, node in zip(varying, [n for n in module.graph.nodes if n.op == "placeholder"], strict=True):
        sizes = declared.get(id(leaf))
        for axis, size in sizes.items() if isinstance(sizes, Mapping) else enumerate(sizes or ()):
            name = size if isinstance(size, str) else getattr(size, "__name__", None)
            symbolic = node.meta["val"].shape[axis]
            if name and isinstance(symbolic, torch.SymInt) and symbolic.node.expr.is_Symbol:
                names.setdefault(symbolic.node.expr, name)
    return names


def dynamic_sizes(module: fx.GraphModule, calling: Calling) -> Any:
    """The sizes that are dynamic in a program whose user named none here; None if there are none."""
    values = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
    sizes = [
        {axis: Dim.AUTO for axis, size in enumerate(value.shape) if isinstance(size, torch.SymInt)}
        if isinstance(value, torch.Tensor)
        else None
        for value in values
    ]
    if not any(sizes):
        return None
    queue = iter(sizes)
    leaves = [None if name is None else next(queue) for name in calling.inputs]
    args, kwargs = calling.in_spec.unflatten(leaves)
    return dict(calling.signature.bind(*args, **kwargs).arguments)


def _declared_sizes(value: Any, shapes: Any, found: dict[int, Any]) -> None:
    """Collect what `shapes` declares for each tensor inside `value`, by the tensor's id."""
    if shapes is None:
        return
    if isinstance(value, torch.Tensor):
        found[id(value)] = shapes
        return
    if isinstance(value, Mapping) and isinstance(shapes, Mapping):
        for key in value.keys() & shapes.keys():
            _declared_sizes(value[key], shapes[key], found)
        return
    children = pytree.tree_flatten(value, is_leaf=lambda part: part is not value)[0]
    inner = list(shapes.values()) if isinstance(shapes, Mapping) else shapes
    if isinstance(inner, (list, tuple)) and children != [value]:
        for child, part in zip(children, inner, strict=False):
            _declared_sizes(child, part, found)
