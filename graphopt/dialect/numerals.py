"""Numbers as text and text as numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphopt.errors import GraphOptError

Texts = np.ndarray[Any, np.dtype[np.object_]]
"""A tensor of text: an array of Python strings."""

_WORD = 1 << 64


def to_texts(x: Tensor) -> Texts:
    """Each number as text: floats with 8 significant digits like onnxruntime, which has "INF" and "NaN" as well."""
    write = _write_float if x.dtype.is_floating_point else _write_integer
    texts = np.empty(x.numel(), dtype=object)
    texts[:] = [write(number) for number in x.detach().reshape(-1).tolist()]
    return texts.reshape(tuple(x.shape))


def _write_float(number: float) -> str:
    text = f"{number:.8g}"
    return {"nan": "NaN", "inf": "INF", "-inf": "-INF"}.get(text, text)


def _write_integer(number: int | bool) -> str:
    return str(int(number))


def from_texts(texts: Texts, dtype: torch.dtype) -> Tensor:
    """The number in each text as float64 where `dtype` is a float type, else as int64 (which a cast wraps around).

    Raises:
        GraphOptError: a text is no number.
    """
    flat = [str(text).strip() for text in texts.reshape(-1)]
    if dtype.is_floating_point:
        return torch.tensor([_read_float(text) for text in flat], dtype=torch.float64).reshape(texts.shape)
    numbers = np.array([_read_integer(text) % _WORD for text in flat], dtype=np.uint64)
    return torch.from_numpy(numbers.view(np.int64)).reshape(texts.shape)


def _read_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise GraphOptError(f"expected text that is a number, found {text!r}; it cannot be cast") from None


def _read_integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = _read_float(text)
    if number - number != 0:
        raise GraphOptError(f"expected text that is a finite number, found {text!r}; no integer is that")
    return int(number)
