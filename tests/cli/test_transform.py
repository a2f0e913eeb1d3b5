"""transform: what it writes, what it reports, and when it writes nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

Invoke = Callable[..., Any]
Refused = Callable[..., str]

pytestmark = pytest.mark.usefixtures("soften")


def run(path: Path, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    result: np.ndarray[Any, Any] = session.run(None, {"x": x})[0]
    return result


X = np.random.default_rng(1).normal(size=(5, 2)).astype(np.float32)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_writes_beside_the_model(invoke: Invoke, model: Path) -> None:
    result = invoke("transform", model, "--pass", "soften")
    assert result.exit_code == 0, result.output
    assert names(model.parent) == {"net.onnx", "net.soften.onnx"}
    out = model.with_name("net.soften.onnx")
    onnx.checker.check_model(onnx.load(out), full_check=True)
    assert 1e-4 < abs(run(out, X) - run(model, X)).max() < 0.1
    for text in ("corner_1", "2 rewritten, 1 refused", "a sigmoid has no corner", "wrote ", "relative RMS"):
        assert text in result.stdout


def test_says_that_synthetic_data_gives_no_quality(invoke: Invoke, model: Path) -> None:
    assert "its quality is not" in invoke("transform", model, "--pass", "soften").stdout
    path = model.with_name("calib.npz")
    np.savez(path, x=X)
    result = invoke("transform", model, "--pass", "soften", "--calib", path, "--force")
    assert result.exit_code == 0, result.output
    assert "its quality is not" not in result.stdout


def test_calibration_folder(invoke: Invoke, model: Path) -> None:
    (model.parent / "data").mkdir()
    for i in range(3):
        np.savez(model.parent / "data" / f"{i}.npz", x=X)
    result = invoke("transform", model, "--pass", "soften", "--calib", model.parent / "data", "--json", "-")
    assert json.loads(result.stdout)["calibration"] == "3 batches from data"


def test_report_has_the_documented_fields(invoke: Invoke, model: Path) -> None:
    path = model.with_name("report.json")
    result = invoke("transform", model, "--pass", "soften{shift=0.02}", "--report", path)
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert report["version"] == 1
    assert report["pipeline"] == ["soften{shift=0.02}"]
    for side, file in (("input", "net.onnx"), ("output", "net.soften.onnx")):
        facts = report[side]
        assert Path(facts["path"]).name == file
        assert len(facts["sha256"]) == 64
        assert (facts["bytes"], facts["opset"]) == (model.with_name(file).stat().st_size, 17)
    (one,) = report["passes"]
    assert (one["name"], one["equivalence"]) == ("soften", "approximate")
    assert one["options"] == {"shift": 0.02, "limit": 10.0, "refuse": False, "wait": 0.0}
    assert one["seconds"] >= 0
    assert {site["name"]: site["status"] for site in one["sites"]} == {
        "corner_1": "rewritten",
        "corner_2": "rewritten",
        "last": "refused",
    }
    for site in one["sites"]:
        assert set(site) == {"name", "kind", "status", "reason", "errors"}
    assert set(report["cost"]) == {"before", "after"}
    (output,) = report["verification"]["outputs"]
    assert output["name"] == "y"
    assert output["max_abs"] > 0
    assert output["rel_rms"] > 0
    assert 0.9 < output["cosine"] <= 1
    assert {"python", "torch", "onnx"} <= set(report["environment"])


def test_json_to_stdout_stands_alone(invoke: Invoke, model: Path) -> None:
    result = invoke("transform", model, "--pass", "soften", "--json", "-")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["output"]["path"].endswith("net.soften.onnx")
    assert result.stderr == ""


def test_quiet(invoke: Invoke, model: Path) -> None:
    result = invoke("transform", model, "--pass", "soften", "--quiet")
    assert (result.exit_code, result.output) == (0, "")


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        (["soften"], "net.soften.onnx"),
        (["soften{shift=0.1}", "soften"], "net.soften.onnx"),
        pytest.param(["cleanup", "soften"], "net.soften.onnx"),
    ],
)
def test_default_name(spelled: list[str], name: str) -> None:
    from graphopt.cli.saving import default_output

    passes = [item.partition("{")[0] for item in spelled]
    assert default_output(Path("a") / "net.onnx", passes, "onnx") == Path("a") / name


def test_default_names_of_other_pipelines() -> None:
    from graphopt.cli.saving import default_output

    assert default_output(Path("m.onnx"), ["cleanup"], "onnx").name == "m.cleanup.onnx"
    assert default_output(Path("m.onnx"), ["linearize", "quantize"], "onnx").name == "m.linearize-quantize.onnx"
    assert default_output(Path("m.onnx"), ["linearize"], "torch").name == "m.linearize.pt2"


def test_pipeline_file_runs_before_the_given_passes(invoke: Invoke, model: Path) -> None:
    path = model.with_name("pipeline.toml")
    path.write_text('passes = ["soften{shift=0.001}"]')
    args = ("--pipeline", path, "--pass", "soften{shift=0.002}", "--allow-noop", "--json", "-")
    report = json.loads(invoke("transform", model, *args).stdout)
    assert report["pipeline"] == ["soften{shift=0.001}", "soften{shift=0.002}"]


def test_only(invoke: Invoke, model: Path) -> None:
    result = invoke("transform", model, "--pass", "soften", "--only", "corner_2", "--json", "-")
    (one,) = json.loads(result.stdout)["passes"]
    assert [site["name"] for site in one["sites"] if site["status"] == "rewritten"] == ["corner_2"]


def test_force(invoke: Invoke, model: Path) -> None:
    assert invoke("transform", model, "--pass", "soften").exit_code == 0
    first = model.with_name("net.soften.onnx").read_bytes()
    assert invoke("transform", model, "--pass", "soften{shift=0.2}").exit_code == 2
    assert model.with_name("net.soften.onnx").read_bytes() == first
    assert invoke("transform", model, "--pass", "soften{shift=0.2}", "--force").exit_code == 0
    assert model.with_name("net.soften.onnx").read_bytes() != first


def test_same_seed_same_file(invoke: Invoke, model: Path) -> None:
    written = []
    for name in ("a.onnx", "b.onnx"):
        assert invoke("transform", model, "--pass", "soften", "--seed", "3", "-o", model.with_name(name)).exit_code == 0
        written.append(model.with_name(name).read_bytes())
    assert written[0] == written[1]


def test_nothing_to_rewrite(invoke: Invoke, model: Path) -> None:
    report = model.with_name("report.json")
    result = invoke("transform", model, "--pass", "soften{refuse=true}", "--json", report)
    assert result.exit_code == 3
    assert result.stderr.count("\n") == 1
    assert "all 3 candidates were refused (first last: a sigmoid has no corner to soften)" in result.stderr
    assert "option refuse is set" in result.stdout
    assert names(model.parent) == {"net.onnx", "report.json"}
    assert json.loads(report.read_text())["output"] == {}


def test_allow_noop_writes_the_same_model(invoke: Invoke, model: Path) -> None:
    result = invoke("transform", model, "--pass", "soften{refuse=true}", "--allow-noop")
    assert result.exit_code == 0, result.output
    assert "because of --allow-noop" in result.stdout
    assert onnx.load(model.with_name("net.soften.onnx")) == onnx.load(model)


@pytest.mark.parametrize("allow", [(), ("--allow-noop",)], ids=["plain", "allow-noop"])
def test_all_sites_reverted(allow: tuple[str, ...], invoke: Invoke, model: Path) -> None:
    result = invoke("transform", model, "--pass", "soften{limit=0.000001}", *allow)
    assert result.exit_code == 1
    assert "all 2 candidates were reverted" in result.stderr
    assert result.stderr.count("\n") == 1
    assert "reverted" in result.stdout
    assert names(model.parent) == {"net.onnx"}


def test_min_cosine_missed(refused: Refused, model: Path) -> None:
    sentence = refused("transform", model, "--pass", "soften{shift=3}", "--min-cosine", "0.9999", code=1)
    assert "expected a mean cosine of at least 0.9999" in sentence
    assert names(model.parent) == {"net.onnx"}


def test_cleanup_alone(invoke: Invoke, model: Path) -> None:
    result = invoke("transform", model, "--pass", "cleanup", "--allow-noop")
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(run(model.with_name("net.cleanup.onnx"), X), run(model, X))


def test_cleanup_does_not_hide_that_nothing_was_rewritten(refused: Refused, model: Path) -> None:
    proto = onnx.load(model)
    proto.graph.node.insert(0, onnx.helper.make_node("Identity", ["x"], ["x2"], name="useless"))
    proto.graph.node[1].input[0] = "x2"
    onnx.save(proto, model)
    assert "soften found nothing" in refused(
        "transform", model, "--pass", "cleanup", "--pass", "soften{refuse=true}", code=3
    )


def test_linearize_needs_no_further_arguments(invoke: Invoke, attention: Path) -> None:
    result = invoke("transform", attention, "--pass", "linearize")
    assert result.exit_code == 0, result.output
    out = attention.with_name("attention.linearize.onnx")
    x = np.random.default_rng(0).normal(size=(3, 17, 8)).astype(np.float32)
    assert run(out, x).shape == (3, 17, 8)
    assert "linearize" in result.stdout
