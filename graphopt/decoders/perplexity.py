"""How well a language model predicts a text: cross-entropy in nats, as a mean and over the position."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from graphopt.decoders.driver import Driver, Model, token_array
from graphopt.decoders.interface import Interface
from graphopt.errors import GraphOptError
from graphopt.graph import Graph

_Array = np.ndarray[Any, Any]
# Logits of one run: 128 MB in fp32.
_MOST_LOGITS = 1 << 25
_ROWS = 16


@dataclass(frozen=True)
class Score:
    """Mean next-token cross-entropy.

    Attributes:
        nats: the mean over all predicted tokens.
        tokens: how many were predicted.
        per_position: `[T - 1]`; entry t is the mean cross-entropy of token t + 1 after the tokens 0 to t, over all
            texts that are that long, and NaN where it is among the skipped.
    """

    nats: float
    tokens: int
    per_position: _Array

    @property
    def perplexity(self) -> float:
        """The exponential of the cross-entropy."""
        return math.exp(self.nats)


def cross_entropy(model: Model, data: Any, *, skip: int = 0) -> Score:
    """Mean next-token cross-entropy of a text under a model.

    Args:
        model: a path, a `Graph`, a session, or a callable from tokens `[B, T]` to logits `[B, T, V]`.
        data: tokens `[N, T]` or `[T]`, an iterable of such, or calibration batches of a `Graph`.
        skip: leave out the predictions after fewer than that many tokens beyond the first.

    Raises:
        GraphOptError: the model is no language model or cannot run on the tokens, or none are left to predict.
    """
    if skip < 0:
        raise GraphOptError(f"expected skip of at least 0, got {skip}")
    driver = Driver(model)
    sums, counts = np.zeros(0), np.zeros(0, np.int64)
    for tokens in _token_batches(model, driver, data):
        nats = token_nats(driver, tokens)
        longer = max(0, nats.shape[1] - len(sums))
        sums, counts = np.pad(sums, (0, longer)), np.pad(counts, (0, longer))
        sums[: nats.shape[1]] += nats.sum(0)
        counts[: nats.shape[1]] += len(nats)
    sums[:skip], counts[:skip] = 0, 0
    total = int(counts.sum())
    if not total:
        raise GraphOptError(f"expected texts of at least {skip + 2} tokens to leave one to predict, found none")
    means = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
    return Score(float(sums.sum()) / total, total, means)


def _token_batches(model: Model, driver: Driver, data: Any) -> Iterator[Any]:
    if isinstance(data, (np.ndarray, torch.Tensor)):
        yield data
        return
    if not isinstance(data, Iterable):
        raise GraphOptError(f"expected tokens or batches of them, got {type(data).__name__}")
    items = list(data)
    if items and isinstance(items[0], int):
        yield np.array(items)
        return
    names = [spec.name for spec in model.inputs] if isinstance(model, Graph) else [driver.interface.tokens.name]
    at = names.index(driver.interface.tokens.name)
    for item in items:
        yield item[at] if isinstance(item, tuple) else item


def token_nats(driver: Driver, tokens: Any) -> _Array:
    """The cross-entropy of every token but the first, fp64 `[N, T - 1]`; each row is a text of its own.

    Raises:
        GraphOptError: the model cannot run on the tokens.
    """
    ids = token_array(tokens, driver.interface.vocabulary)
    rows = driver.interface.batch or min(_ROWS, rows_at_once(driver.interface, ids.shape[1]))
    found = []
    for start in range(0, len(ids), rows):
        part = ids[start : start + rows]
        driver.restart()
        # A model of one batch size is given the last text again until there are enough.
        full = np.pad(part, ((0, rows - len(part)), (0, 0)), "edge") if driver.interface.batch else part
        found += [_nats(scores, row) for scores, row in zip(driver.feed(full), part, strict=False)]
    return np.stack(found)


def rows_at_once(interface: Interface, length: int) -> int:
    """How many texts of a length may be run together, for all their logits to take little memory."""
    return max(1, _MOST_LOGITS // (length * (interface.vocabulary or 1)))


def _nats(scores: _Array, ids: _Array) -> _Array:
    """Cross-entropy of `ids` `[T]` under logits `[T, V]`: of each but the first, `[T - 1]`."""
    wide = scores[:-1].astype(np.float64)
    top = wide.max(-1, keepdims=True)
    total = np.log(np.exp(wide - top).sum(-1)) + top[:, 0]
    found: _Array = total - wide[np.arange(len(wide)), ids[1:]]
    return found
