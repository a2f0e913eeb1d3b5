"""Calibration data in every form, and every way to get it wrong."""

import numpy as np
import onnx
import pytest
import torch

import graphopt
from graphopt import GraphOptError
from graphopt.calibration import calibration_for

MODEL = """
<ir_version: 8, opset_import: ["": 17]>
g (int64[batch,seq] ids, float[batch,seq] mask) => (float[batch,seq,4] y)
<float[7,4] table = {0}>
{ e = Gather(table, ids) m = Unsqueeze(mask, axes) y = Mul(e, m) }
"""


@pytest.fixture
def graph(tmp_path):
    model = onnx.parser.parse_model(MODEL.replace("<float[7,4] table = {0}>\n", ""))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((7, 4), np.float32), "table"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2]), "axes"))
    onnx.save(model, tmp_path / "m.onnx")
    return graphopt.load(tmp_path / "m.onnx")


def feeds(batch=3, seq=5):
    return {"ids": np.ones((batch, seq), np.int64), "mask": np.ones((batch, seq), np.float32)}


def test_forms(graph, tmp_path):
    np.savez(tmp_path / "long.npz", **feeds(40))
    assert [len(b[0]) for b in calibration_for(graph, tmp_path / "long.npz")] == [16, 16, 8]
    np.savez(tmp_path / "stacked.npz", **{k: np.stack([v] * 5) for k, v in feeds().items()})
    assert [tuple(b[0].shape) for b in calibration_for(graph, tmp_path / "stacked.npz")] == [(3, 5)] * 5
    folder = tmp_path / "many"
    folder.mkdir()
    for i in (4, 9):
        np.savez(folder / f"{i}.npz", **feeds(2, i))
    assert [tuple(b[0].shape) for b in calibration_for(graph, folder)] == [(2, 4), (2, 9)]
    assert len(calibration_for(graph, [feeds(), {k: torch.from_numpy(v) for k, v in feeds().items()}])) == 2
    assert len(calibration_for(graph, torch.utils.data.DataLoader([{k: v[0] for k, v in feeds().items()}] * 4, 2))) == 2


def test_random_inputs_are_valid_and_seeded(graph):
    data = calibration_for(graph, 3, seed=5, sizes={"seq": 11})
    assert data.synthetic
    assert len(data) == 3
    for ids, mask in data:
        assert ids.shape == mask.shape == (2, 11)
        assert 0 <= int(ids.min()) <= int(ids.max()) < 7, "indices stay in the table"
        graph.execute(ids, mask)
    again = calibration_for(graph, 3, seed=5, sizes={"seq": 11})
    assert all(torch.equal(a[0], b[0]) for a, b in zip(data, again, strict=True))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"mask": None}, "expected a value for input mask"),
        ({"extra": np.ones(3)}, "no input 'extra'"),
        ({"ids": np.ones((3, 5), np.float32)}, "is float32"),
        ({"ids": np.ones((3, 5, 1, 1), np.int64)}, "has shape"),
        ({"mask": np.full((3, 5), np.nan, np.float32)}, "NaN"),
        ({"mask": np.ones((0, 5), np.float32), "ids": np.ones((0, 5), np.int64)}, "are empty|is empty"),
    ],
    ids=["missing", "extra", "type", "rank", "nan", "empty"],
)
def test_wrong_arrays(graph, tmp_path, change, match):
    arrays = {k: v for k, v in (feeds() | change).items() if v is not None}
    np.savez(tmp_path / "bad.npz", **arrays)
    for source in (tmp_path / "bad.npz", [arrays]):
        with pytest.raises(GraphOptError, match=match):
            calibration_for(graph, source)


@pytest.mark.parametrize(
    ("content", "match"), [(None, "does not exist"), (b"text", "cannot be read"), (b"", "cannot be read")]
)
def test_wrong_files(graph, tmp_path, content, match):
    path = tmp_path / "c.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GraphOptError, match=match):
        calibration_for(graph, path)


def test_other_mistakes(graph, tmp_path):
    for source, match in (
        ([], "empty"),
        (0, "at least 1"),
        (3.5, "as a path"),
        (["x"], "expected a dict"),
        (tmp_path, "found none"),
    ):
        with pytest.raises(GraphOptError, match=match):
            calibration_for(graph, source)
    with pytest.raises(GraphOptError, match="no symbolic dim 'sequence'"):
        calibration_for(graph, 1, sizes={"sequence": 4})


def test_pickles_are_not_loaded(graph, tmp_path):
    np.savez(tmp_path / "p.npz", ids=np.array([{"a": 1}], dtype=object))
    with pytest.raises(GraphOptError, match="cannot be read"):
        calibration_for(graph, tmp_path / "p.npz")
