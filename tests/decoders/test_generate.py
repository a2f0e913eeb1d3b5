"""Logits and text against a loop over the tokens, for every kind of memory, in torch and in onnxruntime."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import graphopt
from graphopt import GraphOptError
from graphopt.decoders.driver import Driver
from graphopt.decoders.generate import choose, generate, logits, stream
from graphopt.graph import Graph
from graphopt.registry import backend

WINDOW = {"none": 10**6, "cache": 10**6, "state": 3}
# Sums of at most nine terms of size 1 in fp32.
TOLERANCE = 1e-5
OPENED: dict[str, Callable[[Path], Any]] = {
    "path": lambda path: path,
    "graph": graphopt.load,
    "session": lambda path: backend("onnxruntime").session(graphopt.load(path)),
}


@pytest.mark.parametrize("memory", ["none", "cache", "state"])
@pytest.mark.parametrize("kind", OPENED)
def test_logits_however_the_text_is_fed(toys, reference, tokens: np.ndarray, memory: str, kind: str) -> None:
    model = OPENED[kind](toys[memory])
    wanted = reference(tokens, window=WINDOW[memory])
    # One token at a time, a split within and beyond the window of 3, and all at once.
    for split in (None, 1, 2, 5, 8, 9):
        found = logits(model, tokens, split=split)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, atol=TOLERANCE, rtol=0, err_msg=f"split {split}")


@pytest.mark.parametrize("memory", ["none", "cache", "state"])
def test_left_padding(toys, reference, tokens: np.ndarray, memory: str) -> None:
    mask = np.ones_like(tokens)
    mask[0, :4] = mask[1, :1] = 0
    wanted = reference(tokens, mask, window=WINDOW[memory])
    for split in (None, 1, 3, 6):
        found = logits(toys[memory], tokens, split=split, mask=mask)
        np.testing.assert_allclose(found[mask > 0], wanted[mask > 0], atol=TOLERANCE, rtol=0)
    # What the padding consists of makes no difference, and neither does the padding itself.
    alone = logits(toys[memory], tokens[:1, 4:])
    np.testing.assert_allclose(logits(toys[memory], tokens, mask=mask)[:1, 4:], alone, atol=TOLERANCE, rtol=0)
    padded = generate(toys[memory], tokens, new_tokens=4, mask=mask)
    assert padded[0, 9:].tolist() == generate(toys[memory], tokens[0, 4:], new_tokens=4)[0, 5:].tolist()


@pytest.mark.parametrize("memory", ["none", "cache", "state"])
def test_greedy_text(toys, reference, tokens: np.ndarray, memory: str) -> None:
    wanted = tokens[:, :2]
    for _ in range(8):
        wanted = np.concatenate([wanted, reference(wanted, window=WINDOW[memory])[:, -1:].argmax(-1)], axis=1)
    for kind in ("path", "graph"):
        found = generate(OPENED[kind](toys[memory]), tokens[:, :2], new_tokens=8)
        assert found.dtype == np.int64
        assert found.tolist() == wanted.tolist()


def test_callables_and_static_lengths(reference, tokens: np.ndarray) -> None:
    def toy(ids: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(reference(ids.numpy()))

    found = logits(toy, torch.from_numpy(tokens), split=4)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, reference(tokens))

    class Bigram(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(11, 11)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.embed(ids)

    module = Bigram()
    # Exported without dynamic shapes: 3 texts of 9 tokens and no others.
    graph = graphopt.load(module, (torch.zeros(3, 9, dtype=torch.int64),))
    wanted = module.embed.weight.detach().numpy()
    np.testing.assert_array_equal(logits(graph, tokens[:, :5], split=2), wanted[tokens[:, :5]])
    assert generate(graph, tokens[:, :1], new_tokens=8)[:, 1].tolist() == wanted[tokens[:, 0]].argmax(-1).tolist()
    with pytest.raises(GraphOptError, match="expected at most 9 tokens, which is the model's only length, got 10"):
        generate(graph, tokens, new_tokens=2)


def test_draws_follow_the_distribution() -> None:
    scores = np.log(np.array([0.5, 0.3, 0.2, 1e-300]))
    rows = np.tile(scores, (20_000, 1))
    for temperature, top_k in ((1.0, 0), (0.5, 0), (2.0, 2)):
        found = np.bincount(
            choose(rows, temperature, top_k, np.random.default_rng(0).random(len(rows))), minlength=4
        ) / len(rows)
        weights = np.exp(scores / temperature)
        weights[top_k or 4 :] = 0
        # The standard error of a frequency in 20,000 draws is at most 0.0035; four of them.
        np.testing.assert_allclose(found, weights / weights.sum(), atol=0.014)
    assert (choose(rows[:5], 0.0, 0, np.zeros(5)) == 0).all()
    with pytest.raises(GraphOptError, match="the model gives NaN"):
        choose(np.array([[np.nan, 1.0]]), 1.0, 0, np.zeros(1))


def test_seeds_and_memories_agree(toys) -> None:
    begin = np.zeros((40, 1), np.int64)
    texts = [generate(toys[m], begin, new_tokens=6, temperature=1.0, seed=4) for m in ("none", "cache")]
    assert texts[0].tolist() == texts[1].tolist()
    assert len({tuple(row) for row in texts[0].tolist()}) > 20, "each row has draws of its own"
    other = generate(toys["none"], begin, new_tokens=6, temperature=1.0, seed=5)
    assert other.tolist() != texts[0].tolist()


def test_stop(toys, tokens: np.ndarray) -> None:
    whole = generate(toys["cache"], tokens, new_tokens=8)[:, 9:]
    stop = int(whole[0, 2])
    found = generate(toys["cache"], tokens, new_tokens=8, stop=stop)[:, 9:]
    for row, full in zip(found.tolist(), whole.tolist(), strict=True):
        end = full.index(stop) + 1 if stop in full else len(row)
        assert row[:end] == full[:end]
        assert set(row[end:]) <= {stop}
    alone = generate(toys["cache"], tokens[:1], new_tokens=8, stop={np.int64(stop), 10})
    assert alone.shape[1] < 17
    assert alone[0, -1] in (stop, 10)
    assert generate(toys["cache"], tokens, new_tokens=0).tolist() == tokens.tolist()


def test_stream_is_lazy(toys, tokens: np.ndarray) -> None:
    steps = stream(toys["state"], tokens, new_tokens=10**9)
    first = [next(steps).tolist() for _ in range(3)]
    assert first == generate(toys["state"], tokens, new_tokens=3)[:, 9:].T.tolist()


def test_llama_prefill_equals_decode(llama: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 32000, (2, 9))
    mask = np.ones_like(ids)
    mask[0, :3] = 0
    graph = graphopt.load(llama)
    whole = logits(graph, ids)
    # Logits are fp16 of size 0.4: one unit in the last place is 2.4e-4, and sums in another order move two of them.
    for model, split in ((graph, 4), (llama, None), (llama, 4), (llama, 1)):
        np.testing.assert_allclose(logits(model, ids, split=split), whole, atol=5e-4, rtol=0)
    padded = logits(llama, ids, split=5, mask=mask)
    np.testing.assert_allclose(padded[0, 3:], logits(llama, ids[:1, 3:])[0], atol=5e-4, rtol=0)


def test_mistakes(toys, toy_model, tmp_path: Path, tokens: np.ndarray) -> None:
    model = toys["cache"]
    for prompt, match in (
        (tokens + 3, r"expected tokens in \[0, 11\), got values from"),
        (tokens.astype(np.float32), r"expected integer tokens \[batch, length\].*float32"),
        (np.zeros((2, 0), np.int64), "at least one each"),
    ):
        with pytest.raises(GraphOptError, match=match):
            generate(model, prompt, new_tokens=1)
    for options, match in (
        ({"new_tokens": -1}, "expected new_tokens of at least 0, got -1"),
        ({"new_tokens": 1, "temperature": -0.5}, "expected temperature of at least 0"),
        ({"new_tokens": 1, "top_k": -2}, "expected top_k of at least 0"),
        ({"new_tokens": 1, "mask": np.zeros_like(tokens)}, "expected prompts that end with a token"),
        ({"new_tokens": 1, "mask": np.ones((1, 2))}, r"expected a mask of the tokens' shape \[3, 9\]"),
        ({"new_tokens": 1, "mask": np.full_like(tokens, 2)}, "expected a mask of zeros"),
        ({"new_tokens": 1, "mask": np.arange(9)[None].repeat(3, 0) % 2 ^ 1}, "expected padding only in front"),
    ):
        with pytest.raises(GraphOptError, match=match):
            generate(model, tokens, **options)
    with pytest.raises(GraphOptError, match="expected split between 1 and the 9 tokens"):
        logits(model, tokens, split=10)
    with pytest.raises(GraphOptError, match="expected a path, a Graph, a session or a callable"):
        generate(3, tokens, new_tokens=1)  # type: ignore[arg-type]
    with pytest.raises(GraphOptError, match=r"the model cannot run on tokens of shape \[3, 65\]|cannot be computed"):
        logits(model, np.zeros((3, 65), np.int64))  # beyond the 64 positions
    extra = toy_model("none")
    extra.graph.input.append(onnx.helper.make_tensor_value_info("image", 1, [1, 3, 8, 8]))
    onnx.save(extra, tmp_path / "extra.onnx")
    with pytest.raises(GraphOptError, match=r"as the only inputs, found also image: float32\[1, 3, 8, 8\]"):
        generate(tmp_path / "extra.onnx", tokens, new_tokens=1)
    driver = Driver(model)
    driver.feed(tokens)
    with pytest.raises(GraphOptError, match="expected 3 sequences as at the step before, got 1"):
        driver.feed(tokens[:1])
    with pytest.raises(GraphOptError, match="has no attention mask"):
        generate(lambda ids: torch.zeros(*ids.shape, 11), tokens, new_tokens=1, mask=np.tile(np.arange(9) > 2, (3, 1)))


def test_public_name(toys) -> None:
    assert graphopt.generate is generate
    assert isinstance(graphopt.load(toys["none"]), Graph)
