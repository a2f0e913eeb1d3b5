"""LayerNorm and RMSNorm: as operators, spelled out in the ways of the exporters, and near misses."""

from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest
import torch
from torch import fx, nn

import graphopt
from graphopt.execute import execute
from graphopt.frontends.onnx import load_onnx
from graphopt.onnxfile import OnnxFile
from graphopt.sites import NormSite, find
from graphopt.sites.vocabulary import constant, name_of

HEAD = """
<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>
norms (float[B,T,6] x, float[B,T,6] s, float16[B,T,6] h) => (float y)
<float[6] w, float[6] b, float[1,1,6] ww, float16[6] hw, float16[6] hb, float[5,6] table, float eps = {{0.001}},
 float two = {{2.0}}, float one = {{1.0}}, float minus = {{-0.5}}, float half = {{0.5}}, float[1,5,1] rows>
{{
  {body}
}}
"""


def model(body: str, opset: int = 17) -> graphopt.Graph:
    proto = onnx.parser.parse_model(HEAD.format(body="\n  ".join(body.split(";")), opset=opset))
    generator = np.random.default_rng(0)
    for info in proto.graph.value_info:  # declared without a value: a random weight
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        value = generator.standard_normal(shape).astype(dtype)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, info.name))
    del proto.graph.value_info[:]
    return load_onnx(OnnxFile(proto))


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, s, h = (torch.randn(2, 5, 6, generator=generator) for _ in range(3))
    return [x * 0.1 + 1, s, h.half()]


def check(graph: graphopt.Graph, values: list[Any]) -> tuple[NormSite, ...]:
    """The norms of `graph`, each compared with what the graph computes."""
    sites: tuple[NormSite, ...] = find(graph, "norm").sites
    seen: dict[fx.Node, Any] = {}
    with torch.no_grad():
        execute(graph, values, seen.__setitem__)
    for site in sites:
        x = sum(seen[n].float() for n in site.inputs)
        x = x - x.mean(-1, keepdim=True) if site.form == "layer" else x
        y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + site.epsilon)
        y = y if site.weight is None else y * constant(graph, site.weight).float().reshape(-1)
        y = y if site.bias is None else y + constant(graph, site.bias).float().reshape(-1)
        expected = seen[site.output]
        tolerance = 2e-2 if expected.dtype == torch.float16 else 1e-4
        assert seen[site.x].dtype == expected.dtype
        torch.testing.assert_close(y.to(expected.dtype), expected, rtol=tolerance, atol=tolerance)
        inside = set(site.nodes)
        assert all(user in inside for node in site.nodes[:-1] for user in node.users)
    return sites


MOMENTS = "m = ReduceMean <axes = [-1]> (x); d = Sub(x, m); "
# Body; then the form, the names of scale, bias and output.
SPELLED = {
    MOMENTS + "q = Pow(d, two); v = ReduceMean <axes = [-1]> (q); e = Add(v, eps); r = Sqrt(e); n = Div(d, r);"
    "k = Mul(n, w); y = Add(k, b)": ("layer", "w", "b", "y"),
    MOMENTS + "q = Mul(d, d); v = ReduceMean <axes = [2]> (q); e = Add(eps, v); r = Sqrt(e); i = Reciprocal(r);"
    "n = Mul(i, d); k = Mul(w, n); y = Add(b, k)": ("layer", "w", "b", "y"),
    # The deviation is computed twice, as torch.onnx did for a while.
    MOMENTS + "d2 = Sub(x, m); q = Pow(d2, two); v = ReduceMean <axes = [-1]> (q); e = Add(v, eps); r = Sqrt(e);"
    "n = Div(d, r); k = Mul(n, w); y = Add(k, b)": ("layer", "w", "b", "y"),
    MOMENTS + "m2 = ReduceMean <axes = [-1]> (x); d2 = Sub(x, m2); q = Mul(d2, d2); v = ReduceMean <axes = [-1]> (q);"
    "e = Add(v, eps); r = Sqrt(e); y = Div(d, r)": ("layer", None, None, "y"),
    # TensorFlow's batch norm: scale goes into the factor, the mean into the offset.
    "m = ReduceMean <axes = [2]> (x); d = Sub(m, x); q = Mul(d, d); v = ReduceMean <axes = [2]> (q); e = Add(v, eps);"
    "r = Sqrt(e); i = Reciprocal(r); f = Mul(i, w); o = Mul(f, m); c = Sub(b, o); k = Mul(x, f);"
    "y = Add(k, c)": ("layer", "w", "b", "y"),
    # The scale before the division.
    MOMENTS + "q = Mul(d, d); v = ReduceMean <axes = [-1]> (q); e = Add(v, eps); r = Sqrt(e); k = Mul(w, d);"
    "n = Div(k, r); y = Add(n, b)": ("layer", "w", "b", "y"),
    MOMENTS + "q = Mul(d, d); v = ReduceMean <axes = [-1]> (q); e = Add(v, eps); r = Pow(e, minus); n = Mul(d, r);"
    "k = Mul(ww, n); y = Add(k, b)": ("layer", "ww", "b", "y"),
    MOMENTS + "q = Mul(d, d); v = ReduceMean <axes = [-1]> (q); e = Add(v, eps); r = Pow(e, half); n = Div(d, r);"
    "y = Add(n, b)": ("layer", None, "b", "y"),
    "q = Pow(x, two); v = ReduceMean <axes = [-1]> (q); e = Add(v, eps); r = Sqrt(e); i = Reciprocal(r);"
    "n = Mul(x, i); y = Mul(w, n)": ("rms", "w", None, "y"),
    "q = Mul(x, x); v = ReduceMean <axes = [-1]> (q); e = Add(v, eps); r = Sqrt(e); i = Div(one, r); n = Mul(x, i);"
    "k = Identity(w); y = Mul(n, k)": ("rms", "w", None, "y"),
    # What follows belongs to it only as long as it is a scale and a bias.
    "q = Mul(x, x); v = ReduceMean <axes = [-1]> (q); e = Add(v, eps); r = Sqrt(e); n = Div(x, r); k = Mul(n, w);"
    "y = Add(k, x)": ("rms", "w", None, "k"),
    "q = Mul(x, x); v = ReduceMean <axes = [-1]> (q); e = Add(v, eps); r = Sqrt(e); n = Div(x, r); k = Mul(n, w);"
    "l = Mul(k, half); y = Mul(l, b)": ("rms", "w", None, "k"),
    "q = Mul(x, x); v = ReduceMean <axes = [-1]> (q); e = Add(v, eps); r = Sqrt(e); n = Div(x, r); k = Mul(n, w);"
    "y = Add(k, n)": ("rms", None, None, "n"),
    "q = Mul(x, x); v = ReduceMean <axes = [-1]> (q); e = Add(v, eps); r = Sqrt(e); n = Div(x, r);y = Mul(n, rows)": (
        "rms",
        None,
        None,
        "n",
    ),
    # Half precision: the statistics in single, the scale in either.
    "x2 = Cast <to = 1> (h); q = Pow(x2, two); v = ReduceMean <axes = [-1]> (q); e = Add(v, eps); r = Sqrt(e);"
    "i = Reciprocal(r); n = Mul(x2, i); c = Cast <to = 10> (n); y = Mul(hw, c)": ("rms", "hw", None, "y"),
    "x2 = Cast <to = 1> (h); m = ReduceMean <axes = [-1]> (x2); d = Sub(x2, m); q = Pow(d, two);"
    "v = ReduceMean <axes = [-1]> (q); e = Add(v, eps); r = Sqrt(e); n = Div(d, r); k = Mul(n, w); o = Add(k, b);"
    "y = Cast <to = 10> (o)": ("layer", "w", "b", "y"),
    # The single-precision value is used elsewhere, so it is what the norm reads.
    "x2 = Cast <to = 1> (h); q = Pow(x2, two); v = ReduceMean <axes = [-1]> (q); e = Add(v, eps); r = Sqrt(e);"
    "n = Div(x2, r); k = Mul(n, w); y = Add(x2, k)": ("rms", "w", None, "k"),
}


@pytest.mark.parametrize("body", SPELLED)
def test_spelled_out(body: str) -> None:
    graph = model(body)
    (site,) = check(graph, inputs())
    weight, bias = (None if n is None else name_of(n) for n in (site.weight, site.bias))
    assert (site.form, weight, bias, name_of(site.output)) == SPELLED[body]
    assert site.epsilon == pytest.approx(1e-3)
    assert find(graph, "norm").refusals == ()


OPERATORS = {
    ("y = LayerNormalization <epsilon = 0.001> (x, w, b)", 17): ("layer", "w", "b", 0.001),
    ("y = LayerNormalization <axis = 2> (x, w)", 17): ("layer", "w", None, 1e-5),
    ("y, m, i = LayerNormalization(x, w, b)", 17): ("layer", "w", "b", 1e-5),
    ("y = RMSNormalization <epsilon = 0.01> (x, w)", 23): ("rms", "w", None, 0.01),
    ("y = SimplifiedLayerNormalization <axis = -1> (x, w)", 17): ("rms", "w", None, 1e-5),
    ("y = LayerNormalization(h, hw, hb)", 17): ("layer", "hw", "hb", 1e-5),
    ("y = com.microsoft.SkipLayerNormalization(x, s, w, b)", 17): ("layer", "w", "b", 1e-12),
    ("y = com.microsoft.SkipSimplifiedLayerNormalization(x, s, w)", 17): ("rms", "w", None, 1e-12),
}


@pytest.mark.parametrize(("body", "opset"), OPERATORS)
def test_operators(body: str, opset: int) -> None:
    (site,) = check(model(body, opset), inputs())
    weight, bias = (None if n is None else name_of(n) for n in (site.weight, site.bias))
    form, *names, epsilon = OPERATORS[body, opset]
    assert (site.form, weight, bias) == (form, *names)
    assert site.epsilon == pytest.approx(epsilon)
    assert [name_of(n) for n in site.inputs][1:] == (["s"] if "Skip" in body else [])


ROOT = "q = Mul(x, x); v = ReduceMean <axes = [-1]> (q); e = Add(v, eps); r = Sqrt(e); "
REFUSED = {
    "y = LayerNormalization <axis = 1> (x, w, b)": "it normalises from axis 1 on, not over the last axis alone",
    "k = ReduceMean <axes = [0, 1], keepdims = 0> (s); y = LayerNormalization(x, k, b)": "its scale is no constant "
    "vector",
    "y = LayerNormalization(x, table, b)": "its scale is no constant vector",
    "z, m, i = LayerNormalization(x, w, b); y = Add(z, m)": "its extra output 'm' is used",
    "z, , , t = com.microsoft.SkipLayerNormalization(x, s, w, b); y = Add(z, t)": "its extra output 't' is used",
    "y = com.microsoft.SkipLayerNormalization(x, s, w, b, w)": "it adds a bias to its input too",
    "y = com.microsoft.SkipLayerNormalization(x, x, w, b)": "it adds no second value of the model to its input",
    "m = ReduceMean <axes = [1]> (x); d = Sub(x, m); q = Mul(d, d); v = ReduceMean <axes = [1]> (q); e = Add(v, eps);"
    "r = Sqrt(e); y = Div(d, r)": "it normalises over axes [1], not over the last one",
    "q = Mul(x, x); v = ReduceMean <keepdims = 1> (q); e = Add(v, eps); r = Sqrt(e); y = Div(x, r)": "it normalises "
    "over all axes, not over the last one",
    ROOT + "y = Div(s, r)": "what is done with the normalised value is not understood",
    ROOT + "n = Div(x, r); l = Log(r); y = Add(n, l)": "its intermediate value 'r' is used by 'l' too",
}


@pytest.mark.parametrize("body", REFUSED)
def test_near_misses(body: str) -> None:
    findings = find(model(body), "norm")
    assert findings.sites == ()
    assert [r.reason for r in findings.refusals] == [REFUSED[body]]


@pytest.mark.parametrize(
    "body",
    ["q = Mul(x, x); t = ReduceSum(q); y = Sqrt(t)", "q = Mul(x, s); v = ReduceMean <axes = [-1]> (q); y = Sqrt(v)"],
)
def test_other_roots_are_no_candidates(body: str) -> None:
    findings = find(model(body), "norm")
    assert (findings.sites, findings.refusals) == ((), ())


class Rms(nn.Module):
    """As in Llama."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Gemma(Rms):
    """The scale is one more than what is stored."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + self.weight)


class Variance(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)


class Unbiased(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5)


MODULES = {
    "layer": (nn.LayerNorm(6), torch.float32, "layer", 1e-5),
    "layer without scale": (nn.LayerNorm(6, elementwise_affine=False, eps=1e-3), torch.float32, "layer", 1e-3),
    "layer in half": (nn.LayerNorm(6).half(), torch.float16, "layer", 1e-5),
    "rms": (nn.RMSNorm(6), torch.float32, "rms", torch.finfo(torch.float32).eps),
    "llama": (Rms(6), torch.float32, "rms", 1e-6),
    "llama in half": (Rms(6).half(), torch.float16, "rms", 1e-6),
    "gemma": (Gemma(6), torch.float32, "rms", 1e-6),
    "variance": (Variance(), torch.float32, "layer", 1e-5),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    module, dtype, form, epsilon = MODULES[name]
    graph = graphopt.load(nn.Sequential(module).eval(), (torch.randn(2, 5, 6).to(dtype),), ({0: "batch", 1: "length"},))
    (site,) = check(graph, [torch.randn(3, 4, 6).to(dtype)])
    assert site.form == form
    assert site.epsilon == pytest.approx(epsilon)
    assert site.inputs == graph.placeholders
    assert site.output in graph.results
    has_scale = isinstance(getattr(module, "weight", None), nn.Parameter)
    assert (site.weight is not None) == has_scale


def test_other_module_norms() -> None:
    two_axes = find(graphopt.load(nn.LayerNorm((5, 6)), (torch.randn(2, 5, 6),)), "norm")
    assert [r.reason for r in two_axes.refusals] == ["it normalises the last 2 axes"]
    assert find(graphopt.load(Unbiased(), (torch.randn(2, 5, 6),)), "norm").sites == ()
