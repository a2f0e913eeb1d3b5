"""What an evaluation computes with and what it writes down about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

# Values of tensors up to this many elements are written down: targets of reshapes, ranges of slices.
_RECORDED = 16
_INTEGERS = (torch.int64, torch.int32)


@dataclass(frozen=True)
class Unknown:
    """The value of a node whose shape cannot be told, and why."""

    reason: str


@dataclass(frozen=True)
class Leaf:
    """One observed tensor, or Python integer (then `shape` is None)."""

    shape: tuple[int, ...] | None
    dtype: torch.dtype | str
    values: tuple[int, ...] | None = None
    """The elements of a small integer tensor, where they are known."""


def leaves(value: Any) -> tuple[Leaf | Unknown, ...]:
    """The tensors and integers in a node's value, in order; what is neither is left out."""
    return tuple(leaf for x in pytree.tree_leaves(value) if (leaf := _leaf(x)) is not None)


def _leaf(value: Any) -> Leaf | Unknown | None:
    if isinstance(value, Unknown):
        return value
    if isinstance(value, torch.Tensor):
        known = not value.is_meta and value.dtype in _INTEGERS and value.numel() <= _RECORDED
        values = tuple(value.reshape(-1).tolist()) if known else None
        return Leaf(tuple(value.shape), value.dtype, values)
    if isinstance(value, np.ndarray):
        return Leaf(value.shape, "string")
    if isinstance(value, int) and not isinstance(value, bool):
        return Leaf(None, "int", (value,))
    return None


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The torch tensors in a nested value."""
    for x in pytree.tree_leaves(value):
        if isinstance(x, torch.Tensor):
            yield x


def is_made_up(value: Any) -> bool:
    """Whether a tensor has a shape only: on the meta device, or strings (which no input ever gives)."""
    return (isinstance(value, torch.Tensor) and value.is_meta) or isinstance(value, np.ndarray)


def strings(shape: tuple[int, ...]) -> Any:
    """A string tensor of any size that takes no memory."""
    return np.broadcast_to(np.array("", dtype=object), shape)
