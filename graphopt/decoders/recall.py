"""What a language model recalls of its own context, at growing distances; needs no training and no task.

A text is [segment][filler of d tokens][the same segment]. A model that looks up what followed the last occurrence of a
token predicts the second copy better than the first, by up to the whole entropy of the segment. But the second copy
also stands at other positions and behind other text, which alone may be worth more than what is recalled. So the same
text is read once more with another segment at its beginning: the gain is the difference on the very same last segment.
It is exactly 0 for a model that sees only a window, once the filler fills all that its layers together can see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.decoders.driver import Driver, Model, token_array
from graphopt.decoders.perplexity import token_nats
from graphopt.decoders.sample import random_tokens, sample_tokens
from graphopt.errors import GraphOptError
from graphopt.rewrite.context import Track, _silent

_Array = np.ndarray[Any, Any]
DISTANCES = (0, 16, 64, 256)
_DIGITS = 4


@dataclass(frozen=True)
class Recall:
    """What is recalled over one distance, in nats per token.

    Attributes:
        distance: tokens of filler between the two copies.
        gain: how much less the second copy costs than where another segment stood in place of the first: `unseen` -
            `second`.
        error: standard error of `gain` over the texts.
        first: mean cross-entropy on the first copy.
        second: mean cross-entropy on the second copy.
        unseen: mean cross-entropy on the second copy where another segment stood in place of the first.
    """

    distance: int
    gain: float
    error: float
    first: float
    second: float
    unseen: float

    @property
    def drop(self) -> float:
        """How much less the second copy costs than the first, whatever the reason."""
        return self.first - self.second


def recall(
    model: Model,
    *,
    distances: Sequence[int] = DISTANCES,
    segment: int = 32,
    texts: int = 16,
    filler: Any = None,
    source: Any = None,
    first: int | None = None,
    seed: int = 0,
    track: Track = _silent,
) -> list[Recall]:
    """Measure how much better a repeated segment is predicted than its first occurrence.

    Args:
        model: a path, a `Graph`, a session, or a callable from tokens `[B, T]` to logits `[B, T, V]`.
        distances: tokens between the two copies.
        segment: tokens of a copy.
        texts: how many texts to average over.
        filler: tokens `[L]` that the filler is cut from; None lets the model write it.
        source: tokens `[L]` that the segments are cut from; None draws them uniformly from the vocabulary, so that
            nothing but recall can predict them.
        first: a token in front of every text, as the begin-of-text token.
        seed: for everything random.
        track: wraps the loop over the distances, for progress bars.

    Raises:
        GraphOptError: the model is no language model or cannot run on texts that long, or a number is out of range.
    """
    if segment < 2 or texts < 2 or not distances or min(distances) < 0:
        raise GraphOptError(
            "expected segments of at least 2 tokens, at least 2 texts, and distances of at least 0, "
            f"got {segment}, {texts} and {list(distances)}"
        )
    driver = Driver(model)
    rng = np.random.default_rng(seed)
    copy, other = (_segments(driver, source, (texts, segment), rng) for _ in range(2))
    between = _filler(driver, filler, (texts, max(distances)), rng, seed)
    found = []
    for distance in track(distances, len(distances), "Probing recall"):
        rest = [between[:, :distance], copy]
        seen, unseen = (token_nats(driver, _joined([begin, *rest], first)) for begin in (copy, other))
        # Entry t is the cross-entropy of token t + 1. What follows a copy's first token is the first that it can tell.
        start = int(first is not None)
        once = seen[:, start : start + segment - 1].mean(1)
        found.append(_summary(distance, once, seen[:, 1 - segment :].mean(1), unseen[:, 1 - segment :].mean(1)))
    return found


def _joined(parts: Sequence[_Array], first: int | None) -> _Array:
    begin = [] if first is None else [np.full((len(parts[0]), 1), first)]
    return np.concatenate([*begin, *parts], axis=1)


def _summary(distance: int, first: _Array, second: _Array, unseen: _Array) -> Recall:
    gain = unseen - second
    error = float(gain.std(ddof=1) / len(gain) ** 0.5)
    return Recall(distance, float(gain.mean()), error, float(first.mean()), float(second.mean()), float(unseen.mean()))


def _segments(driver: Driver, source: Any, shape: tuple[int, int], rng: np.random.Generator) -> _Array:
    if source is None:
        return random_tokens(driver.interface, shape, rng)
    return _cuts(token_array(source, driver.interface.vocabulary).reshape(-1), shape, rng)


def _filler(driver: Driver, filler: Any, shape: tuple[int, int], rng: np.random.Generator, seed: int) -> _Array:
    if filler is not None:
        return _cuts(token_array(filler, driver.interface.vocabulary).reshape(-1), shape, rng)
    # The first sampled token is random, not written: it is left out.
    return sample_tokens(driver, shape[0], shape[1] + 1, seed=seed)[:, 1:] if shape[1] else np.zeros(shape, np.int64)


def _cuts(text: _Array, shape: tuple[int, int], rng: np.random.Generator) -> _Array:
    """Pieces `shape` from random places of a text."""
    count, length = shape
    if len(text) < length:
        raise GraphOptError(f"expected a text of at least {length} tokens to cut pieces from, got {len(text)}")
    starts = rng.integers(0, len(text) - length + 1, count)
    return np.stack([text[start : start + length] for start in starts])


def key_value_recall(
    model: Model,
    *,
    encode: Callable[[str], Sequence[int]] | None = None,
    distances: Sequence[int] = DISTANCES,
    pairs: int = 4,
    texts: int = 16,
    filler: Any = None,
    seed: int = 0,
    track: Track = _silent,
) -> list[Recall]:
    r"""Measure how much better a stated value is predicted when it is asked for again.

    A text is a few lines `key = value`, such as `"bd = 4021\n"`, then filler, then one of the lines again. The
    cross-entropy is that of the value where it was stated, where it is asked for, and where it is asked for although
    the line stated another value.

    Args:
        model: as for `recall`.
        encode: text -> tokens; None takes the bytes of the text as they are, for byte-level models.
        distances: tokens of filler.
        pairs: lines in front of the filler.
        texts: how many texts to average over.
        filler: tokens `[L]` that the filler is cut from; None lets the model write it.
        seed: for everything random.
        track: wraps the loop over the distances, for progress bars.

    Raises:
        GraphOptError: as for `recall`.
    """
    if pairs < 1 or texts < 2 or not distances or min(distances) < 0:
        raise GraphOptError(
            "expected at least 1 pair, at least 2 texts, and distances of at least 0, "
            f"got {pairs}, {texts} and {list(distances)}"
        )
    driver = Driver(model)
    rng = np.random.default_rng(seed)
    spelled = encode or (lambda text: list(text.encode()))
    between = _filler(driver, filler, (texts, max(distances)), rng, seed)
    questions = [_question(rng, pairs) for _ in range(texts)]
    found = []
    for distance in track(distances, len(distances), "Probing recall"):
        rows = [_asked(driver, spelled, q, row[:distance]) for q, row in zip(questions, between, strict=True)]
        found.append(_summary(distance, *np.array(rows).T))
    return found


@dataclass(frozen=True)
class _Question:
    keys: tuple[str, ...]
    values: tuple[str, ...]
    asked: int
    other: str
    """A value that stands at no key."""


def _question(rng: np.random.Generator, pairs: int) -> _Question:
    letters = rng.choice(26 * 26, pairs, replace=False)
    numbers = rng.choice(10**_DIGITS, pairs + 1, replace=False)
    *values, other = (f"{number:0{_DIGITS}}" for number in numbers)
    keys = (f"{chr(97 + pair // 26)}{chr(97 + pair % 26)} = " for pair in letters)
    return _Question(tuple(keys), tuple(values), int(rng.integers(pairs)), other)


def _asked(
    driver: Driver, encode: Callable[[str], Sequence[int]], question: _Question, filler: _Array
) -> tuple[float, float, float]:
    """Mean cross-entropy of the value: where it is stated, asked for, and asked for but never stated."""
    value = list(encode(question.values[question.asked]))
    end = [*filler.tolist(), *encode("\n"), *encode(question.keys[question.asked]), *value]
    found = []
    for stated in (question.values[question.asked], question.other):
        start: list[int] = []
        place = 0
        for i, (key, own) in enumerate(zip(question.keys, question.values, strict=True)):
            # Keys and values are encoded apart, so that a value is the same tokens wherever it stands.
            start += encode(key)
            place = len(start) if i == question.asked else place
            start += [*encode(stated if i == question.asked else own), *encode("\n")]
        nats = token_nats(driver, np.array(start + end))[0]
        found.append((float(nats[place - 1 : place - 1 + len(value)].mean()), float(nats[-len(value) :].mean())))
    (first, second), (_, unseen) = found
    return first, second, unseen
