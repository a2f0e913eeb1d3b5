"""Saving destroys nothing that it should not, writes nowhere else, and leaves nothing behind when it fails."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

import graphopt
from graphopt import GraphOptError
from graphopt.onnxfile.write import _write_proto

WEIGHTS = np.arange(4096, dtype=np.float32)


def stored(folder, location="m.onnx.data", name="m.onnx"):
    """y = x + w with w in external data; returns the path."""
    folder.mkdir(exist_ok=True)
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[4096] x) => (float[4096] y) { y = Add(x, w) }'
    )
    tensor = model.graph.initializer.add(name="w", data_type=1, dims=[4096])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", 0), ("length", WEIGHTS.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    (folder / location).parent.mkdir(exist_ok=True)
    (folder / location).write_bytes(WEIGHTS.tobytes())
    (folder / name).write_bytes(model.SerializeToString())
    return folder / name


def works(path):
    x = np.ones(4096, np.float32)
    return np.array_equal(graphopt.load(path).run({"x": x})["y"], x + WEIGHTS)


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_onto_the_source(tmp_path):
    path = stored(tmp_path)
    graph = graphopt.load(path)
    before = content(tmp_path)
    graph.save(path)
    assert content(tmp_path) == before
    assert works(path)


@pytest.mark.parametrize("options", [{}, {"external": True}])
def test_onto_the_weights(tmp_path, options):
    """The graph in memory still reads that file; at another offset lie other weights."""
    path = stored(tmp_path, "m.onnx.data" if options else "w.bin")
    graph = graphopt.load(path)
    before = content(tmp_path)
    with pytest.raises(GraphOptError, match="holds the model's weights"):
        graph.save(path if options else tmp_path / "w.bin", **options)
    assert content(tmp_path) == before
    assert works(path)


def test_onto_the_weights_through_a_link(tmp_path):
    path = stored(tmp_path)
    (tmp_path / "other.onnx").symlink_to("m.onnx.data")
    with pytest.raises(GraphOptError, match="holds the model's weights"):
        graphopt.load(path).save(tmp_path / "other.onnx")
    assert works(path)


def test_a_link_is_replaced_and_what_it_leads_to_is_kept(tmp_path):
    path = stored(tmp_path / "model")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "victim").write_bytes(b"precious")
    out = tmp_path / "out"
    out.mkdir()
    for name, target in (("file.onnx", "../elsewhere/victim"), ("nothing.onnx", "../elsewhere/new")):
        (out / name).symlink_to(target)
        graphopt.load(path).save(out / name)
        assert not (out / name).is_symlink()
        assert works(out / name)
    assert content(tmp_path / "elsewhere") == {"victim": b"precious"}


def test_into_a_linked_folder(tmp_path):
    path = stored(tmp_path / "model")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    graphopt.load(path).save(tmp_path / "link" / "out.onnx")
    assert works(tmp_path / "real" / "out.onnx")


@pytest.mark.parametrize("location", [".bashrc", "conftest.py", "sub/w.bin", "Makefile", "out.onnx", "w.so", ".w.bin"])
def test_a_model_does_not_choose_names_beside_the_output(tmp_path, location):
    """Next to the output, a file of such a name may be run."""
    path = stored(tmp_path / "model", location)
    (tmp_path / "home").mkdir()
    graphopt.load(path).save(tmp_path / "home" / "out.onnx")
    assert sorted(content(tmp_path / "home")) == ["out.onnx", "out.onnx.data"]
    assert works(tmp_path / "home" / "out.onnx")


def test_usual_names_of_weights_are_kept(tmp_path):
    for location in ("m.onnx.data", "model.onnx_data", "weights.bin"):
        path, target = stored(tmp_path / location, location), tmp_path / f"target-{location}"
        target.mkdir()
        graphopt.load(path).save(target / "out.onnx")
        assert sorted(content(target)) == sorted([location, "out.onnx"])
        assert onnx.load(target / "out.onnx", load_external_data=False) == onnx.load(path, load_external_data=False)


def make_pipe(folder):
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


@pytest.mark.parametrize(
    ("place", "match"),
    [
        (lambda folder: Path("/dev/null"), "is a device"),
        (make_pipe, "is a device"),
        (lambda folder: folder, "is a folder"),
        (lambda folder: folder / "missing" / "out.onnx", "create it first"),
        (lambda folder: folder / ("n" * 300), "name"),
        (lambda folder: folder / "a\0b.onnx", "null"),
        (lambda folder: Path("/proc/self/out.onnx"), "choose another"),
    ],
    ids=["device", "pipe", "folder", "missing", "long", "nul", "read-only"],
)
def test_places_that_cannot_be_written(tmp_path, place, match):
    path = stored(tmp_path / "model")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(GraphOptError, match=match) as caught:
        graphopt.load(path).save(place(out))
    assert "\n" not in str(caught.value)
    assert not content(out)
    assert Path("/dev/null").is_char_device()


def test_a_name_as_long_as_a_name_can_be(tmp_path):
    name = "n" * 250 + ".onnx"
    graphopt.load(stored(tmp_path / "model")).save(tmp_path / name)
    assert works(tmp_path / name)


# The limit is of one file; Python ignores the signal and gets an error, as from a full disk.
LIMITED = """
import json, resource, sys
import graphopt
for source, out, limit, external in json.loads(sys.argv[1]):
    graph = graphopt.load(source)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
    try:
        graph.save(out, external=external)
    except graphopt.GraphOptError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
"""


def test_a_full_disk(tmp_path):
    """An older output stays whole, with its own weights, and nothing is left beside it."""
    path, out = stored(tmp_path / "model", "w.bin"), tmp_path / "out"
    large = stored(tmp_path / "large", "w.bin")
    model = onnx.load(large, load_external_data=False)
    model.metadata_props.add(key="k", value="v" * 200_000)
    large.write_bytes(model.SerializeToString())
    out.mkdir()
    graphopt.load(path).save(out / "m.onnx", external=True)
    before = content(out)
    # It ends before the weights, in them, in the model behind them, and in a model without weights of its own.
    cases = [(path, 100, True), (path, 8_000, True), (large, 100_000, True), (large, 100_000, False)]
    given = json.dumps([(str(source), str(out / "m.onnx"), limit, external) for source, limit, external in cases])
    done = subprocess.run([sys.executable, "-c", LIMITED, given], capture_output=True, text=True, check=True)
    sentences = done.stdout.splitlines()
    assert len(sentences) == len(cases)
    assert all("File too large" in sentence for sentence in sentences)
    assert content(out) == before
    assert works(out / "m.onnx")


def test_more_than_a_protobuf_holds(tmp_path):
    def refuse():
        raise ValueError("Message onnx.ModelProto exceeds maximum protobuf size of 2GB: 2200000000")

    large = SimpleNamespace(SerializeToString=refuse)  # what protobuf says of 2 GB
    with pytest.raises(GraphOptError, match="external=True"):
        _write_proto(large, tmp_path / "out.onnx")
    assert not content(tmp_path)
