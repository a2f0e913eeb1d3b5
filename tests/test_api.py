"""The public names."""

import subprocess
import sys

import pytest

import graphopt


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
