"""Reading what is no model, or means harm: one sentence, never a crash."""

import onnx
import pytest

import graphopt
from graphopt import GraphOptError


def small_model(location=None, offset=0, length=16):
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[4] x) => (float[4] y) { y = Add(x, w) }'
    )
    tensor = model.graph.initializer.add(name="w", data_type=1, dims=[4])
    if location is None:
        tensor.raw_data = bytes(16)
    else:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
    return model


def refuse(path, match):
    with pytest.raises(GraphOptError, match=match) as caught:
        graphopt.load(path)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (b"this is no model, it is text\n" * 9, "does not parse|without a graph"),
        (None, "does not parse"),
    ],
    ids=["empty", "text", "truncated"],
)
def test_not_a_model(tmp_path, content, match):
    path = tmp_path / "bad.onnx"
    data = small_model().SerializeToString()
    path.write_bytes(data[: len(data) * 2 // 3] if content is None else content)
    refuse(path, match)


def test_missing_file_and_folder(tmp_path):
    refuse(tmp_path / "no.onnx", "does not exist")
    refuse(tmp_path, "is a folder")


@pytest.mark.parametrize("location", ["../w.bin", "/etc/passwd", "sub/../../w.bin", "link.bin", ""])
def test_external_data_stays_in_its_folder(tmp_path, location):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "w.bin").write_bytes(bytes(16))
    (folder / "link.bin").symlink_to(tmp_path / "w.bin")
    onnx.save(small_model(location), folder / "m.onnx")
    refuse(folder / "m.onnx", "inside the model's folder")


@pytest.mark.parametrize(
    ("offset", "length", "match"),
    [(8, 16, "expected 24 bytes"), (-4, 16, "truncated"), (0, "x", "no number")],
)
def test_spans_past_the_end(tmp_path, offset, length, match):
    (tmp_path / "w.bin").write_bytes(bytes(16))
    onnx.save(small_model("w.bin", offset, length), tmp_path / "m.onnx")
    refuse(tmp_path / "m.onnx", match)


def test_missing_external_file(tmp_path):
    onnx.save(small_model("w.bin"), tmp_path / "m.onnx")
    refuse(tmp_path / "m.onnx", "beside the model")


def test_dims_beyond_the_bytes(tmp_path):
    model = small_model()
    model.graph.initializer[0].dims[0] = 1 << 60
    onnx.save(model, tmp_path / "m.onnx")
    refuse(tmp_path / "m.onnx", "needs .* bytes")


def test_cycle(tmp_path):
    nodes = "{ a = Add(x, b) b = Add(x, a) y = Add(a, b) }"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g (float[4] x) => (float[4] y) {nodes}')
    onnx.save(model, tmp_path / "m.onnx")
    refuse(tmp_path / "m.onnx", "cycle")


def test_undefined_value(tmp_path):
    model = small_model()
    model.graph.node[0].input[1] = "nowhere"
    onnx.save(model, tmp_path / "m.onnx")
    refuse(tmp_path / "m.onnx", "nothing in the model defines it")


def test_weights_are_not_read_on_load(tmp_path):
    """A sparse 8 GB data file loads at once, because no weight is touched."""
    size = 8 << 30
    model = small_model("w.bin", 0, size)
    model.graph.initializer[0].dims[0] = size // 4
    with (tmp_path / "w.bin").open("wb") as stream:
        stream.truncate(size)
    onnx.save(model, tmp_path / "m.onnx")
    graph = graphopt.load(tmp_path / "m.onnx")
    weight = next(n for n in graph.nodes if n.op == "get_attr")
    assert graph.weight(weight).shape == (size // 4,)
