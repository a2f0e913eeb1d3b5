"""The tools on a pretrained model: stories260K, without a cache as a module and with one as a graph."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graphopt.decoders import Interface, cross_entropy, generate, logits, recall, self_calibration
from graphopt.graph import Graph

SENTENCE = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."


@pytest.fixture(scope="module")
def tokenizer(sample_module: Callable[[str], Any], shared_data: Path) -> Any:
    return sample_module("tokenizer").Tokenizer(shared_data / "stories260k" / "tok512.bin")


@pytest.fixture(scope="module")
def text(tokenizer: Any, shared_data: Path) -> np.ndarray:
    """Tokens of held-out stories."""
    return np.array(tokenizer.encode((shared_data / "text" / "tinystories_sample.txt").read_text()[:12_000]))


def test_the_published_sentence(stories: Graph, tokenizer: Any) -> None:
    found = generate(stories, [1], new_tokens=40)
    assert tokenizer.decode(found[0].tolist()).startswith(SENTENCE)


def test_prefill_equals_decode(stories: Graph, stories_module: torch.nn.Module, text: np.ndarray) -> None:
    ids = text[:90].reshape(2, 45)
    with torch.no_grad():
        wanted = stories_module(torch.from_numpy(ids)).numpy()
    # fp32 logits of size 20, five layers: 1e-5 of that.
    for split in (None, 1, 30):
        np.testing.assert_allclose(logits(stories, ids, split=split), wanted, atol=2e-4, rtol=0)


def test_its_own_text(stories: Graph, stories_module: torch.nn.Module) -> None:
    batches = self_calibration(stories, sequences=12, length=160, first=1, seed=0)
    score = cross_entropy(stories, batches)
    # 1.26 nats per token is known of this model; the mean of 12 texts has a standard error of 0.05: three of them.
    assert score.nats == pytest.approx(1.26, abs=0.15)
    # An unbiased draw costs what the model's distribution holds in entropy: their difference has one of 0.03.
    tokens_at = [spec.name for spec in stories.inputs].index(Interface.of(stories).tokens.name)
    ids = torch.cat([batch[tokens_at] for batch in batches])
    with torch.no_grad():
        entropy = torch.distributions.Categorical(logits=stories_module(ids)[:, :-1]).entropy().mean()
    assert score.nats == pytest.approx(float(entropy), abs=0.1)


def test_recall_fades_with_the_distance(stories: Graph, text: np.ndarray) -> None:
    near, far = recall(stories, distances=(0, 256), texts=16, filler=text, source=text, first=1)
    # Over four seeds: 0.27 to 0.38 nats per token next to each other, 0.02 to 0.04 behind 256 tokens.
    assert near.gain > 0.15
    assert far.gain < 0.5 * near.gain
    # Copies of random tokens are not recalled (-0.18 to 0.10), though the second one costs 0.5 to 0.7 less.
    (noise,) = recall(stories, distances=(0,), texts=16, filler=text, first=1)
    assert noise.drop > 0.3
    assert abs(noise.gain) < 0.3
