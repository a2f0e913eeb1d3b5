"""Loops, branches and model-local functions run as on onnxruntime, and come back as they were."""

import time

import numpy as np
import onnx
import onnx.helper
import onnx.parser
import onnxruntime
import pytest
import torch

import graphopt
from graphopt.backends.onnx import to_proto
from graphopt.dialect.control import at_most
from graphopt.errors import GraphOptError
from graphopt.frontends.onnx import load_onnx
from graphopt.onnxfile import OnnxFile
from graphopt.subgraphs import bodies_of, walk

HEADER = '<ir_version: 10, opset_import: ["": 21, "own": 1]> '

MODELS = {
    "branch with captured values": """g (float[N, 4] x, bool c) => (float[N, 4] y) <float[4] w = {1, 2, 3, 4}> {
        h = Neg(x)
        y = If(c) <then_branch = t () => (float[N, 4] p) { p = Mul(h, w) },
                   else_branch = e () => (float[N, 4] q) { q = Sub(x, h) }> }""",
    "branch that hands on": """g (float[N, 4] x, bool c) => (float[N, 4] y) <float[1, 4] w = {1, 2, 3, 4}> {
        h = Exp(x)
        y = If(c) <then_branch = t () => (float[N, 4] h) { }, else_branch = e () => (float[N, 4] w) { }> }""",
    "several outputs": """g (float[N, 4] x, bool c) => (float[N, 4] y, float[N, 4] z) {
        y, z = If(c) <then_branch = t () => (float[N, 4] p, float[N, 4] q) { p = Abs(x) q = Neg(x) },
                      else_branch = e () => (float[N, 4] r, float[N, 4] s) { r = Neg(x) s = Exp(x) }> }""",
    "loop": """g (float[N, 4] x, bool c) => (float[N, 4] y, float[T, N, 4] z) <int64 n = {3}, float half = {0.5}> {
        y, z = Loop(n, , x) <body = b (int64 i, bool go, float[N, 4] s) => (bool on, float[N, 4] r, float[N, 4] o)
            { on = Identity(go) r = Mul(s, half) o = Add(s, x) }> }""",
    "loop that stops": """g (float[N, 4] x, bool c) => (float[N, 4] y) <float limit = {20}> {
        y = Loop(, c, x) <body = b (int64 i, bool go, float[N, 4] s) => (bool on, float[N, 4] r)
            { r = Add(s, x) m = ReduceMax<keepdims = 0>(r) on = Less(m, limit) }> }""",
    "loop of no trip": """g (float[N, 4] x, bool c) => (float[N, 4] y, float[T, 3] z)
        <int64 n = {0}, float[3] w = {1, 2, 3}> {
        y, z = Loop(n, , x) <body = b (int64 i, bool go, float[N, 4] s) => (bool on, float[N, 4] r, float[3] o)
            { on = Identity(go) r = Neg(s) o = Identity(w) }> }""",
    "nested": """g (float[N, 4] x, bool c) => (float[N, 4] y) <int64 n = {4}, int64 one = {1}, int64 two = {2}> {
        y = Loop(n, , x) <body = b (int64 i, bool go, float[N, 4] s) => (bool on, float[N, 4] r) {
            on = Identity(go) rest = Mod(i, two) odd = Equal(rest, one)
            r = If(odd) <then_branch = t () => (float[N, 4] p) { p = Add(s, x) },
                         else_branch = e () => (float[N, 4] q) { k = Cast<to = 1>(i) q = Mul(s, k) }> }> }""",
    "names of their own": """g (float[N, 4] x, bool c) => (float[N, 4] y) {
        a = Neg(x)
        b = If(c) <then_branch = t () => (float[N, 4] p) { u = Abs(a) p = Neg(u) },
                   else_branch = e () => (float[N, 4] q) { u = Exp(a) q = Neg(u) }>
        u = Add(a, b) y = Neg(u) }""",
    "scan": """g (float[N, 4] x, bool c) => (float[4] y, float[N, 4] z) <float[4] s = {0, 0, 0, 0}> {
        y, z = Scan<num_scan_inputs = 1, body = b (float[4] t, float[4] v) => (float[4] r, float[4] o)
            { r = Add(t, v) o = Mul(r, v) }>(s, x) }""",
    "scan backwards and across": """g (float[N, 4] x, bool c) => (float[N] y, float[N, 4] z) <int64[1] axes = {1}> {
        s = ReduceSum<keepdims = 0>(x, axes)
        y, z = Scan<num_scan_inputs = 1, scan_input_axes = [1], scan_input_directions = [1], scan_output_axes = [1],
            body = b (float[N] t, float[N] v) => (float[N] r, float[N] o) { r = Add(t, v) o = Sqrt(r) }>(s, x)
        }""",
    "sequences as state": """g (float[N, 4] x, bool c) => (float[M, 4] y) <int64 n = {3}> {
        empty = SequenceEmpty()
        all = Loop(n, , empty) <body = b (int64 i, bool go, seq(float[N, 4]) s) => (bool on, seq(float[N, 4]) r)
            { on = Identity(go) k = Cast<to = 1>(i) p = Mul(x, k) r = SequenceInsert(s, p) }>
        y = ConcatFromSequence<axis = 0>(all) }""",
    "functions": """g (float[N, 4] x, bool c) => (float[N, 4] y) { y = own.twice<alpha = 0.25>(x) }
        <domain: "own", opset_import: ["": 21, "own": 1]> twice <alpha>(v) => (r) {
            a = own.leaky<slope: float = @alpha>(v) r = own.leaky(a) }
        <domain: "own", opset_import: ["": 21]> leaky <slope: float = 0.5>(v) => (r) {
            r = LeakyRelu<alpha: float = @slope>(v) }""",
    "function with a branch": """g (float[N, 4] x, bool c) => (float[N, 4] y) { y = own.choose(c, x) }
        <domain: "own", opset_import: ["": 21]> choose (k, v) => (r) {
            r = If(k) <then_branch = t () => (p) { p = Neg(v) }, else_branch = e () => (q) { q = Abs(v) }> }""",
    "function without its last input": """g (float[N, 4] x, bool c) => (float[N, 4] y) { y = own.limit(x) }
        <domain: "own", opset_import: ["": 21]> limit (v, low) => (r) { r = Clip(v, low) }""",
}
# onnxruntime asks for an Identity in between; the standard does not.
REFUSED = {"branch that hands on"}
X = np.random.default_rng(0).uniform(0.5, 3, (3, 4)).astype(np.float32)


def parsed(name):
    return onnx.parser.parse_model(HEADER + MODELS[name])


def on_onnxruntime(proto, feeds):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    used = {i.name for i in session.get_inputs()}
    return session.run(None, {k: v for k, v in feeds.items() if k in used})


@pytest.mark.parametrize("chosen", [True, False])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in REFUSED])
def test_runs_as_on_onnxruntime(name, chosen):
    proto = parsed(name)
    feeds = {"x": X, "c": np.array(chosen)}
    graph = load_onnx(OnnxFile(proto))
    assert not [n for n in graph.nodes if type(getattr(graph.module, str(n.target), None)).__name__ == "OpaqueOperator"]
    found = graph.run(feeds)
    for spec, expected in zip(graph.outputs, on_onnxruntime(proto, feeds), strict=True):
        assert (found[spec.name].dtype, found[spec.name].shape) == (expected.dtype, expected.shape)
        np.testing.assert_allclose(found[spec.name], expected, rtol=1e-6)  # Exp differs by an ulp or two
    # The compiled form of the graph, without the interpreter.
    values = graph.module(torch.from_numpy(X), torch.tensor(bool(feeds["c"])))
    for value, spec in zip(values, graph.outputs, strict=True):
        np.testing.assert_array_equal(value.detach().numpy(), found[spec.name])


def test_a_branch_hands_on_outer_values():
    graph = load_onnx(OnnxFile(parsed("branch that hands on")))
    np.testing.assert_allclose(graph.run({"x": X, "c": np.array(True)})["y"], np.exp(X), rtol=1e-6)
    np.testing.assert_array_equal(graph.run({"x": X, "c": np.array(False)})["y"], [[1, 2, 3, 4]])


@pytest.mark.parametrize("name", MODELS)
def test_comes_back_as_it_was(name):
    proto = parsed(name)
    graph = load_onnx(OnnxFile(proto))
    assert to_proto(graph) is proto
    assert to_proto(graph, rebuild=True) == proto
    assert to_proto(graph.copy(), rebuild=True) == proto


def test_bodies_are_graphs():
    graph = load_onnx(OnnxFile(parsed("nested")))
    ((loop, name, body),) = bodies_of(graph)
    assert (loop.proto.op_type, name) == ("Loop", "body")
    assert [spec.name for spec in body.inputs] == ["i", "go", "s", "x"]
    assert body.captured == ("x",)
    assert [level.proto.name for level in walk(graph)] == ["g", "b", "t", "e"]


def test_gradients_flow_through_loops_and_captured_values():
    graph = load_onnx(OnnxFile(parsed("loop")))
    x = torch.rand(2, 4, dtype=torch.float32, requires_grad=True)
    y, z = graph.execute(x, torch.tensor(True))
    (found,) = torch.autograd.grad(y.sum() + z.sum(), x)
    # y = x / 8 and z = (x + x) + (x / 2 + x) + (x / 4 + x).
    torch.testing.assert_close(found, torch.full_like(x, 0.125 + 2 + 1.5 + 1.25))


def test_weights_of_bodies_train():
    text = """g (float[N, 4] x, bool c) => (float[N, 4] y) <float[4] w = {1, 2, 3, 4}> {
        y = If(c) <then_branch = t () => (float[N, 4] p) { p = Mul(x, w) },
                   else_branch = e () => (float[N, 4] q) { q = Mul(x, w) }> }"""
    module = load_onnx(OnnxFile(onnx.parser.parse_model(HEADER + text))).to_module()
    weight = dict(module.named_parameters())["w"]
    module(torch.ones(2, 4), torch.tensor(True)).sum().backward()
    torch.testing.assert_close(weight.grad, torch.full((4,), 2.0))
    with torch.no_grad():
        weight.mul_(2)
    torch.testing.assert_close(module(torch.ones(1, 4), torch.tensor(False))[0], torch.tensor([2.0, 4, 6, 8]))


def test_functions_that_unfold_without_bound_load_at_once():
    calls = [
        f'<domain: "own", opset_import: ["": 21, "own": 1]> f{i} (v) => (r) '
        f"{{ a = own.f{i - 1}(v) r = own.f{i - 1}(a) }}"
        for i in range(1, 15)
    ]
    text = (
        'g (float[N, 4] x) => (float[N, 4] y) { y = own.f14(x) } <domain: "own", opset_import: ["": 21]> '
        "f0 (v) => (r) { r = Neg(v) } " + " ".join(calls)
    )
    started = time.perf_counter()
    graph = load_onnx(OnnxFile(onnx.parser.parse_model(HEADER + text)))
    assert time.perf_counter() - started < 1  # 2^14 calls, of which none is looked into
    assert len(list(graph.nodes)) == 3


def test_a_loop_can_be_limited():
    text = """g (float[N, 4] x) => (float[N, 4] y) <int64 n = {9223372036854775807}> {
        y = Loop(n, , x) <body = b (int64 i, bool go, float[N, 4] s) => (bool on, float[N, 4] r)
            { on = Identity(go) r = Neg(s) }> }"""
    graph = load_onnx(OnnxFile(onnx.parser.parse_model(HEADER + text)))
    with at_most(100), pytest.raises(GraphOptError, match="at most 100 trips on made-up inputs"):
        graph.run({"x": X})


def test_calls_with_too_many_inputs_are_refused():
    proto = parsed("functions")
    proto.graph.node[0].input.append("x")
    with pytest.raises(GraphOptError, match="2 inputs"):
        load_onnx(OnnxFile(proto))


def test_unknown_value_in_a_body():
    proto = parsed("nested")
    proto.graph.node[0].attribute[0].g.node[0].input[0] = "nowhere"
    with pytest.raises(GraphOptError, match="nowhere"):
        load_onnx(OnnxFile(proto))


@pytest.mark.parametrize("name", MODELS)
def test_saved_as_a_file(name, tmp_path):
    onnx.save(parsed(name), tmp_path / "in.onnx")
    graphopt.load(tmp_path / "in.onnx").save(tmp_path / "out.onnx")
    assert onnx.load(tmp_path / "out.onnx") == onnx.load(tmp_path / "in.onnx")
