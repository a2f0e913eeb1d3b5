"""inspect, passes and explain: what they say of a model."""

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

Invoke = Callable[..., Any]


def data(result: Any) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    loaded: dict[str, Any] = json.loads(result.stdout)
    return loaded


def test_version(invoke: Invoke) -> None:
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"graphopt {metadata.version('graphopt')}\n")


def test_help_names_every_verb_with_an_example(invoke: Invoke) -> None:
    listed = invoke("--help")
    assert listed.exit_code == 0
    for verb in ("inspect", "passes", "explain", "transform", "verify", "bench"):
        assert verb in listed.stdout
        one = invoke(verb, "--help")
        assert one.exit_code == 0
        assert f"graphopt {verb}" in one.stdout


def test_no_verb_shows_the_help(invoke: Invoke) -> None:
    result = invoke()
    assert result.exit_code == 2
    assert "transform" in result.stdout


def test_inspect_for_people(invoke: Invoke, model: Path) -> None:
    result = invoke("inspect", model)
    assert result.exit_code == 0, result.output
    for text in ("net.onnx", "opset ai.onnx 17, IR version 8, from tests", "batch x 2", "MatMul", "5 nodes"):
        assert text in result.stdout
    assert "5 run as torch functions" in result.stdout


def test_inspect_as_data(invoke: Invoke, model: Path) -> None:
    found = data(invoke("inspect", model, "--json", "-"))
    assert found["file"]["bytes"] == model.stat().st_size
    assert found["file"]["opsets"] == {"ai.onnx": 17}
    assert found["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", 2]}]
    assert found["operators"]["by_operator"] == {"MatMul": 2, "Relu": 2, "Sigmoid": 1}


def test_inspect_costs_in_the_models_dims(invoke: Invoke, model: Path) -> None:
    found = data(invoke("inspect", model, "--json", "-", "--dim", "batch=5"))
    assert found["cost"]["parameters"]["value"] == 4
    assert found["cost"]["weight_bytes"]["value"] == 16
    # Two products of [batch, 2] and [2, 2]: 8 multiplications and additions for each row.
    assert found["cost"]["flops"]["value"] >= 2 * 8 * 5
    assert "batch" in found["cost"]["flops"]["expression"]
    assert found["cost"]["peak_activation_bytes"]["value"] >= 2 * 5 * 4


def test_inspect_names_what_torch_cannot_run(invoke: Invoke, model: Path) -> None:
    proto = onnx.load(model)
    proto.graph.node.append(helper.make_node("Mystery", ["b"], ["m"], domain="some.where"))
    onnx.save(proto, model)
    result = invoke("inspect", model)
    assert "unknown to ONNX and to onnxruntime: some.where::Mystery (1)" in result.stdout
    assert data(invoke("inspect", model, "--json", "-"))["operators"]["unknown"] == {"some.where::Mystery": 1}


def test_inspect_lists_attention(invoke: Invoke, attention: Path) -> None:
    result = invoke("inspect", attention, "--sites", "attention")
    assert result.exit_code == 0, result.output
    assert "attention sites" in result.stdout
    (site,) = data(invoke("inspect", attention, "--json", "-"))["sites"]["attention"]["sites"]
    assert (site["query_heads"], site["head_dim"], site["mask"]["kind"], site["past"]) == (2, 4, "none", None)


def test_quiet_and_json_file(invoke: Invoke, model: Path) -> None:
    path = model.with_name("out.json")
    result = invoke("inspect", model, "--quiet", "--json", path)
    assert (result.exit_code, result.output) == (0, "")
    assert json.loads(path.read_text())["file"]["opset"] == 17


@pytest.mark.parametrize(
    "name", ["onnxruntime-qnn__attention_symbolic_batch", "magika__model", "jax2onnx__model_with_function"]
)
def test_inspect_real_models(invoke: Invoke, shared_data: Path, name: str) -> None:
    found = data(invoke("inspect", shared_data / "zoo" / f"{name}.onnx", "--json", "-"))
    assert found["operators"]["total"] > 0


@pytest.mark.usefixtures("soften")
def test_passes(invoke: Invoke) -> None:
    result = invoke("passes")
    assert result.exit_code == 0
    for text in (
        "soften",
        "linearize",
        'relu(x) + shift [a "quoted" equation: with brackets]',
        "What is added.",
    ):
        assert text in result.stdout
    assert "broken  (unavailable: " in result.stdout
    assert "clitest_missing" in result.stdout
    assert "The second paragraph." not in result.stdout


@pytest.mark.usefixtures("soften")
def test_passes_in_full(invoke: Invoke) -> None:
    assert "The second paragraph." in invoke("passes", "soften").stdout
    (found,) = data(invoke("passes", "soften", "--json", "-"))["passes"]
    assert (found["equivalence"], found["kind"], found["needs_calibration"]) == (
        "approximate",
        "activation",
        True,
    )
    assert found["options"][0] == {
        "name": "shift",
        "type": "float",
        "default": "0.01",
        "help": "What is added.",
    }


@pytest.mark.usefixtures("soften")
def test_explain(invoke: Invoke, model: Path) -> None:
    found = data(invoke("explain", model, "--pass", "soften", "--json", "-"))["sites"]
    assert [(site["name"], site["status"]) for site in found] == [
        ("corner_1", "accepted"),
        ("corner_2", "accepted"),
        ("last", "refused"),
    ]
    result = invoke("explain", model, "--pass", "soften{refuse=true}")
    assert "0 of 3 activation candidates would be rewritten" in result.stdout
    assert "option refuse is set" in result.stdout
    assert "a sigmoid has no corner to soften" in result.stdout


@pytest.mark.usefixtures("soften")
@pytest.mark.parametrize(
    ("node", "site"), [("corner_2", "corner_2"), ("b", "corner_1"), ("last", "last"), ("y", "last")]
)
def test_explain_one_node_by_any_of_its_names(node: str, site: str, invoke: Invoke, model: Path) -> None:
    found = data(invoke("explain", model, "--pass", "soften", "--node", node, "--json", "-"))["sites"]
    assert [each["name"] for each in found] == [site]


@pytest.mark.usefixtures("soften")
def test_explain_a_node_that_no_finder_took(invoke: Invoke, model: Path) -> None:
    result = invoke("explain", model, "--pass", "soften", "--node", "first")
    assert result.exit_code == 0
    assert "node 'first' is part of no activation candidate" in result.stdout


def test_explain_linearize(invoke: Invoke, attention: Path) -> None:
    found = data(invoke("explain", attention, "--pass", "linearize", "--node", "/Softmax", "--json", "-"))["sites"]
    assert [site["status"] for site in found] == ["accepted"]


def test_one_site_in_closed_form(invoke: Invoke, mlp_file: Path) -> None:
    found = invoke("inspect", mlp_file, "--sites", "mlp")
    assert found.exit_code == 0, found.output
    shown = invoke("inspect", mlp_file, "--site", "down")
    assert shown.exit_code == 0, shown.output
    for text in (
        "mlp site down",
        "gelu in closed form",
        "erf(sqrt(2)*x/2)",
        "max(x, 0) - P(t) / Q(t)",
        "nowhere above",
    ):
        assert text in shown.stdout
    (site, _) = data(invoke("inspect", mlp_file, "--site", "down", "--json", "-"))["sites"]
    assert site["kind"] == "mlp"
    assert site["closed_form"]["error"]["largest"] <= site["closed_form"]["error"]["bound"] < 1e-4


def test_a_rational_function_in_closed_form(invoke: Invoke, mlp_file: Path, tmp_path: Path) -> None:
    result = invoke("transform", mlp_file, "-o", tmp_path / "b.onnx", "--pass", "rational{groups=2}")
    assert result.exit_code == 0, result.output
    node = next(n for n in onnx.load(tmp_path / "b.onnx").graph.node if "Rational" in n.op_type)
    shown = invoke("inspect", tmp_path / "b.onnx", "--site", node.name)
    assert shown.exit_code == 0, shown.output
    assert "groups 0, 1 of 2" in shown.stdout
    assert "P'(t)" in shown.stdout


def test_a_site_that_is_not_there(invoke: Invoke, mlp_file: Path) -> None:
    result = invoke("inspect", mlp_file, "--site", "dow")
    assert result.exit_code == 2
    assert "no site is called 'dow'; the closest are 'down'" in result.output
