"""What a pass does to single nodes and what of it is saved."""

import numpy as np
import onnx
import pytest

import graphopt
from graphopt import dialect
from graphopt.backends.onnxruntime import Session

HEAD = '<ir_version: 8, opset_import: ["": 17]> g (float[2] x, bool c) => (float[2] y)'


@pytest.fixture
def load(tmp_path):
    def make(body):
        onnx.save(onnx.parser.parse_model(f"{HEAD} {{ {body} }}"), tmp_path / "m.onnx")
        return graphopt.load(tmp_path / "m.onnx").copy()

    return make


def node(graph, name):
    return next(n for n in graph.nodes if n.meta.get("onnx_name") == name)


def check(graph, tmp_path, expected, c=True):
    graph.module.recompile()
    graph.lint()
    graph.save(tmp_path / "out.onnx")
    feeds = {"x": np.array([1.0, -2.0], np.float32), "c": np.array(c)}
    assert graph.run(feeds)["y"].tolist() == expected
    found = Session(tmp_path / "out.onnx").run({s.name: feeds[s.name] for s in graph.inputs})
    assert found["y"].tolist() == expected
    return onnx.load(tmp_path / "out.onnx")


def test_only_one_of_two_equal_inputs_is_rewired(load, tmp_path):
    graph = load("n = Neg(x) a = Abs(x) y = Mul(a, a) z = Identity(n)")
    product = node(graph, "y")
    product.args = (product.args[0], node(graph, "n"))
    check(graph, tmp_path, [-1.0, 4.0])


def test_a_changed_attribute_is_saved(load, tmp_path):
    graph = load("a = Identity(x) y = LeakyRelu<alpha = 0.5>(a)")
    relu = node(graph, "y")
    relu.kwargs = {"alpha": 0.25}
    model = check(graph, tmp_path, [1.0, -0.5])
    assert [n.op_type for n in model.graph.node] == ["Identity", "LeakyRelu"]


def test_an_optional_input_is_added(load, tmp_path):
    graph = load("zero = Constant<value = float {0}>() y = Clip(x)")
    clip = node(graph, "y")
    clip.args = (clip.args[0], node(graph, "zero"))
    check(graph, tmp_path, [1.0, 0.0])


def test_an_output_that_another_value_takes_over(load, tmp_path):
    graph = load("a = Neg(x) y = Abs(a) b = Add(y, a)")
    with graph.fx.inserting_after(node(graph, "b")):
        new = graph.fx.call_function(dialect.lookup("", "Mul", 17).function, (node(graph, "b"), node(graph, "y")))
    (output,) = [n for n in graph.nodes if n.op == "output"]
    output.args = ((new,),)
    model = check(graph, tmp_path, [0.0, 8.0])
    assert [o.name for o in model.graph.output] == ["y"]


def test_an_input_becomes_the_output(load, tmp_path):
    graph = load("y = Identity(x)")
    (output,) = [n for n in graph.nodes if n.op == "output"]
    output.args = ((graph.placeholders[0],),)
    graph.fx.erase_node(node(graph, "y"))
    check(graph, tmp_path, [1.0, -2.0])


def test_what_a_subgraph_captures_is_rewired(load, tmp_path):
    branch = "() => (float[2] o) { o = Add(a, a) }"
    graph = load(f"a = Abs(x) n = Neg(x) y = If(c) <then_branch = t {branch}, else_branch = e {branch}>")
    node(graph, "a").replace_all_uses_with(node(graph, "n"))
    branching = node(graph, "y")
    graph.fx.erase_node(node(graph, "a"))
    assert branching.op == "call_module"
    model = onnx.ModelProto()
    graph.module.recompile()
    graph.save(tmp_path / "out.onnx")
    model = onnx.load(tmp_path / "out.onnx")
    found = Session(tmp_path / "out.onnx").run({"x": np.array([1.0, -2.0], np.float32), "c": np.array(True)})
    assert found["y"].tolist() == [-2.0, 4.0]
    assert [n.op_type for n in model.graph.node] == ["Neg", "If"]


def test_an_opaque_node_with_equal_inputs_is_rewired(load, tmp_path, monkeypatch):
    known = dialect.lookup
    monkeypatch.setattr(dialect, "lookup", lambda d, n, o: None if n == "SequenceConstruct" else known(d, n, o))
    graph = load("n = Neg(x) s = SequenceConstruct(x, x) y = ConcatFromSequence<axis = 0>(s)")
    sequence = node(graph, "s")
    assert sequence.op == "call_module"
    sequence.args = (sequence.args[0], node(graph, "n"))
    graph.module.recompile()
    feeds = {"x": np.array([1.0, -2.0], np.float32)}
    assert graph.run(feeds | {"c": np.array(True)})["y"].tolist() == [1.0, -2.0, -1.0, 2.0]
    graph.save(tmp_path / "out.onnx")
    assert Session(tmp_path / "out.onnx").run(feeds | {"c": np.array(True)})["y"].tolist() == [1.0, -2.0, -1.0, 2.0]
