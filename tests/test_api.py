"""The public names."""

import subprocess
import sys

import numpy as np
import onnx
import onnx.parser
import pytest

import graphopt
from graphopt.errors import GraphOptError
from graphopt.frontends.onnx import load_onnx
from graphopt.onnxfile import OnnxFile


def test_all_names_are_there():
    for name in graphopt.__all__:
        assert getattr(graphopt, name) is not None
    assert sorted(graphopt._HOMES) == sorted(graphopt.__all__) == dir(graphopt)
    with pytest.raises(AttributeError, match="no attribute"):
        _ = graphopt.nothing


def test_importing_is_light():
    code = "import sys, graphopt; print([m for m in ('torch', 'onnx', 'sympy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_wrong_source():
    with pytest.raises(graphopt.GraphOptError, match=r"expected a path, an nn\.Module or an ExportedProgram, got int"):
        graphopt.load(3)


def test_an_input_with_a_default_may_be_fed_or_left_out():
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[2] x, float[2] w, bool c) => (float[2] y)
        <float[2] w = {3, 4}> { n = Mul(x, w) y = If(c) <
        then_branch = t () => (float[2] p) { p = Add(n, w) }, else_branch = e () => (float[2] q) { q = Neg(n) }> }"""
    graph = load_onnx(OnnxFile(onnx.parser.parse_model(text)))
    feeds = {"x": np.ones(2, np.float32), "c": np.array(True)}
    assert graph.run(feeds)["y"].tolist() == [6, 8]
    assert graph.run(feeds | {"w": np.array([10, 20], np.float32)})["y"].tolist() == [20, 40]
    with pytest.raises(GraphOptError, match="expected input w"):
        graph.run(feeds | {"w": np.ones(3, np.float32)})
