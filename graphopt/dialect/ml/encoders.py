"""Operators that look values up in lists: labels, categories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphopt.dialect.numerals import Texts
from graphopt.dialect.registry import operator
from graphopt.dialect.strings import strings
from graphopt.errors import GraphOptError

from .scores import DOMAIN

_DEFAULT_TEXT = "_Unused"


def _positions(x: Tensor | Texts, keys: Any, *, last: bool) -> Tensor:
    """Return where each element stands among the keys, -1 where it does not.

    Args:
        x: [...], numbers or strings.
        keys: a list, a tensor, or a string tensor, of the kind of x.
        last: whether of equal keys the last one counts, or the first.
    """
    if not isinstance(x, Tensor):
        numbered = list(enumerate(keys))
        table = {key: number for number, key in (numbered if last else reversed(numbered))}
        found = [table.get(text, -1) for text in x.reshape(-1)]
        return torch.tensor(found, dtype=torch.int64).reshape(x.shape)
    wide = torch.float64 if x.dtype.is_floating_point else torch.int64
    # In the precision of x, in which it was compared when the keys were written.
    known = torch.as_tensor(keys, dtype=x.dtype).to(wide)
    # NaN has no place in an order.
    numbers, nans = (part.nonzero()[:, 0] for part in (~known.isnan(), known.isnan()))
    values = x.to(wide)
    result = torch.full_like(values, -1, dtype=torch.int64)
    if len(numbers):
        ordered, order = torch.sort(known[numbers], stable=True)
        ordered, order = ordered.to(x.device), numbers[order].to(x.device)
        place = (torch.searchsorted(ordered, values, right=last) - int(last)).clamp(0, len(ordered) - 1)
        result = torch.where(ordered[place] == values, order[place], result)
    return torch.where(values.isnan(), int(nans[-1 if last else 0]), result) if len(nans) else result


def _mapped(positions: Tensor, values: Any, default: Any, dtype: torch.dtype | None = None) -> Tensor | Texts:
    """Return the value at each position, the default at -1; strings, where `dtype` is None."""
    if dtype is None:
        table = strings([*values, default], [len(values) + 1])
        return np.asarray(table[positions.cpu().numpy()], dtype=object)
    pool = torch.cat([torch.as_tensor(values, dtype=dtype).reshape(-1), torch.as_tensor([default], dtype=dtype)])
    return pool.to(positions.device)[positions]


@operator("LabelEncoder", domain=DOMAIN)
def label_encoder_1(
    x: Tensor | Texts,
    *,
    classes_strings: list[str] | None = None,
    default_int64: int = -1,
    default_string: str = _DEFAULT_TEXT,
) -> Tensor | Texts:
    """Turn strings into their positions in `classes_strings`, or such positions into strings."""
    names = classes_strings or []
    if isinstance(x, Tensor):
        inside = (x >= 0) & (x < len(names))
        return _mapped(torch.where(inside, x, -1), names, default_string)
    positions = _positions(x, names, last=False)
    return torch.where(positions < 0, default_int64, positions)


@operator("LabelEncoder", domain=DOMAIN, since=2)
def label_encoder_2(
    x: Tensor | Texts,
    *,
    default_float: float = -0.0,
    default_int64: int = -1,
    default_string: str = _DEFAULT_TEXT,
    keys_floats: list[float] | None = None,
    keys_int64s: list[int] | None = None,
    keys_strings: list[str] | None = None,
    values_floats: list[float] | None = None,
    values_int64s: list[int] | None = None,
    values_strings: list[str] | None = None,
) -> Tensor | Texts:
    """Map each element: keys_*[i] becomes values_*[i], anything else the default; the first of equal keys counts."""
    positions = _positions(x, _given(keys_strings, keys_int64s, keys_floats), last=False)
    if values_strings is not None:
        return _mapped(positions, values_strings, default_string)
    if values_int64s is not None:
        return _mapped(positions, values_int64s, default_int64, torch.int64)
    return _mapped(positions, values_floats or [], default_float, torch.float32)


@operator("LabelEncoder", domain=DOMAIN, since=4)
def label_encoder_4(
    x: Tensor | Texts,
    *,
    default_float: float = -0.0,
    default_int64: int = -1,
    default_string: str = _DEFAULT_TEXT,
    default_tensor: Tensor | Texts | None = None,
    keys_floats: list[float] | None = None,
    keys_int64s: list[int] | None = None,
    keys_strings: list[str] | None = None,
    keys_tensor: Tensor | Texts | None = None,
    values_floats: list[float] | None = None,
    values_int64s: list[int] | None = None,
    values_strings: list[str] | None = None,
    values_tensor: Tensor | Texts | None = None,
) -> Tensor | Texts:
    """Map each element: keys_*[i] becomes values_*[i], anything else the default; the last of equal keys counts."""
    positions = _positions(x, _given(keys_tensor, keys_strings, keys_int64s, keys_floats), last=True)
    default = None if default_tensor is None else default_tensor.reshape(-1).tolist()[0]
    if isinstance(values_tensor, Tensor):
        own = default_float if values_tensor.dtype.is_floating_point else default_int64
        return _mapped(positions, values_tensor, own if default is None else default, values_tensor.dtype)
    texts = values_strings if values_tensor is None else values_tensor.tolist()
    if texts is not None:
        return _mapped(positions, texts, default_string if default is None else default)
    if values_int64s is not None:
        return _mapped(positions, values_int64s, default_int64 if default is None else default, torch.int64)
    return _mapped(positions, values_floats or [], default_float if default is None else default, torch.float32)


def _given(*keys: Any) -> Any:
    """The first that is not None."""
    return next((values for values in keys if values is not None), [])


@operator("CategoryMapper", domain=DOMAIN)
def category_mapper_1(
    x: Tensor | Texts,
    *,
    cats_int64s: list[int] | None = None,
    cats_strings: list[str] | None = None,
    default_int64: int = -1,
    default_string: str = _DEFAULT_TEXT,
) -> Tensor | Texts:
    """Turn strings into the integers at the same position of two lists, or integers into strings."""
    numbers, names = cats_int64s or [], cats_strings or []
    if isinstance(x, Tensor):
        return _mapped(_positions(x, numbers, last=True), names, default_string)
    return _mapped(_positions(x, names, last=True), numbers, default_int64, torch.int64)


@operator("OneHotEncoder", domain=DOMAIN)
def one_hot_encoder_1(
    x: Tensor | Texts,
    *,
    cats_int64s: list[int] | None = None,
    cats_strings: list[str] | None = None,
    zeros: int = 1,
) -> Tensor:
    """Replace each element by a row of zeros with a one at its category.

    Args:
        x: [...]; floating point numbers are cut to integers.
        cats_int64s: the categories of numbers.
        cats_strings: the categories of strings.
        zeros: whether an element of no category becomes a row of zeros, or is an error.

    Returns:
        [..., categories], float32.
    """
    categories: Sequence[Any] = (cats_int64s if isinstance(x, Tensor) else cats_strings) or []
    positions = _positions(x.to(torch.int64) if isinstance(x, Tensor) else x, categories, last=True)
    if not zeros and not positions.is_meta and bool((positions < 0).any()):
        raise GraphOptError("expected only elements of the categories of OneHotEncoder, found another; set zeros to 1")
    return (positions.unsqueeze(-1) == torch.arange(len(categories), device=positions.device)).to(torch.float32)
