"""Shapes in symbols: hand-made models, everything in the zoo, and the fitting of formulas."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from graphopt.errors import GraphOptError
from graphopt.execute import execute
from graphopt.frontends.onnx import load_onnx
from graphopt.frontends.torch import load_torch
from graphopt.onnxfile import OnnxFile
from graphopt.onnxfile.tensors import from_numpy
from graphopt.shapes import shapes_of
from graphopt.shapes.assign import Assignment, Domain
from graphopt.shapes.fit import Fitter
from graphopt.shapes.symbols import SymbolTable, input_shapes, parse

BATCH, SEQ, H, W = (sympy.Symbol(n, integer=True, positive=True) for n in ("batch", "seq", "h", "w"))
DATA = Path(os.environ.get("GRAPHOPT_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def build(nodes, inputs, outputs=("y",), opset=17, **arrays):
    """A graph from nodes; inputs as name -> shape or (element type, shape), keyword arguments are weights."""
    typed = {name: spec if isinstance(spec, tuple) else (T.FLOAT, spec) for name, spec in inputs.items()}
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, *spec) for name, spec in typed.items()],
        [helper.make_tensor_value_info(name, T.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return load_onnx(OnnxFile(helper.make_model(made, opset_imports=opsets, ir_version=10)))


def result(graph):
    shapes = shapes_of(graph)
    assert not shapes.unknown
    return shapes.shape(graph.results[0])


def test_matmul():
    graph = build([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": ["batch", "seq", 8]}, w=np.ones((8, 5), "f"))
    shapes = shapes_of(graph)
    assert shapes.shape(graph.results[0]) == (BATCH, SEQ, 5)
    assert shapes.dtype(graph.results[0]) == torch.float32
    assert shapes.symbols == {"batch": BATCH, "seq": SEQ}
    assert shapes.at({"batch": 2, SEQ: 3})[graph.results[0]] == (2, 3, 5)
    assert shapes.at({"batch": 2})[graph.results[0]] == (2, None, 5)
    with pytest.raises(GraphOptError, match="no dimension 'length'"):
        shapes.at({"length": 3})


def test_strided_convolution():
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2], pads=[1, 1, 1, 1])
    graph = build([node], {"x": ["batch", 3, "h", "w"]}, w=np.ones((4, 3, 3, 3), "f"))
    assert result(graph) == (BATCH, 4, sympy.floor((H + 1) / 2), sympy.floor((W + 1) / 2))


def test_strides_compose_into_one_quotient():
    conv = [helper.make_node("Conv", [a, "w"], [b], strides=[2], pads=[1, 1]) for a, b in ("xa", "ab", "by")]
    graph = build(conv, {"x": ["batch", 3, "seq"]}, w=np.ones((3, 3, 3), "f"))
    assert result(graph) == (BATCH, 3, sympy.floor((SEQ + 7) / 8))


@pytest.mark.parametrize("kernel", [16, 30, 400])
def test_large_strides(kernel):
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=[kernel // 2], pads=[kernel, kernel])
    graph = build([node], {"x": ["batch", 1, "seq"]}, w=np.ones((4, 1, kernel), "f"))
    stride = kernel // 2
    assert result(graph) == (BATCH, 4, sympy.floor((SEQ + 2 * kernel - kernel) / sympy.Integer(stride)) + 1)


def test_shape_arithmetic():
    graph = build(
        [
            helper.make_node("Shape", ["x"], ["s"]),
            helper.make_node("Slice", ["s", "zero", "two"], ["lead"]),
            helper.make_node("Concat", ["lead", "heads"], ["target"], axis=0),
            helper.make_node("Reshape", ["x", "target"], ["split"]),
            helper.make_node("Transpose", ["split"], ["t"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", ["t", "merge"], ["y"]),
        ],
        {"x": ["batch", "seq", 12]},
        zero=np.array([0]),
        two=np.array([2]),
        heads=np.array([4, 3]),
        merge=np.array([-1, 3]),
    )
    shapes = shapes_of(graph)
    by_name = {node.meta.get("onnx_name"): node for node in graph.nodes}
    assert shapes.shape(by_name["t"]) == (BATCH, 4, SEQ, 3)
    assert shapes.shape(by_name["y"]) == (4 * BATCH * SEQ, 3)
    assert shapes.values(by_name["target"]) == (BATCH, SEQ, 4, 3)


def test_attention_block():
    width, heads = 16, 4
    nodes = []
    for name in "qkv":
        nodes += [
            helper.make_node("MatMul", ["x", f"w{name}"], [f"{name}0"]),
            helper.make_node("Reshape", [f"{name}0", "split"], [f"{name}1"]),
            helper.make_node("Transpose", [f"{name}1"], [name], perm=[0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]),
        ]
    nodes += [
        helper.make_node("MatMul", ["q", "k"], ["scores"]),
        helper.make_node("Unsqueeze", ["mask", "axes"], ["bias"]),
        helper.make_node("Add", ["scores", "bias"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "v"], ["mixed"]),
        helper.make_node("Transpose", ["mixed"], ["back"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["back", "join"], ["y"]),
    ]
    weights = {f"w{name}": np.ones((width, width), "f") for name in "qkv"}
    graph = build(
        nodes,
        {"x": ["batch", "seq", width], "mask": ["batch", "seq"]},
        split=np.array([0, 0, heads, width // heads]),
        join=np.array([0, 0, width]),
        axes=np.array([1, 2]),
        **weights,
    )
    shapes = shapes_of(graph)
    by_name = {node.meta.get("onnx_name"): node for node in graph.nodes}
    assert shapes.shape(by_name["weights"]) == (BATCH, heads, SEQ, SEQ)
    assert shapes.shape(by_name["y"]) == (BATCH, SEQ, width)
    assert not shapes.relations


def test_sums_of_dimensions():
    graph = build(
        [
            helper.make_node("Concat", ["a", "b"], ["c"], axis=1),
            helper.make_node("Flatten", ["c"], ["y"], axis=2),
        ],
        {"a": ["batch", "past", 3], "b": ["batch", "seq", 3]},
    )
    past = sympy.Symbol("past", integer=True, positive=True)
    (total, width) = result(graph)
    assert sympy.expand(total - BATCH * (past + SEQ)) == 0
    assert width == 3


def test_a_dimension_that_follows_from_others():
    graph = build(
        [
            helper.make_node("Concat", ["past", "x"], ["k"], axis=1),
            helper.make_node("Add", ["k", "mask"], ["y"]),
        ],
        {"past": ["batch", "before", 3], "x": ["batch", "seq", 3], "mask": ["batch", "total", 1]},
    )
    shapes = shapes_of(graph)
    assert {s.name: str(e) for s, e in shapes.relations.items()} == {"total": "before + seq"}
    assert shapes.at({"batch": 1, "before": 2, "seq": 3})[graph.results[0]] == (1, 5, 3)
    with pytest.raises(GraphOptError, match="expected total = before \\+ seq = 5"):
        shapes.at({"batch": 1, "before": 2, "seq": 3, "total": 7})


def test_multiples():
    """A U-shaped network: halved, doubled, and added to what it was."""
    graph = build(
        [
            helper.make_node("MaxPool", ["x"], ["half"], kernel_shape=[4], strides=[4]),
            helper.make_node("Resize", ["half", "", "twice"], ["back"]),
            helper.make_node("Add", ["back", "x"], ["y"]),
        ],
        {"x": ["batch", 3, "seq"]},
        twice=np.array([1, 1, 4], "f"),
    )
    shapes = shapes_of(graph)
    assert {s.name: step for s, step in shapes.steps.items()} == {"seq": (0, 4)}
    assert shapes.shape(graph.results[0]) == (BATCH, 3, SEQ)


def test_a_maximum():
    """Positions beyond the table do not exist."""
    graph = build(
        [
            helper.make_node("Shape", ["x"], ["s"], start=1, end=2),
            helper.make_node("Slice", ["table", "zero", "s"], ["positions"]),
            helper.make_node("Add", ["x", "positions"], ["y"]),
        ],
        {"x": ["batch", "seq", 4]},
        table=np.ones((16, 4), "f"),
        zero=np.array([0]),
    )
    shapes = shapes_of(graph)
    assert shapes.shape(graph.results[0]) == (BATCH, SEQ, 4)
    assert not shapes.relations


def test_data_dependent_size():
    graph = build(
        [
            helper.make_node("NonZero", ["x"], ["at"]),
            helper.make_node("Transpose", ["at"], ["y"], perm=[1, 0]),
        ],
        {"x": ["batch", "seq"]},
    )
    shapes = shapes_of(graph)
    count, rank = shapes.shape(graph.results[0])
    assert rank == 2
    assert count in shapes.open
    assert not shapes.unknown
    assert shapes.at({"batch": 2, "seq": 2})[graph.results[0]] == (None, 2)


def test_a_node_on_onnxruntime():
    branch = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["z"])], "b", [], [helper.make_tensor_value_info("z", T.FLOAT, None)]
    )
    graph = build(
        [helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)],
        {"c": (T.BOOL, []), "x": ["batch", 4]},
    )
    assert result(graph) == (BATCH, 4)


def test_branches_of_different_sizes():
    branches = [
        helper.make_graph(
            [helper.make_node("Concat", ["x"] * count, ["z"], axis=1)],
            "b",
            [],
            [helper.make_tensor_value_info("z", T.FLOAT, None)],
        )
        for count in (1, 2)
    ]
    graph = build(
        [helper.make_node("If", ["c"], ["y"], then_branch=branches[0], else_branch=branches[1])],
        {"c": (T.BOOL, []), "x": ["batch", 4]},
    )
    shapes = shapes_of(graph)
    batch, width = shapes.shape(graph.results[0])
    assert batch == BATCH
    assert width in shapes.open


def test_an_unknown_value_does_not_end_it():
    graph = build(
        [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Relu", ["z"], ["y"])],
        {"x": None, "z": ["batch"]},
        outputs=("a", "y"),
    )
    shapes = shapes_of(graph)
    first, second = graph.results
    assert shapes.shape(first) is None
    assert "unknown" in shapes.unknown[first]
    assert shapes.shape(second) == (BATCH,)


def test_weights_are_not_read():
    """A weight that only pretends to have 16 GB."""
    graph = build([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": ["batch", 2]}, w=np.ones((2, 2), "f"))
    weight = next(node for node in graph.nodes if node.op == "get_attr")
    huge = torch.empty(1).expand(1 << 16, 1 << 16)
    graph.module.register_parameter(str(weight.target), torch.nn.Parameter(huge, requires_grad=False))
    bad = shapes_of(graph)  # 2 does not fit 65536, which is reported and not raised
    assert bad.unknown.keys() == {graph.results[0]}


def test_module_with_dynamic_sizes():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(8, 24)

        def forward(self, x):
            q, k, v = self.linear(x).view(x.shape[0], x.shape[1], 3, 2, 4).permute(2, 0, 3, 1, 4)
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return y.transpose(1, 2).reshape(-1, 8), torch.arange(x.shape[1])

    graph = load_torch(Block().eval(), (torch.randn(2, 5, 8),), {"x": {0: "batch", 1: "seq"}})
    shapes = shapes_of(graph)
    assert shapes.shape(graph.results[0]) == (BATCH * SEQ, 8)
    assert shapes.shape(graph.results[1]) == (SEQ,)


def test_names_of_symbols():
    from graphopt.graph import ValueSpec

    table = SymbolTable()
    specs = [
        ValueSpec("ids", None, ("batch-size", "past + 1", None)),
        ValueSpec("cache", None, ("batch_size", "past", -1)),
        ValueSpec("class", None, ("lambda", "?", "3d")),
    ]
    shapes = input_shapes(specs, table)
    assert [[str(d) for d in shape or ()] for shape in shapes] == [
        ["batch_size", "past + 1", "ids_2"],
        ["batch_size_1", "past", "cache_2"],
        ["nlambda", "class_1", "n3d"],
    ]
    assert "batch-size" in table.by_display
    assert all(s.is_positive and s.is_integer for s in table.by_display.values())


@pytest.mark.parametrize(
    "text", ["__import__('os')", "a.b", "a ** 99999999", "a // 0", "f(a)", "(" * 90, "a if a else a"]
)
def test_hostile_names_are_only_names(text):
    assert parse(text, {"a"}, SymbolTable()) is None


def refined(formula, count=12):
    """Fit a function of (batch, seq) as a graph's observations would, refining on request."""
    sizes = [{s: Assignment(domain, column)(s) for s in (BATCH, SEQ)} for domain in [Domain()] for column in range(6)]
    for _ in range(count):
        fitter = Fitter({s: [row[s] for row in sizes] for s in (BATCH, SEQ)}, len(sizes))
        term = fitter.fit(tuple(formula(row[BATCH], row[SEQ]) for row in sizes))
        wishes = [w for w in fitter.wishes if w.expression == SEQ]
        if not wishes:
            return term
        wish = wishes[0]
        far = 8 * max(row[SEQ] for row in sizes)
        near = next((size for size in range(2, 2100) if wish.halves(size)), far)
        sizes.append({BATCH: 3 + len(sizes), SEQ: far if wish.stride is None else near})
    return term


def holds(term, formula):
    return term is not None and all(
        term.expression.subs({BATCH: b, SEQ: s}) == formula(b, s) for b, s in ((1, 1), (4, 37), (31, 513), (2, 4096))
    )


small = st.integers(-9, 9)


@given(a=small, b=small, c=st.integers(-99, 99))
def test_polynomials_are_found(a, b, c):
    def formula(batch, seq):
        return a * batch * seq + b * seq + c

    assert holds(refined(formula), formula)


@given(a=st.integers(1, 9), power=st.integers(1, 3), c=small)
def test_powers_are_found(a, power, c):
    def formula(batch, seq):
        return a * seq**power + c

    assert holds(refined(formula), formula)


@given(stride=st.integers(2, 64), shift=st.integers(0, 200), c=small)
def test_rounded_quotients_are_found(stride, shift, c):
    def formula(batch, seq):
        return (seq + shift) // stride + c

    assert holds(refined(formula), formula)


@given(st.lists(st.integers(0, 2**40), min_size=6, max_size=6, unique=True))
def test_noise_has_no_formula(values):
    rows = [Assignment(Domain(), column) for column in range(6)]
    fitter = Fitter({s: [row(s) for row in rows] for s in (BATCH, SEQ)}, 6)
    term = fitter.fit(tuple(values))
    if term is not None:
        found = [term.expression.subs({s: row(s) for s in (BATCH, SEQ)}) for row in rows]
        assert found == values


def models():
    found = []
    for folder, marks in (("zoo", ()), ("zoo_extra", pytest.mark.slow)):
        index = DATA / folder / "index.json"
        entries = json.loads(index.read_text()) if index.exists() else []
        found += [pytest.param(DATA / folder, entry, marks=marks, id=entry["file"]) for entry in entries]
    return found


def feed(spec, random):
    shape, kind, span = spec["shape"], spec["dtype"], spec.get("range")
    if kind in ("string", "str"):
        return np.full(shape, "a", dtype=object)
    if isinstance(span, list) and "float" not in kind:
        return random.integers(span[0], max(span[1], span[0] + 1), shape).astype(kind)
    return (random.standard_normal(shape) if not isinstance(span, list) else random.uniform(*span, shape)).astype(kind)


# Values that are no tensors, or a domain without shape functions whose operator runs in no trial.
UNKNOWN = ("ZipMap", "SplitToSequence")


@pytest.mark.skipif(not models(), reason=f"no models at {DATA}")
@pytest.mark.parametrize(("folder", "entry"), models())
def test_shapes_agree_with_what_runs(folder, entry):
    graph = load_onnx(folder / entry["file"])
    shapes = shapes_of(graph)
    assert all(node.meta["onnx"].proto.op_type in UNKNOWN for node in shapes.unknown)
    random = np.random.default_rng(0)
    feeds = {spec["name"]: np.asarray(feed(spec, random)) for spec in entry["inputs"]}
    real = {}

    def observe(node, value):
        # Nodes inside the bodies of control flow are reported too.
        if node.graph is graph.fx and node.op != "get_attr" and isinstance(value, (torch.Tensor, np.ndarray)):
            real[node] = tuple(value.shape)

    values = [from_numpy(feeds[spec.name]) for spec in graph.inputs]
    try:
        with torch.no_grad():
            execute(graph, values, observe)
    except Exception as error:
        pytest.skip(f"the model does not run on random inputs: {error}")
    sizes = {
        dim: size
        for node in graph.placeholders
        for dim, size in zip(shapes.shape(node), real[node], strict=True)
        if dim.is_Symbol
    }
    found = shapes.at(sizes)
    for node, shape in real.items():
        expected = found[node]
        assert expected is not None
        assert len(expected) == len(shape)
        assert all(a is None or a == b for a, b in zip(expected, shape, strict=True)), (
            node,
            shapes.shape(node),
            shape,
        )
