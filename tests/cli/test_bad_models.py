"""Models that cannot be read or used: one sentence, exit code 2, nothing written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

Refused = Callable[..., str]

pytestmark = pytest.mark.usefixtures("soften")


def verbs(path: Path) -> list[tuple[Any, ...]]:
    return [
        ("inspect", path),
        ("explain", path, "--pass", "soften"),
        ("transform", path, "--pass", "soften"),
        ("verify", path, path),
        ("bench", path),
    ]


def broken_models() -> dict[str, tuple[Callable[[Path, onnx.ModelProto], Path], str]]:
    def make(name: str, content: Callable[[bytes], bytes]) -> Callable[[Path, onnx.ModelProto], Path]:
        def write(folder: Path, proto: onnx.ModelProto) -> Path:
            path = folder / name
            path.write_bytes(content(proto.SerializeToString()))
            return path

        return write

    def external(location: str) -> Callable[[Path, onnx.ModelProto], Path]:
        def write(folder: Path, proto: onnx.ModelProto) -> Path:
            tensor = proto.graph.initializer[0]
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value=location)
            path = folder / "model.onnx"
            onnx.save(proto, path)
            return path

        return write

    def folder(where: Path, proto: onnx.ModelProto) -> Path:
        (where / "folder.onnx").mkdir()
        return where / "folder.onnx"

    return {
        "truncated": (make("short.onnx", lambda data: data[: len(data) // 2]), "truncated or another format"),
        "text": (make("text.onnx", lambda data: b"this is a text file, not a model\n" * 9), "text.onnx"),
        "empty": (make("empty.onnx", lambda data: b""), "is empty"),
        "folder": (folder, "is a folder"),
        "missing": (lambda where, proto: where / "missing.onnx", "does not exist"),
        "missing data": (external("weights.bin"), "weights.bin"),
        "escaping data": (external("../../secret.bin"), "inside the model's folder"),
        "absolute data": (external("/etc/hostname"), "inside the model's folder"),
    }


@pytest.mark.parametrize("verb", range(5), ids=["inspect", "explain", "transform", "verify", "bench"])
@pytest.mark.parametrize("kind", broken_models())
def test_unreadable_model(kind: str, verb: int, model: Path, tmp_path: Path, rejects: Refused) -> None:
    write, words = broken_models()[kind]
    path = write(tmp_path, onnx.load(model))
    assert words in rejects(*verbs(path)[verb])


@pytest.mark.parametrize("verb", range(5), ids=["inspect", "explain", "transform", "verify", "bench"])
def test_json_in_a_missing_folder(verb: int, model: Path, rejects: Refused) -> None:
    assert "create it first" in rejects(*verbs(model)[verb], "--json", model.parent / "no" / "x.json")


@pytest.mark.parametrize("verb", ["verify", "bench"])
def test_other_interface(verb: str, model: Path, rejects: Refused) -> None:
    proto = onnx.load(model)
    proto.graph.output[0].name = "d"
    other = model.with_name("other.onnx")
    onnx.save(proto, other)
    assert "expected two models with the same outputs" in rejects(verb, model, other)


def test_batch_of_a_fixed_model(tmp_path: Path, rejects: Refused) -> None:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "net", value[:1], value[1:])
    path = tmp_path / "fixed.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    assert "symbolic first dim" in rejects("bench", path, "--batch", "4")


def test_debug_shows_the_traceback(invoke: Callable[..., Any], model: Path) -> None:
    result = invoke("inspect", model.with_name("missing.onnx"), "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "does not exist" in result.stderr.splitlines()[-1]


def test_unexpected_exception(
    model: Path, invoke: Callable[..., Any], soften: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, graph: Any) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(soften, "find", fail)
    result = invoke("transform", model, "--pass", "soften")
    assert result.exit_code == 2
    assert result.stderr == "unexpected error: RuntimeError: two lines; run with --debug for the traceback\n"
    assert [path.name for path in model.parent.iterdir()] == [model.name]
