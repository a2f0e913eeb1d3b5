"""Passes enter loops and branches; functions are opened by `inline`; what nobody knows stays as it is."""

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch

import graphopt
from graphopt.backends.onnx import to_proto
from graphopt.calibration import Calibration
from graphopt.errors import GraphOptError
from graphopt.frontends.onnx import load_onnx
from graphopt.onnxfile import OnnxFile
from graphopt.registry import PASSES, names, pass_class
from graphopt.rewrite import Context
from graphopt.sites.vocabulary import name_of
from graphopt.subgraphs import walk

# Tests are imported by path: this folder is no package.
_spec = importlib.util.spec_from_file_location(
    "attention_models", Path(__file__).parents[1] / "passes" / "attention_models.py"
)
models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models)

HEADER = '<ir_version: 10, opset_import: ["": 21, "own": 1]> '
X = np.random.default_rng(0).uniform(0.5, 3, (3, 4)).astype(np.float32)


def parsed(text):
    return onnx.parser.parse_model(HEADER + text)


def ran(proto, feeds):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


LOOP = """g (float[N, 4] x, bool c) => (float[N, 4] y) <int64 n = {3}, float[4] w = {1, 2, 3, 4}, float one = {1}> {
    h = Neg(x)
    y = Loop(n, , x) <body = b (int64 i, bool go, float[N, 4] s) => (bool on, float[N, 4] r) {
        on = Identity(go) a = Mul(s, one) b1 = Neg(a) b2 = Neg(b1)
        r = If(go) <then_branch = t () => (float[N, 4] p) { u = Identity(h) v = Add(u, b2) p = Mul(v, w) },
                    else_branch = e () => (float[N, 4] q) { q = Neg(b2) }> }> }"""


def test_cleanup_enters_loops_and_branches():
    proto = parsed(LOOP)
    graph = load_onnx(OnnxFile(proto))
    feeds = {"x": X, "c": np.array(True)}
    result = graph.apply("cleanup", calibration=[feeds])
    kinds = sorted({site.kind for p in result.report.passes for site in p.sites if site.status == "rewritten"})
    assert kinds == ["identity", "involution", "times-one"]
    saved = to_proto(result.graph)
    loop = next(n for n in saved.graph.node if n.op_type == "Loop").attribute[0].g
    assert sorted(n.op_type for n in loop.node) == ["Identity", "If"]
    branch = next(a.g for a in next(n for n in loop.node if n.op_type == "If").attribute if a.name == "then_branch")
    assert [n.op_type for n in branch.node] == ["Add", "Mul"]
    # `w` is used in the branch only, and is still the model's; `one` has no use any more.
    assert [t.name for t in saved.graph.initializer] == ["n", "w"]
    onnx.checker.check_model(saved, full_check=True)
    np.testing.assert_array_equal(ran(saved, feeds)[0], ran(proto, feeds)[0])
    assert to_proto(graph, rebuild=True) == proto  # the original has not changed


def test_a_branch_that_never_ran_stays():
    graph = load_onnx(OnnxFile(parsed(LOOP)))
    result = graph.apply("cleanup", calibration=[{"x": X, "c": np.array(True)}])
    branches = [level.proto for level in walk(result.graph) if level.proto.name == "e"]
    assert [n.op_type for n in branches[0].node] == ["Neg"]


def test_a_captured_value_that_changes_its_name():
    text = """g (float[N, 4] x, bool c) => (float[N, 4] y) {
        a = Exp(x) b = Exp(x) z = Add(a, b)
        y = If(c) <then_branch = t () => (float[N, 4] p) { p = Sub(b, z) },
                   else_branch = e () => (float[N, 4] q) { q = Neg(b) }> }"""
    proto = parsed(text)
    graph = load_onnx(OnnxFile(proto))
    feeds = {"x": X, "c": np.array(False)}
    result = graph.apply("cleanup", calibration=[feeds])  # merges b into a
    saved = to_proto(result.graph)
    assert [n.op_type for n in saved.graph.node].count("Exp") == 1
    np.testing.assert_array_equal(ran(saved, feeds)[0], ran(proto, feeds)[0])


def test_constant_branches_are_opened():
    text = """g (float[N, 4] x) => (float[N, 4] y, float[N, 4] z) <bool c = {1}> {
        a, b = If(c) <then_branch = t () => (float[N, 4] p, float[N, 4] q)
                          <float[4] w = {1, 2, 3, 4}> { p = Mul(x, w) q = Exp(p) },
                      else_branch = e () => (float[N, 4] r, float[N, 4] s) { r = Neg(x) s = Neg(x) }>
        y = Neg(a) z = Neg(b) }"""
    proto = parsed(text)
    result = load_onnx(OnnxFile(proto)).apply("cleanup", calibration=[{"x": X}])
    saved = to_proto(result.graph)
    assert [n.op_type for n in saved.graph.node] == ["Mul", "Exp", "Neg", "Neg"]
    for found, expected in zip(ran(saved, {"x": X}), ran(proto, {"x": X}), strict=True):
        np.testing.assert_array_equal(found, expected)


FUNCTIONS = """g (float[N, 4] x) => (float[N, 4] y) { a = own.twice<alpha = 0.25>(x) y = own.leaky(a) }
    <domain: "own", opset_import: ["": 21, "own": 1]> twice <alpha>(v) => (r) {
        a = own.leaky<slope: float = @alpha>(v) r = own.leaky(a) }
    <domain: "own", opset_import: ["": 21]> leaky <slope: float = 0.5>(v) => (r) {
        r = LeakyRelu<alpha: float = @slope>(v) }"""


def test_inline_opens_functions():
    proto = parsed(FUNCTIONS)
    feeds = {"x": X - 2}
    graph = load_onnx(OnnxFile(proto))
    result = graph.apply("inline", calibration=[feeds])
    saved = to_proto(result.graph)
    assert [n.op_type for n in saved.graph.node] == ["LeakyRelu"] * 3
    assert [n.attribute[0].f for n in saved.graph.node] == [0.25, 0.5, 0.5]
    np.testing.assert_array_equal(ran(saved, feeds)[0], ran(proto, feeds)[0])
    assert to_proto(graph, rebuild=True) == proto


def test_inline_can_be_limited():
    graph = load_onnx(OnnxFile(parsed(FUNCTIONS)))
    some = graph.apply("inline{functions=leaky}", calibration=[{"x": X}])
    assert [n.op_type for n in to_proto(some.graph).graph.node] == ["twice", "LeakyRelu"]
    stopped = graph.apply("inline{most_nodes=1}", calibration=[{"x": X}])
    assert {site.status for site in stopped.report.passes[0].sites} == {"refused"}
    assert "most_nodes=1" in stopped.report.passes[0].sites[0].reason


def test_inline_refuses_another_opset():
    proto = parsed(FUNCTIONS)
    for function in proto.functions:
        function.opset_import[0].version = 13
    result = load_onnx(OnnxFile(proto)).apply("inline", calibration=[{"x": X}])
    assert "imports version 13" in result.report.passes[0].sites[0].reason


def attention_in_a_branch(tmp_path):
    """A model whose attention runs in one branch of an If; the weights lie outside of it."""
    models.export(models.Block("causal"), tmp_path / "m.onnx")
    proto = onnx.load(tmp_path / "m.onnx")
    inner = onnx.GraphProto(name="attend", node=proto.graph.node, output=proto.graph.output)
    other = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["idle"])], "idle", [], [onnx.ValueInfoProto(name="idle")]
    )
    other.output[0].type.CopyFrom(proto.graph.output[0].type)
    del proto.graph.node[:]
    proto.graph.output[0].name = "result"
    proto.graph.input.append(onnx.helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, []))
    proto.graph.node.append(onnx.helper.make_node("If", ["c"], ["result"], then_branch=inner, else_branch=other))
    onnx.checker.check_model(proto)
    onnx.save(proto, tmp_path / "branch.onnx")
    return tmp_path / "branch.onnx"


def batches(count, chosen=True):
    for i in range(count):
        x, mask = models.example(2, 20 + i, seed=i)
        yield {"x": x.numpy(), "mask": mask.numpy(), "c": np.array(chosen)}


def test_linearize_enters_a_branch(tmp_path):
    graph = graphopt.load(attention_in_a_branch(tmp_path))
    sites = graph.sites("attention")
    assert len(sites) == 1
    result = graph.apply("linearize{method=hedgehog,fit_steps=60}", calibration=list(batches(6)))
    (report,) = [site for site in result.report.passes[0].sites if site.kind == "attention"]
    assert (report.status, report.name) == ("rewritten", sites[0].name)
    assert report.errors["after_fit"] < report.errors["before_fit"]
    result.graph.save(tmp_path / "linear.onnx")
    saved = onnx.load(tmp_path / "linear.onnx")
    onnx.checker.check_model(saved)
    branch = next(a.g for a in saved.graph.node[0].attribute if a.name == "then_branch")
    assert "Softmax" not in {n.op_type for n in branch.node}
    feeds = next(batches(1))
    (found,) = ran(saved, feeds)
    # onnxruntime sums in another order than torch.
    np.testing.assert_allclose(found, result.graph.run(feeds)["result"], rtol=1e-3, atol=1e-5)
    (idle,) = ran(saved, {**feeds, "c": np.array(False)})
    np.testing.assert_array_equal(idle, feeds["x"])


def test_a_site_in_a_branch_that_never_ran_is_refused(tmp_path):
    graph = graphopt.load(attention_in_a_branch(tmp_path))
    result = graph.apply("linearize{method=hedgehog,fit_steps=0}", calibration=list(batches(2, chosen=False)))
    reports = [site for site in result.report.passes[0].sites if site.kind == "attention"]
    assert [(r.status, "never ran" in r.reason) for r in reports] == [("refused", True)]


def test_sites_of_branches_can_be_chosen_by_name(tmp_path):
    graph = graphopt.load(attention_in_a_branch(tmp_path))
    with pytest.raises(GraphOptError, match="no site is called 'nowhere'"):
        graph.apply("linearize{method=hedgehog,fit_steps=0}", calibration=list(batches(2)), only=["nowhere"])


UNKNOWN = """g (float[N, 4] x) => (float[N, 4] y) <float[4] w = {1, 2, 3, 4}> {
    a = Identity(x)
    b, , d = secret.Frobnicate<mode = "größe", level = 3, table = [1.5, 2.5]>(a, , w)
    y = Add(b, d) }"""


@pytest.mark.parametrize("name", names(PASSES))
def test_an_operator_that_nobody_knows_passes_through_every_pass(name):
    header = '<ir_version: 10, opset_import: ["": 21, "secret": 7]> '
    proto = onnx.parser.parse_model(header + UNKNOWN)
    proto.graph.node[1].name = "frob"
    graph = load_onnx(OnnxFile(proto))
    assert to_proto(graph, rebuild=True) == proto
    # It cannot be run, so nothing can be calibrated: the pass itself must leave it alone.
    context = Context(Calibration([], "nothing"))
    rewritten, _ = pass_class(name)().run(graph, context)
    rewritten.lint()
    kept = next(n for n in rewritten.nodes if name_of(n) == "frob")
    emitted = next(n for n in to_proto(rewritten, rebuild=True).graph.node if n.name == "frob")
    original = proto.graph.node[1]
    assert emitted.attribute == original.attribute
    assert (emitted.domain, emitted.op_type, list(emitted.output)) == ("secret", "Frobnicate", ["b", "", "d"])
    assert len(kept.args) == 3


def test_gradients_do_not_stop_at_a_rewritten_loop():
    graph = load_onnx(OnnxFile(parsed(LOOP)))
    result = graph.apply("cleanup", calibration=[{"x": X, "c": np.array(True)}])
    grads = []
    for each in (graph, result.graph):
        x = torch.from_numpy(X).requires_grad_()
        (y,) = each.execute(x, torch.tensor(True))
        grads += torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(*grads, rtol=0, atol=0)
