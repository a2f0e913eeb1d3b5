"""A pass from another package is found through its entry point and runs as ours do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FIXTURE = Path(__file__).parents[1] / "fixtures" / "thirdparty_pass"

PROGRAM = """
import json, sys
import numpy as np, onnx
import graphopt
from graphopt import registry
model = onnx.parser.parse_model(
    '<ir_version: 8, opset_import: ["": 17]> g (float[b,5] x) => (float[b,5] y) { y = Softmax<axis=-1>(x) }'
)
onnx.save(model, sys.argv[1])
result = graphopt.load(sys.argv[1]).apply("double_negation{times=2}")
result.graph.save(sys.argv[2])
(report,) = result.report.passes
print(json.dumps({
    "names": registry.names(registry.PASSES),
    "status": [s.status for s in report.sites],
    "equivalence": report.equivalence,
    "operators": [n.op_type for n in onnx.load(sys.argv[2]).graph.node],
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(folder), str(FIXTURE)], check=True, capture_output=True)
    return folder


def test_it_runs(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    arguments = [sys.executable, "-c", PROGRAM, str(tmp_path / "a.onnx"), str(tmp_path / "b.onnx")]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"cleanup", "double_negation", "linearize"} <= set(found["names"])
    assert found["status"] == ["rewritten"]
    assert found["equivalence"] == "reassociated"
    assert found["operators"] == ["Neg"] * 4 + ["Softmax"]


def test_the_command_line_lists_it(installed):
    environment = {**os.environ, "PYTHONPATH": str(installed), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", "graphopt", "passes"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "double_negation" in done.stdout
    assert "How often to negate twice." in done.stdout
