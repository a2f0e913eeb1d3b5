"""Totals of whole models, peaks, growth, display and comparison."""

import dataclasses

import numpy as np
import pytest
import sympy
import torch
from onnx import TensorProto as T
from onnx import helper

from graphopt.cost import compare, cost_of, format_expr, format_number
from graphopt.errors import GraphOptError
from graphopt.frontends.onnx import load_onnx
from graphopt.frontends.torch import load_torch
from graphopt.graph import TorchSource
from graphopt.onnxfile import OnnxFile

B, S = (sympy.Symbol(name, integer=True, positive=True) for name in ("batch", "seq"))
LAYERS, H, INNER, HEADS, WORDS, POSITIONS = 2, 32, 64, 4, 50, 64


class Encoder(torch.nn.Module):
    """Positional tensors in and out, as exporters like it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return tuple(self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=False))


def tiny_bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=H,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        max_position_embeddings=POSITIONS,
    )
    return Encoder(transformers.BertModel(config)).eval()


# Four projections, scores and mixture, two layers of the MLP; then the pooler.
MATMULS = LAYERS * (4 * 2 * B * S * H * H + 2 * 2 * B * S * S * H + 2 * 2 * B * S * H * INNER) + 2 * B * H * H


@pytest.fixture(scope="module")
def bert_onnx(tmp_path_factory):
    """The model as torch's TorchScript exporter writes it."""
    path = tmp_path_factory.mktemp("bert") / "bert.onnx"
    ids = torch.ones(2, 7, dtype=torch.long)
    axes = {0: "batch", 1: "seq"}
    torch.onnx.export(
        tiny_bert(),
        (ids, ids),
        str(path),
        input_names=["input_ids", "attention_mask"],
        output_names=["hidden", "pooled"],
        dynamic_axes={"input_ids": axes, "attention_mask": axes},
        opset_version=17,
        dynamo=False,
    )
    return load_onnx(path)


@pytest.mark.filterwarnings("ignore")
def test_bert_from_onnx(bert_onnx):
    cost = cost_of(bert_onnx)
    products = sympy.expand(sum(e for kind, e in cost.by_kind.items() if kind in ("MatMul", "Gemm")))
    assert products == sympy.expand(MATMULS + B * H)  # Gemm's bias
    assert cost.matmul_flops == products
    assert cost.by_kind["Softmax"] == 5 * LAYERS * HEADS * B * S**2
    assert cost.by_kind["LayerNormalization"] == 7 * (2 * LAYERS + 1) * H * B * S
    assert cost.by_kind["Erf"] == LAYERS * INNER * B * S
    assert cost.unknown == {}
    # The exporter merges equal tensors: zero biases, norms of ones.
    stored = sum(np.prod(t.dims) for t in bert_onnx.onnx.proto.graph.initializer if t.data_type == T.FLOAT)
    assert cost.parameters - stored in range(40)  # and a few scalars in Constant nodes
    assert cost.growth()["flops"] == {"batch": "O(batch)", "seq": "O(seq**2)"}
    assert cost.at({"batch": 1, "seq": 16})["matmul_flops"] == (MATMULS + B * H).subs({B: 1, S: 16})


@pytest.mark.filterwarnings("ignore")
def test_bert_from_torch():
    ids = torch.ones(2, 7, dtype=torch.long)
    axes = {0: "batch", 1: "seq"}
    cost = cost_of(load_torch(tiny_bert(), (ids, ids), {"input_ids": axes, "attention_mask": axes}))
    assert cost.unknown == {}
    embeddings = (WORDS + POSITIONS + 2 + 2) * H
    layer = 4 * (H * H + H) + 2 * H * INNER + INNER + H + 2 * 2 * H
    assert cost.parameters == embeddings + LAYERS * layer + H * H + H
    bias = LAYERS * B * S * (4 * H + INNER + H) + B * H
    core = LAYERS * (1 + 1 + 5) * B * HEADS * S**2  # scale, mask, softmax
    assert cost.matmul_flops == sympy.expand(MATMULS + bias + core)


def chain(*nodes, shape=("batch", 8), weights=None, output="y"):
    weights = weights or {}
    made = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", T.FLOAT, list(shape))],
        [helper.make_tensor_value_info(output, T.FLOAT, None)],
        [helper.make_tensor(n, T.FLOAT, s, [0.5] * sympy.prod(s)) for n, s in weights.items()],
    )
    return load_onnx(OnnxFile(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)))


def test_peak_counts_what_lives_at_once():
    # x and a while a is made, a and b (4 times as wide) while b is: x is dead by then.
    wide = chain(
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
        helper.make_node("ReduceSum", ["b"], ["y"], keepdims=0),
        weights={"w": [8, 32]},
    )
    cost = cost_of(wide)
    assert cost.peak_activation_bytes == 4 * (8 + 32) * B
    assert cost.by_kind["MatMul"] == 512 * B


def test_a_reshape_takes_no_memory():
    flat = chain(helper.make_node("Flatten", ["x"], ["a"]), helper.make_node("Relu", ["a"], ["y"]))
    assert cost_of(flat).peak_activation_bytes == 2 * 4 * 8 * B


def test_a_skipped_value_lives_on():
    skip = chain(
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Add", ["b", "x"], ["y"]),
    )
    assert cost_of(skip).peak_activation_bytes == 3 * 4 * 8 * B


def test_tied_weights_count_once():
    tied = chain(
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["y"]),
        weights={"w": [8, 8]},
    )
    assert cost_of(tied).parameters == 64


def test_sizes_are_checked():
    cost = cost_of(chain(helper.make_node("Relu", ["x"], ["y"])))
    assert cost.at({"batch": 3}) == {
        "parameters": 0, "weight_bytes": 0, "flops": 24, "matmul_flops": 0, "peak_activation_bytes": 192,
    }  # fmt: skip
    with pytest.raises(GraphOptError, match="batch is missing"):
        cost.at({})
    with pytest.raises(GraphOptError, match="no dimension 'length'; its dynamic dimensions are batch"):
        cost.at({"length": 3})


def test_comparison():
    before = cost_of(chain(helper.make_node("MatMul", ["x", "w"], ["y"]), weights={"w": [8, 8]}))
    after = cost_of(chain(helper.make_node("MatMul", ["x", "w"], ["y"]), weights={"w": [8, 2]}))
    rows = {row.quantity: row for row in compare(before, after)}
    assert (rows["flops"].before, rows["flops"].after, rows["flops"].ratio) == (128 * B, 32 * B, 0.25)
    assert rows["parameters"].ratio == 0.25
    assert rows["matmul_flops"].ratio == 0.25


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950, "950"), (1500, "1.5k"), (999_900, "1M"), (22_713_216, "22.7M"), (4.35e9, "4.35G")],
)
def test_numbers(value, text):
    assert format_number(value) == text
    assert format_expr(sympy.sympify(value)) == text


def test_expressions_are_not_abbreviated():
    assert format_expr(B * S * (4608 * S + 21233664)) == "21233664*batch*seq + 4608*batch*seq**2"
    assert format_expr(3 * S - 2) == "-2 + 3*seq"
    long = sum(B ** sympy.Integer(i) for i in range(12))
    assert format_expr(long).startswith("(6 smaller terms) + ")


def test_top_nodes():
    cost = cost_of(
        chain(
            helper.make_node("MatMul", ["x", "w"], ["a"], name="big"),
            helper.make_node("Relu", ["a"], ["y"], name="small"),
            weights={"w": [8, 8]},
        )
    )
    assert [name for name, _ in cost.top(1)] == ["big"]


def test_quantised_weights_are_parameters_and_indices_are_not():
    made = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["w", "s"], ["d"]),
            helper.make_node("MatMul", ["x", "d"], ["a"]),
            helper.make_node("Gather", ["a", "i"], ["y"], axis=1),
        ],
        "g",
        [helper.make_tensor_value_info("x", T.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", T.FLOAT, None)],
        [
            helper.make_tensor("w", T.INT8, [8, 4], [1] * 32),
            helper.make_tensor("s", T.FLOAT, [], [0.1]),
            helper.make_tensor("i", T.INT64, [2], [0, 1]),
        ],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    cost = cost_of(load_onnx(OnnxFile(model)))
    assert cost.parameters_by_dtype == {"int8": 32, "float32": 1}
    assert cost.weight_bytes == 32 + 4 + 16


class Strange(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.relu(x).mul(2) + x


def test_graphs_of_plain_torch_calls():
    """Graphs as torch.fx traces them: functions, methods and operators instead of ATen overloads."""
    made = chain(helper.make_node("Relu", ["x"], ["y"]))
    module = torch.fx.symbolic_trace(Strange())
    plain = dataclasses.replace(made, module=module, source=TorchSource((), {}))
    assert cost_of(plain).by_kind == {"aten::relu": 8 * B, "aten::mul": 8 * B, "aten::add": 8 * B}


def test_a_graph_that_contradicts_itself():
    broken = chain(
        *[helper.make_node("MatMul", [a, "w"], [b]) for a, b in zip("xabcdefgh", "abcdefghy", strict=True)],
        weights={"w": [7, 8]},
    )
    cost = cost_of(broken)
    assert len(cost.unknown) == 9
    assert cost.flops == 0
