"""Calibration data for language models: text that the model writes itself, or text that the user has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from graphopt.decoders.driver import Driver, check_complete, filled, token_array
from graphopt.decoders.generate import written
from graphopt.decoders.interface import Interface
from graphopt.decoders.perplexity import rows_at_once
from graphopt.dialect.control import MADE_UP_TRIPS, at_most
from graphopt.errors import GraphOptError
from graphopt.graph import Graph
from graphopt.onnxfile.tensors import from_numpy
from graphopt.rewrite.context import Track, _silent

if TYPE_CHECKING:
    from graphopt.calibration import Calibration

_Array = np.ndarray[Any, Any]
SEQUENCES, LENGTH = 32, 128
# One batch in ten is held out, so there have to be ten at least.
_BATCHES = 16
_SHORTEST = 8
# Of earlier logits when a later token changes; where none sees it, only sums in another order differ.
_UNCHANGED = 1e-2
_SPELLING = re.compile(r"self(?::([1-9]\d{0,6})x([1-9]\d{0,6}))?")


def self_calibration(
    graph: Graph,
    *,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    batch: int | None = None,
    seed: int = 0,
    temperature: float = 1.0,
    first: int | None = None,
    track: Track = _silent,
) -> list[tuple[Any, ...]]:
    """Batches of text that the model itself writes: what it was trained on, as far as it knows.

    All texts are written at once, with the model's cache or state; without one, as many as memory allows, each step
    on the whole text. The batches then hold each text as a whole, with empty caches.

    Args:
        graph: the model.
        sequences: how many texts.
        length: tokens of each, the first included.
        batch: texts per batch; None makes 16 batches or fewer.
        seed: the same seed gives the same tokens.
        temperature: of the draws; 1 is the model's own distribution.
        first: the first token of every text, as the begin-of-text token; None draws one for each text uniformly.
        track: wraps the loop over the tokens, for progress bars.

    Returns:
        Flat inputs in the order of the graph's, as `graphopt.calibration.Calibration` holds them.

    Raises:
        GraphOptError: the graph is no language model, or it cannot run on so many tokens.
    """
    tokens = sample_tokens(
        Driver(graph), sequences, length, seed=seed, temperature=temperature, first=first, track=track
    )
    return text_batches(graph, tokens, length=length, batch=batch or -(-sequences // _BATCHES))


def sample_tokens(
    driver: Driver,
    sequences: int,
    length: int,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    first: int | None = None,
    track: Track = _silent,
) -> _Array:
    """Texts that a model writes, int64 `[sequences, length]`; see `self_calibration`.

    Raises:
        GraphOptError: as there.
    """
    if sequences < 1 or length < 2:
        raise GraphOptError(
            f"expected at least 1 text of at least 2 tokens to sample, got {sequences} of {length} tokens"
        )
    begin = random_tokens(driver.interface, (sequences, 1), np.random.default_rng((seed, 1)))
    if first is not None:
        begin = token_array(np.full_like(begin, first), driver.interface.vocabulary)
    rows = driver.interface.batch or _rows(driver.interface, sequences, length)
    starts = range(0, sequences, rows)
    done = []
    steps = iter(track(range(len(starts) * (length - 1)), len(starts) * (length - 1), "Sampling text"))
    for start in starts:
        driver.restart()
        part = begin[start : start + rows]
        if driver.interface.batch:
            part = np.resize(part, (rows, 1))
        columns = [part[:, 0]]
        for column in written(driver, part, length - 1, temperature=temperature, seed=seed, first_row=start):
            columns.append(column)
            next(steps, None)
        done.append(np.stack(columns, axis=1))
    next(steps, None)  # lets the bar end
    return np.concatenate(done)[:sequences]


def _rows(interface: Interface, sequences: int, length: int) -> int:
    """Texts that are written at once: all, unless each step gives the logits of the whole text."""
    return sequences if interface.memories else min(sequences, rows_at_once(interface, length))


def random_tokens(interface: Interface, shape: tuple[int, ...], rng: np.random.Generator) -> _Array:
    """Uniformly random tokens.

    Raises:
        GraphOptError: the size of the vocabulary is unknown.
    """
    if interface.vocabulary is None:
        raise GraphOptError("expected a model of known vocabulary to draw random tokens, this one states none")
    return rng.integers(0, interface.vocabulary, shape)


def text_batches(graph: Graph, tokens: Any, *, length: int | None = None, batch: int = 16) -> list[tuple[Any, ...]]:
    """Batches of a given text, with all other inputs filled in: everything visible, caches empty, states zero.

    Args:
        graph: the model.
        tokens: one long text `[L]`, or texts `[N, L]`; each is cut, and what is left over at its end is dropped.
        length: tokens per sequence; None takes the texts as they are.
        batch: sequences per batch; the last batch may have fewer.

    Returns:
        Flat inputs in the order of the graph's.

    Raises:
        GraphOptError: the graph is no language model, or the text is shorter than `length`.
    """
    interface = Interface.of(graph)
    check_complete(interface)
    ids = token_array(tokens, interface.vocabulary)
    length = ids.shape[1] if length is None else length
    if not 1 <= length <= ids.shape[1]:
        raise GraphOptError(f"expected texts of at least {length} tokens, got {ids.shape[1]}; choose a smaller length")
    if batch < 1:
        raise GraphOptError(f"expected at least 1 sequence per batch, got {batch}")
    batch = interface.batch or batch
    rows = ids[:, : ids.shape[1] // length * length].reshape(-1, length)
    if interface.batch:
        rows = rows[: len(rows) // batch * batch]
    if not len(rows):
        raise GraphOptError(f"expected at least the {batch} sequences that the model takes at once, got fewer")
    parts = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    return [_flat(graph, interface, part) for part in parts]


def _flat(graph: Graph, interface: Interface, tokens: _Array) -> tuple[Any, ...]:
    feeds = prefill(interface, tokens)
    return tuple(from_numpy(feeds[spec.name]) for spec in graph.inputs)


def prefill(interface: Interface, tokens: _Array) -> dict[str, Any]:
    """All inputs by name for a text that nothing precedes."""
    return filled(interface, tokens) | {m.past.name: m.empty(len(tokens)) for m in interface.memories}


def completed(graph: Graph, feeds: Mapping[str, Any]) -> Mapping[str, Any]:
    """`feeds` with all other inputs filled in, where it holds nothing but the tokens of a model with memory."""
    if len(feeds) != 1 or len(graph.inputs) < 2:
        return feeds
    try:
        interface = Interface.of(graph)
    except GraphOptError:
        return feeds
    if list(feeds) != [interface.tokens.name] or not interface.memories or interface.others:
        return feeds
    return prefill(interface, token_array(feeds[interface.tokens.name], interface.vocabulary))


def is_self(source: Any) -> bool:
    """Whether `source` asks for the model's own text."""
    return isinstance(source, str) and source.partition(":")[0] == "self"


def own_text(
    graph: Graph, source: str = "self", *, seed: int, sizes: Mapping[str, int] | None = None, track: Track = _silent
) -> Calibration:
    """The calibration data that `self` or `self:32x256` (sequences x length) means.

    Args:
        graph: the model.
        source: without a length it is 128 tokens, or fewer where the model's positions end before.
        seed: for the draws.
        sizes: sizes of symbolic dims by name, of which that of the tokens' length counts where `source` has none.
        track: wraps the loop over the tokens.

    Raises:
        GraphOptError: it is spelled otherwise, or the graph is no language model.
    """
    from graphopt.calibration import Calibration

    match = _SPELLING.fullmatch(source)
    if match is None:
        raise GraphOptError(f"expected self or self:SEQUENCESxLENGTH, as in self:32x256, got {source!r}")
    if match[1] is None:
        driver = Driver(graph)
        count, length = SEQUENCES, _given_length(driver.interface, sizes) or _runnable_length(driver)
    else:
        count, length = int(match[1]), int(match[2])
    batches = self_calibration(graph, sequences=count, length=length, seed=seed, track=track)
    return Calibration(batches, f"{count} texts of {length} tokens that the model wrote itself")


def own_text_by_default(
    graph: Graph, *, seed: int, sizes: Mapping[str, int] | None = None, track: Track = _silent
) -> Calibration | None:
    """The text of a model that can write some; None where it cannot, or where `sizes` ask for more than a length."""
    try:
        with at_most(MADE_UP_TRIPS):
            if not _writes(graph) or (sizes and (len(sizes) > 1 or _given_length(Interface.of(graph), sizes) is None)):
                return None
        # Each token may take a trip of every loop.
        with at_most(MADE_UP_TRIPS * LENGTH):
            return own_text(graph, seed=seed, sizes=sizes, track=track)
    except GraphOptError:
        return None


def _given_length(interface: Interface, sizes: Mapping[str, int] | None) -> int | None:
    dim = interface.tokens.shape[1] if interface.tokens.shape else None
    return (sizes or {}).get(dim) if isinstance(dim, str) else None


def _writes(graph: Graph) -> bool:
    """Whether the model predicts each token from those before: it has the interface, and no token sees a later one."""
    interface = Interface.of(graph)
    tokens, logits = interface.tokens.shape, interface.logits.shape
    assert tokens is not None
    assert logits is not None
    if interface.others or interface.rows is None or interface.rows != logits[-1] or tokens != logits[:2]:
        return False
    driver = Driver(graph)
    rng = np.random.default_rng(0)
    text = random_tokens(interface, (interface.batch or 2, min(_SHORTEST, interface.length or _SHORTEST)), rng)
    other = text.copy()
    other[:, -1] = (other[:, -1] + 1) % interface.rows
    before = driver.feed(text)[:, :-1]
    driver.restart()
    change = np.abs(driver.feed(other)[:, :-1] - before)
    return bool(before.size and (change <= _UNCHANGED * np.abs(before).max()).all())


def _runnable_length(driver: Driver) -> int:
    """The usual length, or a shorter one where the model's positions end before.

    Raises:
        GraphOptError: the model does not even run on a few tokens.
    """
    if driver.interface.length is not None:
        return driver.interface.length
    length = LENGTH
    while True:
        driver.restart()
        try:
            driver.feed(torch.zeros(driver.interface.batch or 1, length, dtype=torch.int64))
        except GraphOptError:
            if length <= _SHORTEST:
                raise
            length //= 2
        else:
            return length
