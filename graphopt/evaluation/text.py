"""Held-out text: rows of tokens, without their padding, that calibration does not hold."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graphopt.calibration import Calibration
from graphopt.decoders.driver import check_complete, mask_array, token_array
from graphopt.decoders.interface import Interface
from graphopt.errors import GraphOptError
from graphopt.graph import Graph
from graphopt.onnxfile.tensors import to_numpy
from graphopt.rewrite.context import Context

_Array = np.ndarray[Any, Any]
_SHORTEST = 8


@dataclass(frozen=True)
class Text:
    """Texts by length: each group is `[N, T]`.

    Attributes:
        groups: int64 tokens, the longest texts first.
        description: where they come from, in words.
    """

    groups: tuple[_Array, ...]
    description: str

    @property
    def length(self) -> int:
        """Tokens of the longest text."""
        return int(self.groups[0].shape[1])

    @property
    def count(self) -> int:
        """How many texts there are."""
        return sum(len(group) for group in self.groups)

    @property
    def flat(self) -> _Array:
        """All texts one behind the other, int64 `[L]`."""
        return np.concatenate([group.reshape(-1) for group in self.groups])

    @property
    def digest(self) -> str:
        """Tells texts apart, whatever they are called."""
        found = hashlib.sha256()
        for group in self.groups:
            found.update(f"{group.shape}".encode())
            found.update(np.ascontiguousarray(group).tobytes())
        return found.hexdigest()


def held_out_text(graph: Graph, source: Any, calibration: Calibration) -> Text:
    """The text to judge by.

    Args:
        graph: the model.
        source: tokens `[N, T]`, or `[L]` of one long text that is cut into texts as long as those of the calibration;
            an .npz file that holds them under the name of the model's input (and, beside them, its mask where texts
            are padded); or None for the batches of the calibration that no training sees.
        calibration: what the pass is fitted on.

    Raises:
        GraphOptError: the model is no language model, there is no text to spare or none of 8 tokens, or calibration
            holds some of it.
    """
    roles = Interface.of(graph)
    check_complete(roles)
    context = Context(calibration)
    if source is None and not context.spares_batches:
        raise GraphOptError(
            "expected at least 10 calibration batches, of which one in ten is kept to judge by, "
            f"found {len(calibration)}; give more, or other text with --eval (held_out)"
        )
    if source is None:
        held = [calibration.batches[i] for i in context.held_out()]
        text = _text(_rows_of(graph, roles, held), f"the held-out part of {calibration.description}")
        seen = [calibration.batches[i] for i in context.training()]
    else:
        seen = list(calibration)
        text = _given(roles, source, max((len(row) for row in _rows_of(graph, roles, seen)), default=0))
    _check_apart(text, _rows_of(graph, roles, seen))
    return text


def _given(roles: Interface, source: Any, length: int) -> Text:
    if isinstance(source, (str, Path)):
        return _from_npz(roles, Path(source), length)
    return _text(_cut(roles, np.asarray(to_numpy(source)), length), "the given text")


def _cut(roles: Interface, tokens: _Array, length: int) -> _Array:
    """Texts `[N, T]`; one long text `[L]` falls into texts of `length`, and what is left over is dropped."""
    checked = token_array(_flat(tokens), roles.vocabulary)
    if tokens.ndim > 1 or not 0 < length < len(tokens):
        return checked
    return checked[0, : len(tokens) // length * length].reshape(-1, length)


def _from_npz(roles: Interface, path: Path, length: int) -> Text:
    if not path.exists():
        raise GraphOptError(f"expected held-out text, but {path} does not exist; check the path")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, AttributeError) as error:
        raise GraphOptError(f"expected an .npz file of tokens, but {path} cannot be read as one: {error}") from error
    name = roles.tokens.name
    if name not in arrays:
        found = ", ".join(arrays) or "none"
        raise GraphOptError(f"expected an array {name!r} of tokens in {path}, as the model calls them, found {found}")
    tokens = _cut(roles, arrays[name], length)
    mask = arrays.get(roles.attention_mask.name) if roles.attention_mask is not None else None
    if mask is None or arrays[name].ndim == 1:  # one long text has no padding
        return _text(tokens, path.name)
    return _text(_unpadded(tokens, mask_array(_flat(mask), tokens.shape)), path.name)


def _flat(array: _Array) -> _Array:
    """Batches of texts `[M, N, T]` as texts `[M N, T]`."""
    return array.reshape(-1, array.shape[-1]) if array.ndim > 2 else array


def _rows_of(graph: Graph, roles: Interface, batches: Iterable[tuple[Any, ...]]) -> list[_Array]:
    names = [spec.name for spec in graph.inputs]
    tokens = names.index(roles.tokens.name)
    mask = None if roles.attention_mask is None else names.index(roles.attention_mask.name)
    rows: list[_Array] = []
    for batch in batches:
        ids = np.asarray(to_numpy(batch[tokens])).astype(np.int64)
        rows += _unpadded(ids, None if mask is None else _mask_of(batch[mask], ids.shape[1]))
    return rows


def _mask_of(value: torch.Tensor, length: int) -> _Array:
    """Of the tokens themselves: a mask also covers what lies in the cache."""
    return np.asarray(to_numpy(value[:, -length:].to(torch.int64)))


def _unpadded(tokens: _Array, mask: _Array | None) -> list[_Array]:
    seen = np.ones_like(tokens) if mask is None else mask
    return [row[visible != 0] for row, visible in zip(tokens, seen, strict=True)]


def _text(rows: Sequence[_Array] | _Array, description: str) -> Text:
    """Group by length.

    Raises:
        GraphOptError: all texts are too short to measure anything.
    """
    lengths = sorted({len(row) for row in rows if len(row) >= _SHORTEST}, reverse=True)
    if not lengths:
        raise GraphOptError(f"expected held-out texts of at least {_SHORTEST} tokens, found none in {description}")
    groups = (np.stack([row for row in rows if len(row) == length]).astype(np.int64) for length in lengths)
    return Text(tuple(groups), description)


def _check_apart(text: Text, seen: Sequence[_Array]) -> None:
    """Refuse held-out texts that training sees: they would be remembered, not predicted."""
    known = {row.tobytes() for row in seen}
    shared = sum(row.tobytes() in known for group in text.groups for row in group)
    if shared:
        raise GraphOptError(
            f"expected held-out texts that calibration does not hold, found {shared} of {text.count} in both; "
            "give other text"
        )
