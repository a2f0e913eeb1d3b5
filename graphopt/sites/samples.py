"""Valid random inputs made from a model's own input specification, and running parts of the model on them."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from graphopt.dialect.control import MADE_UP_TRIPS, at_most
from graphopt.errors import GraphOptError
from graphopt.execute import GraphInterpreter
from graphopt.graph import Dim, Graph, TorchSource, ValueSpec
from graphopt.sites import vocabulary

Pattern = Literal["random", "ones", "right", "left", "zeros", "lengths"]
"""What integer inputs hold: 0 and 1 at random, ones, ones then zeros, zeros then ones, zeros; with `lengths`,
inputs of at most one number per sample hold any number up to the longest axis, and others ones."""

# Small and distinct, so that axes can be told apart by their sizes. No size is 1: such axes broadcast.
_BATCHES = (2, 3)
_LENGTHS = ((5, 7, 11, 13, 17, 19), (6, 9, 10, 14, 15, 21))
_KEPT_ELEMENTS = 64
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def sample_inputs(
    graph: Graph, seed: int = 0, sizes: Mapping[str, int] | None = None, pattern: Pattern = "random"
) -> list[Any]:
    """One valid random value per input, in order.

    Args:
        graph: the model.
        seed: of the random generator.
        sizes: sizes of symbolic dims by name (see `size_choices`); others get small distinct ones.
        pattern: what integer inputs hold; every row of a random 2-D input holds a 1.

    Raises:
        GraphOptError: an input is no tensor or has no known rank.
    """
    known = {**next(size_choices(graph)), **(sizes or {})}
    generator = torch.Generator().manual_seed(seed)
    return [_value(graph, i, spec, known, generator, pattern) for i, spec in enumerate(graph.inputs)]


def size_choices(graph: Graph, variant: int = 0, longer: int = 0) -> Iterator[dict[str, int]]:
    """Sizes for every symbolic dim, most distinctive choice first; callers try the next where a run fails.

    Args:
        graph: the model; an unnamed unknown dim goes by `input:axis`.
        variant: 0 or 1; the two differ in every size, which shows what is static.
        longer: how much longer than usual sequences are, with a batch of one.
    """
    symbols = _symbols(graph)
    batch = 1 if longer else _BATCHES[variant]
    lengths = [n + longer for n in _LENGTHS[variant]]
    firsts = [s for s, axis in symbols.items() if axis == 0 and not _is_length(s)]
    others = [s for s in symbols if s not in firsts]
    # Dims of different names that have to agree: cached and new lengths add up to what "total" counts.
    past, new = lengths[1] - longer, lengths[0]
    joined = {s: past + new if "total" in s else past if "past" in s else new for s in others}
    if not any("total" in s or "past" in s for s in others):
        yield {**dict.fromkeys(firsts, batch), **{s: lengths[i % len(lengths)] for i, s in enumerate(others)}}
    yield {**dict.fromkeys(firsts, batch), **joined}
    if any("past" in s for s in others):
        # Some decoders run either without a cache or with one new token.
        yield {**dict.fromkeys(firsts, batch), **{s: 0 if "past" in s else new for s in others}}
    yield {**dict.fromkeys(firsts, batch), **dict.fromkeys(others, new)}
    yield {**dict.fromkeys(firsts, 1), **joined}
    yield {**dict.fromkeys(firsts, 1), **dict.fromkeys(others, new)}
    yield dict.fromkeys(symbols, 4 + variant)
    yield dict.fromkeys(symbols, 1)


def _is_length(name: str) -> bool:
    return "seq" in name or "len" in name


def _symbols(graph: Graph) -> dict[str, int]:
    """Every symbol with the first axis that it stands on."""
    found: dict[str, int] = {}
    for spec in graph.inputs:
        for axis, dim in enumerate(spec.shape or ()):
            for name in _names(dim, spec, axis):
                found.setdefault(name, axis)
    return found


def _names(dim: Dim, spec: ValueSpec, axis: int) -> list[str]:
    if isinstance(dim, int):
        return []
    if dim is None:
        return [f"{spec.name}:{axis}"]
    tree = _parsed(dim)
    return [dim] if tree is None else [n.id for n in ast.walk(tree) if isinstance(n, ast.Name)]


def _parsed(dim: str) -> ast.expr | None:
    """A dim such as `past + sequence` as an expression, None where it is just a name."""
    try:
        tree = ast.parse(dim, mode="eval").body
    except (SyntaxError, ValueError):
        return None
    allowed = (ast.BinOp, ast.Name, ast.Constant, ast.operator, ast.expr_context)
    plain = all(isinstance(n, allowed) for n in ast.walk(tree))
    return tree if plain and isinstance(tree, ast.BinOp) else None


def _size(dim: Dim, spec: ValueSpec, axis: int, sizes: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    if dim is None:
        return sizes[f"{spec.name}:{axis}"]
    if dim in sizes:
        return sizes[dim]
    tree = _parsed(dim)
    return sizes[dim] if tree is None else max(0, _computed(tree, sizes))


def _computed(tree: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(tree, ast.Name):
        return sizes[tree.id]
    if isinstance(tree, ast.BinOp) and type(tree.op) in _OPERATORS:
        return _OPERATORS[type(tree.op)](_computed(tree.left, sizes), _computed(tree.right, sizes))
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
        return tree.value
    raise GraphOptError(f"cannot compute the size {ast.unparse(tree)!r} of an input; give sizes by name")


def _value(
    graph: Graph,
    index: int,
    spec: ValueSpec,
    sizes: Mapping[str, int],
    generator: torch.Generator,
    pattern: Pattern,
) -> Any:
    if spec.shape is None or not isinstance(spec.dtype, torch.dtype):
        plain = _example(graph, index)
        if plain is not None:
            return plain
        raise GraphOptError(f"cannot make random values for input {spec}")
    shape = [_size(dim, spec, axis, sizes) for axis, dim in enumerate(spec.shape)]
    if spec.dtype.is_floating_point or spec.dtype.is_complex:
        return torch.randn(shape, generator=generator).to(spec.dtype)
    if pattern == "lengths" and len(shape) < 2:
        longest = max(sizes.values(), default=1)
        longest = max([longest, *(d for s in graph.inputs for d in s.shape or () if isinstance(d, int))])
        return torch.randint(1, longest + 1, shape, generator=generator).to(spec.dtype)
    return _integers(shape, generator, pattern).to(spec.dtype)


def _example(graph: Graph, index: int) -> Any:
    """The value that a module was exported with: the only valid one for what is no tensor."""
    if not isinstance(graph.source, TorchSource):
        return None
    leaves = torch.utils._pytree.tree_leaves((graph.source.example_args, dict(graph.source.example_kwargs)))
    return leaves[index] if len(leaves) == len(graph.inputs) else None


def _integers(shape: list[int], generator: torch.Generator, pattern: Pattern) -> torch.Tensor:
    if pattern in ("ones", "zeros", "lengths"):
        return torch.full(shape, int(pattern != "zeros"))
    value = torch.randint(0, 2, shape, generator=generator)
    if len(shape) < 2 or shape[-1] < 2:
        return value if pattern == "random" else torch.ones(shape, dtype=torch.int64)
    if pattern == "random":
        value[..., -1] = 1  # a row without any visible key says nothing about a mask
        return value
    # Each row keeps another number of ones, the first row all but one, and never none.
    kept = shape[-1] - 1 - torch.arange(shape[-2]).remainder(shape[-1] - 1)
    column = torch.arange(shape[-1])
    ones = column < kept.unsqueeze(-1) if pattern == "right" else column >= shape[-1] - kept.unsqueeze(-1)
    return ones.to(torch.int64).expand(shape).contiguous()


@dataclass
class Sample:
    """One set of inputs, and what running (a part of) the model on it showed."""

    graph: Graph
    inputs: list[Any]
    sizes: dict[str, int]
    shapes: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[fx.Node, torch.dtype] = field(default_factory=dict)
    small: dict[fx.Node, Any] = field(default_factory=dict)
    """Values of few elements: sizes, scales, thresholds."""
    errors: dict[fx.Node, str] = field(default_factory=dict)
    """Nodes that could not run."""

    def observe(self, wanted: Iterable[fx.Node]) -> None:
        """Run what `wanted` depends on, and keep shapes, types and small values; failures are noted."""

        def keep(node: fx.Node, value: Any) -> None:
            if isinstance(value, torch.Tensor):
                self.shapes[node], self.dtypes[node] = tuple(value.shape), value.dtype
                if value.numel() <= _KEPT_ELEMENTS:
                    self.small[node] = value
            elif isinstance(value, (bool, int, float)):
                self.small[node] = value

        run_part(self.graph, self.inputs, wanted, {}, keep, self.errors)

    def sizes_known(self) -> dict[fx.Node, Any]:
        """Values of the nodes that read sizes: with them, what only has a known shape need not run."""
        return {n: v for n, v in self.small.items() if vocabulary.kind(n) in vocabulary.SHAPES}

    def values(self, wanted: Iterable[fx.Node], given: Mapping[fx.Node, Any] | None = None) -> dict[fx.Node, Any]:
        """Values of `wanted`, as far as they can be computed, from the inputs and the values in `given`."""
        targets = set(wanted)
        found = {n: v for n, v in (given or {}).items() if n in targets}

        def keep(node: fx.Node, value: Any) -> None:
            if node in targets:
                found[node] = value

        run_part(self.graph, self.inputs, targets, given or {}, keep, {})
        return found


def needed(graph: Graph, wanted: Iterable[fx.Node], given: Mapping[fx.Node, Any]) -> list[fx.Node]:
    """What has to run for `wanted`, producers first, where the values of `given` are known."""
    behind = vocabulary.ancestors(wanted, stop=lambda n: n in given)
    return [n for n in graph.nodes if n in behind and n not in given]


def run_part(
    graph: Graph,
    inputs: list[Any],
    wanted: Iterable[fx.Node],
    given: Mapping[fx.Node, Any],
    keep: Callable[[fx.Node, Any], None],
    errors: dict[fx.Node, str],
) -> None:
    """Run what `wanted` depends on and call `keep` for each value; failures are noted, not looked behind."""
    plan = needed(graph, wanted, given)
    interpreter = GraphInterpreter(graph)
    interpreter.env = {**dict(zip(graph.placeholders, inputs, strict=True)), **given}
    last = {parent: node for node in plan for parent in node.all_input_nodes}
    freed: dict[fx.Node, list[fx.Node]] = {}
    for parent, node in last.items():
        freed.setdefault(node, []).append(parent)
    with torch.no_grad(), at_most(MADE_UP_TRIPS):
        for node in plan:
            if any(parent not in interpreter.env for parent in node.all_input_nodes):
                continue
            try:
                value = interpreter.env[node] if node.op == "placeholder" else interpreter.run_node(node)
            except Exception as error:  # torch and onnxruntime raise anything; the caller decides what it means
                errors[node] = str(error)
                continue
            interpreter.env[node] = value
            keep(node, value)
            for parent in freed.get(node, ()):
                interpreter.env.pop(parent, None)


def observed(graph: Graph, wanted: Iterable[fx.Node], variant: int = 0) -> Sample:
    """The first sample on which all of `wanted` runs, else the one on which most of it does.

    Raises:
        GraphOptError: no valid input can be made for the model.
    """
    wanted = list(wanted)
    best: Sample | None = None
    tried: list[dict[str, int]] = []
    for sizes in size_choices(graph, variant):
        if sizes in tried:
            continue
        tried.append(sizes)
        for pattern in _PATTERNS:
            sample = Sample(graph, sample_inputs(graph, 0, sizes, pattern), sizes)
            sample.observe(wanted)
            if not sample.errors:
                return sample
            if best is None or len(sample.shapes) > len(best.shapes):
                best = sample
    assert best is not None
    return best


# Zeros where a model has a table of one row, such as BERT without token types.
_PATTERNS: tuple[Pattern, ...] = ("ones", "zeros")
