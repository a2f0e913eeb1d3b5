"""Each torch function that replacements consist of, lowered and run on onnxruntime against torch."""

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import fx

import graphopt
from graphopt.backends.onnx.table import _table
from graphopt.backends.onnxruntime import Session
from graphopt.rewrite.splice import splice
from graphopt.sites.base import Site

F32, I64, BOOL = torch.float32, torch.int64, torch.bool

CASES = {
    "add": lambda x: x + 2,
    "add mixed types": lambda x: x + torch.ge(x, 0).to(I64),
    "sub": lambda x: torch.sub(1.0, x),
    "mul": lambda x: x * x,
    "div": lambda x: x / 3,
    "matmul": lambda x: x @ x.transpose(-1, -2),
    "unary": lambda x: torch.tanh(torch.exp(torch.neg(x))).sigmoid().sqrt().abs().log().relu().erf(),
    "waves": lambda x: torch.sin(x) + torch.cos(x * 2),
    "softmax inner": lambda x: torch.softmax(x, 1),
    "softmax last": lambda x: x.softmax(-1),
    "permute": lambda x: x.permute(2, 0, 3, 1),
    "permute list": lambda x: torch.permute(x, (0, 2, 1, 3)),
    "unflatten last": lambda x: torch.unflatten(x, -1, (2, 4)),
    "unflatten first": lambda x: torch.unflatten(x, 0, (-1, 2)),
    "unflatten middle": lambda x: torch.unflatten(x, 2, (3, -1)),
    "flatten end": lambda x: x.transpose(1, 2).flatten(-2),
    "flatten start": lambda x: torch.flatten(x, 0, 1),
    "flatten middle": lambda x: torch.flatten(x, 1, 2),
    "unsqueeze, squeeze": lambda x: torch.squeeze(torch.unsqueeze(x, -1), -1).unsqueeze(1),
    "narrow": lambda x: torch.narrow(x, 2, 1, 3),
    "narrow last": lambda x: torch.narrow(x, -2, -1, 1),
    "cat": lambda x: torch.cat([x, x * 2], dim=-1),
    "where": lambda x: torch.where(x > 0, x, -1.0),
    "where both": lambda x: torch.where(torch.lt(x, 0), x, x * 3),
    "repeat_interleave": lambda x: torch.repeat_interleave(x, 3, 1),
    "comparisons": lambda x: torch.logical_or(torch.le(x, 0), torch.logical_and(torch.gt(x, 0.5), torch.lt(x, 1))),
    "not equal": lambda x: torch.logical_not(torch.ne(x, x)),
    "cumsum": lambda x: torch.cumsum(torch.ge(x, 0), 2),
    "cumsum float": lambda x: torch.cumsum(x, -1),
    "like": lambda x: torch.ones_like(x) + torch.zeros_like(x),
    "amax": lambda x: torch.amax(x, -1, True) - torch.amin(x, (1, 2), True),
    "clamp": lambda x: torch.clamp(torch.clamp(x, min=-0.5), max=0.5),
    "pad": lambda x: F.pad(x, (1, 2, 0, 3), value=-4.0),
    "pad bool": lambda x: F.pad(torch.gt(x, 0), (2, 0), value=True),
    # Scaled down: sums of hundreds in another order differ by more than the tolerance.
    "sum": lambda x: (torch.sum(x, (1, -1)) + x.sum()) / 100 + torch.gt(x, 0).sum((1, 3)),
    "mean": lambda x: torch.mean(x, -1, keepdim=True) + x.mean(dim=(0, 2), keepdim=True),
    "rsqrt": lambda x: torch.rsqrt(torch.square(x) + 1),
    "pow": lambda x: x**2 + torch.pow(torch.abs(x), 1.5) + x.pow(2),
    "maximum": lambda x: torch.maximum(x, torch.minimum(x * 2, 0 - x)),
    "gates": lambda x: F.logsigmoid(x * 60) + F.softplus(x * 30) + F.silu(x) + F.elu(x, 0.5),
    "float": lambda x: torch.gt(x, 0).float(),
    "normalize": lambda x: F.normalize(x, dim=-1) + F.normalize(x, 2.0, 2, eps=3.0),
    "rms_norm": lambda x: F.rms_norm(x, (8,)) + F.rms_norm(x, (8,), eps=1e-3),
    "getitem": lambda x: x[:, 1:, -5:, 1:-1] + x[:, :1, -5:, :6],
    "getitem clamped": lambda x: x[:, :, -70:, :99],
    "getitem single": lambda x: x[0, ..., -1] + x[1, :, 2:3, None, 0],
    "getitem stepped": lambda x: x[..., 1::2, :][:, None],
    "getitem whole": lambda x: x[:],
    "softmax typed": lambda x: F.softmax(x, dim=-1, dtype=torch.float64) + F.softmax(x, -1),
    "linear": lambda x: F.linear(x, WEIGHT, BIAS),
}
WEIGHT, BIAS = torch.randn(5, 8), torch.randn(5)


class Replacement(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(WEIGHT), torch.nn.Parameter(BIAS)
        self.function = function

    def forward(self, x):
        if self.function is CASES["linear"]:
            return F.linear(x, self.weight, self.bias)
        return self.function(x)


@pytest.mark.parametrize("opset", [11, 13, 18, 20])
@pytest.mark.parametrize("name", CASES)
def test_lowering(name, opset, tmp_path):
    if name == "softmax inner" and opset < 13:
        pytest.skip("refused: Softmax flattened what is behind its axis before opset 13")
    if name == "comparisons" and opset < 12:
        pytest.skip("refused: float comparisons with equality came with opset 12")
    if name in ("add mixed types", "cumsum") and opset < 12:
        pytest.skip("uses >= on floats, as above")
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}]> g (float[a,b,c,8] x) => (y) {{ y = Identity(x) }}'
    )
    onnx.save(model, tmp_path / "m.onnx")
    graph = graphopt.load(tmp_path / "m.onnx")
    (node,) = [n for n in graph.nodes if n.op == "call_function"]
    x = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    module = Replacement(CASES[name])
    splice(graph, Site("s", node, (node,), (node.args[0],)), module, "graphopt.s", (x,))
    expected = module(x).detach()
    graph.save(tmp_path / "out.onnx")
    saved = onnx.load(tmp_path / "out.onnx")
    assert saved.opset_import[0].version == opset
    found = Session(tmp_path / "out.onnx").run({"x": x.numpy()})["y"]
    assert found.dtype == expected.numpy().dtype
    # The same fp32 functions in another library: a few ulp.
    np.testing.assert_allclose(found, expected.numpy(), rtol=3e-6, atol=3e-6)
    # Another size than the one that was observed: nothing dynamic is baked in.
    other = torch.randn(4, 2, 9, 8)
    np.testing.assert_allclose(
        Session(tmp_path / "out.onnx").run({"x": other.numpy()})["y"],
        module(other).detach().numpy(),
        rtol=3e-6,
        atol=3e-6,
    )


def test_the_table_is_covered():
    """A lowering that no case uses is a lowering that nobody tested."""
    seen = set()
    for function in CASES.values():
        for node in fx.symbolic_trace(Replacement(function)).graph.nodes:
            if node.op in ("call_function", "call_method"):
                seen.add(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", ""))
    names = {n for n in _table if "::" not in n}
    aliases = {"iadd", "true_divide", "bmm", "contiguous", "concat", "type", "_to_copy", "clip", "bitwise_and"}
    assert names - seen - aliases - {"bitwise_or", "logsigmoid", "eq", "logical_not", "zeros_like", "amin"} <= {
        "div",
        "getitem",
        "truediv",
    }


def test_what_has_no_lowering_says_so(tmp_path):
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[a,4] x) => (float[a,4] y) { y = Identity(x) }'
    )
    onnx.save(model, tmp_path / "m.onnx")
    graph = graphopt.load(tmp_path / "m.onnx")
    (node,) = [n for n in graph.nodes if n.op == "call_function"]
    splice(
        graph,
        Site("s", node, (node,), (node.args[0],)),
        Replacement(torch.special.i0),
        "graphopt.s",
        (torch.ones(1, 4),),
    )
    with pytest.raises(graphopt.GraphOptError, match="no ONNX form of"):
        graph.save(tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
