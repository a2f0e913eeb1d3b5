"""Sequences, which are Python lists, and optionals, which are None when they are empty."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphopt.errors import GraphOptError

from .dtypes import scalar
from .registry import operator
from .strings import joined, stacked


@operator("SequenceEmpty", since=11)
def sequence_empty_11(*, dtype: int | None = None) -> list[Any]:
    """Return a sequence without elements, of whatever type."""
    return []


@operator("SequenceConstruct", since=11)
def sequence_construct_11(*inputs: Any) -> list[Any]:
    """Return a sequence of the inputs."""
    return list(inputs)


@operator("SequenceLength", since=11)
def sequence_length_11(sequence: list[Any]) -> Tensor:
    """Return the number of elements as int64."""
    return torch.tensor(len(sequence), dtype=torch.int64)


def _position(sequence: list[Any], position: Tensor, last: int) -> int:
    """Return the position counted from the front.

    Raises:
        GraphOptError: it lies outside of [-len(sequence), last].
    """
    index = scalar(position)
    if not -len(sequence) <= index <= last:
        raise GraphOptError(
            f"expected a position in [{-len(sequence)}, {last}] for a sequence of {len(sequence)}, found {index}; "
            "check what computes it"
        )
    return index % len(sequence) if index < 0 else index


@operator("SequenceAt", since=11, values=(1,))
def sequence_at_11(sequence: list[Any], position: Tensor) -> Any:
    """Return the element at a position; negative ones count from the back."""
    return sequence[_position(sequence, position, len(sequence) - 1)]


@operator("SequenceInsert", since=11, values=(2,))
def sequence_insert_11(sequence: list[Any], tensor: Any, position: Tensor | None = None) -> list[Any]:
    """Return the sequence with an element inserted before a position, by default at the back."""
    index = len(sequence) if position is None else _position(sequence, position, len(sequence))
    return [*sequence[:index], tensor, *sequence[index:]]


@operator("SequenceErase", since=11, values=(1,))
def sequence_erase_11(sequence: list[Any], position: Tensor | None = None) -> list[Any]:
    """Return the sequence without the element at a position, by default the last one."""
    index = _position(sequence, torch.tensor(-1) if position is None else position, len(sequence) - 1)
    return [*sequence[:index], *sequence[index + 1 :]]


@operator("SplitToSequence", since=11, values=(1,))
def split_to_sequence_11(x: Any, split: Tensor | None = None, *, axis: int = 0, keepdims: int = 1) -> list[Any]:
    """Cut x along an axis into the parts of a sequence.

    Args:
        x: a tensor or a string tensor.
        split: [], the size of all parts but the last, which may be smaller; or [parts], the size of each. Without it
            the size is one.
        axis: where to cut.
        keepdims: whether parts of size one keep the axis; it counts only where `split` is not given.
    """
    size = x.shape[axis]
    if split is not None and split.dim() == 1:
        sizes = split.tolist()
    else:
        part = 1 if split is None else scalar(split)
        sizes = [min(part, size - start) for start in range(0, size, part)] if part > 0 else [part]
    if sum(sizes) != size or min(sizes, default=0) < 0:
        raise GraphOptError(f"expected split sizes that add up to {size}, found {sizes}; check what computes them")
    ends = list(itertools.accumulate(sizes))
    parts: list[Any] = []
    if sizes and isinstance(x, np.ndarray):
        parts += np.split(x, ends[:-1], axis)
    elif sizes:
        parts += torch.tensor_split(x, ends[:-1], axis)
    return parts if split is not None or keepdims else [part.squeeze(axis) for part in parts]


@operator("ConcatFromSequence", since=11)
def concat_from_sequence_11(sequence: list[Any], *, axis: int, new_axis: int = 0) -> Any:
    """Join the elements along an axis, which is a new one when `new_axis` is set."""
    if not sequence:
        raise GraphOptError("expected a sequence with elements to concatenate, found an empty one")
    return stacked(sequence, axis) if new_axis else joined(sequence, axis)


@operator("SequenceMap", since=17, counted=True)
def sequence_map_17(
    sequence: list[Any], *additional: Any, body: Callable[..., tuple[Any, ...]], outputs: int
) -> list[Any] | tuple[list[Any], ...]:
    """Run the body on each element.

    Args:
        sequence: decides how often the body runs.
        additional: sequences of the same length, which are taken apart too, or tensors, which every run gets whole.
        body: (element, *others) -> results.
        outputs: how many results there are.

    Returns:
        A sequence of all first results, and so on.
    """
    lengths = {len(value) for value in (sequence, *additional) if isinstance(value, list)}
    if len(lengths) > 1:
        raise GraphOptError(f"expected sequences of one length for SequenceMap, found lengths {sorted(lengths)}")
    columns: tuple[list[Any], ...] = tuple([] for _ in range(outputs))
    for index, element in enumerate(sequence):
        others = (value[index] if isinstance(value, list) else value for value in additional)
        for column, result in zip(columns, body(element, *others), strict=True):
            column.append(result)
    return columns[0] if outputs == 1 else columns


@operator("Optional", since=15)
def optional_15(value: Any = None, *, type: Any = None) -> Any:
    """Return an optional that holds the value, or an empty one of the given type."""
    return value


@operator("OptionalHasElement", since=15)
def optional_has_element_15(value: Any = None) -> Tensor:
    """Return whether there is a value."""
    return torch.tensor(value is not None)


@operator("OptionalGetElement", since=15)
def optional_get_element_15(value: Any) -> Any:
    """Return the value of an optional."""
    if value is None:
        raise GraphOptError("expected an optional with a value, found an empty one; ask OptionalHasElement first")
    return value
