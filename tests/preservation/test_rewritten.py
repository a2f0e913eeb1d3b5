"""Passes that change one thing leave the rest of its meaning: attributes, names, uses without an edge."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import pytest
from torch import fx

import graphopt
from graphopt import dialect
from graphopt.backends.onnx import to_proto
from graphopt.errors import GraphOptError
from graphopt.frontends.onnx import load_onnx
from graphopt.graph import Graph
from graphopt.onnxfile import OnnxFile
from graphopt.sites.vocabulary import name_of
from graphopt.subgraphs import walk

from .attention import attention, batches
from .checks import check_names, is_valid, session
from .models import MODELS
from .odd import BOTH, BRANCHES, P, X, branch, info, parsed, tensor

LINEARIZE = "linearize{method=hedgehog,fit_steps=0,max_error=9}"


def loaded(proto: onnx.ModelProto) -> Graph:
    return load_onnx(OnnxFile(proto))


def called(graph: Graph, name: str) -> fx.Node:
    """The node of that name, in a body too."""
    return next(n for level in walk(graph) for n in level.nodes if name_of(n) == name)


def operators(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def on_onnxruntime(proto: onnx.ModelProto, feeds: dict[str, Any], folder: Path) -> list[Any]:
    (folder / "run.onnx").write_bytes(proto.SerializeToString())
    assert is_valid(folder / "run.onnx")
    found: list[Any] = session(folder / "run.onnx").run(None, feeds)
    return found


# Weights.


@pytest.mark.parametrize("name", ["training info", "a weight that can be fed"])
def test_what_is_no_constant_is_not_taken_for_one(name: str) -> None:
    """`w` is all ones, so that x w = x: until it is trained, or fed."""
    proto = MODELS[name].model
    result = loaded(proto).apply("cleanup", calibration=[{"x": X}])
    assert operators(to_proto(result.graph)) == operators(proto)[1:]


def test_a_trained_weight_is_no_constant_in_a_body_either() -> None:
    proto = parsed(BRANCHES)
    proto.graph.initializer.append(tensor("w", np.float32(1)))
    branch(proto, 0).node[0].CopyFrom(onnx.helper.make_node("Mul", ["h", "w"], ["m"]))
    branch(proto, 0).node.append(onnx.helper.make_node("Neg", ["m"], ["p"]))
    binding = proto.training_info.add(algorithm=onnx.helper.make_graph([], "step", [], [])).update_binding.add()
    binding.key, binding.value = "w", "w"
    result = loaded(proto).apply("cleanup", calibration=list(BOTH))
    assert to_proto(result.graph) is proto
    binding.key = "h"
    fixed = to_proto(loaded(proto).apply("cleanup", calibration=list(BOTH)).graph)
    assert [n.op_type for n in branch(fixed, 0).node] == ["Neg"]


@pytest.mark.parametrize(
    "name",
    [
        "a weight that only a body uses",
        "a constant that only a body uses",
        "sparse initialiser used in a branch only",
        "quantisation annotations",
    ],
)
def test_a_use_without_an_edge_is_a_use(name: str) -> None:
    odd = MODELS[name]
    result = loaded(odd.model).apply("cleanup{skip=identity}", calibration=list(odd.feeds))
    assert result.report.passes[0].sites == []
    assert to_proto(result.graph) is odd.model


def test_a_weight_goes_with_its_last_use_in_a_body() -> None:
    proto = parsed(BRANCHES)
    proto.graph.initializer.append(tensor("one", np.float32(1)))
    constant = onnx.helper.make_node("Constant", [], ["also"], value_float=1.0)
    proto.graph.node.insert(1, constant)
    proto.graph.node[-1].attribute[1].g.node[0].CopyFrom(onnx.helper.make_node("Mul", ["h", "also"], ["m"]))
    branch(proto, 1).node.append(onnx.helper.make_node("Neg", ["m"], ["q"]))
    branch(proto, 0).node[0].CopyFrom(onnx.helper.make_node("Mul", ["h", "one"], ["m"]))
    branch(proto, 0).node.append(onnx.helper.make_node("Neg", ["m"], ["p"]))
    found = to_proto(loaded(proto).apply("cleanup", calibration=list(BOTH)).graph)
    assert operators(found) == ["Exp", "If"]
    assert not found.graph.initializer
    kept = to_proto(loaded(proto).apply("cleanup", calibration=[BOTH[0]]).graph)  # the other branch never ran
    assert operators(kept) == ["Exp", "Constant", "If"]
    assert not kept.graph.initializer


def test_a_branch_that_never_ran_is_named() -> None:
    proto = parsed(BRANCHES)
    proto.graph.node[-1].name = "choice"
    (report,) = loaded(proto).apply("cleanup", calibration=[BOTH[0]]).report.passes
    assert report.notes == ["stayed as they were, since the calibration data never ran them: else_branch of choice"]
    assert loaded(proto).apply("cleanup", calibration=list(BOTH)).report.passes[0].notes == []


def test_constants_of_bodies_stay_where_they_are() -> None:
    proto = parsed("""g (float[N, 4] x, bool c) => (float[N, 4] y) {
        a = Exp(x) k = Constant<value_float = 2.0>() b = Neg(a)
        y = If(c) <then_branch = t () => (float[N, 4] p) { p = Mul(b, k) },
                   else_branch = e () => (float[N, 4] q) { q = Neg(b) }> }""")
    graph = loaded(proto).copy()
    graph.fx.erase_node(called(graph, "k"))  # as a pass does with what has no edge
    assert to_proto(graph) == proto


# Nodes that a pass changed.


def test_a_changed_node_keeps_what_was_said_of_it() -> None:
    proto = parsed("g (float[N, 4] x) => (float[N, 4] y) { y = LeakyRelu<alpha = 0.5>(x) }")
    node = proto.graph.node[0]
    node.name, node.doc_string = "leaky", "half"
    node.metadata_props.add(key="of", value="a node")
    graph = loaded(proto).copy()
    called(graph, "leaky").kwargs = {"alpha": 0.25}
    node.attribute[0].f = 0.25
    assert to_proto(graph) == proto


def test_a_changed_node_still_names_all_of_its_outputs(tmp_path: Path) -> None:
    proto = parsed("""g (float[4, 4] x) => (float[2, 4] y) {
        [halves] a, b = Split<axis = 1, num_outputs = 2>(x) y = Transpose(a) }""")
    graph = loaded(proto).copy()
    split = called(graph, "halves")
    split.kwargs = {**split.kwargs, "axis": 0}
    for node in list(graph.nodes):
        if node.op == "call_function" and not node.users:
            graph.fx.erase_node(node)
    graph.module.recompile()
    saved = to_proto(graph)
    del saved.graph.output[:]
    saved.graph.output.append(info("y", 4, 2))
    x = np.arange(16, dtype=np.float32).reshape(4, 4)
    np.testing.assert_array_equal(on_onnxruntime(saved, {"x": x}, tmp_path)[0], x[:2].T)


def test_a_new_node_gets_a_name_and_a_domain_of_its_own(tmp_path: Path) -> None:
    proto = parsed("g (float[N, 4] x) => (float[N, 4] y) { [quickgelu] h = Exp(x) [quick_gelu] y = Neg(h) }")
    graph = loaded(proto).copy()
    first = called(graph, "quickgelu")
    function = dialect.lookup("com.microsoft", "QuickGelu", 1).function
    with graph.fx.inserting_after(first):
        new = graph.fx.create_node("call_function", function, (first,), name="quickgelu")
    called(graph, "quick_gelu").args = (new,)
    graph.module.recompile()
    saved = to_proto(graph)
    assert [(o.domain, o.version) for o in saved.opset_import][-1] == ("com.microsoft", 1)
    assert len({node.name for node in saved.graph.node}) == 3
    expected = graph.run({"x": X})["y"]
    # The same fp32 function in another library: a few ulp.
    np.testing.assert_allclose(on_onnxruntime(saved, {"x": X}, tmp_path)[0], expected, rtol=1e-6)


def replaced(level: Graph, operator: str) -> None:
    """Let another operator compute the first output of a graph, beside the value that was it."""
    old = level.results[0]
    with level.fx.inserting_before(next(n for n in level.nodes if n.op == "output")):
        new = level.fx.call_function(dialect.lookup("", operator, 21).function, (old,))
    (output,) = [n for n in level.nodes if n.op == "output"]
    output.args = (tuple(new if n is old else n for n in level.results),)
    level.module.recompile()


def test_a_body_that_returns_another_value_than_an_outer_one() -> None:
    proto = parsed("""g (float[N, 4] x, bool c) => (float[N, 4] y) {
        h = Exp(x)
        z = If(c) <then_branch = t () => (float[N, 4] h) { }, else_branch = e () => (float[N, 4] q) { q = Neg(h) }>
        y = Add(z, h) }""")
    graph = loaded(proto).copy()
    body = next(level for level in walk(graph) if level.proto.name == "t")
    replaced(body, "Neg")
    saved = to_proto(graph)
    check_names(saved.graph)
    inner = saved.graph.node[1].attribute[0].g
    assert [n.op_type for n in inner.node] == ["Neg"]
    assert inner.output[0].name == inner.node[0].output[0] != "h"
    assert inner.output[0].type == proto.graph.node[1].attribute[0].g.output[0].type


@pytest.mark.parametrize("name", ["a weight that is an output", "an input that is an output"])
def test_an_output_that_is_also_something_else_cannot_become_another_value(name: str) -> None:
    graph = loaded(MODELS[name].model).copy()
    (output,) = [n for n in graph.nodes if n.op == "output"]
    first, second, *rest = graph.results
    output.args = ((first, first, *rest),)
    if second.op == "get_attr" and not second.users:
        graph.fx.erase_node(second)  # nothing else needs the weight: its name is free
        assert to_proto(graph).graph.output == MODELS[name].model.graph.output
        return
    with pytest.raises(GraphOptError, match="is an input or a weight too"):
        to_proto(graph)


def test_an_output_that_a_body_uses_becomes_another_value() -> None:
    proto = parsed("""g (float[N, 4] x, bool c) => (float[N, 4] y, float[N, 4] z) {
        y = Neg(x)
        z = If(c) <then_branch = t () => (float[N, 4] p) { p = Abs(y) },
                   else_branch = e () => (float[N, 4] q) { q = Exp(y) }> }""")
    graph = loaded(proto).copy()
    old = graph.results[0]
    with graph.fx.inserting_after(old):
        new = graph.fx.call_function(dialect.lookup("", "Abs", 21).function, old.args)
    old.replace_all_uses_with(new)
    graph.fx.erase_node(old)
    first, second = to_proto(graph).graph.node
    assert (first.op_type, list(first.input), list(first.output)) == ("Abs", ["x"], ["y"])
    assert second == proto.graph.node[1]


def test_an_output_that_bodies_know_by_name_cannot_become_another_value() -> None:
    proto = parsed("""g (float[N, 4] x, bool c) => (float[4] k, float[N, 4] z) {
        k = Constant<value_floats = [1.0, 2.0, 3.0, 4.0]>()
        z = If(c) <then_branch = t () => (float[N, 4] p) { p = Mul(x, k) },
                   else_branch = e () => (float[N, 4] q) { q = Div(x, k) }> }""")
    graph = loaded(proto).copy()
    replaced(graph, "Neg")
    with pytest.raises(GraphOptError, match="output 'k' is an input or a weight too"):
        to_proto(graph)


# Bodies that were changed before they were opened.


def test_what_a_pass_changed_in_a_body_stays_changed_when_it_is_opened() -> None:
    proto = parsed("""g (float[N, 4] x) => (float[N, 4] y) <bool yes = {1}> {
        y = If(yes) <then_branch = t () => (float[N, 4] p) { [leaky] u = LeakyRelu<alpha = 0.5>(x) p = Neg(u) },
                     else_branch = e () => (float[N, 4] q) { q = Neg(x) }> }""")
    graph = loaded(proto).copy()
    called(graph, "leaky").kwargs = {"alpha": 0.25}
    next(n for n in graph.nodes if n.op == "call_module")
    for level in walk(graph):
        level.module.recompile()
    found = to_proto(graph.apply("cleanup", calibration=[{"x": -X}]).graph)
    assert [(n.op_type, [a.f for a in n.attribute]) for n in found.graph.node] == [("LeakyRelu", [0.25]), ("Neg", [])]


def test_equal_branches_that_know_other_weights_are_not_merged(tmp_path: Path) -> None:
    """Two calls of a function: its branches are the same but for a weight that they know by its name."""
    odd = MODELS["a function with loops and branches"]
    result = loaded(odd.model).apply(["inline", "cleanup"], calibration=list(odd.feeds))
    assert operators(to_proto(result.graph)).count("Loop") == 3


def test_a_function_without_imports_has_those_of_the_model() -> None:
    proto = parsed("""g (float[N, 4] x, bool c) => (float[N, 4] y) { y = own.f(x, c) }
        <domain: "own", opset_import: ["": 21]> f (v, c) => (r) {
            r = If(c) <then_branch = t () => (float[N, 4] p) {
                           a = Transpose<perm = [1, 0]>(v) b = Transpose<perm = [1, 0]>(a) p = Neg(b) },
                       else_branch = e () => (float[N, 4] q) { q = Exp(v) }> }""")
    del proto.functions[0].opset_import[:]
    found = to_proto(loaded(proto).apply(["inline", "cleanup"], calibration=list(BOTH)).graph)
    assert [[n.op_type for n in branch(found, i).node] for i in range(2)] == [["Neg"], ["Exp"]]


def test_a_function_of_an_unimported_version_stays() -> None:
    proto = parsed("""g (float[N, 4] x) => (float[N, 4] y) { y = own.f(x) }
        <domain: "own", opset_import: ["": 21, "other": 3]> f (v) => (r) { r = Neg(v) }""")
    (site,) = loaded(proto).apply("inline", calibration=[{"x": X}]).report.passes[0].sites
    assert site.status == "refused"
    assert "imports version 3 of other, which the model does not import" in site.reason


def test_a_call_that_leaves_out_what_it_is_to_return_stays() -> None:
    proto = parsed("""g (float[N, 4] x) => (float[N, 4] y) { y, z = own.f(x) }
        <domain: "own", opset_import: ["": 21]> f (v, w) => (r, w) { r = Neg(v) }""")
    (site,) = loaded(proto).apply("inline", calibration=[{"x": X}]).report.passes[0].sites
    assert (site.status, "left out" in site.reason) == ("refused", True)


def test_overloads_are_told_apart() -> None:
    """One overload is random, so equal calls of it are not one value; of the other they are."""
    proto = parsed("""g (float[N, 4] x) => (float[N, 4] y) {
            a = own.f(x) b = own.f(x) c = own.f(x) d = own.f(x) y = Sum(a, b, c, d) }
        <domain: "own", opset_import: ["": 21]> f (v) => (r) { r = Neg(v) }
        <domain: "own", opset_import: ["": 21]> g (v) => (r) { r = RandomUniformLike(v) }""")
    proto.functions[0].overload, proto.functions[1].name, proto.functions[1].overload = "exact", "f", "random"
    for node, overload in zip(proto.graph.node, ("exact", "random", "exact", "random"), strict=False):
        node.overload = overload
    for functions in (list(proto.functions), list(proto.functions)[::-1]):
        del proto.functions[:]
        proto.functions.extend(functions)
        result = loaded(proto).apply("cleanup{rules=cse}", calibration=[{"x": X}])
        rewritten = to_proto(result.graph)
        assert [n.overload for n in rewritten.graph.node] == ["exact", "random", "random", ""]
        assert result.report.notes == [
            "output 'y' could not be compared: the original itself gives other values each time"
        ]


# What lowering adds.


def test_functions_that_an_earlier_run_left_are_used_again(tmp_path: Path) -> None:
    """A model of which one attention was rewritten, saved, loaded, and the other one rewritten."""
    path = tmp_path / "two.onnx"
    path.write_bytes(attention(2).SerializeToString())
    counts = []
    for step in range(2):
        graph = graphopt.load(path)
        site = graph.sites("attention")[0]
        result = graph.apply(LINEARIZE, calibration=batches(), only=[site.name])
        assert result.report.rewritten == 1
        path = tmp_path / f"{step}.onnx"
        result.graph.save(path)
        assert is_valid(path)
        counts.append(len(onnx.load(path).functions))
    assert counts[0] == counts[1] > 0
    # onnxruntime sums in another order than torch.
    expected = result.graph.run(batches()[0])["y"]
    np.testing.assert_allclose(session(path).run(None, batches()[0])[0], expected, rtol=1e-3, atol=1e-5)


def test_another_function_of_the_same_name_is_not_taken_for_ours() -> None:
    proto = attention()
    lowered = to_proto(loaded(proto).apply(LINEARIZE, calibration=batches()).graph)
    name = lowered.functions[0].name
    proto.functions.extend(
        parsed(
            f'g (float[N] x) => (float[N] y) {{ y = Neg(x) }} <domain: "graphopt", opset_import: ["": 21]> '
            f"{name} (v) => (r) {{ r = Neg(v) }}"
        ).functions
    )
    proto.ir_version = 8
    saved = to_proto(loaded(proto).apply(LINEARIZE, calibration=batches()).graph)
    assert [f.name for f in saved.functions] == [name, *(f.name for f in lowered.functions[1:]), f"{name}_1"] or [
        f.name for f in saved.functions
    ][:2] == [name, f"{name}_1"]
    assert name not in {n.op_type for n in saved.graph.node}


@pytest.mark.parametrize("name", ["4-bit constant of a function", "4-bit constant that a function reshapes"])
@pytest.mark.parametrize("passes", ["inline", "inline+cleanup"])
def test_4_bit_weights_stay_such(name: str, passes: str) -> None:
    """Their carriers have 8 bits."""
    proto = MODELS[name].model
    graph = loaded(proto)
    saved = to_proto(graph.apply(passes.split("+"), calibration=[{"x": X}]).graph)
    stored = [a.t for n in saved.graph.node for a in n.attribute if n.op_type == "Constant" and a.name == "value"]
    assert [t.data_type for t in stored] == [P.INT4]
    assert "Reshape" in operators(saved) or "reshapes" not in name  # folded, it would have 8 bits
    np.testing.assert_array_equal(loaded(saved).run({"x": X})["z"], graph.run({"x": X})["z"])
