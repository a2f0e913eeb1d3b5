"""Writing text with a language model, and its logits on a given text."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from graphopt.decoders.driver import Driver, Model, mask_array, token_array
from graphopt.errors import GraphOptError

_Array = np.ndarray[Any, Any]


def generate(
    model: Model,
    prompt: Any,
    *,
    new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    stop: int | Collection[int] | None = None,
    mask: Any = None,
) -> _Array:
    """Continue texts.

    Args:
        model: a path to an .onnx file (run by onnxruntime), a `Graph` (run by torch), a session, or a callable from
            tokens `[B, T]` to logits `[B, T, V]`. A cache or a state is used where the model has one.
        prompt: integer tokens `[B, T]`, or `[T]` for one text.
        new_tokens: the most tokens to add.
        temperature: 0 takes the likeliest token; otherwise the logits are divided by it and a token is drawn.
        top_k: draw among that many likeliest tokens only; 0 among all.
        seed: for the draws; the same seed gives the same tokens.
        stop: a token, or several, that end a text. A text that has ended is filled up with its last token.
        mask: `[B, T]`, 0 where a shorter prompt is padded on the left.

    Returns:
        Prompt and continuation, int64 `[B, T + new_tokens]`; shorter where all texts have ended before.

    Raises:
        GraphOptError: the model is no language model, cannot run on the prompt, or an option is out of range.
    """
    steps = stream(
        model, prompt, new_tokens=new_tokens, temperature=temperature, top_k=top_k, seed=seed, stop=stop, mask=mask
    )
    new = [token[:, None] for token in steps]
    return np.concatenate([token_array(prompt, None), *new], axis=1)


def stream(
    model: Model,
    prompt: Any,
    *,
    new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    stop: int | Collection[int] | None = None,
    mask: Any = None,
) -> Iterator[_Array]:
    """The tokens that `generate` adds, `[B]` at a time, as soon as each is known.

    Raises:
        GraphOptError: as for `generate`; at once for the options and the model, later for what it cannot run on.
    """
    for name, value in (("new_tokens", new_tokens), ("top_k", top_k), ("temperature", temperature)):
        if not value >= 0:
            raise GraphOptError(f"expected {name} of at least 0, got {value}")
    ends = () if stop is None else np.atleast_1d(list(stop) if isinstance(stop, Collection) else stop).tolist()
    return written(
        Driver(model), prompt, new_tokens, temperature=temperature, top_k=top_k, seed=seed, ends=ends, mask=mask
    )


def written(
    driver: Driver,
    prompt: Any,
    new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    first_row: int = 0,
    ends: Collection[int] = (),
    mask: Any = None,
) -> Iterator[_Array]:
    """As `stream`, on a driver that goes on from what it was fed; `first_row` numbers the texts for the draws."""
    tokens = token_array(prompt, driver.interface.vocabulary)
    if mask is not None and not mask_array(mask, tokens.shape)[:, -1].all():
        raise GraphOptError("expected prompts that end with a token, found padding at the end; pad on the left")
    # One generator per text: what is drawn for it does not depend on the texts beside it.
    rngs = [np.random.default_rng((seed, first_row + row)) for row in range(len(tokens))]
    ended = np.zeros(len(tokens), bool)
    last = tokens[:, -1]
    for step in range(new_tokens):
        scores = driver.feed(tokens, mask if step == 0 else None)[:, -1]
        last = np.where(ended, last, choose(scores, temperature, top_k, np.array([rng.random() for rng in rngs])))
        ended |= np.isin(last, list(ends))
        yield last
        if ended.all():
            return
        tokens = last[:, None]


def choose(scores: _Array, temperature: float, top_k: int, drawn: _Array) -> _Array:
    """One token per row of logits, int64 `[B]`.

    Args:
        scores: the logits `[B, V]`.
        temperature: see `generate`.
        top_k: see `generate`.
        drawn: uniform numbers in [0, 1), `[B]`.

    Raises:
        GraphOptError: the logits are NaN.
    """
    if np.isnan(scores).any():
        raise GraphOptError("expected finite logits to choose a token by, the model gives NaN")
    if temperature == 0:
        likeliest: _Array = scores.argmax(-1)
        return likeliest
    scaled = scores.astype(np.float64) / temperature
    if 0 < top_k < scaled.shape[-1]:
        least = np.partition(scaled, -top_k, axis=-1)[:, -top_k, None]
        scaled = np.where(scaled >= least, scaled, -np.inf)
    weights = np.exp(scaled - scaled.max(-1, keepdims=True))
    sums = weights.cumsum(-1)
    # The number inverts the distribution function; a token of weight 0 has no room in it.
    below = (sums <= drawn[:, None] * sums[:, -1:]).sum(-1)
    chosen: _Array = np.minimum(below, sums.shape[-1] - 1)  # the product may round up to the whole sum
    return chosen


def logits(model: Model, tokens: Any, split: int | None = None, mask: Any = None) -> _Array:
    """The logits of every position of a given text.

    Args:
        model: as for `generate`.
        tokens: `[B, T]`, or `[T]` for one text.
        split: feed that many tokens at once and the others one at a time, as when writing; None feeds all at once.
        mask: `[B, T]`, 0 where a shorter text is padded on the left.

    Returns:
        `[B, T, V]` in fp32, or in the model's own fp64.

    Raises:
        GraphOptError: the model is no language model or cannot run on the text, or `split` is no number of its tokens.
    """
    driver = Driver(model)
    ids = token_array(tokens, driver.interface.vocabulary)
    length = ids.shape[1]
    first = length if split is None else split
    if not 1 <= first <= length:
        raise GraphOptError(f"expected split between 1 and the {length} tokens of the text, got {split}")
    seen = np.ones_like(ids) if mask is None else mask_array(mask, ids.shape)
    edges = [0, first, *range(first + 1, length + 1)]
    parts = [driver.feed(ids[:, a:b], seen[:, a:b]) for a, b in pairwise(edges)]
    return np.concatenate(parts, axis=1)
