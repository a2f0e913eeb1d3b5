"""Calibration on text: what the batches hold, and every way to ask for them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from typer.testing import CliRunner

import graphopt
from graphopt import GraphOptError
from graphopt.calibration import calibration_for
from graphopt.cli import app
from graphopt.decoders import generate, self_calibration, text_batches
from graphopt.graph import Graph
from graphopt.rewrite import Equivalence, Pass, SiteReport

DECODERS = ["none", "cache", "state"]


@dataclass(frozen=True)
class Watch(Pass):
    """x -> x"""

    name: ClassVar[str] = "watch"
    equivalence: ClassVar[Equivalence] = Equivalence.EXACT
    needs_calibration: ClassVar[bool] = True

    def run(self, graph: Graph, context: Any) -> tuple[Graph, list[SiteReport]]:
        return graph.copy(), [SiteReport("x", "x", "rewritten")]


@dataclass(frozen=True)
class Look(Watch):
    """x -> x"""

    name: ClassVar[str] = "look"
    needs_calibration: ClassVar[bool] = False


def by_name(graph: Graph, batch: tuple[Any, ...]) -> dict[str, torch.Tensor]:
    return {spec.name: value for spec, value in zip(graph.inputs, batch, strict=True)}


def check_batch(graph: Graph, batch: tuple[Any, ...], rows: int, length: int) -> torch.Tensor:
    """The tokens of a batch whose other inputs are those of a text that nothing precedes."""
    values = by_name(graph, batch)
    assert values["input_ids"].shape == (rows, length)
    assert values["attention_mask"].tolist() == [[1] * length] * rows
    assert values["position_ids"].tolist() == [list(range(length))] * rows
    if "past_key_values.0.key" in values:
        assert values["past_key_values.0.key"].shape == (rows, 1, 0, 4)
    if "past_state.0" in values:
        assert torch.equal(values["past_state.0"], torch.zeros(rows, 1, 1, 4))
    return values["input_ids"]


@pytest.mark.parametrize("memory", DECODERS)
def test_own_text(toys: dict[str, Path], memory: str) -> None:
    graph = graphopt.load(toys[memory])
    batches = self_calibration(graph, sequences=10, length=12, batch=4, seed=3)
    ids = torch.cat([check_batch(graph, b, r, 12) for b, r in zip(batches, (4, 4, 2), strict=True)]).numpy()
    again = self_calibration(graph, sequences=10, length=12, batch=4, seed=3)
    assert all(torch.equal(a, b) for x, y in zip(batches, again, strict=True) for a, b in zip(x, y, strict=True))
    # The same draws by `generate`, from the same first tokens.
    wanted = generate(toys[memory], ids[:, :1], new_tokens=11, temperature=1.0, seed=3)
    assert ids.tolist() == wanted.tolist()
    other = self_calibration(graph, sequences=10, length=12, batch=4, seed=4)
    assert not torch.equal(other[0][-1], batches[0][-1])
    assert len(set(ids[:, 0].tolist())) > 1
    begun = self_calibration(graph, sequences=3, length=4, first=1)
    assert [by_name(graph, b)["input_ids"][:, 0].tolist() for b in begun] == [[1]] * 3


def test_greedy_text_and_progress(toys: dict[str, Path]) -> None:
    graph = graphopt.load(toys["cache"])
    seen = []

    def track(items: Any, total: int | None, text: str) -> Any:
        for item in items:
            yield item
            seen.append((total, text))

    batches = self_calibration(graph, sequences=2, length=6, temperature=0.0, first=5, track=track)
    ids = np.concatenate([by_name(graph, b)["input_ids"].numpy() for b in batches])
    assert ids.tolist() == generate(graph, [[5]] * 2, new_tokens=5).tolist()
    assert seen == [(5, "Sampling text")] * 5


def test_given_text(toys: dict[str, Path]) -> None:
    graph = graphopt.load(toys["state"])
    text = np.arange(47) % 11
    batches = text_batches(graph, text, length=9, batch=2)
    ids = torch.cat([check_batch(graph, b, r, 9) for b, r in zip(batches, (2, 2, 1), strict=True)])
    assert ids.flatten().tolist() == text[:45].tolist()
    rows = text[:40].reshape(4, 10).astype(np.int32)
    (batch,) = text_batches(graph, rows)
    assert check_batch(graph, batch, 4, 10).tolist() == rows.tolist()
    assert len(text_batches(graph, rows, length=3, batch=5)) == 3  # 12 pieces of 3, and 4 tokens left over
    for values in batches:
        graph.execute(*values)


def test_static_sizes() -> None:
    class Bigram(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(5, 5)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.embed(ids)

    graph = graphopt.load(Bigram(), (torch.zeros(2, 7, dtype=torch.int64),))
    data = calibration_for(graph, None, fitting=True)
    assert data.description == "32 texts of 7 tokens that the model wrote itself"
    assert [tuple(b[0].shape) for b in data] == [(2, 7)] * 16
    (groups,) = zip(*data.batches, strict=True)
    assert len({tuple(row) for batch in groups for row in batch.tolist()}) > 25, "each group has draws of its own"
    with pytest.raises(GraphOptError, match="at least the 2 sequences that the model takes at once"):
        text_batches(graph, np.zeros(7, np.int64))


def test_large_vocabularies_are_written_in_groups(toys: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graphopt.load(toys["none"])
    whole = torch.cat([by_name(graph, b)["input_ids"] for b in self_calibration(graph, sequences=7, length=6)])
    monkeypatch.setattr("graphopt.decoders.perplexity._MOST_LOGITS", 3 * 6 * 11)
    seen: list[int] = []
    execute = Graph.run
    monkeypatch.setattr(Graph, "run", lambda self, feeds: seen.append(len(feeds["input_ids"])) or execute(self, feeds))
    parts = torch.cat([by_name(graph, b)["input_ids"] for b in self_calibration(graph, sequences=7, length=6)])
    assert seen == [3] * 5 + [3] * 5 + [1] * 5
    assert parts.shape == whole.shape == (7, 6)
    assert torch.equal(parts, whole), "a text does not depend on those beside it"


def test_sources(toys: dict[str, Path]) -> None:
    graph = graphopt.load(toys["cache"])
    data = calibration_for(graph, "self:20x8", seed=2)
    assert data.description == "20 texts of 8 tokens that the model wrote itself"
    assert not data.synthetic
    assert [check_batch(graph, b, 2, 8).shape for b in data] == [(2, 8)] * 10
    assert torch.equal(data.batches[0][-1], self_calibration(graph, sequences=20, length=8, seed=2)[0][-1])
    # The usual 128 tokens are more than its 64 positions.
    assert calibration_for(graph, "self").description == "32 texts of 64 tokens that the model wrote itself"
    assert calibration_for(graph, "self", sizes={"T": 5}).description.startswith("32 texts of 5 tokens")
    for source in ("self:", "self:3", "self:0x4", "self:3x-1", "self:axb"):
        with pytest.raises(
            GraphOptError, match=r"expected self or self:SEQUENCESxLENGTH, as in self:32x256, got 'self"
        ):
            calibration_for(graph, source)
    with pytest.raises(GraphOptError, match="at least 1 text of at least 2 tokens to sample, got 3 of 1 tokens"):
        calibration_for(graph, "self:3x1")
    with pytest.raises(GraphOptError, match="cannot be computed on these values"):
        calibration_for(graph, "self:2x70")


def test_default_where_something_is_fitted(toys: dict[str, Path], tmp_path: Path) -> None:
    graph = graphopt.load(toys["state"])
    assert graph.apply(Watch()).report.calibration == "32 texts of 64 tokens that the model wrote itself"
    assert graph.apply(Watch(), sizes={"T": 6}).report.calibration.startswith("32 texts of 6 tokens")
    fitted = graph.apply(Watch()).report
    assert not [note for note in fitted.notes if "random" in note]
    # Random inputs where nothing is fitted, where they are asked for, and where batches have to be of a size.
    for passes, options in ((Look(), {}), (Watch(), {"calibration": 3}), (Watch(), {"calibration": "random"})):
        report = graphopt.load(toys["none"]).apply(passes, **options).report
        assert "random batches" in report.calibration
    report = graphopt.load(toys["none"]).apply(Watch(), sizes={"B": 2, "T": 6}).report
    assert "random batches" in report.calibration


@pytest.mark.parametrize("looks_ahead", [False, True])
def test_default_needs_a_causal_model(tmp_path: Path, looks_ahead: bool) -> None:
    rng = np.random.default_rng(0)
    mix = "m = ReduceMean <axes = [1]> (e)" if looks_ahead else "m = CumSum(e, one)"
    text = f"""<ir_version: 8, opset_import: ["": 17]>
    g (int64[batch,seq] ids) => (float[batch,seq,7] y)
    {{ e = Gather(table, ids) {mix} s = Add(e, m) y = MatMul(s, head) }}"""
    model = onnx.parser.parse_model(text)
    for name, value in (("table", rng.normal(size=(7, 4))), ("head", rng.normal(size=(4, 7)))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(value.astype(np.float32), name))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1), "one"))
    onnx.save(model, tmp_path / "m.onnx")
    description = calibration_for(graphopt.load(tmp_path / "m.onnx"), None, fitting=True).description
    assert description.startswith("8 random batches" if looks_ahead else "32 texts of 128 tokens")


def test_tokens_alone_suffice_for_a_model_with_memory(toys: dict[str, Path], tmp_path: Path) -> None:
    graph = graphopt.load(toys["state"])
    ids = np.random.default_rng(0).integers(0, 11, (20, 5))
    np.savez(tmp_path / "ids.npz", input_ids=ids)
    found = [check_batch(graph, b, r, 5) for b, r in zip(calibration_for(graph, tmp_path / "ids.npz"), (16, 4))]  # noqa: B905
    assert torch.cat(found).tolist() == ids.tolist()
    np.savez(tmp_path / "stacked.npz", input_ids=ids.reshape(5, 4, 5).astype(np.int32))
    assert [check_batch(graph, b, 4, 5).shape for b in calibration_for(graph, tmp_path / "stacked.npz")] == [(4, 5)] * 5
    # As before: some of the others are no tokens alone, and without a memory everything has to be given.
    np.savez(tmp_path / "some.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    with pytest.raises(GraphOptError, match="expected a value for input position_ids"):
        calibration_for(graph, tmp_path / "some.npz")
    with pytest.raises(GraphOptError, match="expected a value for input"):
        calibration_for(graphopt.load(toys["none"]), tmp_path / "ids.npz")
    np.savez(tmp_path / "wide.npz", input_ids=ids + 20)
    with pytest.raises(GraphOptError, match=r"expected tokens in \[0, 11\)"):
        calibration_for(graph, tmp_path / "wide.npz")


def test_command_line(toys: dict[str, Path], tmp_path: Path) -> None:
    out, report = tmp_path / "out.onnx", tmp_path / "report.json"
    run = ["transform", toys["cache"], "-o", out, "--pass", "cleanup", "--allow-noop", "--json", report]
    done = CliRunner().invoke(app, [*map(str, run), "--calib", "self:11x7", "--quiet"])
    assert done.exit_code == 0, done.output
    assert json.loads(report.read_text())["calibration"] == "11 texts of 7 tokens that the model wrote itself"
    done = CliRunner().invoke(app, [*map(str, run), "--calib", "self:11", "--force"])
    assert done.exit_code == 2
    assert "expected self or self:SEQUENCESxLENGTH" in done.stderr


def test_mistakes(toys: dict[str, Path]) -> None:
    graph = graphopt.load(toys["cache"])
    with pytest.raises(GraphOptError, match=r"expected texts of at least 9 tokens, got 5; choose a smaller length"):
        text_batches(graph, np.zeros(5, np.int64), length=9)
    with pytest.raises(GraphOptError, match="expected at least 1 sequence per batch, got 0"):
        text_batches(graph, np.zeros(5, np.int64), batch=0)
    with pytest.raises(GraphOptError, match=r"expected tokens in \[0, 11\)"):
        self_calibration(graph, sequences=2, length=4, first=11)
