"""A model with an operator that nobody knows: shown, saved unchanged, rewritten by rules alone; never in silence."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner, Result

import graphopt
from graphopt.calibration import Calibration
from graphopt.cli import app
from graphopt.errors import GraphOptError, NoRuntime
from graphopt.frontends.onnx import load_onnx
from graphopt.onnxfile import OnnxFile
from graphopt.passes.cleanup import layout, rules
from graphopt.registry import PASSES, names, pass_class
from graphopt.rewrite import Context, Equivalence, Pass
from graphopt.rewrite.report import SiteReport

from .attention import PREFIX, beside
from .checks import essence, nodes_in
from .odd import X, parsed

OPSETS = '"": 21, "secret": 7, "own": 1'
FUNCTION = '<domain: "own", opset_import: ["": 21]> f (v) => (r) { r = Exp(v) }'
# `z` can be computed, `y` cannot; a needless node stands on either side of the unknown one.
MODEL = f"""g (float[N, 4] x) => (float[N, 4] y, float[N, 4] z) <float[4] w = {{1, 2, 3, 4}}> {{
    a = Identity(x) e = own.f(a) z = Neg(e)
    [frob] b, , d = secret.Frobnicate<mode = "größe", level = 3, table = [1.5, 2.5]>(a, , w)
    i = Identity(d) y = Add(b, i) }} {FUNCTION}"""
PLACES = {
    "main graph": MODEL,
    "branch": """g (float[N, 4] x, bool c) => (float[N, 4] y) {
        a = Identity(x)
        y = If(c) <then_branch = t () => (float[N, 4] p) { [frob] s = secret.Frobnicate(a) p = Neg(s) },
                   else_branch = e () => (float[N, 4] q) { n = Neg(a) m = Neg(n) q = Abs(m) }> }""",
    "function": """g (float[N, 4] x) => (float[N, 4] y) { a = Identity(x) y = own.f(a) }
        <domain: "own", opset_import: ["": 21, "secret": 7]> f (v) => (r) {
            [frob] s = secret.Frobnicate(v) r = Neg(s) }""",
}


@pytest.fixture
def invoke() -> Callable[..., Result]:
    """Run a command line in this process."""

    def run(*args: Any, **env: str) -> Result:
        return CliRunner().invoke(app, [str(arg) for arg in args], env=env)

    return run


@pytest.fixture(params=PLACES)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The model with its unknown operator at some place."""
    onnx.save(parsed(PLACES[request.param], opsets=OPSETS), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(parsed(MODEL, opsets=OPSETS), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def sentence(result: Result, code: int = 2) -> str:
    """The one line of a command that has failed."""
    assert result.exit_code == code, result.output
    (line,) = result.stderr.splitlines()
    assert "Traceback" not in result.output
    return line


def frobnicate(path: Path) -> onnx.NodeProto:
    proto = onnx.load(path)
    nodes = [*nodes_in(proto.graph), *(n for f in proto.functions for n in f.node)]
    return next(n for n in nodes if n.name == "frob")


def test_inspect_shows_it(path: Path, invoke: Callable[..., Result]) -> None:
    result = invoke("inspect", path)
    assert result.exit_code == 0, result.output
    assert "unknown to ONNX and to onnxruntime: secret::Frobnicate (1)" in result.stdout
    operators = json.loads(invoke("inspect", path, "--json", "-").stdout)["operators"]
    assert operators["unknown"] == {"secret::Frobnicate": 1}
    assert operators["on_onnxruntime"] == 0


@pytest.mark.parametrize(
    "passes", [["cleanup"], ["inline"], ["inline", "cleanup"], ["cleanup", "inline"]], ids="+".join
)
def test_rules_rewrite_what_is_around_it(path: Path, passes: list[str], invoke: Callable[..., Result]) -> None:
    out, report = path.with_name("out.onnx"), path.with_name("report.json")
    chosen = [text for name in passes for text in ("--pass", name)]
    result = invoke("transform", path, *chosen, "-o", out, "--report", report, "--allow-noop", FORCE_COLOR="1")
    assert result.exit_code == 0, result.output
    data = json.loads(report.read_text())
    assert data["verification"]["samples"] == 0
    assert data["verification"]["outputs"] == []
    reason = data["verification"]["unverified"]
    assert reason.startswith(
        "the result could not be verified by running it, because operator secret::Frobnicate has no"
    )
    assert reason in data["notes"]
    shown = " ".join(result.stdout.split())
    assert f"\x1b[33mnote: {reason}" in shown
    assert "the written file was not checked" in shown
    assert essence(frobnicate(out)) == essence(frobnicate(path))
    assert "Identity" not in {n.op_type for n in onnx.load(out).graph.node} or "cleanup" not in passes


def test_nothing_else_changes(path: Path, invoke: Callable[..., Result]) -> None:
    out = path.with_name("out.onnx")
    result = invoke("transform", path, "--pass", "cleanup{rules=cse}", "-o", out, "--allow-noop")
    assert result.exit_code == 0, result.output
    assert onnx.load(out) == onnx.load(path)
    nothing = invoke("transform", path, "--pass", "cleanup{rules=cse}", "-o", path.with_name("other.onnx"))
    assert "found nothing to rewrite" in sentence(nothing, 3)
    assert not path.with_name("other.onnx").exists()


def test_a_branch_that_cannot_be_reached_is_rewritten_too(invoke: Callable[..., Result], tmp_path: Path) -> None:
    path, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    onnx.save(parsed(PLACES["branch"], opsets=OPSETS), path)
    assert invoke("transform", path, "--pass", "cleanup", "-o", out).exit_code == 0
    branches = [a.g for n in onnx.load(out).graph.node for a in n.attribute]
    assert sorted([n.op_type for n in b.node] for b in branches) == [["Abs"], ["Frobnicate", "Neg"]]


@pytest.mark.parametrize("chosen", [["linearize"], ["cleanup", "linearize"]], ids="+".join)
def test_what_needs_data_is_refused(path: Path, chosen: list[str], invoke: Callable[..., Result]) -> None:
    passes = [text for name in chosen for text in ("--pass", name)]
    found = sentence(invoke("transform", path, *passes))
    assert found.startswith("error: expected a model that can be run, as linearize needs it, but operator secret::Frob")
    assert "cleanup" in found
    assert "--calib" not in found
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]


def test_attention_before_an_unknown_operator_is_refused(tmp_path: Path, invoke: Callable[..., Result]) -> None:
    onnx.save(beside(parsed(MODEL, opsets=OPSETS)), tmp_path / "model.onnx")
    assert PREFIX in invoke("inspect", tmp_path / "model.onnx", "--json", "-").stdout
    assert "linearize needs it" in sentence(invoke("transform", tmp_path / "model.onnx", "--pass", "linearize"))


def test_a_bound_that_cannot_be_checked_is_missed(model: Path, invoke: Callable[..., Result]) -> None:
    found = sentence(invoke("transform", model, "--pass", "cleanup", "--min-cosine", "0.5"))
    assert "to compare the outputs for min_cosine, but operator secret::Frobnicate" in found
    assert [p.name for p in model.parent.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("arguments", [["verify", "A", "A"], ["bench", "A"], ["bench", "A", "A"]], ids="-".join)
def test_verbs_that_run_a_model_say_why_they_cannot(
    model: Path, arguments: list[str], invoke: Callable[..., Result]
) -> None:
    on_onnxruntime = sentence(invoke(*(model if a == "A" else a for a in arguments)))
    assert "secret:Frobnicate" in on_onnxruntime
    option = "--runtime" if arguments[0] == "verify" else "--target"
    on_torch = sentence(invoke(*(model if a == "A" else a for a in arguments), option, "torch"))
    assert on_torch.startswith("error: operator secret::Frobnicate has no torch meaning, and onnxruntime")
    assert "--calib" not in on_onnxruntime + on_torch


# In Python.


def test_the_report_says_so() -> None:
    graph = load_onnx(OnnxFile(parsed(MODEL, opsets=OPSETS)))
    report = graph.apply("cleanup", calibration=[{"x": X}]).report
    assert (report.samples, report.outputs, report.rewritten) == (0, [], 2)
    assert report.unverified in report.notes
    assert report.passes[0].notes == [
        "1 rewrites could not be compared: operators that are random, or that nobody knows, feed them"
    ]
    known = load_onnx(OnnxFile(parsed("g (float[N, 4] x) => (float[N, 4] y) { a = Identity(x) y = Neg(a) }")))
    report = known.apply("cleanup", calibration=[{"x": X}]).report
    assert (report.samples, report.unverified, report.notes) == (1, "", [])


def test_what_can_be_run_is_still_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong rule is found out, though the model cannot be run to its end."""
    wrong = rules.Rule("identity", ("Neg",), "-x", "x", "it is not", layout.keep_operand)
    monkeypatch.setattr(rules, "RULES", (*rules.RULES, wrong))
    text = """g (float[N, 4] x) => (float[N, 4] y) {
        a = Neg(x) b = Abs(a) c = Exp(a) d = secret.Frobnicate(b, c) e = Identity(d) y = Abs(e) }"""
    graph = load_onnx(OnnxFile(parsed(text, opsets=OPSETS)))
    report = graph.apply("cleanup", calibration=[{"x": X}]).report
    assert [(s.name, s.status) for s in report.passes[0].sites] == [("a", "reverted"), ("e", "rewritten")]


@dataclass(frozen=True)
class _Claims(Pass):
    """Rewrites nothing, and says that it did."""

    name: ClassVar[str] = "claims"
    equivalence: ClassVar[Equivalence] = Equivalence.EXACT

    def run(self, graph: Any, context: Context) -> Any:
        return graph, [SiteReport("a", "claim", "rewritten")]


def test_a_pass_without_proof_has_to_be_checked() -> None:
    graph = load_onnx(OnnxFile(parsed(MODEL, opsets=OPSETS)))
    with pytest.raises(GraphOptError, match="expected to run the model to check what claims did, but operator secret"):
        graph.apply(_Claims(), calibration=[{"x": X}])


@pytest.mark.parametrize("name", names(PASSES))
def test_passes_without_data_leave_it_alone(name: str) -> None:
    proto = parsed(MODEL, opsets=OPSETS)
    rewritten, _ = pass_class(name)().run(load_onnx(OnnxFile(proto)), Context(Calibration([], "nothing")))
    rewritten.lint()
    assert [n.meta["onnx"].proto for n in rewritten.nodes if n.op == "call_module"][-1] == proto.graph.node[3]


def test_an_operator_without_a_kernel_is_no_matter_of_the_data() -> None:
    text = """g (float[N, 4] x) => (float[N, 3, 2] y) {
        y = com.microsoft.Rfft<normalized = 0, onesided = 1, signal_ndim = 1>(x) }"""
    graph = load_onnx(OnnxFile(parsed(text, opsets='"": 21, "com.microsoft": 1')))
    with pytest.raises(NoRuntime, match="onnxruntime cannot run it either"):
        graph.run({"x": X})


def test_onnxruntime_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    text = "g (int32[N] x) => (uint32[N] y) { a = Identity(x) b = Identity(a) y = com.microsoft.MurmurHash3(b) }"
    onnx.save(parsed(text, opsets='"": 21, "com.microsoft": 1'), tmp_path / "model.onnx")
    x = {"x": np.arange(3, dtype=np.int32)}
    assert graphopt.load(tmp_path / "model.onnx").run(x)["y"].dtype == np.uint32
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = graphopt.load(tmp_path / "model.onnx").apply("cleanup", calibration=[x])
    assert "runs on onnxruntime, which is not installed; install graphopt[cpu]" in result.report.unverified
    assert result.report.rewritten == 2


def test_data_that_does_not_fit_is_no_missing_runtime(tmp_path: Path, invoke: Callable[..., Result]) -> None:
    text = "g (float[N, 4] x) => (float[N, 4] y) <int64[2] s = {7, 5}> { a = Identity(x) y = Reshape(a, s) }"
    onnx.save(parsed(text), tmp_path / "model.onnx")
    found = sentence(invoke("transform", tmp_path / "model.onnx", "--pass", "cleanup"))
    assert "give inputs that fit it with --calib" in found
