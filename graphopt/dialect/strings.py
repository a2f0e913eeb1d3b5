"""String tensors, which are numpy arrays of Python `str`, moved by the torch functions that move numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from .numerals import Texts

__all__ = ["accepting_strings", "each", "joined", "stacked", "strings"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

# How many of an operator's outputs, from the first on, hold strings where its inputs do: of most of them, all.
_ALL = 1 << 30
_OUTPUTS = dict.fromkeys(
    (
        "CenterCropPad", "Compress", "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements",
        "GatherND", "OneHot", "Pad", "Reshape", "ReverseSequence", "Scatter", "ScatterElements", "ScatterND", "Slice",
        "SpaceToDepth", "Split", "Squeeze", "TensorScatter", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where",
    ),
    _ALL,
) | {"Equal": 0, "NonZero": 0, "Size": 0, "Unique": 1}  # fmt: skip
# These look at the strings: equal ones need one code, in the order of the strings.
_COMPARING = frozenset({"Equal", "NonZero", "Unique"})


def strings(values: Iterable[str], shape: Sequence[int]) -> Texts:
    """Return a string tensor of the given shape."""
    flat = list(values)
    result = np.empty(len(flat), dtype=object)
    result[:] = flat
    return result.reshape(tuple(shape))


def each(function: Callable[..., Any], *arrays: Texts) -> Texts:
    """Apply a function to each element, or to each group of elements where the arrays broadcast."""
    return np.asarray(np.frompyfunc(function, len(arrays), 1)(*arrays), dtype=object)


def accepting_strings(name: str, function: _Function) -> _Function:
    """Let the function of an ONNX operator take string tensors too.

    Such a call runs on integers that stand for the strings, so it is for operators that move elements, count them, or
    compare them for equality. Every other operator's function is returned as it is.

    Args:
        name: the operator type.
        function: its torch function.
    """
    if name not in _OUTPUTS:
        return function

    @functools.wraps(function)
    def accepting(*args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(arg, np.ndarray) for arg in args):
            return function(*args, **kwargs)
        pool, coded = _coded(args, ranked=name in _COMPARING)
        result = function(*coded, **kwargs)
        if not isinstance(result, tuple):
            return _decoded(pool, result) if _OUTPUTS[name] else result
        return tuple(_decoded(pool, x) if i < _OUTPUTS[name] else x for i, x in enumerate(result))

    return cast(_Function, accepting)


def _coded(args: Sequence[Any], *, ranked: bool) -> tuple[Texts, list[Any]]:
    """Return the strings, and the arguments with a position among them in the place of each.

    Position 0 is the empty string: what torch fills up with zeros, ONNX fills up with empty strings.
    """
    arrays = [arg for arg in args if isinstance(arg, np.ndarray)]
    pool = np.concatenate([strings([""], [1]), *(array.reshape(-1) for array in arrays)])
    positions = np.arange(len(pool))
    if ranked:
        pool, positions = np.unique(pool, return_inverse=True)
    device = next((arg.device for arg in args if isinstance(arg, Tensor)), None)
    codes = torch.as_tensor(positions[1:], dtype=torch.int64, device=device)
    parts = iter(torch.split(codes, [array.size for array in arrays]))
    return pool, [next(parts).reshape(arg.shape) if isinstance(arg, np.ndarray) else arg for arg in args]


def _decoded(pool: Texts, codes: Tensor) -> Texts:
    return np.asarray(pool[codes.cpu().numpy()], dtype=object)


def joined(values: Sequence[Any], axis: int) -> Any:
    """Concatenate tensors, or string tensors."""
    return np.concatenate(values, axis) if isinstance(values[0], np.ndarray) else torch.cat(list(values), axis)


def stacked(values: Sequence[Any], axis: int) -> Any:
    """Stack tensors, or string tensors, along a new axis."""
    return np.stack(values, axis) if isinstance(values[0], np.ndarray) else torch.stack(list(values), axis)
