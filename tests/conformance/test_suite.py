"""The backend suite of the onnx package: each model runs, and comes back from disk as it was.

What fails is listed, with its reason, in expected_failures.txt.
"""

import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest

import graphopt
from graphopt.backends.onnx import to_proto

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("conformance_suite", ROOT / "benchmarks/conformance/suite.py")
suite = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)  # dataclasses look their module up
_spec.loader.exec_module(suite)

CASES = {case.name: case for case in suite.cases()}
CHECKS = ("outputs", "identical", "onnxruntime")
EXPECTED_FAILURES = Path(__file__).with_name("expected_failures.txt").read_text()
LISTED = re.findall(r"^(?!#)(\S+) - (.+)$", EXPECTED_FAILURES, re.MULTILINE)
REASONS = dict(LISTED)

# The suite allows 1e-3. Two libraries agree to 1e-5 in float32 and to 1e-15 in float64 on all of it; another processor
# may round elsewhere. Its float16 models round after each operator, so those keep its tolerance.
TIGHTER = {"float32": 1e-4, "float64": 1e-12}
# Their expected values are written down with four digits.
ROUNDED = {
    "test_averagepool_2d_ceil_last_window_starts_on_pad",
    "test_gridsample_bicubic",
    "test_hammingwindow",
    "test_hammingwindow_symmetric",
    "test_roialign_aligned_false",
    "test_roialign_aligned_true",
}


def each(check):
    """Parametrise over all models; those that are listed have to fail."""
    keys = {name: f"{check}:{name}" for name in CASES}
    marks = {name: [pytest.mark.xfail(reason=REASONS[key])] for name, key in keys.items() if key in REASONS}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks.get(name, ()), id=name) for name in CASES])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all models: each replaces the one before it."""
    return tmp_path_factory.mktemp("suite")


@pytest.fixture
def graph(folder, name):
    path = folder / "model.onnx"
    path.write_bytes(CASES[name].data)
    return graphopt.load(path)


@each("outputs")
def test_outputs_are_the_published_ones(graph, name, monkeypatch):
    """In torch alone: operators that it has no function for would run on onnxruntime."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    case = CASES[name]
    for feeds, expected in case.data_sets:
        found = list(graph.run(feeds).values())
        tighter = {} if name in ROUNDED else TIGHTER
        suite.check_values(expected, found, rtol=case.rtol, atol=case.atol, tighter=tighter, random=case.random)


@each("identical")
def test_saved_model_is_the_same_protobuf(graph, folder, name):
    graph.save(folder / "saved.onnx")
    assert onnx.load(folder / "saved.onnx") == CASES[name].model
    # An unchanged graph is saved by a short cut; here every node is emitted from its fx node.
    assert to_proto(graph, rebuild=True) == CASES[name].model


@each("onnxruntime")
def test_saved_model_runs_alike_on_onnxruntime(graph, folder, name):
    """Bit by bit the same outputs; what onnxruntime refuses, it refuses for the same reason."""
    graph.save(folder / "saved.onnx")
    for feeds, _ in CASES[name].data_sets:
        before = suite.outcome(CASES[name].data, feeds)
        after = suite.outcome((folder / "saved.onnx").read_bytes(), feeds)
        assert suite.identical(before, after)


ONE = np.ones(2, np.float32)


@pytest.mark.parametrize(
    ("expected", "found", "kind"),
    [
        (ONE, ONE.astype(np.float64), "wrong type"),
        (ONE, ONE[None], "wrong shape"),
        (ONE, ONE * 1.002, "wrong values"),
        (ONE, np.array([1, np.nan], np.float32), "wrong values"),
        (np.array([1]), np.array([2]), "wrong values"),
        (np.array([2**53], np.int64), np.array([2**53 + 1], np.int64), "wrong values"),
        (np.array([1], ml_dtypes.int4), np.array([2], ml_dtypes.int4), "wrong values"),
        (np.array([1], ml_dtypes.float8_e5m2), np.array([1.25], ml_dtypes.float8_e5m2), "wrong values"),
        (np.array([1], ml_dtypes.bfloat16), np.array([1.03], ml_dtypes.bfloat16), "wrong values"),
        (np.array(["a"], object), np.array(["b"], object), "wrong values"),
        ([ONE, ONE], [ONE], "wrong type"),
        ([ONE], [ONE * 2], "wrong values"),
        (None, ONE, "wrong values"),
        (ONE, None, "wrong values"),
        ({"a": 1.0}, {"a": 2.0}, "wrong values"),
    ],
)
def test_other_values_are_told_apart(expected, found, kind):
    suite.check_values(expected, expected, rtol=1e-3, atol=1e-7)
    with pytest.raises(suite.Wrong) as caught:
        suite.check_values(expected, found, rtol=1e-3, atol=1e-7)
    assert caught.value.kind == kind
    assert not suite.identical(expected, found)


def test_the_suite_is_whole():
    """A model that no longer loads would silently leave every check."""
    kinds = Counter(case.kind for case in CASES.values())
    least = {"node": 1884, "pytorch-converted": 82, "pytorch-operator": 35, "simple": 23, "light": 9}
    assert all(kinds[kind] >= count for kind, count in least.items()), kinds
    assert all(case.data_sets for case in CASES.values())


def test_onnxruntime_runs_most_of_it():
    """Where it refused everything, the saved models would be refused alike."""
    sample = list(CASES.values())[::10]
    runs = [case for case in sample if not isinstance(suite.outcome(case.data, case.data_sets[0][0]), str)]
    assert len(runs) > 0.6 * len(sample)


def test_expected_failures_name_checks_and_models():
    lines = [line for line in EXPECTED_FAILURES.splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(LISTED) == len(REASONS), "each line is `check:model - reason`, and names another model"
    for key in REASONS:
        check, _, model = key.partition(":")
        assert check in CHECKS, key
        assert model in CASES, key


def test_expected_failures_only_shrink():
    limit = int(re.search(r"^# At most (\d+) lines", EXPECTED_FAILURES, re.MULTILINE)[1])
    assert len(REASONS) <= limit
