"""Models that others exported: the same bits before and after, no node more, and nothing left for a second run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graphopt.api import load
from graphopt.calibration import Calibration
from graphopt.errors import GraphOptError
from graphopt.graph import Graph
from graphopt.onnxfile.tensors import from_numpy
from graphopt.passes.cleanup import Cleanup
from graphopt.passes.cleanup.checking import fingerprint
from graphopt.rewrite import Context

# Models whose node count has to fall at least to this.
AT_MOST = {
    "onnxruntime-qnn__TFBertForSequenceClassification_1.onnx": 900,
    "onnxruntime-qnn__model.onnx": 410,
    "onnxruntime-qnn__attention_past_state.onnx": 45,
    "voicevox_core__predict_spectrogram.onnx": 340,
    "sample-apps__transformer.onnx": 100,
    "libonnx__light_resnet50.onnx": 200,
}


def feeds(entry: dict[str, Any]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(entry["seed"])
    found = {}
    for spec in entry["inputs"]:
        if spec["dtype"] == "bool":
            value = np.ones(spec["shape"], bool)
        elif spec["range"] == "normal":
            value = rng.standard_normal(spec["shape"])
        else:
            value = rng.integers(*spec["range"], spec["shape"])
        found[spec["name"]] = np.asarray(value).astype(spec["dtype"])
    return found


def count(graph: Graph) -> int:
    return sum(n.op.startswith("call") and getattr(n.target, "__name__", "") != "getitem" for n in graph.nodes)


def test_zoo(shared_data: Path, record_property: Any) -> None:
    index = shared_data / "zoo" / "index.json"
    if not index.exists():
        pytest.skip("no zoo")
    before = after = 0
    for entry in json.loads(index.read_text()):
        path = index.parent / entry["file"]
        graph = load(path)
        try:
            values = tuple(from_numpy(v) for v in graph.ordered(feeds(entry)))
            with torch.no_grad():
                expected = [fingerprint(v) for v in graph.execute(*values)]
        except (GraphOptError, RuntimeError):
            continue  # the importer and the dialect have their own tests
        calibration = Calibration([values], "zoo")
        rewritten, reports = Cleanup().run(graph, Context(calibration))
        with torch.no_grad():
            assert [fingerprint(v) for v in rewritten.execute(*values)] == expected, path.name
        assert not [r for r in reports if r.status == "reverted"], path.name
        assert (rewritten.inputs, rewritten.outputs) == (graph.inputs, graph.outputs)
        assert count(rewritten) <= min(count(graph), AT_MOST.get(path.name, 1 << 30)), path.name
        assert Cleanup().run(rewritten, Context(calibration))[0] is rewritten, path.name
        record_property(path.name, f"{count(graph)} -> {count(rewritten)}")
        print(f"{path.name}: {count(graph)} -> {count(rewritten)}")
        before, after = before + count(graph), after + count(rewritten)
    print(f"all: {before} -> {after}")
    assert after < 0.75 * before
