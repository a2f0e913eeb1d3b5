"""What a row is measured by: cross-entropy over held-out text and over the position, and recall over the distance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.decoders.driver import Driver
from graphopt.decoders.interface import Interface
from graphopt.decoders.perplexity import token_nats
from graphopt.decoders.recall import Recall, recall
from graphopt.errors import GraphOptError
from graphopt.evaluation.text import Text
from graphopt.graph import Graph
from graphopt.rewrite.context import Track, _silent

_Array = np.ndarray[Any, Any]
_SEGMENT = 32
_DISTANCES = (0, 16, 64, 256, 1024, 4096, 16384)
_TEXTS = 16
# The largest argument of exp in fp64; a ruined model passes it.
_LARGEST = 709.0


@dataclass(frozen=True)
class Bucket:
    """Mean cross-entropy of the tokens at positions `first` to `last` of their texts, both included; counted from 0."""

    first: int
    last: int
    nats: float
    tokens: int


@dataclass(frozen=True)
class Probe:
    """How recall is measured: copies of `segment` tokens, that many `texts`, and the `distances` between copies."""

    segment: int
    texts: int
    distances: tuple[int, ...]

    @classmethod
    def fitting(cls, text: Text, *, distances: Sequence[int] | None = None, texts: int = _TEXTS) -> Probe:
        """The probe for texts of this length: two copies and what lies between are never longer.

        Raises:
            GraphOptError: a given distance is too long.
        """
        segment = max(2, min(_SEGMENT, text.length // 4))
        room = text.length - 2 * segment
        if distances is None:
            return cls(segment, texts, tuple(d for d in _DISTANCES if d <= room))
        if any(not 0 <= d <= room for d in distances):
            raise GraphOptError(
                f"expected distances between 0 and {room}, so that two copies of {segment} tokens fit into held-out "
                f"texts of {text.length}, got {list(distances)}"
            )
        return cls(segment, texts, tuple(distances))


@dataclass(frozen=True)
class Measured:
    """How well a model predicts held-out text.

    Attributes:
        per_text: mean cross-entropy of each text, in nats per token; what errors are computed from.
        nats: the mean over all predicted tokens.
        tokens: how many were predicted.
        buckets: the mean over ranges of positions.
        recall: per distance.
    """

    per_text: tuple[float, ...]
    nats: float
    tokens: int
    buckets: tuple[Bucket, ...]
    recall: tuple[Recall, ...]

    @property
    def error(self) -> float:
        """Standard error of the mean over the texts; NaN for one text."""
        return standard_error(np.array(self.per_text))

    @property
    def perplexity(self) -> float:
        """The exponential of the cross-entropy."""
        return exponential(self.nats)


def exponential(nats: float) -> float:
    """exp, infinite where fp64 ends."""
    return math.exp(nats) if nats < _LARGEST else math.inf


def standard_error(values: _Array) -> float:
    """Of the mean of independent values; NaN for fewer than two."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.nan


def measure(graph: Graph, text: Text, probe: Probe, *, seed: int = 0, track: Track = _silent) -> Measured:
    """Measure a language model.

    Args:
        graph: the model, run by torch with its caches and states where it has some.
        text: held-out text.
        probe: how recall is measured; its segments and its filler are cut from the text.
        seed: for the cuts; the same for all models that are compared.
        track: wraps long loops, for progress bars.

    Raises:
        GraphOptError: the graph is no language model or cannot run on the text.
    """
    driver = Driver(graph)
    sums, counts = np.zeros(text.length - 1), np.zeros(text.length - 1, np.int64)
    per_text: list[float] = []
    for group in track(text.groups, len(text.groups), "Measuring cross-entropy"):
        nats = token_nats(driver, group)
        sums[: nats.shape[1]] += nats.sum(0)
        counts[: nats.shape[1]] += len(nats)
        per_text += nats.mean(1).tolist()
    total = int(counts.sum())
    found: Sequence[Recall] = ()
    if probe.distances and _can_be_probed(graph):
        flat = text.flat
        found = recall(
            graph,
            distances=probe.distances,
            segment=probe.segment,
            texts=probe.texts,
            filler=flat,
            source=flat,
            seed=seed,
            track=track,
        )
    return Measured(tuple(per_text), float(sums.sum()) / total, total, tuple(_buckets(sums, counts)), tuple(found))


def _can_be_probed(graph: Graph) -> bool:
    """A model of one length takes no shorter text without padding, which the probe's texts would need."""
    return Interface.of(graph).length is None or not Interface.of(graph).memories


def _buckets(sums: _Array, counts: _Array) -> list[Bucket]:
    """Ranges of positions, each longer than the last by half an octave; entry t of the arrays is position t + 1."""
    found = []
    edges = sorted({round(2 ** (step / 2)) for step in range(2 * len(sums).bit_length() + 1)})
    for first, following in zip(edges, [*edges[1:], len(sums) + 1], strict=True):
        last = min(following - 1, len(sums))
        tokens = int(counts[first - 1 : last].sum())
        if tokens:
            found.append(Bucket(first, last, float(sums[first - 1 : last].sum()) / tokens, tokens))
    return found
