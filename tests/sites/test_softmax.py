"""Softmax operators: their axis, its size, and what they are there for."""

import onnx.parser
import pytest
import torch
from torch import nn

import graphopt
from graphopt.execute import execute
from graphopt.frontends.onnx import load_onnx
from graphopt.onnxfile import OnnxFile
from graphopt.sites import find

HEAD = """
<ir_version: 8, opset_import: ["" : {opset}]>
probabilities (float[B,2,T,S] x, float[B,2,S,4] v, float[B,3,1,1] image, float[B,9000] words, float[B,6] logits)
=> (float y)
<float[6,2] W, float zero = {{0.0}}, int64[3] rows = {{-1, 1, 6}}>
{{
  {body}
}}
"""


def model(body: str, opset: int = 17) -> graphopt.Graph:
    proto = onnx.parser.parse_model(HEAD.format(body="\n  ".join(body.split(";")), opset=opset))
    weight = onnx.helper.make_tensor("W", onnx.TensorProto.FLOAT, [6, 2], [0.1] * 12)
    proto.graph.initializer.append(weight)
    del proto.graph.value_info[:]
    return load_onnx(OnnxFile(proto))


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 2, 5, 7), (3, 2, 7, 4), (3, 3, 1, 1), (3, 9000), (3, 6))
    return [torch.randn(shape, generator=generator) for shape in shapes]


# Body and opset; then the axis, the role, and the size of the axis.
FOUND = {
    ("p = Softmax(x); y = MatMul(p, v)", 17): (-1, "attention", "S"),
    ("p = Softmax <axis = 3> (x); q = Identity(p); d, m = Dropout(q); y = MatMul(d, v)", 17): (-1, "attention", "S"),
    ("p = Softmax(x); n = IsNaN(p); w = Where(n, zero, p); y = MatMul(w, v)", 17): (-1, "attention", "S"),
    ("p = Softmax(x); h = Cast <to = 1> (p); t = Transpose <perm = [0, 1, 3, 2]> (h); w = Transpose <perm = [0, 1, 3,"
     " 2]> (v); y = MatMul(w, t)", 17): (-1, "attention", "S"),
    ("p = Softmax <axis = 3> (x); y = MatMul(p, v)", 11): (-1, "attention", "S"),
    ("y = Softmax(logits)", 17): (-1, "classifier", 6),
    ("y = Softmax(logits)", 11): (-1, "classifier", 6),
    ("p = Softmax(logits); y = Reshape(p, rows)", 17): (-1, "classifier", 6),
    ("y = Softmax(image)", 11): (-3, "classifier", 3),
    ("y = Softmax <axis = 1> (x)", 17): (-3, "classifier", 2),
    ("y = Softmax(words)", 17): (-1, "vocabulary", 9000),
    ("p = Softmax(logits); y = MatMul(p, W)", 17): (-1, "other", 6),
    ("p = Softmax(x); y = ReduceSum(p)", 17): (-1, "other", "S"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "opset"), FOUND)
def test_roles(body: str, opset: int) -> None:
    graph = model(body, opset)
    (site,) = find(graph, "softmax").sites
    assert (site.axis, site.role, site.length) == FOUND[body, opset]
    seen = {}
    execute(graph, inputs(), seen.__setitem__)
    (x,) = site.inputs
    assert site.nodes == (site.anchor,) == (site.output,)
    torch.testing.assert_close(torch.softmax(seen[x], site.axis), seen[site.output], rtol=1e-4, atol=1e-6)


def test_several_axes_at_once_are_refused() -> None:
    findings = find(model("y = Softmax(x)", opset=11), "softmax")
    assert findings.sites == ()
    assert [r.reason for r in findings.refusals] == [
        "it normalises all axes from 1 on together, as Softmax does before opset 13"
    ]


def test_constant_probabilities_are_refused() -> None:
    (refusal,) = find(model("p = Softmax(W); y = MatMul(logits, p)"), "softmax").refusals
    assert refusal.reason == "it depends on no input of the model"


class Attention(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = torch.softmax(q @ k.transpose(-1, -2), dim=-1, dtype=torch.float32).to(q.dtype)
        return nn.functional.dropout(scores, 0.1, self.training) @ v


def test_an_attention_module() -> None:
    q = torch.randn(2, 5, 4)
    graph = graphopt.load(
        Attention().eval(), (q, torch.randn(2, 7, 4), torch.randn(2, 7, 4)), ({}, {1: "keys"}, {1: "keys"})
    )
    (site,) = find(graph, "softmax").sites
    assert (site.axis, site.role, site.length) == (-1, "attention", "keys")


def test_fused_attention_is_no_softmax() -> None:
    class Fused(nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, q, q)

    findings = find(graphopt.load(Fused(), (torch.randn(1, 2, 5, 4),)), "softmax")
    assert (findings.sites, findings.refusals) == ((), ())
