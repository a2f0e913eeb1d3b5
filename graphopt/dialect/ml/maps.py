"""Operators with maps, which are Python dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphopt.dialect.numerals import Texts, from_texts
from graphopt.dialect.registry import operator
from graphopt.dialect.strings import strings
from graphopt.errors import GraphOptError

from .scores import DOMAIN, labels_of


@operator("ZipMap", domain=DOMAIN, values=(0,))
def zip_map_1(
    x: Tensor, *, classlabels_int64s: list[int] | None = None, classlabels_strings: list[str] | None = None
) -> list[dict[Any, float]]:
    """Return a map from labels to values for each row of x: [N, labels], or [labels] as one row."""
    labels = labels_of(classlabels_int64s, classlabels_strings)
    if x.shape[-1] != len(labels):
        raise GraphOptError(f"expected one column for each of {len(labels)} labels of ZipMap, found {x.shape[-1]}")
    return [dict(zip(labels, row, strict=True)) for row in x.reshape(-1, len(labels)).tolist()]


@operator("DictVectorizer", domain=DOMAIN)
def dict_vectorizer_1(
    x: Mapping[Any, Any], *, int64_vocabulary: list[int] | None = None, string_vocabulary: list[str] | None = None
) -> Tensor | Texts:
    """Return the values of the keys in the vocabulary, zero or the empty string for those the map lacks.

    Args:
        x: numbers or strings by key.
        int64_vocabulary: the keys in order.
        string_vocabulary: the same, as strings.

    Returns:
        [1, keys] of the type of the values: that of onnxruntime, with a first axis that the standard does not mention.
    """
    keys = labels_of(int64_vocabulary, string_vocabulary)
    kind = next((type(value) for value in x.values()), float)
    if issubclass(kind, str):
        return strings((x.get(key, "") for key in keys), [1, len(keys)])
    # A plain Python float is what a float of any width becomes.
    doubled = torch.float64 if issubclass(kind, np.float64) else torch.float32
    dtype = torch.int64 if issubclass(kind, (int, np.integer)) else doubled
    return torch.tensor([[x.get(key, 0) for key in keys]], dtype=dtype)


@operator("CastMap", domain=DOMAIN)
def cast_map_1(
    x: Mapping[int, Any], *, cast_to: str = "TO_FLOAT", map_form: str = "DENSE", max_map: int = 1
) -> Tensor | Texts:
    """Return the values of a map in the order of their keys.

    Args:
        x: floats or strings by key.
        cast_to: TO_FLOAT, TO_INT64, or TO_STRING.
        map_form: DENSE has only the values that there are; SPARSE puts each at the position that its key says.
        max_map: how many positions SPARSE has.

    Returns:
        [1, positions]; the type and the fillers are those of onnxruntime.
    """
    if map_form == "DENSE":
        values = [x[key] for key in sorted(x)]
    else:
        if min(x, default=0) < 0:
            raise GraphOptError(f"expected keys from 0 on for a sparse CastMap, found {min(x)}")
        values = [x.get(key) for key in range(max_map)]
    shape = [1, len(values)]
    if cast_to == "TO_STRING":
        return strings((_text(value) for value in values), shape)
    if cast_to not in ("TO_FLOAT", "TO_INT64"):
        raise GraphOptError(f"expected CastMap to cast TO_FLOAT, TO_INT64, or TO_STRING, found {cast_to!r}")
    dtype = torch.float32 if cast_to == "TO_FLOAT" else torch.int64
    if any(isinstance(value, str) for value in values):
        return from_texts(strings(("0" if value is None else value for value in values), shape), dtype).to(dtype)
    numbers = torch.tensor([0.0 if value is None else float(value) for value in values], dtype=torch.float32)
    return numbers.to(dtype).reshape(shape)


def _text(value: Any) -> str:
    if value is None:
        return "0.f"
    return value if isinstance(value, str) else f"{value:.6f}"
