"""What other tools drop stays: through loading, copying, passes, and saving."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest

import graphopt
from graphopt.backends.onnx import to_proto
from graphopt.frontends.onnx import load_onnx
from graphopt.onnxfile import OnnxFile

from .checks import (
    check_interface,
    check_mentions,
    check_names,
    check_nodes,
    essence,
    is_valid,
    nodes_in,
    same_bits,
    session,
    stored,
)
from .models import MODELS
from .odd import Odd, X, without_the_needless_node

RUNNING = [name for name, odd in MODELS.items() if odd.runs]
WITH_FUNCTIONS = [name for name, odd in MODELS.items() if odd.model.functions]
# New nodes, or nodes under new names, that rules of cleanup leave behind.
MADE = {
    "a constant branch with weights and names of its own": ["Abs"],  # its name is that of another node
    "values that are merged into one that a body shadows": ["Identity"],  # another name for the body to use
    "names that new nodes would take": ["Transpose", "Transpose"],
}


@pytest.mark.parametrize("name", MODELS)
def test_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    path = stored(MODELS[name], tmp_path)
    original = path.read_bytes()
    graph = graphopt.load(path)
    proto = onnx.ModelProto.FromString(original)
    assert to_proto(graph) is graph.onnx.proto
    for each in (graph, graph.copy(), graph.copy().copy()):
        rebuilt = to_proto(each, rebuild=True)
        assert rebuilt == proto
        # Equality does not see fields that this version of protobuf's schema lacks.
        assert rebuilt.SerializeToString(deterministic=True) == proto.SerializeToString(deterministic=True)
    graph.save(tmp_path / "saved.onnx")
    assert onnx.ModelProto.FromString((tmp_path / "saved.onnx").read_bytes()) == proto
    assert path.read_bytes() == original


@pytest.mark.parametrize("name", RUNNING)
def test_runs_as_on_onnxruntime(name: str, tmp_path: Path) -> None:
    path = stored(MODELS[name], tmp_path)
    graph, runtime = graphopt.load(path), session(path)
    for feeds in MODELS[name].feeds:
        found = graph.run(feeds)
        for spec, expected in zip(graph.outputs, runtime.run(None, feeds), strict=True):
            compare(found[spec.name], expected)


def compare(found: object, expected: object) -> None:
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for each in zip(found, expected, strict=True):
            compare(*each)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-6)
    else:
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        if expected.dtype == object:
            assert found.tolist() == expected.tolist()
        else:  # Exp and Gelu differ by an ulp or two
            np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "a value listed twice in a body",
        "a function that returns an input",
        "4-bit constant that a function reshapes",
    ],
)
def test_runs_as_the_reference_where_onnxruntime_does_not(name: str) -> None:
    odd = MODELS[name]
    graph = load_onnx(OnnxFile(odd.model))
    reference = onnx.reference.ReferenceEvaluator(odd.model)
    for feeds in odd.feeds:
        found = graph.run(feeds)
        for spec, expected in zip(graph.outputs, reference.run(None, feeds), strict=True):
            np.testing.assert_allclose(found[spec.name], expected, rtol=1e-6)  # Exp differs by an ulp or two


@pytest.mark.parametrize("chosen", [True, False])
def test_a_name_means_what_the_innermost_scope_says(chosen: bool) -> None:
    graph = load_onnx(OnnxFile(MODELS["a weight that one branch shadows and the other reads"].model))
    outer, inner = np.float32([1, 2, 3, 4]), np.float32([5, 6, 7, 8])
    h = X * outer
    found = graph.run({"x": X, "c": np.array(chosen)})["y"]
    np.testing.assert_array_equal(found, h * inner if chosen else h - outer)


@pytest.mark.parametrize("name", MODELS)
def test_a_node_less_is_all_that_changes(name: str, tmp_path: Path) -> None:
    odd = MODELS[name]
    path = stored(odd, tmp_path)
    result = graphopt.load(path).apply("cleanup{rules=identity}", calibration=data(odd))
    assert result.report.rewritten == 1
    expected = without_the_needless_node(odd.model)
    found = to_proto(result.graph)
    assert found == expected
    assert found.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


@pytest.mark.parametrize("name", MODELS)
def test_cleanup_keeps_what_it_has_no_rule_for(name: str, tmp_path: Path) -> None:
    rewritten = check_rewritten(MODELS[name], ["cleanup"], tmp_path)
    check_nodes(MODELS[name].model, rewritten, MADE.get(name, ()))


@pytest.mark.parametrize("passes", [["inline"], ["inline", "cleanup"], ["cleanup", "inline", "cleanup"]], ids="+".join)
@pytest.mark.parametrize("name", WITH_FUNCTIONS)
def test_inline_keeps_all_but_the_calls(name: str, passes: Sequence[str], tmp_path: Path) -> None:
    before = MODELS[name].model
    after = check_rewritten(MODELS[name], passes, tmp_path)
    functions = {(f.domain, f.name) for f in before.functions}
    assert not [n for n in nodes_in(after.graph) if (n.domain, n.op_type) in functions]
    if passes == ["inline"]:
        own = [essence(n) for n in nodes_in(before.graph) if (n.domain, n.op_type) not in functions]
        assert not Counter(own) - Counter(map(essence, nodes_in(after.graph)))


def data(odd: Odd) -> list[dict[str, Any]]:
    """What a calibration may hold: weights that can be fed are none of its inputs."""
    weights = {t.name for t in odd.model.graph.initializer}
    return [{name: value for name, value in feeds.items() if name not in weights} for feeds in odd.feeds]


def check_rewritten(odd: Odd, passes: Sequence[str], folder: Path) -> onnx.ModelProto:
    """Rewrite a model, check that everything stays that should, and return what was saved."""
    path, out = stored(odd, folder), folder / "out.onnx"
    result = graphopt.load(path).apply(passes, calibration=data(odd))
    assert [s for p in result.report.passes for s in p.sites if s.status == "reverted"] == []
    result.graph.save(out)
    saved = onnx.load(out, load_external_data=False)
    check_interface(odd.model, saved)
    check_mentions(saved)
    check_names(saved.graph)
    assert to_proto(graphopt.load(out), rebuild=True) == saved
    assert is_valid(out) or not is_valid(path)
    if odd.runs:
        before, after = session(path), session(out)
        assert all(same_bits(before.run(None, feeds), after.run(None, feeds)) for feeds in odd.feeds)
    return saved
