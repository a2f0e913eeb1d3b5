"""Ablations: each row against a loop over tokens, which rows there are, and going on after an interruption."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch

import graphopt
from graphopt import CheckFailed, GraphOptError, NothingToRewrite
from graphopt.evaluation import Ablation, Row, ablate, variants
from graphopt.evaluation.store import graph_digest
from graphopt.evaluation.variants import ORDER
from graphopt.graph import Graph
from graphopt.rewrite import Equivalence, SitePass

PASS = "linearize{window=4,fit_steps=3,lora_steps=2}"
SMALL: dict[str, Any] = {"calibration": "self:20x24", "texts": 4, "distances": (0, 8)}
Texts = Callable[[int, int, int], np.ndarray[Any, Any]]


def loop(module: torch.nn.Module, text: np.ndarray[Any, Any], visible: Callable[[int, int], bool]) -> np.ndarray:
    """Cross-entropy of each token but the first in fp64, with softmax over the keys j that query i may see."""
    table, head = (getattr(module, name).detach().double().numpy() for name in ("table", "head"))
    weights = {n: w.detach().double().numpy() for n, w in module.weights.items()}
    nats = []
    for row in text:
        x = table[row]
        q, k, v = (x @ weights[n] for n in "qkv")
        size = q.shape[1] // 2
        for i in range(len(row) - 1):
            keys = [j for j in range(i + 1) if visible(i, j)]
            heads = []
            for part in (slice(0, size), slice(size, 2 * size)):
                p = np.exp(q[i, part] @ k[keys][:, part].T / size**0.5)
                heads.append(p / p.sum() @ v[keys][:, part])
            logits = (x[i] + np.concatenate(heads) @ weights["o"]) @ head
            nats.append(np.log(np.exp(logits).sum()) - logits[row[i + 1]])
    return np.array(nats).reshape(len(text), -1)


@pytest.fixture(scope="module")
def held_out(texts: Texts) -> np.ndarray[Any, Any]:
    return texts(1, 6, 24)


@pytest.fixture(scope="module")
def ablation(module_graph: Graph, held_out: np.ndarray[Any, Any]) -> Ablation:
    return ablate(module_graph, PASS, held_out=held_out, **SMALL)


@pytest.mark.parametrize(
    ("key", "visible"),
    [
        ("original", lambda i, j: True),
        ("window", lambda i, j: j > i - 4),
        ("window_sinks", lambda i, j: j < 4 or j > i - 4),
    ],
)
def test_rows_without_training_are_what_a_loop_computes(
    key: str,
    visible: Callable[[int, int], bool],
    ablation: Ablation,
    module: torch.nn.Module,
    held_out: np.ndarray[Any, Any],
) -> None:
    expected = loop(module, held_out, visible)
    found = ablation.row(key).measured
    # Sums of fp32 logits of size 5.
    np.testing.assert_allclose(found.per_text, expected.mean(1), atol=1e-5)
    assert found.nats == pytest.approx(expected.mean(), abs=1e-5)
    assert found.perplexity == pytest.approx(np.exp(expected.mean()), rel=1e-5)
    assert found.error == pytest.approx(expected.mean(1).std(ddof=1) / 6**0.5, abs=1e-5)
    assert found.tokens == expected.size
    for bucket in found.buckets:
        part = expected[:, bucket.first - 1 : bucket.last]
        assert (bucket.nats, bucket.tokens) == (pytest.approx(part.mean(), abs=1e-5), part.size)
    assert [b.first for b in found.buckets] == [1, 2, 3, 4, 6, 8, 11, 16, 23]
    assert found.buckets[-1].last == 23


def test_all_rows_and_what_they_say(ablation: Ablation) -> None:
    assert tuple(row.key for row in ablation.rows) == ORDER
    assert ablation.left_out == ()
    assert ablation.pipeline == (PASS,)
    for row in ablation.rows[1:]:
        assert row.sites["rewritten"] == 1
        change, error = row.difference(ablation.original)
        assert change == pytest.approx(row.measured.nats - ablation.original.measured.nats)
        assert error > 0
    trained = {row.key: row.pipeline[0] for row in ablation.rows[1:]}
    assert "train=transfer" in trained["transfer"]
    assert "train" not in trained["full"]
    assert "branches=linear" in trained["linear_trained"]


def test_a_window_recalls_nothing_beyond_itself(ablation: Ablation) -> None:
    """Behind 8 tokens of filler, one layer with a window of 4 sees nothing of the first copy: the gain is exactly 0."""
    near, far = ablation.row("window").measured.recall
    assert (near.distance, far.distance) == (0, 8)
    assert near.gain != 0.0
    assert far.gain == 0.0
    assert ablation.row("linear").measured.recall[1].gain != 0.0


@pytest.mark.parametrize("name", ["plain", "cached"])
def test_onnx_files_give_the_same_numbers(
    name: str, decoder_files: dict[str, Path], ablation: Ablation, held_out: np.ndarray[Any, Any]
) -> None:
    keys = ("swap", "full", "linear")
    found = ablate(graphopt.load(decoder_files[name]), PASS, held_out=held_out, rows=keys, **SMALL)
    for row in found.rows:
        expected = ablation.row(row.key).measured
        # The same sums in another order, through five steps of training.
        assert row.measured.nats == pytest.approx(expected.nats, abs=1e-4), row.key
        assert row.measured.recall[1].gain == pytest.approx(expected.recall[1].gain, abs=1e-4), row.key


def test_the_same_seed_gives_the_same_numbers(
    module_graph: Graph, ablation: Ablation, held_out: np.ndarray[Any, Any]
) -> None:
    again = ablate(module_graph, PASS, held_out=held_out, rows=["full"], **SMALL)
    assert again.row("full").measured == ablation.row("full").measured
    other = ablate(module_graph, PASS, held_out=held_out, rows=["full"], seed=1, **SMALL)
    assert other.row("full").measured.nats != ablation.row("full").measured.nats


def test_held_out_batches_by_default(module_graph: Graph, texts: Texts, module: torch.nn.Module) -> None:
    batches = [{"input_ids": texts(10 + i, 2, 20)} for i in range(10)]
    found = ablate(module_graph, PASS, calibration=batches, rows=["swap"], distances=(0,), texts=2)
    # Of ten batches, the sixth is kept from training.
    expected = loop(module, texts(15, 2, 20), lambda i, j: True)
    assert found.original.measured.nats == pytest.approx(expected.mean(), abs=1e-5)
    assert any("fewer than 8 texts" in note for note in found.notes)


def stopping(after: int) -> Callable[[Iterable[Any], int | None, str], Iterator[Any]]:
    """A progress bar at which the user loses patience when a row begins."""

    def track(items: Iterable[Any], total: int | None, text: str) -> Iterator[Any]:
        for number, item in enumerate(items):
            if text == "Ablation" and number == after:
                raise KeyboardInterrupt
            yield item

    return track


def counting(begun: list[str]) -> Callable[[Iterable[Any], int | None, str], Iterator[Any]]:
    def track(items: Iterable[Any], total: int | None, text: str) -> Iterator[Any]:
        begun.append(text)
        yield from items

    return track


def test_goes_on_after_an_interruption(
    module_graph: Graph, ablation: Ablation, held_out: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    inputs: dict[str, Any] = {**SMALL, "held_out": held_out, "rows": ["swap", "linear", "full"], "folder": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        ablate(module_graph, PASS, track=stopping(2), **inputs)
    assert sorted(path.name for path in (tmp_path / "rows").iterdir()) == ["original.json", "swap.json"]
    begun: list[str] = []
    found = ablate(module_graph, PASS, track=counting(begun), **inputs)
    assert begun.count("Measuring cross-entropy") == 2
    assert {row.key: row.measured for row in found.rows} == {
        key: ablation.row(key).measured for key in ("original", "swap", "linear", "full")
    }
    begun.clear()
    assert ablate(module_graph, PASS, track=counting(begun), **inputs).rows == found.rows
    assert "Measuring cross-entropy" not in begun
    ablate(module_graph, PASS, track=counting(begun), seed=1, **inputs)
    assert begun.count("Measuring cross-entropy") == 4


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 1}', "null", "\x00"])
def test_a_broken_row_is_computed_anew(
    content: str, module_graph: Graph, held_out: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    inputs: dict[str, Any] = {**SMALL, "held_out": held_out, "rows": ["swap"], "folder": tmp_path}
    whole = ablate(module_graph, PASS, **inputs)
    stored = tmp_path / "rows" / "swap.json"
    kept = json.loads(stored.read_text())
    stored.write_text(content)
    assert ablate(module_graph, PASS, **inputs).row("swap").measured == whole.row("swap").measured
    again = json.loads(stored.read_text())
    assert again["fingerprint"] == kept["fingerprint"]
    # One of another form, under the right fingerprint.
    stored.write_text(json.dumps({**kept, "row": {"key": "swap"}}))
    assert ablate(module_graph, PASS, **inputs).row("swap").measured == whole.row("swap").measured


def test_the_model_hash_sees_weights_and_nodes(
    decoder_files: dict[str, Path], module_graph: Graph, module: torch.nn.Module
) -> None:
    plain = graphopt.load(decoder_files["plain"])
    assert graph_digest(plain) == graph_digest(graphopt.load(decoder_files["plain"]))
    assert graph_digest(plain) == graph_digest(plain.copy())
    assert graph_digest(plain) != graph_digest(graphopt.load(decoder_files["cached"]))
    changed = module_graph.copy()
    assert graph_digest(changed) == graph_digest(module_graph)
    node = next(n for n in changed.nodes if n.op == "get_attr")
    value = changed.weight(node).clone()
    value.view(-1)[-1] += 1
    from graphopt.graph import set_attribute

    set_attribute(changed.module, str(node.target), value)
    assert graph_digest(changed) != graph_digest(module_graph)


def test_stages_stop_where_the_pass_does() -> None:
    found, missing = variants("linearize{train=transfer}")
    assert [v.key for v in found] == [
        "original", "swap", "window", "window_sinks", "linear", "transfer", "window_trained", "linear_trained",
    ]  # fmt: skip
    assert [(item.key, item.failed) for item in missing] == [("full", False)]
    assert "train=transfer" in missing[0].reason
    found, missing = variants("linearize{train=none,sinks=4,window=8}")
    assert [v.key for v in found] == ["original", "swap", "window", "linear"]
    assert {item.key for item in missing} == {"transfer", "full", "window_sinks", "window_trained", "linear_trained"}
    found, _ = variants(["cleanup", "linearize"], ["swap"])
    assert [item.name for item in found[1].passes] == ["cleanup", "linearize"]


@pytest.mark.parametrize(
    ("spelling", "sentence"),
    [
        ("cleanup", "found 0 among: cleanup"),
        (["linearize", "linearize"], "found 2 among"),
        ("linearize{branches=window}", "expected branches=both"),
        ([], "found 0 among: none"),
    ],
)
def test_pipelines_that_cannot_be_taken_apart(spelling: Any, sentence: str) -> None:
    with pytest.raises(GraphOptError, match=sentence):
        variants(spelling)


def test_unknown_rows() -> None:
    with pytest.raises(GraphOptError, match="expected rows among original, swap"):
        variants("linearize", ["swapped"])


def test_a_method_without_branches(module_graph: Graph, held_out: np.ndarray[Any, Any]) -> None:
    """What an option does is seen by the numbers: method gated takes `branches` and does nothing with it."""
    spelling = "linearize{method=gated,window=4,fit_steps=2,lora_steps=1}"
    found = ablate(module_graph, spelling, held_out=held_out, **SMALL)
    left = {item.key: item for item in found.left_out}
    assert left.keys() == {"window", "window_sinks", "linear", "window_trained", "linear_trained"} - {
        row.key for row in found.rows
    }
    assert "very same numbers as the row 'after swap'" in left["window"].reason
    assert "do nothing" in left["linear_trained"].reason
    assert not any(item.failed for item in found.left_out)


@dataclass(frozen=True)
class Halved(SitePass):
    """softmax(q k) v   ->   softmax(q k) v / 2, in a pass of a third party that has no branches

    It fails where it is trained.
    """

    name: ClassVar[str] = "halved"
    kind: ClassVar[str] = "attention"
    equivalence: ClassVar[Equivalence] = Equivalence.ARCHITECTURE

    train: Literal["full", "transfer", "none"] = "full"
    """How far to train."""

    def build(self, site: Any, context: Any) -> torch.nn.Module:
        if self.train != "none":
            raise StopIteration
        return _Half(site)


class _Half(torch.nn.Module):
    def __init__(self, site: Any) -> None:
        super().__init__()
        self.site = site

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return self.site.merge(self.site.split(*values).v * 0.5)


def test_a_third_partys_pass_whose_training_fails(module_graph: Graph, held_out: np.ndarray[Any, Any]) -> None:
    found = ablate(module_graph, Halved(), held_out=held_out, **SMALL)
    assert [row.key for row in found.rows] == ["original", "swap"]
    assert {item.key for item in found.failed} == {"transfer", "full"}
    assert "StopIteration" in found.failed[0].reason
    reasons = {item.key: item.reason for item in found.left_out}
    assert reasons["window"] == "halved has no option branches"
    with pytest.raises(CheckFailed, match="none could be computed"):
        ablate(module_graph, Halved(), held_out=held_out, rows=["full"], **SMALL)


def test_refused_models_and_data(module_graph: Graph, texts: Texts) -> None:
    linear = graphopt.load(torch.nn.Linear(3, 3), (torch.zeros(2, 3),))
    with pytest.raises(NothingToRewrite, match="there is no candidate"):
        ablate(linear, PASS)
    with pytest.raises(GraphOptError, match="at least 10 calibration batches"):
        ablate(module_graph, PASS, calibration=[{"input_ids": texts(0, 2, 20)}])
    twice = texts(4, 20, 20)
    with pytest.raises(GraphOptError, match="found 5 of 5 in both"):
        ablate(module_graph, PASS, calibration=[{"input_ids": twice}], held_out=twice[:5])
    with pytest.raises(GraphOptError, match="at least 8 tokens"):
        ablate(module_graph, PASS, calibration=[{"input_ids": twice}], held_out=twice[:, :5])
    with pytest.raises(GraphOptError, match="distances between 0 and 10"):
        ablate(module_graph, PASS, calibration=[{"input_ids": twice}], held_out=texts(5, 2, 20), distances=[11])


def test_a_row_survives_json(ablation: Ablation) -> None:
    for row in ablation.rows:
        assert Row.from_dict(json.loads(json.dumps(row.to_dict(), allow_nan=False))) == row
    for broken in (None, {}, [], {"measured": 1}, {**ablation.rows[1].to_dict(), "more": 1}):
        with pytest.raises(ValueError, match="expected a row"):
            Row.from_dict(broken)
