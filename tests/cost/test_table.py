"""FLOP counts of single nodes against their formulas."""

import pytest
import sympy
import torch
from onnx import TensorProto as T
from onnx import helper

from graphopt.cost import cost_of, flops
from graphopt.frontends.onnx import load_onnx
from graphopt.onnxfile import OnnxFile

B, S = (sympy.Symbol(name, integer=True, positive=True) for name in ("batch", "seq"))


def graph(nodes, inputs, weights=(), outputs=("y",), domains=("com.microsoft",)):
    """A model in memory; inputs as name -> shape."""
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, T.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, T.FLOAT, None) for name in outputs],
        [helper.make_tensor(name, T.FLOAT, shape, [0.1] * sympy.prod(shape)) for name, shape in dict(weights).items()],
    )
    opsets = [helper.make_opsetid("", 23), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return load_onnx(OnnxFile(helper.make_model(made, opset_imports=opsets, ir_version=10)))


def test_matmul():
    cost = cost_of(graph([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": ["batch", "seq", 8]}, {"w": [8, 5]}))
    assert cost.flops == 2 * B * S * 8 * 5
    assert cost.by_kind == {"MatMul": 80 * B * S}
    assert (cost.parameters, cost.weight_bytes) == (40, 160)


def test_gemm_counts_its_bias():
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)
    cost = cost_of(graph([node], {"x": ["batch", 8]}, {"w": [5, 8], "b": [5]}))
    assert cost.flops == B * 5 * (2 * 8 + 1)


@pytest.mark.parametrize("group", [1, 2])
def test_convolution(group):
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2], pads=[1, 1, 1, 1], group=group)
    cost = cost_of(graph([node], {"x": ["batch", 4, 16, 16]}, {"w": [6, 4 // group, 3, 3]}))
    assert cost.flops == B * 6 * 8 * 8 * 2 * (4 // group) * 9


def test_transposed_convolution():
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2])
    cost = cost_of(graph([node], {"x": ["batch", 4, 16]}, {"w": [4, 6, 3]}))
    assert cost.flops == B * 2 * 4 * 16 * 6 * 3


def test_einsum():
    node = helper.make_node("Einsum", ["x", "w"], ["y"], equation="bsd, dh -> bsh")
    cost = cost_of(graph([node], {"x": ["batch", "seq", 8]}, {"w": [8, 3]}))
    assert cost.flops == 2 * B * S * 8 * 3


def test_attention_with_packed_heads():
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], q_num_heads=4, kv_num_heads=4)
    inputs = {name: ["batch", "seq", 32] for name in "qkv"}
    assert cost_of(graph([node], inputs)).flops == sympy.expand(4 * B * S**2 * 32 + 6 * B * 4 * S**2)


def test_contrib_attention_counts_its_projection():
    node = helper.make_node("Attention", ["x", "w", "b"], ["y"], num_heads=4, domain="com.microsoft")
    cost = cost_of(graph([node], {"x": ["batch", "seq", 32]}, {"w": [32, 96], "b": [96]}))
    assert cost.flops == sympy.expand(B * S * 96 * 65 + 4 * B * S**2 * 32 + 6 * B * 4 * S**2)


@pytest.mark.parametrize(("kind", "gates", "unit"), [("LSTM", 4, 30), ("GRU", 3, 23), ("RNN", 1, 4)])
def test_recurrent(kind, gates, unit):
    node = helper.make_node(kind, ["x", "w", "r"], ["y"], hidden_size=5)
    cost = cost_of(graph([node], {"x": ["seq", "batch", 3]}, {"w": [1, gates * 5, 3], "r": [1, gates * 5, 5]}))
    assert cost.flops == S * B * (2 * gates * 5 * (3 + 5) + unit * 5)


def test_stated_constants():
    nodes = [
        helper.make_node("Softmax", ["x"], ["a"]),
        helper.make_node("LayerNormalization", ["a", "w"], ["b"]),
        helper.make_node("Gelu", ["b"], ["c"]),
        helper.make_node("Transpose", ["c"], ["d"], perm=[1, 0]),
        helper.make_node("ReduceSum", ["d"], ["y"], keepdims=0),
    ]
    cost = cost_of(graph(nodes, {"x": ["batch", 8]}, {"w": [8]}))
    assert cost.by_kind == {
        "Softmax": 40 * B,
        "LayerNormalization": 56 * B,
        "Gelu": 40 * B,
        "ReduceSum": 8 * B,
    }


def test_counts_of_custom_operators():
    library = torch.library.Library("costtest", "DEF")
    library.define("mix(Tensor q, Tensor k, *, int width=3) -> Tensor")
    library.impl("mix", lambda q, k, width=3: q + k, "Meta")
    made = graph([helper.make_node("Add", ["q", "k"], ["y"])], {name: ["batch", 4] for name in "qk"})
    node = next(n for n in made.nodes if n.op == "call_function")
    node.target, node.kwargs = torch.ops.costtest.mix.default, {"width": 7}
    assert cost_of(made).unknown == {"add" if node.name == "add" else node.name: "no FLOP count for costtest::mix"}

    @flops("costtest::mix")
    def mix(call):
        return call.attrs["width"] * call.input(1)[0] * call.output()[1]

    assert cost_of(made).flops == 28 * B


def counted(kind, *inputs, result=None, **attrs):
    from graphopt.cost.table import Call, lookup

    entry = lookup(kind)
    assert entry is not None
    shapes = tuple(None if i is None else tuple(map(sympy.sympify, i)) for i in inputs)
    result = (*shapes[0][:3], shapes[2][3]) if result is None else tuple(map(sympy.sympify, result))
    return sympy.expand(entry.count(Call(kind, shapes, (result,), attrs)))


def test_attention_over_all_keys_is_two_products_and_a_division():
    F, D, H = 16, 8, 4
    found = counted("graphopt::kernel_attention", (B, H, S, F), (B, H, S, F), (B, H, S, D))
    assert found == 4 * B * H * S * F * (D + 1) + B * H * S * (D + 1)


def test_causal_operators_are_linear_in_the_length():
    F, D, H, w = 16, 8, 4, 32
    plain = counted("graphopt::linear_attention", (B, H, S, F), (B, H, S, F), (B, H, S, D))
    assert plain == 2 * B * H * S * (64 * (F + D) + 2 * F * D)
    delta = counted("graphopt::linear_attention", (B, H, S, F), (B, H, S, F), (B, H, S, D), rule="delta")
    assert delta - plain == sympy.expand(B * H * S * (2 * 64 * F + 64 * (F + D) + 2 * F * D))
    near = counted("graphopt::window_attention", (B, H, S, D), (B, 2, S, D), (B, 2, S, D), window=w)
    assert near == B * H * S * 2 * w * (2 * D + 2 * (D + 1) + 5)
    q, k, features = (B, H, S, D), (B, 2, S, D), (B, H, S, F)
    hybrid = counted("graphopt::windowed_linear_attention", q, k, k, features, features, window=w)
    assert hybrid == sympy.expand(near + 2 * B * H * S * (64 * (F + D + 1) + 2 * F * (D + 1)) + 3 * B * H * S * (D + 1))
    assert sympy.Poly(hybrid, S).degree() == 1


def test_every_operator_of_ours_has_a_count():
    import graphopt.ops
    from graphopt.cost.table import lookup

    assert [name for name in graphopt.ops.__all__ if lookup(f"graphopt::{name}") is None] == []


def test_rational_functions():
    D, F = 16, 8
    alone = counted("graphopt::group_rational", (B, S, D), (8, 6), (8, 4), result=(B, S, D))
    assert alone == (2 * 9 + 2) * B * S * D
    split = counted("graphopt::group_rational", (B, S, D), (8, 6), (8, 4), result=(B, S, D), split=True)
    assert split == alone + 3 * B * S * D
    layer = counted("graphopt::linear_rational", (B, S, F), (D, F), (D,), (8, 6), (8, 4), result=(B, S, D))
    assert layer == alone + (2 * F + 1) * B * S * D


def test_a_failing_count_is_listed():
    @flops("costtest::broken")
    def broken(call):
        raise RuntimeError("out of luck")

    library = torch.library.Library("costtest", "FRAGMENT")
    library.define("broken(Tensor x) -> Tensor")
    library.impl("broken", lambda x: x, "Meta")
    made = graph([helper.make_node("Relu", ["x"], ["y"])], {"x": ["batch"]})
    node = next(n for n in made.nodes if n.op == "call_function")
    node.target = torch.ops.costtest.broken.default
    assert list(cost_of(made).unknown.values()) == ["costtest::broken: out of luck"]


def test_opaque_nodes_are_listed():
    body = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])],
        "b",
        [],
        [helper.make_tensor_value_info("z", T.FLOAT, None)],
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
    made = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info("c", T.BOOL, []),
            helper.make_tensor_value_info("x", T.FLOAT, ["batch", 3]),
        ],
        [helper.make_tensor_value_info("y", T.FLOAT, None)],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    cost = cost_of(load_onnx(OnnxFile(model)))
    assert list(cost.unknown.values()) == ["no FLOP count for If"]
    assert cost.peak_activation_bytes == 24 * B + 1
