"""An nn.Module as a Graph: torch.export, with the module's own weights under their own names."""

from __future__ import annotations

import functools
import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphopt.errors import GraphOptError
from graphopt.frontends.calling import Calling, output_names, signature_of
from graphopt.frontends.regions import inline_regions, put_constant
from graphopt.frontends.sizes import complete_shapes, dynamic_sizes, export_shapes, size_of, symbol_names
from graphopt.graph import Graph, TorchSource, ValueSpec
from graphopt.onnxfile.tensors import from_numpy

_TRAINING_NOTE = "the module was in training mode: dropout and batch statistics stay active in the graph"
_ASSERT_METADATA = torch.ops.aten._assert_tensor_metadata.default
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
_LIFT = torch.ops.aten.lift_fresh_copy.default
_NUMBERS = {torch.SymInt: "int", torch.SymFloat: "float", torch.SymBool: "bool"}


@dataclass(frozen=True)
class ModuleSource(TorchSource):
    """What it takes to turn the graph back into a module that is called like the original."""

    calling: Calling = field(kw_only=True)
    names: frozenset[str] = frozenset()
    """All parameters, buffers and constants that the graph started with."""
    transient: frozenset[str] = frozenset()
    """Those of them that are not in the module's state_dict."""
    tied: tuple[tuple[str, ...], ...] = ()
    """Groups of names that share one parameter."""
    symbols: Mapping[str, str] = field(default_factory=dict)
    """From the symbols in the graph's shapes to the names that the user gave them."""


def load_torch(
    source: torch.nn.Module | ExportedProgram,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None,
    dynamic_shapes: Any = None,
) -> Graph:
    """Make a Graph of a module; the weights are the module's own tensors.

    The graph holds ATen operators. Inputs that are no tensors (None, flags) keep their example values.

    Args:
        source: an nn.Module, usually in eval mode, or an ExportedProgram.
        example_inputs: positional arguments as a tuple, or keyword arguments as a mapping; an ExportedProgram
            has its own.
        dynamic_shapes: as for `torch.export.export`; a plain string names a dynamic size too.

    Raises:
        GraphOptError: the module cannot be exported with these inputs.
    """
    if isinstance(source, ExportedProgram):
        program, shapes = source, dynamic_shapes
        args, kwargs = program.example_inputs or ((), {})
        signature = _program_signature(program)
        state: Mapping[str, Any] = program.state_dict
        class_name, training = "ExportedProgram", False
    else:
        source = getattr(source, "_orig_mod", source)  # torch.compile's wrapper
        args, kwargs = _split(example_inputs)
        signature = signature_of(source.forward, kwargs)
        shapes = complete_shapes(dynamic_shapes, signature, _bind(signature, args, kwargs))
        program = _export(source, signature, args, kwargs, export_shapes(shapes))
        state = source.state_dict(keep_vars=True)
        class_name, training = type(source).__name__, any(part.training for part in source.modules())
    module, calling = _unlift(program, signature, class_name)
    module.train(training)
    symbols = symbol_names(module, calling, args, kwargs, shapes)
    names = frozenset(str(n.target) for n in module.graph.nodes if n.op == "get_attr")
    source_info = ModuleSource(
        tuple(args),
        dict(kwargs),
        shapes if shapes is not None else dynamic_sizes(module, calling),
        class_name,
        calling=calling,
        names=names,
        transient=names - state.keys(),
        tied=_tied(state),
        symbols={str(symbol): name for symbol, name in symbols.items()},
    )
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    inputs = tuple(_spec(str(n.target), n, symbols) for n in placeholders)
    results = next(n for n in module.graph.nodes if n.op == "output").args[0]
    kept = [n for i, n in enumerate(output_names(calling.out_spec)) if i not in calling.fixed_outputs]
    outputs = tuple(_spec(name, node, symbols) for name, node in zip(kept, results, strict=True))
    return Graph(module, inputs, outputs, source_info, (_TRAINING_NOTE,) if training else ())


def _split(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments, ready for tracing."""
    if not isinstance(example_inputs, (tuple, list, Mapping)):
        found = "none" if example_inputs is None else type(example_inputs).__name__
        raise GraphOptError(
            "expected example_inputs to trace the module with, as a tuple of positional or a dict of keyword "
            f"arguments, got {found}; for one tensor x pass (x,)"
        )
    seen: set[int] = set()

    def distinct(leaf: Any) -> Any:
        """Tracing knows tensors by identity: one that is passed twice would become one input, silently."""
        leaf = from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf
        if isinstance(leaf, torch.Tensor) and id(leaf) in seen:
            leaf = leaf.clone()
        seen.add(id(leaf))
        return leaf

    _register_caches()
    if isinstance(example_inputs, Mapping):
        return (), pytree.tree_map(distinct, dict(example_inputs))
    return pytree.tree_map(distinct, tuple(example_inputs)), {}


def _bind(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Any]:
    try:
        return signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise GraphOptError(f"expected example_inputs that fit forward{signature}, but {error}") from error


def _register_caches() -> None:
    """Let the key-value caches of transformers pass as inputs and outputs, if that library is in use."""
    if "transformers.cache_utils" not in sys.modules:
        return
    try:
        from transformers.integrations.executorch import register_dynamic_cache_export_support
    except ImportError:  # an older or newer release: a cache is then refused by torch.export, with its reason
        return
    register: Any = register_dynamic_cache_export_support
    register()


def _export(
    module: torch.nn.Module,
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shapes: Any,
) -> ExportedProgram:
    reasons = []
    for strict in (False, True):
        try:
            with _called_as(module, signature):
                return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=strict)
        except Exception as error:  # tracing runs the module's own code, which may raise anything
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
            reasons.append(f"{type(error).__name__}: {textwrap.shorten(first, 240)}")
            cause = error
    second = "the same" if reasons[0] == reasons[1] else reasons[1]
    advice = "; set config.use_cache = False" if "cache_utils" in reasons[0] else ""
    raise GraphOptError(
        f"torch.export could not trace {type(module).__name__}: {reasons[0]} (in strict mode: {second}){advice}"
    ) from cause


@contextmanager
def _called_as(module: torch.nn.Module, signature: inspect.Signature) -> Iterator[None]:
    """Let `forward` show `signature`: torch.export (to 2.13) fails on dynamic shapes beside `**kwargs`."""
    if signature == signature_of(module.forward):
        yield
        return
    own, forward = vars(module).get("forward"), module.forward

    @functools.wraps(forward)
    def spelled_out(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    spelled_out.__signature__ = signature  # type: ignore[attr-defined]  # inspect reads it, typeshed lacks it
    vars(module)["forward"] = spelled_out
    try:
        yield
    finally:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own


def _unlift(program: ExportedProgram, signature: inspect.Signature, class_name: str) -> tuple[fx.GraphModule, Calling]:
    """The program as a flat graph that reads weights by name, and how the module around it is called."""
    guarded = "check_guards" in inspect.signature(program.module).parameters
    stateful: Any = program.module(check_guards=False) if guarded else program.module()
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    returned: Any = graph.graph_copy(stateful.graph, mapping)
    flat = list(returned) if isinstance(returned, (list, tuple)) else [returned]
    results = tuple(value for value in flat if isinstance(value, fx.Node))
    if not results:
        raise GraphOptError(f"expected {class_name} to return tensors, but it returns none; return what it computes")
    graph.output(results)
    module = fx.GraphModule(stateful, graph, class_name=class_name)
    inline_regions(module)
    _clean(graph)
    names, fixed = _fix_constants(module, program)
    module.recompile()
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    assert in_spec is not None
    assert out_spec is not None
    fixed_outputs = {i: value for i, value in enumerate(flat) if not isinstance(value, fx.Node)}
    return module, Calling(signature, in_spec, out_spec, names, fixed, fixed_outputs)


def _clean(graph: fx.Graph) -> None:
    """Drop what tracing left behind and no pass should have to know."""
    for node in reversed(list(graph.nodes)):
        node.meta.pop("from_node", None)
        # Guards; and type and device assertions, which would only forbid `.half()` and `.to(device)`.
        if node.target in ("_guards_fn", _ASSERT_METADATA):
            graph.erase_node(node)
        # A view insists on the strides that its input happened to have; a rewritten input may have others. Where the
        # strides allow it, a reshape is the same view.
        if node.target in _VIEWS:
            node.target = torch.ops.aten.reshape.default
        # `torch.tensor(...)` in the model: a constant has no gradient to be detached from.
        if node.target is torch.ops.aten.detach_.default and node.args[0].target is _LIFT:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _fix_constants(module: fx.GraphModule, program: ExportedProgram) -> tuple[tuple[str | None, ...], dict[int, Any]]:
    """Erase the placeholders of values that cannot vary: the names of the others, and the erased values."""
    names: list[str | None] = []
    fixed: dict[int, Any] = {}
    for index, node in enumerate([n for n in module.graph.nodes if n.op == "placeholder"]):
        value = node.meta.get("val")
        if isinstance(value, (torch.Tensor, *_NUMBERS)):
            names.append(str(node.target))
            continue
        for user in list(node.users):
            put_constant(user, node, value)
        module.graph.erase_node(node)
        names.append(None)
        fixed[index] = value
    return tuple(names), fixed


def _program_signature(program: ExportedProgram) -> inspect.Signature:
    """All that an ExportedProgram remembers of `forward` is the names of its arguments."""
    call = program.module_call_graph[0].signature
    spec = program.call_spec.in_spec
    assert spec is not None
    positional, keywords = spec.children()
    names = list((call.forward_arg_names if call else None) or ())
    if len(names) != positional.num_children + keywords.num_children:
        names = [f"arg_{i}" for i in range(positional.num_children)] + list(keywords.context)
    return inspect.Signature([inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names])


def _tied(state: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    groups: dict[int, list[str]] = {}
    for name, value in state.items():
        if isinstance(value, torch.nn.Parameter):
            groups.setdefault(id(value), []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _spec(name: str, node: Any, symbols: Mapping[Any, str]) -> ValueSpec:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ValueSpec(name, _NUMBERS.get(type(value)), ())
    return ValueSpec(name, value.dtype, tuple(size_of(size, symbols) for size in value.shape))
