"""Cross-entropy against torch in fp64 and against distributions that are known."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import graphopt
from graphopt import GraphOptError
from graphopt.decoders import cross_entropy, text_batches


def nats(scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """[N, T - 1] by torch, in fp64."""
    flat = torch.from_numpy(scores[:, :-1]).flatten(0, 1)
    found = torch.nn.functional.cross_entropy(flat, torch.from_numpy(ids[:, 1:]).flatten(), reduction="none")
    return found.reshape(len(ids), -1).numpy()


def test_against_torch(toys: dict[str, Path], reference) -> None:
    ids = np.random.default_rng(1).integers(0, 11, (37, 12))  # more than one run of 16
    wanted = nats(reference(ids), ids)
    # fp32 logits of size 1 against fp64 ones.
    for model in (toys["none"], graphopt.load(toys["cache"])):
        score = cross_entropy(model, ids)
        assert score.tokens == 37 * 11
        assert score.nats == pytest.approx(wanted.mean(), abs=1e-6)
        assert score.perplexity == pytest.approx(math.exp(wanted.mean()), abs=1e-5)
        np.testing.assert_allclose(score.per_position, wanted.mean(0), atol=1e-5)
    later = cross_entropy(toys["none"], ids, skip=4)
    assert later.tokens == 37 * 7
    assert later.nats == pytest.approx(wanted[:, 4:].mean(), abs=1e-6)
    assert np.isnan(later.per_position[:4]).all()
    np.testing.assert_allclose(later.per_position[4:], wanted[:, 4:].mean(0), atol=1e-5)


def test_forms_of_the_data(toys: dict[str, Path]) -> None:
    ids = np.random.default_rng(2).integers(0, 11, (6, 8))
    graph = graphopt.load(toys["cache"])
    whole = cross_entropy(graph, ids)
    batches = text_batches(graph, ids, batch=4)
    for data in (torch.from_numpy(ids), [ids[:2], ids[2:]], batches, iter(batches)):
        score = cross_entropy(graph, data)
        assert score.tokens == whole.tokens
        assert score.nats == pytest.approx(whole.nats, abs=1e-9)
    assert cross_entropy(graph, ids[0]).nats == pytest.approx(cross_entropy(graph, ids[0].tolist()).nats, abs=1e-12)
    # Texts of two lengths: the longer one's last positions are its own.
    mixed = cross_entropy(graph, [ids[:1], ids[1:2, :5]])
    assert (mixed.tokens, len(mixed.per_position)) == (11, 7)
    np.testing.assert_allclose(mixed.per_position[4:], cross_entropy(graph, ids[:1]).per_position[4:], atol=1e-9)


def test_known_distributions() -> None:
    ids = np.tile([0, 1, 2, 3], (5, 3))

    def uniform(tokens: torch.Tensor) -> torch.Tensor:
        return torch.full((*tokens.shape, 7), -3.0)

    assert cross_entropy(uniform, ids).nats == pytest.approx(math.log(7), abs=1e-12)

    def counting(tokens: torch.Tensor) -> torch.Tensor:
        """3/4 on the next number, the rest evenly."""
        right = torch.nn.functional.one_hot((tokens + 1) % 4, 4).double()
        return torch.log(right * 0.75 + (1 - right) * 0.25 / 3)

    assert cross_entropy(counting, ids).nats == pytest.approx(-math.log(0.75), abs=1e-12)
    # Logits beyond the range of exp, and a token without any probability.
    far = cross_entropy(lambda tokens: 1e4 * counting(tokens), ids)
    assert far.nats == pytest.approx(0, abs=1e-12)
    impossible = cross_entropy(lambda tokens: torch.log((tokens[..., None] == torch.arange(4)).double()), ids)
    assert impossible.nats == math.inf


def test_mistakes(toys: dict[str, Path]) -> None:
    for data, options, match in (
        ([], {}, "expected texts of at least 2 tokens to leave one to predict, found none"),
        ([[1]], {}, "at least 2 tokens"),
        ([[1, 2, 3]], {"skip": 2}, "at least 4 tokens"),
        ([[1, 2]], {"skip": -1}, "expected skip of at least 0"),
        (3, {}, "expected tokens or batches of them, got int"),
    ):
        with pytest.raises(GraphOptError, match=match):
            cross_entropy(toys["none"], data, **options)
