"""How transform writes: the check of the written file, and weights beside it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from graphopt import registry

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


def test_written_file_that_computes_something_else(
    refused: Refused, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend with a bug: the check on onnxruntime is what stands between it and the user."""
    backend = registry.backend("onnx")
    lower = type(backend).lower

    def wrong(self: Any, graph: Any) -> onnx.ModelProto:
        proto = lower(self, graph)
        proto.graph.node[-1].op_type = "Tanh"
        return proto

    monkeypatch.setattr(type(backend), "lower", wrong)
    sentence = refused("transform", model, "--pass", "soften", code=1)
    assert "on onnxruntime output 'y' differs" in sentence
    assert names(model.parent) == {"net.onnx"}


def test_written_file_that_does_not_load(refused: Refused, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = registry.backend("onnx")
    lower = type(backend).lower

    def wrong(self: Any, graph: Any) -> onnx.ModelProto:
        proto = lower(self, graph)
        proto.graph.node[-1].op_type = "NoSuchOperator"
        return proto

    monkeypatch.setattr(type(backend), "lower", wrong)
    sentence = refused("transform", model, "--pass", "soften", code=1)
    assert "the original runs there" in sentence
    assert names(model.parent) == {"net.onnx"}


def test_without_onnxruntime_the_check_is_skipped(invoke: Invoke, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.cli.saving.installed", lambda: False)
    result = invoke("transform", model, "--pass", "soften")
    assert result.exit_code == 0
    assert "onnxruntime is not installed" in result.stdout


@pytest.fixture
def heavy(model: Path) -> Path:
    """A model whose weights lie beside it."""
    proto = onnx.load(model)
    folder = model.parent / "heavy"
    folder.mkdir()
    onnx.save(proto, folder / "net.onnx", save_as_external_data=True, location="net.bin", size_threshold=0)
    return folder / "net.onnx"


def test_external_data_is_shared_in_the_same_folder(invoke: Invoke, heavy: Path) -> None:
    assert invoke("transform", heavy, "--pass", "soften").exit_code == 0
    assert names(heavy.parent) == {"net.onnx", "net.bin", "net.soften.onnx"}
    assert abs(run(heavy.with_name("net.soften.onnx"), X) - run(heavy, X)).max() < 0.1


def test_external_data_goes_along_into_another_folder(invoke: Invoke, heavy: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    result = invoke("transform", heavy, "--pass", "soften", "-o", tmp_path / "out" / "net.onnx")
    assert result.exit_code == 0, result.output
    expected = run(heavy, X)
    shutil.rmtree(heavy.parent)
    assert abs(run(tmp_path / "out" / "net.onnx", X) - expected).max() < 0.1


def test_a_failed_check_leaves_no_copied_weights(
    refused: Refused, heavy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("graphopt.cli.saving._LIMIT", -1.0)
    monkeypatch.setattr("graphopt.cli.saving._ALLOWANCE", 0.0)
    refused("transform", heavy, "--pass", "soften", "-o", tmp_path / "out" / "net.onnx", code=1)
    assert names(tmp_path / "out") == set()
    assert names(heavy.parent) == {"net.onnx", "net.bin"}


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A model with a weight large enough to be worth a file of its own."""
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).normal(size=(2, 1000)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
            helper.make_node("Relu", ["a"], ["y"], name="corner"),
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1000])],
        [numpy_helper.from_array(weight, "w")],
    )
    path = tmp_path / "wide.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_external_data_on_request(invoke: Invoke, wide: Path) -> None:
    result = invoke("transform", wide, "--pass", "soften", "--external-data", "--json", "-")
    assert result.exit_code == 0, result.output
    assert names(wide.parent) == {"wide.onnx", "wide.soften.onnx", "wide.soften.onnx.data"}
    assert abs(run(wide.with_name("wide.soften.onnx"), X) - run(wide, X)).max() < 0.1
    assert json.loads(result.stdout)["output"]["external_bytes"] >= 8000


def test_existing_weights_are_not_overwritten(refused: Refused, wide: Path) -> None:
    wide.with_name("wide.soften.onnx.data").write_text("mine")
    assert "--force" in refused("transform", wide, "--pass", "soften", "--external-data")
    assert wide.with_name("wide.soften.onnx.data").read_text() == "mine"


def test_torch_target(invoke: Invoke, model: Path) -> None:
    import torch

    result = invoke("transform", model, "--pass", "soften", "--target", "torch")
    assert result.exit_code == 0, result.output
    program = torch.export.load(model.with_name("net.soften.pt2"))
    assert program.module()(torch.from_numpy(X)).shape == (5, 2)


def test_external_data_needs_an_onnx_target(refused: Refused, model: Path) -> None:
    sentence = refused("transform", model, "--pass", "soften", "--target", "torch", "--external-data")
    assert "drop one of them" in sentence


def test_interrupted_while_checking(invoke: Invoke, wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("graphopt.cli.saving._check", interrupt)
    result = invoke("transform", wide, "--pass", "soften", "--external-data")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
    assert names(wide.parent) == {"wide.onnx"}
