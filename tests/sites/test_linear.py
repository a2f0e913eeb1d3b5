"""Linear layers in every spelling, and products that are none."""

from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import graphopt
from graphopt.execute import execute
from graphopt.frontends.onnx import load_onnx
from graphopt.onnxfile import OnnxFile
from graphopt.sites import LinearSite, find

HEAD = """
<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
layers (float[2,5,4] x, float[5,4] f, float[2,4,3] other) => (float y)
<float[4,3] W, float[3,4] V, float[3] b, float[1,3] row, float[2,3] rows, float[7,4,3] many, float[4] vector,
 float[5,2] left, float16[4,3] half, float[3] b2, float[1] single, float one = {{1.0}}, float[4,1] column,
 int64[2] flat = {{-1, 4}}, int64[3] wide = {{2, 5, 3}}, int64[4] heads = {{2, 5, 3, 1}}, int8[4,3] small,
 float scale = {{0.1}}>
{{
  {body}
}}
"""


def model(body: str) -> graphopt.Graph:
    proto = onnx.parser.parse_model(HEAD.format(body="\n  ".join(body.split(";"))))
    generator = np.random.default_rng(0)
    for info in proto.graph.value_info:  # declared without a value: a random weight
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        value = (generator.standard_normal(shape) * 3).astype(dtype)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, info.name))
    del proto.graph.value_info[:]
    return load_onnx(OnnxFile(proto))


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((2, 5, 4), (5, 4), (2, 4, 3))]


def check(graph: graphopt.Graph, values: list[Any]) -> tuple[LinearSite, ...]:
    """The layers of `graph`, each compared with what the graph computes."""
    seen: dict[fx.Node, Any] = {}
    with torch.no_grad():
        execute(graph, values, seen.__setitem__)
    sites = find(graph, "linear").sites
    for site in sites:
        x = seen[site.x]
        weight = seen[site.weight].to(x.dtype)
        assert site.inputs == (site.x,)
        assert tuple(weight.shape) == (
            (site.in_features, site.out_features) if site.transposed else (site.out_features, site.in_features)
        )
        bias = None if site.bias is None else seen[site.bias].to(x.dtype)
        y = F.linear(x, weight.T if site.transposed else weight, bias)
        torch.testing.assert_close(y, seen[site.output], rtol=1e-4, atol=1e-5)
    return sites


# Body, then: name of the weight, of the bias, whether the weight is stored [in, out], number of nodes.
SPELLINGS = {
    "y = MatMul(x, W)": ("W", None, True, 1),
    "p = MatMul(x, W); y = Add(p, b)": ("W", "b", True, 2),
    "p = MatMul(x, W); y = Add(b, p)": ("W", "b", True, 2),
    "p = MatMul(x, W); y = Sum(p, b)": ("W", "b", True, 2),
    "y = Gemm(f, W, b)": ("W", "b", True, 1),
    "y = Gemm(f, W)": ("W", None, True, 1),
    "y = Gemm <beta = 2.0> (f, W)": ("W", None, True, 1),
    "y = Gemm <transB = 1> (f, V, b)": ("V", "b", False, 1),
    "y = Gemm(f, W, row)": ("W", "row", True, 1),
    "g = Gemm(f, W); y = Add(g, b)": ("W", "b", True, 2),
    "t = Transpose(V); y = MatMul(x, t)": ("V", None, False, 1),
    "t = Transpose <perm = [1, 0]> (V); u = Transpose(t); y = Gemm <transB = 1> (f, u)": ("V", None, False, 1),
    "t = Transpose <perm = [0, 1]> (W); y = MatMul(x, t)": ("W", None, True, 1),
    "i = Identity(W); j = Identity(b); y = Gemm(f, i, j)": ("W", "b", True, 1),
    "c = Cast <to = 1> (half); y = MatMul(x, c)": ("half", None, True, 1),
    "y = com.microsoft.FusedMatMul(x, W)": ("W", None, True, 1),
    "p = com.microsoft.FusedMatMul <transB = 1> (x, V); y = Add(p, b)": ("V", "b", False, 2),
    # The bias has one number per feature only by its own shape.
    "p = MatMul(x, W); y = Add(p, one)": ("W", None, True, 1),
    "p = MatMul(x, W); y = Add(p, row)": ("W", None, True, 1),
    "p = MatMul(x, column); y = Add(p, b)": ("column", None, True, 1),
    "p = MatMul(x, column); y = Add(p, single)": ("column", "single", True, 2),
    # Only the layer's own bias.
    "p = Gemm(f, W, b); y = Add(p, b2)": ("W", "b", True, 1),
    "p = MatMul(x, W); q = Add(p, b); r = Neg(p); y = Add(q, r)": ("W", None, True, 1),
    # Flattened and restored.
    "r = Reshape(x, flat); g = Gemm(r, W, b); y = Reshape(g, wide)": ("W", "b", True, 3),
    "r = Reshape(x, flat); g = MatMul(r, W); s = Reshape(g, wide); y = Add(s, b)": ("W", "b", True, 4),
    "r = Reshape(x, flat); g = Gemm(r, W, b); y = Reshape(g, heads)": ("W", "b", True, 1),
}


@pytest.mark.parametrize("body", SPELLINGS)
def test_spellings(body: str) -> None:
    graph = model(body)
    (site,) = check(graph, inputs())
    weight, bias, transposed, count = SPELLINGS[body]
    found = (site.weight.meta["onnx_name"], None if site.bias is None else site.bias.meta["onnx_name"])
    assert found == (weight, bias)
    assert (site.transposed, len(site.nodes)) == (transposed, count)
    assert find(graph, "linear").refusals == ()


def test_layers_that_share_one_flattened_value() -> None:
    graph = model(
        "r = Reshape(x, flat); g = Gemm(r, W, b); p = Reshape(g, wide); h = Gemm(r, W); q = Reshape(h, wide);"
        "y = Add(p, q)"
    )
    first, second = check(graph, inputs())
    assert first.x is second.x is graph.placeholders[0]
    assert not set(first.nodes) & set(second.nodes)


REFUSED = {
    "y = MatMul(x, many)": "its weight has 3 dimensions ([7, 4, 3]), expected a matrix",
    "y = MatMul(x, vector)": "its weight has 1 dimensions ([4]), expected a matrix",
    "y = MatMul(left, f)": "its constant is the left operand; a linear layer has it on the right",
    "y = Gemm <transA = 1> (f, rows)": "it transposes its left operand or a batch axis",
    "y = Gemm <alpha = 0.5> (f, W, b)": "it scales its result: alpha is 0.5",
    "y = Gemm <beta = 2.0> (f, W, b)": "it scales its result: beta is 2",
    "y = com.microsoft.FusedMatMul <alpha = 0.5> (x, W)": "it scales its result: alpha is 0.5",
    "n = Neg(f); m = ReduceSum <keepdims = 0> (n); y = Gemm(f, W, m)": "its bias depends on an input of the model",
    "y = Gemm(f, W, one)": "its bias has the shape [], expected [3]",
    "n = Neg(b); y = Gemm(f, W, n)": "its bias is computed by neg, not stored",
    "n = Neg(W); y = MatMul(x, n)": "its weight is computed by neg, not stored",
    "d = DequantizeLinear(small, scale); y = MatMul(x, d)": "its weight is quantised already (dequantize_linear)",
}


@pytest.mark.parametrize("body", REFUSED)
def test_near_misses(body: str) -> None:
    findings = find(model(body), "linear")
    assert findings.sites == ()
    assert [r.reason for r in findings.refusals] == [REFUSED[body]]
    assert findings.refusals[0].node == "y"


def test_products_of_two_activations_are_no_candidates() -> None:
    findings = find(model("m = MatMul(x, other); n = MatMul(W, V); y = Add(m, one)"), "linear")
    assert (findings.sites, findings.refusals) == ((), ())


class Conv1D(nn.Module):
    """The linear layer of GPT-2: its weight is stored [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.shape[:-1], 3)


class Matmul(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


@pytest.mark.parametrize(
    ("module", "transposed"), [(nn.Linear(4, 3), False), (Conv1D(), True), (Matmul(), True)], ids=["linear", "1d", "@"]
)
def test_modules(module: nn.Module, transposed: bool) -> None:
    graph = graphopt.load(nn.Sequential(module).eval(), (torch.randn(2, 5, 4),), ({0: "batch", 1: "length"},))
    (site,) = check(graph, [torch.randn(3, 6, 4)])
    assert (site.weight.target, site.bias.target) == ("0.weight", "0.bias")
    assert (site.transposed, site.in_features, site.out_features) == (transposed, 4, 3)
    assert site.x is graph.placeholders[0]


def test_scaled_addmm_is_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.bias, x, self.weight, beta=0.5)

    (refusal,) = find(graphopt.load(Scaled(), (torch.randn(2, 4),)), "linear").refusals
    assert refusal.reason == "it scales its result: beta is 0.5"


def test_names_are_unique() -> None:
    graph = model("p = MatMul(x, W); y = MatMul(x, W)")
    for node in graph.nodes:
        if "onnx" in node.meta and node.meta["onnx"].proto.op_type == "MatMul":
            node.meta["onnx"].proto.name = "same"
    assert [site.name for site in find(graph, "linear").sites] == ["same", "same_2"]
