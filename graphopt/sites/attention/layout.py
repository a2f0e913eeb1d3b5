"""Layouts as short programs of static torch functions, found by following the indices of elements."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Shape = tuple[int, ...]
Step = tuple[Any, ...]
"""The name of a torch function and its arguments behind the tensor."""

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "permute": torch.permute,
    "unflatten": torch.unflatten,
    "flatten": torch.flatten,
    "unsqueeze": torch.unsqueeze,
    "squeeze": torch.squeeze,
    "transpose": torch.transpose,
    "repeat_interleave": torch.repeat_interleave,
}


@dataclass(frozen=True)
class Program:
    """Layout steps that need no dynamic size; runs on tensors and on fx proxies."""

    steps: tuple[Step, ...] = ()

    def __call__(self, x: Any) -> Any:
        """Apply the steps in order."""
        for name, *arguments in self.steps:
            x = _FUNCTIONS[name](x, *arguments)
        return x

    def then(self, *steps: Step) -> Program:
        """This program with more steps behind it; a permutation that changes nothing is left out."""
        return Program(self.steps + tuple(s for s in steps if not _idle(s)))


def _idle(step: Step) -> bool:
    return step[0] == "permute" and list(step[1]) == list(range(len(step[1])))


@dataclass(frozen=True)
class Batch:
    """How the leading axes of a matrix product become [B, H], and back."""

    forward: Program
    backward: Program
    rank: int


def batches(shapes: Sequence[Shape], heads: Iterable[int], grouped: bool) -> Iterator[Batch]:
    """Ways to read the axes before the matrix axes as [B, H], likelier ones first.

    Args:
        shapes: the value's shape on each sample; sizes that differ between samples are dynamic.
        heads: candidates for H where batch and heads share one axis.
        grouped: rank 5 is [B, Hkv, G, ...] rather than several batch axes.
    """
    rank = len(shapes[0])
    if rank == 4:
        yield Batch(Program(), Program(), 4)
    if rank == 3:
        for count in dict.fromkeys([*heads, 1]):
            if all(s[0] % count == 0 for s in shapes):
                yield _one_axis(count)
    if rank == 2:
        forward = Program((("unsqueeze", 0), ("unsqueeze", 0)))
        yield Batch(forward, Program((("squeeze", 0), ("squeeze", 0))), 2)
    if rank == 5:
        inner, outer = ("flatten", 1, 2), ("flatten", 0, 1)
        back = {}
        if static(shapes, 1) and static(shapes, 2):
            back[inner] = ("unflatten", 1, (shapes[0][1], shapes[0][2]))
        if static(shapes, 1):
            back[outer] = ("unflatten", 0, (-1, shapes[0][1]))
        elif static(shapes, 0):
            back[outer] = ("unflatten", 0, (shapes[0][0], -1))
        for step in (inner, outer) if grouped else (outer, inner):
            if step in back:
                yield Batch(Program((step,)), Program((back[step],)), 5)


def _one_axis(heads: int) -> Batch:
    if heads == 1:
        return Batch(Program((("unsqueeze", 1),)), Program((("squeeze", 1),)), 3)
    return Batch(Program((("unflatten", 0, (-1, heads)),)), Program((("flatten", 0, 1),)), 3)


def static(shapes: Sequence[Shape], axis: int) -> bool:
    """Whether the size of an axis is the same on all samples."""
    return len({s[axis] for s in shapes}) == 1


@dataclass(frozen=True)
class Reading:
    """How an earlier value becomes [B, H, T, D], of which each head then stands `repeats` times in a row."""

    program: Program
    repeats: int


def read(sources: Sequence[Shape], wanted: Sequence[torch.Tensor]) -> Reading | None:
    """The program that turns a value into `wanted`, given as the indices of its elements.

    Args:
        sources: the value's shape on each sample.
        wanted: for each sample, [B, H, T, D] (B and H may be 1 for all): which element stands where.
    """
    indices = [torch.arange(_count(s)).reshape(s) for s in sources]
    for program in _candidates(sources, wanted):
        repeats = {_match(program(index), target) for index, target in zip(indices, wanted, strict=True)}
        if len(repeats) == 1 and (found := repeats.pop()):
            return Reading(program, found)
    return None


def _count(shape: Shape) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _match(found: torch.Tensor, target: torch.Tensor) -> int:
    """How often each head of `found` is repeated in `target`; 0 where it is something else."""
    if found.dim() != 4 or found.shape[1] == 0 or target.shape[1] % found.shape[1]:
        return 0
    repeats = target.shape[1] // found.shape[1]
    if found.shape[2:] != target.shape[2:] or found.shape[0] not in (1, target.shape[0]):
        return 0
    repeated = found.repeat_interleave(repeats, 1) if repeats > 1 else found
    return repeats if torch.equal(repeated.expand(target.shape), target) else 0


def _candidates(sources: Sequence[Shape], wanted: Sequence[torch.Tensor]) -> Iterator[Program]:
    """Programs that may lead to rank 4; checking is cheap because the shapes are tiny."""
    for program in _to_rank_4(sources, wanted):
        shapes = [tuple(program(torch.empty(s, device="meta")).shape) for s in sources]
        for order in itertools.permutations(range(4)):
            fits = (all(shape[order[i]] == w.shape[i] for i in (2, 3)) for shape, w in zip(shapes, wanted, strict=True))
            if all(fits):
                yield program.then(("permute", order))


def _to_rank_4(sources: Sequence[Shape], wanted: Sequence[torch.Tensor]) -> Iterator[Program]:
    rank = len(sources[0])
    if rank == 4:
        yield Program()
    if rank == 5:
        yield from (Program((("squeeze", i),)) for i in range(5) if all(s[i] == 1 for s in sources))
        yield from (Program((("flatten", i, i + 1),)) for i in range(4))
    if rank == 2:
        yield Program((("unsqueeze", 0), ("unsqueeze", 0)))
    if rank != 3:
        return
    yield Program((("unsqueeze", 1),))
    heads, width = wanted[0].shape[1], wanted[0].shape[3]
    sizes = [h for h in range(heads, 1, -1) if heads % h == 0]
    for axis in (2, 0, 1):
        for size in sizes:
            if all(s[axis] % size == 0 for s in sources):
                # Of the two parts, the static one is named; the other follows.
                yield Program((("unflatten", axis, (-1, size) if axis != 2 else (size, -1)),))
                yield Program((("unflatten", axis, (size, -1) if axis != 2 else (-1, size)),))
    if all(s[2] % width == 0 for s in sources):
        yield Program((("unflatten", 2, (-1, width)),))
