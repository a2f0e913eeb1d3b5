"""report: pages of JSON reports, and ablations with their files, exit codes and interruptions."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt.evaluation import ablation

Invoke = Callable[..., Any]
Refused = Callable[..., str]
PASS = "linearize{window=4,fit_steps=3,lora_steps=2}"
FILES = {
    "report.json", "table.md", "report.html", "rows",
    *(f"{name}.{suffix}" for name in ("cross_entropy", "recall", "perplexity") for suffix in ("svg", "png")),
}  # fmt: skip


@pytest.fixture(scope="module")
def build_decoder() -> Callable[..., Path]:
    source = Path(__file__).parents[1] / "evaluation" / "conftest.py"
    spec = importlib.util.spec_from_file_location("evaluation_models", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.decoder_file


@pytest.fixture
def decoder(build_decoder: Callable[..., Path], tmp_path: Path) -> Path:
    return build_decoder(tmp_path / "decoder.onnx", cached=False)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.npz"
    np.savez(path, input_ids=np.random.default_rng(2).integers(0, 13, (8, 24)))
    return path


@pytest.fixture
def transformed(invoke: Invoke, attention: Path) -> Path:
    path = attention.with_name("t.json")
    result = invoke("transform", attention, "--pass", "linearize{fit_steps=2}", "--json", path)
    assert result.exit_code == 0, result.output
    return path


def test_shows_reports(invoke: Invoke, transformed: Path) -> None:
    result = invoke("report", transformed)
    assert result.exit_code == 0, result.output
    assert "1 rewritten" in result.stdout
    page = transformed.with_suffix(".html").read_text()
    data = json.loads(transformed.read_text())
    for text in (data["pipeline"][0], data["passes"][0]["sites"][0]["name"], data["input"]["sha256"], "seq=128"):
        assert text in page
    out = transformed.with_name("both.html")
    other = transformed.with_name("u.json")
    other.write_text(transformed.read_text())
    assert invoke("report", transformed, other, "-o", out).exit_code == 0
    assert out.read_text().count("<h2>") == 2


def test_refuses_to_overwrite(invoke: Invoke, transformed: Path, rejects: Refused) -> None:
    assert "is a folder" in rejects("report", transformed, "-o", transformed.parent)
    assert "another file" in rejects("report", transformed, "-o", transformed, "--force")
    page = transformed.with_suffix(".html")
    page.write_text("mine")
    assert "give --force" in rejects("report", transformed)
    assert invoke("report", transformed, "--force", "--quiet").stdout == ""
    assert page.read_text() != "mine"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1}', "\x00"])
def test_broken_json(content: str, tmp_path: Path, rejects: Refused) -> None:
    path = tmp_path / "broken.json"
    path.write_text(content)
    assert "broken.json" in rejects("report", path)


def test_wrong_usage(decoder: Path, transformed: Path, tmp_path: Path, rejects: Refused) -> None:
    assert "expected --pass" in rejects("report", decoder)
    assert "beside --fit-steps" in rejects("report", transformed, "--fit-steps", 3)
    assert "one model" in rejects("report", decoder, decoder, "--pass", PASS)
    assert "drop --pass" in rejects("report", transformed, "--pass", PASS)
    assert "cannot be read" in rejects("report", tmp_path / "missing.json")
    assert "does not exist" in rejects("report", tmp_path / "missing.onnx", "--pass", PASS)
    assert "did you mean 'linearize'" in rejects("report", decoder, "--pass", "linearise")
    assert "found 0 among: cleanup" in rejects("report", decoder, "--pass", "cleanup")
    assert "expected rows among" in rejects("report", decoder, "--pass", PASS, "--row", "none")
    assert "is none" in rejects("report", decoder, "--pass", PASS, "--eval", tmp_path / "missing.npz")


def test_models_that_are_not_for_it(model: Path, attention: Path, rejects: Refused) -> None:
    assert "there is no candidate" in rejects("report", model, "--pass", PASS, code=3)
    assert "expected a language model" in rejects("report", attention, "--pass", PASS)


def test_bad_text(decoder: Path, tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "text.npz"
    base = ("report", decoder, "--pass", PASS, "--calib", "self:10x12", "--eval", path, "-o", tmp_path / "out")
    path.write_bytes(b"no archive")
    assert "cannot be read as one" in refused(*base)
    np.savez(path, ids=np.zeros((2, 12), int))
    assert "expected an array 'input_ids'" in refused(*base)
    np.savez(path, input_ids=np.full((2, 12), 13))
    assert "expected tokens in [0, 13)" in refused(*base)
    np.savez(path, input_ids=np.zeros((2, 12), int), attention_mask=np.ones((2, 11), int))
    assert "expected a mask of the tokens' shape" in refused(*base)


def test_without_the_extra(decoder: Path, transformed: Path, rejects: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for arguments in ((decoder, "--pass", PASS), (transformed,)):
        assert 'pip install "graphopt[report]"' in rejects("report", *arguments)


def test_ablation(invoke: Invoke, decoder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    options = ["--calib", "self:20x24", "--eval", text, "--distance", 0, "--distance", 8, "-o", out]
    rows = ["--row", "swap", "--row", "full", "--row", "window"]
    command = ("report", decoder, "--pass", PASS, *options, *rows)
    # Interrupted while the third row is measured, and run again.
    measure, calls = ablation.measure, []

    def interrupted(*args: Any, **more: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*args, **more)

    monkeypatch.setattr(ablation, "measure", interrupted)
    result = invoke(*command)
    assert result.exit_code == 130
    assert {path.name for path in (out / "rows").iterdir()} == {"original.json", "swap.json"}
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    assert len(calls) == 5  # two before, and two that were missing
    for word in ("after swap", "after LoRA", "window only", "recall @8", "wrote report.json"):
        assert word in result.stdout
    assert {path.name for path in out.iterdir()} == FILES
    data = json.loads((out / "report.json").read_text())
    assert data["schema"] == "graphopt.ablation/1"
    assert [row["key"] for row in data["rows"]] == ["original", "swap", "full", "window"]
    assert data["input"]["path"] == str(decoder)
    assert data["held_out"] | {"sha256": ""} == {"description": "text.npz", "texts": 8, "length": 24, "sha256": ""}
    for row in data["rows"]:
        assert row["perplexity"] == pytest.approx(np.exp(row["nats"]))
        assert row["ratio"] == pytest.approx(np.exp(row["nats"] - data["rows"][0]["nats"]))
    assert "after LoRA" in (out / "table.md").read_text()
    assert "text.npz" in (out / "report.html").read_text()
    # The stored report makes the same page again.
    page = tmp_path / "again.html"
    assert invoke("report", out / "report.json", "-o", page).exit_code == 0
    assert page.read_text() == (out / "report.html").read_text()
    again = json.loads(invoke(*command[:-6], "--row", "swap", "--json", "-", "--seed", 0).stdout)
    assert again["rows"] == data["rows"][:2]


def test_a_failed_stage_is_an_exit_code(
    invoke: Invoke, decoder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rows are written all the same."""
    apply = ablation.apply

    def failing(graph: Any, passes: Any, **more: Any) -> Any:
        if passes[0].train == "transfer":
            raise RuntimeError("no luck")
        return apply(graph, passes, **more)

    monkeypatch.setattr(ablation, "apply", failing)
    out = tmp_path / "out"
    options = ("--calib", "self:10x16", "--eval", text, "--distance", 0, "-o", out, "--fit-steps", 0)
    result = invoke("report", decoder, "--pass", PASS, *options, "--row", "swap", "--row", "transfer")
    assert result.exit_code == 1
    assert "after transfer: RuntimeError: no luck" in result.stderr
    data = json.loads((out / "report.json").read_text())
    assert [row["key"] for row in data["rows"]] == ["original", "swap"]
    assert [(item["key"], item["failed"]) for item in data["left_out"]] == [("transfer", True)]


def test_help(invoke: Invoke) -> None:
    result = invoke("report", "--help")
    assert result.exit_code == 0
    for word in ("--pass", "--eval", "--calib", "--row", "--fit-steps", "--seed", "Example"):
        assert word in result.stdout
