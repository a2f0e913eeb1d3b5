"""How a module is called: from its arguments to flat tensors, and from flat results to what it returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphopt.errors import GraphOptError
from graphopt.graph import ValueSpec, check_value

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_NUMBERS = (bool, int, float, torch.SymBool, torch.SymInt, torch.SymFloat)


@dataclass(frozen=True, eq=False)
class Calling:
    """The calling convention of an exported module.

    An exported graph keeps only the values that can vary. The others (None, flags, strings) are part of it: a
    call has to repeat them, or leave them out where the module has the same default.
    """

    signature: inspect.Signature
    """Of `forward`, without `self` and without annotations."""
    in_spec: pytree.TreeSpec
    """The structure of `(args, kwargs)` in the example."""
    out_spec: pytree.TreeSpec
    inputs: tuple[str | None, ...]
    """For each leaf of `in_spec` the name of its graph input, or None where it is fixed."""
    fixed_inputs: Mapping[int, Any]
    fixed_outputs: Mapping[int, Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> Calling:
        return self  # immutable

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], specs: Sequence[ValueSpec]) -> list[Any]:
        """The values of the graph's inputs in a call.

        Args:
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
            specs: the graph's inputs, in order.

        Raises:
            GraphOptError: the call differs from the exported one in more than values and dynamic sizes.
        """
        try:
            leaves = self.in_spec.flatten_up_to(self._as_exported(args, kwargs))
        except ValueError as error:
            raise GraphOptError(f"expected arguments nested as in the example inputs, but: {error}") from error
        for index, expected in self.fixed_inputs.items():
            _check_fixed(self._leaf_name(index), expected, leaves[index])
        varying = [leaf for index, leaf in enumerate(leaves) if index not in self.fixed_inputs]
        for spec, value in zip(specs, varying, strict=True):
            if not isinstance(value, (torch.Tensor, *_NUMBERS)):
                raise GraphOptError(f"expected a tensor for input {spec}, but got {_short(value)}")
            # Only sizes: `.half()` on the module changes the types that it takes.
            check_value(replace(spec, dtype=None), value)
        return varying

    def unflatten(self, results: Iterable[Any]) -> Any:
        """What the module returns, made of the values of the graph's outputs."""
        values = iter(results)
        leaves = [
            self.fixed_outputs[index] if index in self.fixed_outputs else next(values)
            for index in range(self.out_spec.num_leaves)
        ]
        return self.out_spec.unflatten(leaves)

    def _as_exported(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The same call with the split into positional and keyword arguments that the example had."""
        positional, keywords = self.in_spec.children()
        names: list[str] = list(keywords.context)
        if len(args) == positional.num_children and kwargs.keys() == set(names):
            return args, {name: kwargs[name] for name in names}
        parameters = self.signature.parameters
        order = [name for name, parameter in parameters.items() if parameter.kind in _POSITIONAL]
        wanted = [*order[: positional.num_children], *names]
        if len(args) > len(order) or positional.num_children > len(order):
            raise GraphOptError(f"expected {positional.num_children} positional arguments, got {len(args)}")
        given = dict(zip(order, args, strict=False))
        for name, value in kwargs.items():
            if name in given:
                raise GraphOptError(f"argument {name!r} was given twice, by position and by name")
            given[name] = value
        defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
        # What falls into `**kwargs` has no default that could be looked up; None asks for it all the same.
        anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for name, value in given.items():
            known = name in parameters or anything
            if name not in wanted and not (known and _same(value, defaults.get(name))):
                raise GraphOptError(
                    f"argument {name!r} was not among the example inputs, so the graph has no input for it; "
                    f"export with it, or call with {', '.join(wanted)}"
                )
        missing = [name for name in wanted if name not in given and name not in defaults]
        if missing:
            raise GraphOptError(f"expected a value for {', '.join(map(repr, missing))}, but none was given")
        complete = {name: given.get(name, defaults.get(name)) for name in wanted}
        return (
            tuple(complete[name] for name in wanted[: positional.num_children]),
            {name: complete[name] for name in names},
        )

    def _leaf_name(self, index: int) -> str:
        tree = self.in_spec.unflatten(range(self.in_spec.num_leaves))
        for name, value in _named(tree, self.signature):
            if index in pytree.tree_leaves(value):
                return name
        return f"input {index}"


def signature_of(function: Callable[..., Any], keywords: Iterable[str] = ()) -> inspect.Signature:
    """The signature without annotations, which may refer to names that only its module knows.

    Args:
        function: what is called.
        keywords: names used in a call; those that fall into `**kwargs` become parameters of their own.
    """
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
        extra = [name for name in keywords if name not in signature.parameters]
        parameters[-1:-1] = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra]
    return inspect.Signature(parameters)


def output_names(spec: pytree.TreeSpec) -> list[str]:
    """A name for each leaf of an output structure: the path of keys to it.

    `logits`, `hidden_states_3`; what has no key of its own starts with `output_`.
    """
    names: list[str] = []
    for path in _paths(spec):
        words = [str(word) for word in path] or ["0"]
        name = "_".join(words)
        name = "".join(c if c.isalnum() else "_" for c in name)
        name = f"output_{name}" if name[:1].isdigit() else name
        unique, count = name, 0
        while unique in names:
            count += 1
            unique = f"{name}_{count}"
        names.append(unique)
    return names


def _paths(spec: pytree.TreeSpec) -> list[tuple[Any, ...]]:
    if spec.is_leaf():
        return [()]
    return [(key, *rest) for key, child in zip(_keys(spec), spec.children(), strict=True) for rest in _paths(child)]


def _keys(spec: pytree.TreeSpec) -> Sequence[Any]:
    """The keys of a structure's children; most types keep them in the context, each in its own way."""
    context, count = spec.context, spec.num_children
    candidates = [context, *context] if isinstance(context, (list, tuple)) else [context]
    candidates.append(getattr(context, "_fields", None))  # a named tuple's context is its type
    for keys in candidates:
        if isinstance(keys, (list, tuple)) and len(keys) == count and all(isinstance(k, (str, int)) for k in keys):
            return keys
    return range(count)


def _named(tree: tuple[tuple[Any, ...], dict[str, Any]], signature: inspect.Signature) -> list[tuple[str, Any]]:
    args, kwargs = tree
    names = [name for name, p in signature.parameters.items() if p.kind in _POSITIONAL]
    names += [f"args_{i}" for i in range(len(args) - len(names))]
    return [*zip(names, args, strict=False), *kwargs.items()]


def _check_fixed(name: str, expected: Any, value: Any) -> None:
    if not _same(expected, value):
        raise GraphOptError(
            f"the model was exported with {name}={_short(expected)}, but got {_short(value)}; "
            "export it again with example inputs of that kind"
        )


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    return type(a) is type(b) and not isinstance(a, torch.Tensor) and bool(a == b)


def _short(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:80]
