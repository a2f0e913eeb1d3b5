"""load + save of models that others do not keep; tests/conformance does the same with real ones."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import graphopt


def run(path, feeds):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, feeds)


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def odd_model():
    """What other tools drop: a sparse initialiser, metadata, doc strings, an unused weight, non-ASCII names."""
    helper, P = onnx.helper, onnx.TensorProto
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("W", P.FLOAT, [2], [2.0, 3.0]),
        helper.make_tensor("W_at", P.INT64, [2], [0, 3]),
        [2, 2],
    )
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["größe", "W"], ["h"], name="", doc_string="a product"),
            helper.make_node("If", ["c"], ["y"], then_branch=_branch("Relu"), else_branch=_branch("Neg")),
        ],
        "odd",
        [
            helper.make_tensor_value_info("größe", P.FLOAT, ["batch", 2]),
            helper.make_tensor_value_info("c", P.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", P.FLOAT, ["batch", 2])],
        [helper.make_tensor("unused", P.FLOAT, [1], [1.0])],
        sparse_initializer=[sparse],
        doc_string="a graph",
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {"author": "Zoë"})
    return model


def _branch(op_type):
    helper = onnx.helper
    node = helper.make_node(op_type, ["h"], ["b"])
    return helper.make_graph([node], op_type, [], [helper.make_tensor_value_info("b", 1, None)])


def test_what_other_tools_drop(tmp_path):
    path, saved = tmp_path / "odd.onnx", tmp_path / "saved.onnx"
    onnx.save(odd_model(), path)
    graph = graphopt.load(path)
    graph.save(saved)
    assert onnx.load(saved) == odd_model()
    x = np.array([[1.0, -2.0]], np.float32)
    for choice, expected in ((True, [[2.0, 0.0]]), (False, [[-2.0, 6.0]])):
        assert graph.run({"größe": x, "c": np.array(choice)})["y"].tolist() == expected


@pytest.mark.parametrize("where", ["same folder", "other folder", "occupied folder"])
def test_external_data_follows_the_model(tmp_path, where):
    source = tmp_path / "source"
    source.mkdir()
    weights = np.arange(4096, dtype=np.float32).reshape(64, 64)
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
            "g",
            [onnx.helper.make_tensor_value_info("x", 1, [1, 64])],
            [onnx.helper.make_tensor_value_info("y", 1, [1, 64])],
            [onnx.numpy_helper.from_array(weights, "w")],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.save(model, source / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    target = source if where == "same folder" else tmp_path / "target"
    target.mkdir(exist_ok=True)
    if where == "occupied folder":
        (target / "m.data").write_bytes(b"somebody else's")
    graphopt.load(source / "m.onnx").save(target / "out.onnx")
    x = np.ones((1, 64), np.float32)
    np.testing.assert_array_equal(run(target / "out.onnx", {"x": x})[0], x @ weights)
    if where == "occupied folder":
        assert (target / "m.data").read_bytes() == b"somebody else's"
    assert not list(target.glob(".*")), "temporary files stay behind"


def test_weights_move_out_on_request(tmp_path):
    path = tmp_path / "m.onnx"
    value = np.random.default_rng(0).standard_normal((128, 128)).astype(np.float32)
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[1,128] x) => (float[1,128] y) { y = MatMul(x, w) }'
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(value, "w"))
    onnx.save(model, path)
    graphopt.load(path).save(tmp_path / "out.onnx", external=True)
    assert (tmp_path / "out.onnx").stat().st_size < 1000
    assert (tmp_path / "out.onnx.data").stat().st_size >= value.nbytes
    x = np.ones((1, 128), np.float32)
    assert_same(run(path, {"x": x}), run(tmp_path / "out.onnx", {"x": x}))


@pytest.mark.parametrize(
    "name", ["from", "a.class.b", "0", "weight", "a..b", ".", "forward", "training", "x y", "größe"]
)
def test_any_weight_name(tmp_path, name):
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { y = Add(x, w) }'
    )
    model.graph.node[0].input[1] = name
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(2, np.float32), name))
    onnx.save(model, tmp_path / "m.onnx")
    graph = graphopt.load(tmp_path / "m.onnx")
    if name == "a.class.b":
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(2, np.float32), "layer.0.weight"))
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(2, np.float32), "layer.1.weight"))
        onnx.save(model, tmp_path / "m.onnx")
        graph = graphopt.load(tmp_path / "m.onnx")
        assert {"layer.0.weight", "layer.1.weight"} <= {str(n.target) for n in graph.nodes}, "dotted names stay"
    assert graph.run({"x": np.zeros(2, np.float32)})["y"].tolist() == [1.0, 1.0]
    assert graph.to_module()(torch.zeros(2)).tolist() == [1.0, 1.0]
    graph.save(tmp_path / "out.onnx")
    assert onnx.load(tmp_path / "out.onnx") == model
