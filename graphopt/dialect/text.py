"""Operators on strings."""

from __future__ import annotations

import operator as arithmetic
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from graphopt.errors import GraphOptError

from .numerals import Texts
from .regex import matcher
from .registry import operator
from .strings import each, strings

# Locales without the letters beyond ASCII, and languages whose i and j have cases of their own.
_PLAIN_LOCALES = frozenset({"C", "POSIX"})
_OTHER_CASES = frozenset({"tr", "az", "lt"})


@operator("StringConcat", since=20)
def string_concat_20(x: Texts, y: Texts) -> Texts:
    """Return x + y, elementwise."""
    return each(arithmetic.add, x, y)


@operator("StringSplit", since=20)
def string_split_20(x: Texts, *, delimiter: str | None = None, maxsplit: int | None = None) -> tuple[Texts, Tensor]:
    """Split each string.

    Args:
        x: [...].
        delimiter: what separates the parts; without one, or with an empty one, whitespace of any length does, and what
            lies around the string is dropped.
        maxsplit: how often a string is split at most; the rest stays one part.

    Returns:
        The parts [..., most], filled up with empty strings, and how many each string has [...].
    """
    limit = -1 if maxsplit is None else maxsplit
    if delimiter:
        parts = [text.split(delimiter, limit) for text in x.reshape(-1)]
    else:
        parts = [text.strip().split(None, limit) for text in x.reshape(-1)]
    counts = [len(found) for found in parts]
    most = max(counts, default=0)
    filled = (part for found in parts for part in (*found, *[""] * (most - len(found))))
    return strings(filled, (*x.shape, most)), torch.tensor(counts, dtype=torch.int64).reshape(x.shape)


def _lower(text: str) -> str:
    return "".join(char.lower() if len(char.lower()) == 1 else char for char in text)


def _upper(text: str) -> str:
    return "".join(char.upper() if len(char.upper()) == 1 else char for char in text)


_CASES: dict[str, Callable[[str], str]] = {"NONE": str, "LOWER": _lower, "UPPER": _upper}


@operator("StringNormalizer", since=10)
def string_normalizer_10(
    x: Texts,
    *,
    case_change_action: str = "NONE",
    is_case_sensitive: int = 0,
    locale: str | None = None,
    stopwords: list[str] | None = None,
) -> Texts:
    """Drop the strings that are stop words, and change the case of the others.

    Cases are those of single characters, as in C; the full ones of Unicode change the length ("ß", "SS").

    Args:
        x: [C] or [1, C].
        case_change_action: NONE, LOWER, or UPPER.
        is_case_sensitive: whether the case counts in the comparison with stop words.
        locale: decides about cases.
        stopwords: what is dropped.

    Returns:
        [C'] or [1, C'], one empty string where all were dropped.
    """
    if x.ndim not in (1, 2) or (x.ndim == 2 and x.shape[0] != 1):
        raise GraphOptError(f"expected strings of shape [C] or [1, C] for StringNormalizer, found {list(x.shape)}")
    if case_change_action not in _CASES:
        raise GraphOptError(f"expected a case_change_action of NONE, LOWER, or UPPER, found {case_change_action!r}")
    if locale is not None and (locale in _PLAIN_LOCALES or locale[:2] in _OTHER_CASES):
        raise NotImplementedError(f"StringNormalizer does not cover the locale {locale!r}")
    change = _CASES[case_change_action]
    compared = _CASES["NONE"] if is_case_sensitive else _CASES["UPPER" if case_change_action == "UPPER" else "LOWER"]
    stops = {compared(word) for word in stopwords or ()}
    kept = [change(text) for text in x.reshape(-1) if compared(text) not in stops] or [""]
    return strings(kept, [*[1] * (x.ndim - 1), len(kept)])


@operator("RegexFullMatch", since=20)
def regex_full_match_20(x: Texts, *, pattern: str | None = None) -> Tensor:
    """Return where the whole string matches the pattern, which is in RE2 syntax."""
    matches = matcher(pattern or "")
    texts = x.reshape(-1).tolist()
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise NotImplementedError("RegexFullMatch does not cover strings that are no valid UTF-8") from error
    return torch.tensor([matches(text) for text in texts], dtype=torch.bool).reshape(x.shape)


@operator("TfIdfVectorizer", since=9, values=(0,))
def tf_idf_vectorizer_9(
    x: Tensor | Texts,
    *,
    max_gram_length: int,
    max_skip_count: int,
    min_gram_length: int,
    mode: str,
    ngram_counts: list[int],
    ngram_indexes: list[int],
    pool_int64s: list[int] | None = None,
    pool_strings: list[str] | None = None,
    weights: list[float] | None = None,
) -> Tensor:
    """Count n-grams, whose items may lie apart from each other by 1 to `max_skip_count` + 1 positions.

    Args:
        x: [C] or [N, C], int32, int64, or strings.
        max_gram_length: longest n-gram.
        max_skip_count: most items that are skipped between two of an n-gram.
        min_gram_length: shortest n-gram.
        mode: TF counts, IDF gives the weight of what is there, TFIDF counts times the weight.
        ngram_counts: where the n-grams of length 1, 2, ... begin in the pool.
        ngram_indexes: the output coordinate of each n-gram of the pool.
        pool_int64s: the items of all n-grams that count.
        pool_strings: the same as strings.
        weights: of each n-gram of the pool.

    Returns:
        [D] or [N, D], float32, with D one more than the largest coordinate.
    """
    grams = _ngrams(pool_strings if pool_strings is not None else pool_int64s or [], ngram_counts)
    if len(grams) != len(ngram_indexes):
        raise GraphOptError(
            f"expected an output coordinate for each of the {len(grams)} n-grams in the pool of TfIdfVectorizer, "
            f"found {len(ngram_indexes)}"
        )
    if not ngram_indexes or min(ngram_indexes) < 0:
        raise GraphOptError(f"expected output coordinates from 0 on for TfIdfVectorizer, found {ngram_indexes[:5]}")
    numbers = {gram: number for number, gram in enumerate(grams)}
    items = x.cpu().numpy() if isinstance(x, Tensor) else x
    counted = []
    for row in items.reshape(-1, items.shape[-1] if items.ndim else 1).tolist():
        found = _found(row, min_gram_length, max_gram_length, max_skip_count)
        hits = np.array([numbers[gram] for gram in found if gram in numbers], dtype=np.int64)
        counted.append(np.bincount(hits, minlength=len(grams)))
    counts = torch.from_numpy(np.array(counted, dtype=np.float32).reshape(-1, len(grams)))
    if mode == "IDF":
        counts = counts.clamp(max=1)
    if mode != "TF" and weights is not None:
        counts = counts * torch.tensor(weights, dtype=torch.float32)
    result = torch.zeros(len(counts), max(ngram_indexes) + 1).index_add(1, torch.tensor(ngram_indexes), counts)
    result = result.to(x.device) if isinstance(x, Tensor) else result
    return result if items.ndim == 2 else result[0]


def _ngrams(pool: Sequence[int | str], starts: list[int]) -> list[tuple[int | str, ...]]:
    """The n-grams of the pool: those of length 1 from starts[0] on, and so on."""
    grams: list[tuple[int | str, ...]] = []
    for length, (start, end) in enumerate(zip(starts, [*starts[1:], len(pool)], strict=True), 1):
        grams += [tuple(pool[at : at + length]) for at in range(start, end, length)]
    return grams


def _found(items: list[int | str], shortest: int, longest: int, skips: int) -> Iterator[tuple[int | str, ...]]:
    """The n-grams of a row."""
    for length in range(shortest, longest + 1):
        # A single item has no distance to another.
        for step in range(1, 2 if length == 1 else skips + 2):
            reach = step * (length - 1)
            for start in range(len(items) - reach):
                yield tuple(items[start : start + reach + 1 : step])
