"""The ONNX forms of softplus attention and of StableMax, in onnxruntime against the references."""

import math

import numpy as np
import onnx
import pytest
import torch

import graphopt
from graphopt.backends.onnx.attention_parts import BLOCK
from graphopt.backends.onnxruntime import Session
from graphopt.ops import softplus_attention, stablemax
from graphopt.rewrite.splice import splice
from graphopt.sites.base import Site
from tests.backends.operator_models import export, lower

NAME = "softplus_attention"
POWERS = [0, 3, 15]
SIZES = [(1, 0), (1, 130), (7, 0), (7, 40), (64, 0), (65, 3), (128, 0), (150, 90)]
# fp32 sums of 240 terms in another order, to the power of 15.
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


def operands(T, past=0, *, heads=(4, 2), weight=False, B=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1000 * T + past)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731  # short
    (H, Hkv), S = heads, T + past
    given = {"q": 2 * make(B, H, T, 6), "k": make(B, Hkv, S, 6), "v": make(B, Hkv, S, 5)}
    if weight:
        given["key_weight"] = (make(B, 1, S, 1) > -1).double()
        given["key_weight"][0, :, : past + T // 2] = 0  # some rows see nothing
    return {n: x.to(dtype) for n, x in given.items()}


@pytest.mark.parametrize("target", ["onnx", "onnxruntime"])
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("weight", [False, True], ids=["all keys", "some keys"])
def test_all_sizes_in_one_session(target, power, causal, weight, tmp_path):
    lowered = lower(tmp_path, NAME, operands(9, weight=weight), target=target, power=power, causal=causal)
    for T, past in SIZES:
        lowered.compare(operands(T, past, weight=weight), **CLOSE)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 1)], ids=str)
def test_heads(heads, tmp_path):
    lowered = lower(tmp_path, NAME, operands(9, heads=heads), power=3)
    for T in (1, 70):
        lowered.compare(operands(T, 5, heads=heads, B=1), **CLOSE)


@pytest.mark.parametrize("power", [0, 15])
@pytest.mark.parametrize("opset", [13, 20])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_types_and_opsets(dtype, opset, power, tmp_path):
    lowered = lower(tmp_path, NAME, operands(9, weight=True, dtype=dtype), opset=opset, power=power)
    # fp64 shows that nothing passes through fp32; fp16 differs by the rounding of the result alone.
    tolerance = 1e-11 if dtype == torch.float64 else 1e-3
    for T in (1, 100):
        lowered.compare(operands(T, 17, weight=True, dtype=dtype), rtol=tolerance, atol=tolerance)


def test_an_opset_that_is_too_old_is_named(tmp_path):
    with pytest.raises(graphopt.errors.GraphOptError, match="below opset 13"):
        lower(tmp_path, NAME, operands(9), opset=12)


@pytest.mark.parametrize("power", POWERS)
def test_more_queries_than_keys(power, tmp_path):
    """Queries before the first key see nothing."""
    lowered = lower(tmp_path, NAME, operands(9), power=power)
    for T, past in ((5, -3), (150, -80), (200, -190)):
        given = operands(T, past)
        lowered.compare(given, **CLOSE)
        (found,) = lowered.session.run({n: x.numpy() for n, x in given.items()}).values()
        assert (found[:, :, :-past] == 0).all()


@pytest.mark.parametrize("power", [0, 15])
def test_scores_far_below_zero(power, tmp_path):
    """All keys against the query: softplus is exp there, which 1 + exp(x) in fp32 has lost."""
    D, S = 256, 5000
    given = {
        "q": torch.ones(1, 1, 3, D),
        "k": -torch.ones(1, 1, S, D) + 0.3 * torch.randn(1, 1, S, D, generator=torch.Generator().manual_seed(0)),
        "v": torch.randn(1, 1, S, 4, generator=torch.Generator().manual_seed(1)),
    }
    expected = softplus_attention(*(x.double() for x in given.values()), None, power).float()
    assert math.log(D) * math.log(S) > 45
    # A rounding of a score of 45 is 4e-6 of its weight, and 15 times that of the weight's 15th power.
    lower(tmp_path, NAME, given, power=power).compare(given, expected=expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_uniform_rows_stay_uniform(direction, tmp_path):
    lowered = lower(tmp_path, NAME, operands(9), power=15)
    for T in (50, 150):
        given = operands(T)
        given["k"] = torch.linspace(0.5, 2, T)[:, None] * given["k"][:, :, :1]
        given["q"] = direction * given["k"][:, :, :1].repeat_interleave(2, 1).expand(-1, -1, T, -1).contiguous()
        mean = given["v"].double().cumsum(2) / torch.arange(1, T + 1)[:, None]
        expected = mean.repeat_interleave(2, 1).float()
        lowered.compare(given, expected=expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight", [False, True], ids=["all keys", "some keys"])
@pytest.mark.parametrize("prefill", [1, 3, BLOCK, 99])
def test_prefill_and_decode(prefill, weight, tmp_path):
    """The number of a row comes from the length of the cache: decoding gives what one run over the text gives."""
    whole = operands(106, weight=weight)
    lowered = lower(tmp_path, NAME, whole, power=15)
    expected = softplus_attention(*(x.double() for x in whole.values()), power=15)
    for start, end in [(0, prefill), *((i, i + 1) for i in range(prefill, 106))]:
        given = {n: x[:, :, start if n == "q" else 0 : end].contiguous() for n, x in whole.items()}
        lowered.compare(given, expected=expected[:, :, start:end].float(), **CLOSE)


def test_zero_vectors(tmp_path):
    lowered = lower(tmp_path, NAME, operands(9), power=3)
    for T in (9, 70):
        given = operands(T)
        given["q"][:, :, 4] = 0
        given["k"][:, :, 6] = 0
        lowered.compare(given, **CLOSE)


def test_through_the_exporter(tmp_path):
    queries = {"q": {0: "batch", 2: "length"}}
    keys = {n: {0: "batch", 2: "all"} for n in ("k", "v", "key_weight")}
    lowered, names = export(
        tmp_path, NAME, operands(9, 4, weight=True), queries | keys, target="onnxruntime", power=15, causal=True
    )
    for T, past in ((1, 16), (70, 0)):
        other = operands(T, past, weight=True, B=3)
        lowered.compare({new: other[old] for new, old in names.items()}, **CLOSE)


def test_memory_grows_with_a_segment_only(tmp_path):
    """No [T, S] value: shapes inside of the segments hold BLOCK rows."""
    lower(tmp_path, NAME, operands(9), power=15)
    (function,) = onnx.load(tmp_path / "out.onnx").functions
    (branch,) = [n for n in function.node if n.op_type == "If"]
    many = next(a.g for a in branch.attribute if a.name == "else_branch")
    assert [n.op_type for n in many.node].count("MatMul") == 0, "all products are in the body of Scan"


def stablemax_model(tmp_path, dtype, axis, target="onnx", opset=13):
    name = {torch.float16: "float16", torch.float32: "float", torch.float64: "double"}[dtype]
    text = f'<ir_version: 8, opset_import: ["": {opset}]> g ({name}[a,b,c] x) => ({name}[a,b,c] y) {{ y = Relu(x) }}'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    graph = graphopt.load(tmp_path / "m.onnx")
    (node,) = [n for n in graph.nodes if n.op == "call_function"]

    class StableMax(torch.nn.Module):
        def forward(self, x):
            return torch.ops.graphopt.stablemax(x, axis)

    splice(graph, Site("s", node, (node,), tuple(node.args)), StableMax(), "g.s", (torch.zeros(1, 2, 3, dtype=dtype),))
    graph.save(tmp_path / "out.onnx", target=target)
    onnx.checker.check_model(onnx.load(tmp_path / "out.onnx"), full_check=True)
    return Session(tmp_path / "out.onnx")


@pytest.mark.parametrize("target", ["onnx", "onnxruntime"])
@pytest.mark.parametrize("axis", [-1, 0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_stablemax(dtype, axis, target, tmp_path):
    session = stablemax_model(tmp_path, dtype, axis, target)
    x = (20 * torch.randn(4, 6, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)
    (found,) = session.run({"x": x.numpy()}).values()
    # A few roundings of the type that it is computed in, or that of the result.
    tolerance = {torch.float16: 1e-3, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    np.testing.assert_allclose(found, stablemax(x, axis).numpy(), rtol=tolerance, atol=0)


@pytest.mark.parametrize("opset", [8, 13])
def test_stablemax_at_the_edges(opset, tmp_path):
    inf, nan, low = math.inf, math.nan, torch.finfo(torch.float32).min
    x = torch.tensor([[[-inf, 0.0, 1.0], [-inf] * 3, [nan, 1.0, 2.0], [low, -1e30, 0.0], [0.5, 0.0, -0.5]]])
    (found,) = stablemax_model(tmp_path, torch.float32, -1, opset=opset).run({"x": x.numpy()}).values()
    np.testing.assert_allclose(found, stablemax(x).numpy(), rtol=1e-6, atol=0)
    assert np.isnan(found[0, 2]).all()
