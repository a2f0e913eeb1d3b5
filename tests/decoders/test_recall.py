"""What is recalled by models whose memory is known."""

import math

import numpy as np
import pytest
import torch

from graphopt import GraphOptError
from graphopt.decoders import Recall, key_value_recall, recall

VOCABULARY = 50


class Lookup:
    """Half of the probability on what followed the last occurrence of a token within `window`, the rest evenly."""

    def __init__(self, window: int = 10**6, vocabulary: int = VOCABULARY, context: int = 1) -> None:
        self.window, self.vocabulary, self.context = window, vocabulary, context

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        out = torch.full((*tokens.shape, self.vocabulary), 1 / self.vocabulary, dtype=torch.float64)
        for b, row in enumerate(tokens.tolist()):
            for t in range(len(row)):
                followed = self._followed(row[max(0, t + 1 - self.window) : t + 1])
                if followed is not None:
                    out[b, t] *= 0.5
                    out[b, t, followed] += 0.5
        return out.log()

    def _followed(self, seen: list[int]) -> int | None:
        end = seen[-self.context :]
        for j in range(len(seen) - 1, self.context - 1, -1):
            if seen[j - self.context : j] == end:
                return seen[j]
        return None


def segments(seed: int, count: int = 40) -> np.ndarray:
    """A text without repetitions for longer than a segment."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(np.arange(10, VOCABULARY)) for _ in range(count)])


def test_a_lookup_recalls_and_a_window_forgets() -> None:
    source, filler = np.arange(10, VOCABULARY), np.arange(10).repeat(1)
    options = {"segment": 8, "texts": 4, "source": source, "filler": np.tile(filler, 10), "distances": (0, 5, 40)}
    wanted = math.log(VOCABULARY) - math.log(VOCABULARY / (0.5 * VOCABULARY + 0.5))
    for result in recall(Lookup(), **options):
        # Segments have no repetition in them: the first copy costs log V, the second what the lookup leaves.
        assert result.first == pytest.approx(math.log(VOCABULARY), abs=1e-9)
        assert result.second == pytest.approx(math.log(VOCABULARY) - wanted, abs=1e-9)
        assert result.drop == pytest.approx(wanted, abs=1e-9)
        assert 0.5 * wanted < result.gain <= wanted + 1e-9  # some of the other segment's tokens are the same
    near, middle, far = recall(Lookup(window=20), **options)
    assert near.gain == middle.gain > 0.5 * wanted
    assert (far.gain, far.error) == (0.0, 0.0), "exactly: the last segment's surroundings are the same tokens"
    assert [r.distance for r in (near, middle, far)] == [0, 5, 40]


def test_seeded_and_in_front() -> None:
    model = Lookup(vocabulary=VOCABULARY)
    options = {"source": segments(0), "filler": segments(1), "segment": 6, "texts": 3, "distances": (4,)}
    assert recall(model, seed=5, **options) == recall(model, seed=5, **options)
    assert recall(model, seed=5, **options) != recall(model, seed=6, **options)
    seen = []

    def watched(tokens: torch.Tensor) -> torch.Tensor:
        seen.append(tokens)
        return model(tokens)

    recall(watched, first=2, **options)
    copies, others = seen
    assert copies.shape == (3, 1 + 6 + 4 + 6)
    assert (copies[:, 0] == 2).all()
    assert torch.equal(copies[:, 1:7], copies[:, 11:])
    # The other text differs in its first segment alone.
    assert torch.equal(copies[:, 7:], others[:, 7:])
    assert not torch.equal(copies[:, 1:7], others[:, 1:7])


def test_a_model_without_memory_gains_nothing(toys) -> None:
    table = torch.randn(11, 11, generator=torch.Generator().manual_seed(0))
    source = np.random.default_rng(0).integers(0, 11, 200)
    for result in recall(lambda ids: table[ids], source=source, filler=source, segment=5, texts=3, distances=(3, 9)):
        assert (result.gain, result.error) == (0.0, 0.0)
    # Random segments and written filler need a model of known vocabulary.
    found = recall(toys["cache"], segment=4, texts=3, distances=(0, 6))
    assert [type(r) for r in found] == [Recall, Recall]
    assert all(math.isfinite(r.gain) and r.error > 0 for r in found)


def test_standard_error() -> None:
    (result,) = recall(Lookup(), source=segments(0), filler=segments(1), segment=6, texts=9, distances=(30,), seed=1)
    gains = []

    def each(tokens: torch.Tensor) -> torch.Tensor:
        scores = Lookup()(tokens)
        right = scores[:, -6:-1].gather(2, tokens[:, -5:, None])[..., 0]
        gains.append(-right.mean(1).numpy())
        return scores

    recall(each, source=segments(0), filler=segments(1), segment=6, texts=9, distances=(30,), seed=1)
    gain = gains[1] - gains[0]
    assert result.gain == pytest.approx(gain.mean(), abs=1e-12)
    assert result.error == pytest.approx(np.std(gain, ddof=1) / 3, abs=1e-12)


def test_key_values_of_bytes() -> None:
    text = np.frombuffer(b"It was a bright cold day in April, and the clocks were striking thirteen. " * 3, np.uint8)
    # Looks three bytes back, so that a value is found by what stands in front of it.
    model = Lookup(vocabulary=256, context=3)
    near, far = key_value_recall(model, filler=text, pairs=2, texts=3, distances=(0, 60))
    for result in (near, far):
        assert result.gain > 0
        assert result.second < result.unseen
    # With a window shorter than the filler both texts look the same.
    (forgotten,) = key_value_recall(Lookup(50, 256, 3), filler=text, pairs=2, texts=3, distances=(100,))
    assert (forgotten.gain, forgotten.error) == (0.0, 0.0)
    seen = []

    def watched(tokens: torch.Tensor) -> torch.Tensor:
        seen.append(bytes(tokens[0].tolist()).decode())
        return model(tokens)

    key_value_recall(watched, filler=text, pairs=2, texts=2, distances=(20,))
    *lines, asked = seen[0].rsplit("\n", 1)
    assert asked in lines[0].split("\n")[:2]
    assert len(asked) == len("bd = 4021")
    other = seen[1].rsplit("\n", 1)
    assert other[1] == asked
    assert asked not in other[0]
    assert asked[:5] in other[0]


def test_mistakes() -> None:
    model = Lookup()
    for options, match in (
        ({"segment": 1}, "expected segments of at least 2 tokens"),
        ({"texts": 1}, "at least 2 texts"),
        ({"distances": (-1,)}, "distances of at least 0"),
        ({"distances": ()}, "distances of at least 0"),
        ({"filler": np.arange(5), "distances": (9,)}, "expected a text of at least 9 tokens to cut pieces from, got 5"),
        ({"filler": segments(0), "source": None}, "expected a model of known vocabulary"),
    ):
        with pytest.raises(GraphOptError, match=match):
            recall(model, **({"source": segments(0)} | options))
    with pytest.raises(GraphOptError, match="expected at least 1 pair"):
        key_value_recall(model, pairs=0)
