"""MLPs by what their activation computes; and all four kinds of site on exported and real models, numerically."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
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
from graphopt.onnxfile.tensors import from_numpy
from graphopt.shapes import shapes_of
from graphopt.sites import LinearSite, MlpSite, NormSite, Site, SoftmaxSite, find, regions
from graphopt.sites.mlp import activation
from graphopt.sites.vocabulary import constant, name_of

KINDS = ("linear", "softmax", "norm", "mlp")
D, H, OUT = 4, 8, 3


# What a site means, in plain torch.


def linear(graph: graphopt.Graph, site: LinearSite, x: torch.Tensor) -> torch.Tensor:
    weight = graph.weight(site.weight).to(x.dtype)
    bias = None if site.bias is None else graph.weight(site.bias).to(x.dtype)
    matrix = weight.T if site.transposed else weight
    assert matrix.shape == (site.out_features, site.in_features)
    return F.linear(x, matrix, bias)


def norm(graph: graphopt.Graph, site: NormSite, *inputs: torch.Tensor) -> torch.Tensor:
    x = sum(value.float() for value in inputs)
    assert isinstance(x, torch.Tensor)
    weight, bias = (None if n is None else constant(graph, n) for n in (site.weight, site.bias))
    centred = x - x.mean(-1, keepdim=True) if site.form == "layer" else x
    y = centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + site.epsilon)
    y = y if weight is None else y * weight.float().reshape(-1)
    return y if bias is None else y + bias.float().reshape(-1)


def meaning(graph: graphopt.Graph, site: Site, *inputs: torch.Tensor) -> torch.Tensor:
    if isinstance(site, SoftmaxSite):
        return torch.softmax(inputs[0].float(), site.axis)
    if isinstance(site, NormSite):
        return norm(graph, site, *inputs)
    if isinstance(site, LinearSite):
        return linear(graph, site, *inputs)
    assert isinstance(site, MlpSite)
    act = activation(site.activation)
    x = inputs[0].float()
    if site.gate is None:
        return linear(graph, site.down, act(linear(graph, site.up, x)))
    return linear(graph, site.down, act(linear(graph, site.gate, x)) * linear(graph, site.up, x))


def check(graph: graphopt.Graph, values: list[Any], kinds: tuple[str, ...] = KINDS) -> dict[str, int]:
    """Hold every site of `graph` against what the graph itself computes; the number of sites of each kind."""
    sites = {kind: find(graph, kind).sites for kind in kinds}
    wanted = {n for found in sites.values() for site in found for n in (*site.inputs, site.output)}
    seen: dict[fx.Node, Any] = {}

    def observe(node: fx.Node, value: Any) -> None:
        if node in wanted:
            seen[node] = value

    with torch.no_grad():
        execute(graph, values, observe)
        for found in sites.values():
            for site in found:
                expected = seen[site.output]
                got = meaning(graph, site, *(seen[n] for n in site.inputs)).to(expected.dtype)
                tolerance = 2e-2 if expected.dtype == torch.float16 or half(graph) else 1e-4
                # A value near zero is a difference of larger ones.
                scale = float(expected.float().abs().max()) if expected.numel() else 0.0
                torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * scale, msg=f"{site.name}")
    for found in sites.values():
        well_formed(graph, found)
    return {kind: len(found) for kind, found in sites.items()}


def half(graph: graphopt.Graph) -> bool:
    """Whether the model was made in half precision, constants included, even where it is computed in single."""
    weights = [graph.weight(n) for n in graph.nodes if n.op == "get_attr"]
    return any(isinstance(w, torch.Tensor) and w.dtype == torch.float16 for w in weights)


def well_formed(graph: graphopt.Graph, sites: tuple[Site, ...]) -> None:
    order = {node: i for i, node in enumerate(graph.nodes)}
    assert len({site.name for site in sites}) == len(sites)
    assert [order[s.output] for s in sites] == sorted(order[s.output] for s in sites)
    for site in sites:
        inside = set(site.nodes)
        assert len(inside) == len(site.nodes)
        assert site.anchor in inside
        assert [order[n] for n in site.nodes[:-1]] == sorted(order[n] for n in site.nodes[:-1])
        assert len(set(site.inputs)) == len(site.inputs)
        assert not inside & set(site.inputs)
        for node in site.nodes[:-1]:
            assert all(user in inside for user in node.users), f"{node} of {site.name} is used outside"


# Models made by hand.

BODY = """
<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>
mlp (float[B,T,4] x) => (float[B,T,3] y)
<float[4,8] W, float[8] b, float[4,8] G, float[8,3] V, float[3] c, float[8] slope,
 float half = {{0.5}}, float one = {{1.0}}, float two = {{2.0}}, float three = {{3.0}}, float zero = {{0.0}},
 float root = {{1.4142135}}, float cubic = {{0.044715}}, float tau = {{0.7978846}}, float quick = {{1.702}}>
{{
  u0 = MatMul(x, W)
  u = Add(u0, b)
  {body}
  d0 = MatMul(a, V)
  y = Add(c, d0)
}}
"""


def model(body: str, opset: int = 20, **changes: str) -> graphopt.Graph:
    text = BODY.format(body="\n  ".join(body.split(";")), opset=opset)
    for old, new in changes.items():
        text = text.replace(old, new)
    proto = onnx.parser.parse_model(text)
    generator = np.random.default_rng(0)
    for info in proto.graph.value_info:  # declared without a value: a random weight
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        value = generator.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, info.name))
    del proto.graph.value_info[:]
    return load_onnx(OnnxFile(proto))


def sample() -> list[torch.Tensor]:
    return [torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))]


ACTIVATIONS = {
    "relu": ["a = Relu(u)", "a = Max(u, zero)", "p = Greater(u, zero); a = Where(p, u, zero)"],
    "gelu": [
        "a = Gelu(u)",
        "a = com.microsoft.Gelu(u)",
        "s = Div(u, root); e = Erf(s); f = Add(e, one); m = Mul(u, f); a = Mul(m, half)",
        "h = Mul(half, u); s = Div(u, root); e = Erf(s); f = Add(one, e); a = Mul(f, h)",
        "s = Div(u, root); e = Erf(s); f = Add(one, e); h = Mul(f, half); a = Mul(h, u)",
    ],
    "gelu_tanh": [
        'a = Gelu <approximate = "tanh"> (u)',
        "a = com.microsoft.FastGelu(u)",
        "q = Pow(u, three); k = Mul(q, cubic); s = Add(u, k); r = Mul(s, tau); t = Tanh(r); f = Add(t, one);"
        "h = Mul(u, half); a = Mul(h, f)",
        "q = Mul(u, u); k = Mul(q, cubic); s = Add(one, k); v = Mul(u, tau); r = Mul(s, v); t = Tanh(r);"
        "f = Add(one, t); g = Mul(f, u); a = Mul(half, g)",
    ],
    "silu": ["s = Sigmoid(u); a = Mul(u, s)", "s = Sigmoid(u); a = Mul(s, u)"],
    "quick_gelu": [
        "k = Mul(u, quick); s = Sigmoid(k); a = Mul(u, s)",
        "a = com.microsoft.QuickGelu(u)",
    ],
    "tanh": ["a = Tanh(u)"],
    "sigmoid": ["a = Sigmoid(u)"],
    "leaky_relu": ["a = LeakyRelu(u)"],
    "leaky_relu(0.2)": ["a = LeakyRelu <alpha = 0.2> (u)"],
    "elu": ["a = Elu(u)"],
    "elu(0.5)": ["a = Elu <alpha = 0.5> (u)"],
    "selu": ["a = Selu(u)"],
    "hardswish": ["a = HardSwish(u)"],
    "softplus": ["a = Softplus(u)", "e = Exp(u); s = Add(e, one); a = Log(s)"],
    "softsign": ["a = Softsign(u)"],
    "mish": ["a = Mish(u)", "s = Softplus(u); t = Tanh(s); a = Mul(u, t)"],
    "relu_squared": ["r = Relu(u); a = Pow(r, two)", "r = Relu(u); a = Mul(r, r)"],
}


@pytest.mark.parametrize(
    ("name", "body"), [(name, body) for name, bodies in ACTIVATIONS.items() for body in bodies], ids=str
)
def test_each_spelling_of_each_activation(name: str, body: str) -> None:
    graph = model(body)
    assert check(graph, sample()) == {"linear": 2, "softmax": 0, "norm": 0, "mlp": 1}
    (site,) = find(graph, "mlp").sites
    assert site.activation == name
    assert (site.up.in_features, site.up.out_features, site.down.out_features) == (D, H, OUT)
    # A pass replaces the activation nodes: they read u alone and their last node is all that is read of them.
    assert {n.meta.get("onnx_name") for n in site.activation_nodes} == {
        s.split("=")[0].strip() for s in body.split(";")
    }


def test_swish_is_recognised_as_an_operator() -> None:
    graph = model("a = Swish <alpha = 1.5> (u)", opset=24)
    check(graph, sample())
    assert [site.activation for site in find(graph, "mlp").sites] == ["swish(1.5)"]


@pytest.mark.parametrize("operator", ["BiasGelu", "FastGelu"])
def test_a_bias_in_the_activation_is_the_bias_of_the_first_layer(operator: str) -> None:
    graph = model(f"a = com.microsoft.{operator}(u0, b)")
    check(graph, sample())
    (site,) = find(graph, "mlp").sites
    assert name_of(site.up.bias) == "b"
    assert site.activation == ("gelu" if operator == "BiasGelu" else "gelu_tanh")


def test_casts_dropout_and_identities_are_seen_through() -> None:
    graph = model(
        "i = Identity(u); j = Cast <to = 10> (i); k = Cast <to = 1> (j); a0 = Relu(k); a1, m = Dropout(a0);"
        "a = Identity(a1)"
    )
    (site,) = find(graph, "mlp").sites
    assert [name_of(n) for n in site.activation_nodes] == ["a0"]
    well_formed(graph, (site,))


def test_two_layers_around_flattened_values() -> None:
    graph = model(
        "r = Reshape(x, flat); g = Gemm(r, W, b); s = Shape(x); p = Slice(s, first, last);"
        "l = Concat <axis = 0> (p, width); u1 = Reshape(g, l); a0 = Relu(u1); s2 = Shape(a0);"
        "f = Reshape(a0, flat2); g2 = Gemm(f, V, c); p2 = Slice(s2, first, last);"
        "l2 = Concat <axis = 0> (p2, width2); y = Reshape(g2, l2)",
        **{
            "  u0 = MatMul(x, W)\n  u = Add(u0, b)\n": "",
            "  d0 = MatMul(a, V)\n  y = Add(c, d0)\n": "",
            "float half": "int64[2] flat = {-1, 4}, int64[2] flat2 = {-1, 8}, int64[1] first = {0}, "
            "int64[1] last = {2}, int64[1] width = {8}, int64[1] width2 = {3}, float half",
        },
    )
    assert check(graph, sample()) == {"linear": 2, "softmax": 0, "norm": 0, "mlp": 1}
    (site,) = find(graph, "mlp").sites
    # Exporters read the sizes of intermediate values: that arithmetic is part of the region, x is not flattened.
    assert [name_of(n) for n in site.inputs] == ["x"]
    assert {"s2", "p2", "l2", "y"} <= {name_of(n) for n in site.nodes}


@pytest.mark.parametrize("body", ["s = Sigmoid(g); t = Mul(g, s); a = Mul(t, u)", "t = Relu(g); a = Mul(u, t)"])
def test_gated(body: str) -> None:
    graph = model(f"g = MatMul(x, G); {body}")
    assert check(graph, sample())["mlp"] == 1
    (site,) = find(graph, "mlp").sites
    assert site.activation == ("silu" if "Sigmoid" in body else "relu")
    assert (name_of(site.gate.weight), name_of(site.up.weight)) == ("G", "W")
    assert all(name_of(n) != "a" for n in site.activation_nodes)


REFUSED = {
    "its activation is unknown: sin": "a = Sin(u)",
    "its activation is unknown: prelu in 'a' has a constant per channel": "a = PRelu(u, slope)",
    "its activation is unknown: mul in 'a' has a constant per channel": "r = Relu(u); a = Mul(r, slope)",
    "its activation is unknown: exp": "a = Exp(u)",
    "its first layer has a bias, and bias_gelu in 'a' adds another one": "a = com.microsoft.BiasGelu(u, b)",
    "its intermediate value 'a' is used by 'more' too": "a = Relu(u); more = Neg(a); z = ReduceSum(more)",
    "its intermediate value 'u' is an output of the model": "a = Relu(u); z = Identity(zero)",
    "both of the factors that it multiplies have an activation": "g = MatMul(x, G); h = Tanh(g); s = Sigmoid(u);"
    "a = Mul(h, s)",
    "it multiplies two linear layers without an activation": "g = MatMul(x, G); a = Mul(u, g)",
    "gate and up read different values": "n = Neg(x); g = MatMul(n, G); s = Relu(g); a = Mul(s, u)",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_near_misses(reason: str) -> None:
    body = REFUSED[reason]
    changes = {}
    if "z =" in body:
        output = "u" if "'u'" in reason else "z"
        changes["(float[B,T,3] y)"] = f"(float[B,T,3] y, float {output})"
    graph = model(body, **changes)
    findings = find(graph, "mlp")
    assert findings.sites == ()
    assert [r.reason for r in findings.refusals if reason in r.reason], findings.refusals


def test_a_projection_that_is_cut_in_two_is_refused() -> None:
    body = "p, q = Split <axis = -1, num_outputs = 2> (u); s = Sigmoid(p); t = Mul(p, s); a = Mul(t, q)"
    graph = model(body, **{"float[8,3] V": "float[4,3] V"})
    (refusal,) = find(graph, "mlp").refusals
    assert "gate and up are one projection" in refusal.reason


@pytest.mark.parametrize("body", ["a = Identity(u)", "a = Mul(u, half)", "a = Softmax(u)", "a = Add(u, u)"])
def test_what_is_no_candidate(body: str) -> None:
    findings = find(model(body), "mlp")
    assert (findings.sites, findings.refusals) == ((), ())


def test_sites_do_not_overlap() -> None:
    layers = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(D, D), nn.Tanh())), nn.Linear(D, D))
    graph = graphopt.load(layers, (torch.randn(2, D),))
    findings = find(graph, "mlp")
    assert len(findings.sites) == 2
    assert not set(findings.sites[0].nodes) & set(findings.sites[1].nodes)
    assert [r.reason for r in findings.refusals] == [
        f"its first layer belongs to the MLP {findings.sites[0].name!r} already"
    ]


class Gated(nn.Module):
    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.act = act
        self.gate, self.up, self.down = nn.Linear(D, H), nn.Linear(D, H, bias=False), nn.Linear(H, D)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(self.dropout(self.act(self.gate(x)) * self.up(x))))


@pytest.mark.parametrize(
    "name",
    [
        "relu",
        "gelu",
        "gelu_tanh",
        "silu",
        "quick_gelu",
        "leaky_relu",
        "elu",
        "selu",
        "hardswish",
        "softplus",
        "mish",
        "relu6",
        "tanh",
        "sigmoid",
        "hardsigmoid",
    ],
)
def test_modules(name: str) -> None:
    graph = graphopt.load(Gated(activation(name)).eval(), (torch.randn(2, 5, D),), ({0: "batch", 1: "length"},))
    assert check(graph, [torch.randn(3, 4, D)]) == {"linear": 3, "softmax": 0, "norm": 0, "mlp": 1}
    (site,) = find(graph, "mlp").sites
    assert (site.activation, site.gate.weight.target, site.up.bias) == (name, "gate.weight", None)


def test_dropout_that_drops_is_no_identity() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = graphopt.load(Gated(torch.relu).train(), (torch.randn(2, D),))
    assert find(graph, "mlp").sites == ()


# Models of transformers, as modules and as torch.onnx.export writes them.

TINY = {"vocab_size": 60, "attn_implementation": "eager"}
EXPECTED = {
    "bert": {"linear": 6, "softmax": 1, "norm": 3, "mlp": 1},
    "gpt2": {"linear": 4, "softmax": 1, "norm": 3, "mlp": 1},
    "llama": {"linear": 8, "softmax": 1, "norm": 3, "mlp": 1},
    "vit": {"linear": 7, "softmax": 1, "norm": 3, "mlp": 1},
}
MEANT = {"bert": ("gelu", "layer"), "gpt2": ("gelu_tanh", "layer"), "llama": ("silu", "rms"), "vit": ("gelu", "layer")}


class First(nn.Module):
    """A transformers model from one tensor to one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.inner(x)
        return result.logits if hasattr(result, "logits") else result.last_hidden_state


def tiny(name: str) -> tuple[nn.Module, torch.Tensor]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (2, 7))
    common = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    if name == "bert":
        config = transformers.BertConfig(**TINY, **common, max_position_embeddings=20)
        return First(transformers.BertModel(config, add_pooling_layer=False)).eval(), ids
    if name == "gpt2":
        config = transformers.GPT2Config(**TINY, n_embd=16, n_layer=1, n_head=2, n_positions=20, use_cache=False)
        return First(transformers.GPT2Model(config)).eval(), ids
    if name == "llama":
        config = transformers.LlamaConfig(**TINY, **common, max_position_embeddings=20, use_cache=False)
        return First(transformers.LlamaForCausalLM(config)).eval(), ids
    config = transformers.ViTConfig(**common, attn_implementation="eager", image_size=8, patch_size=4, num_labels=3)
    return First(transformers.ViTForImageClassification(config)).eval(), torch.randn(2, 3, 8, 8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], tuple[graphopt.Graph, torch.Tensor]]:
    def export(name: str, dynamo: bool) -> tuple[graphopt.Graph, torch.Tensor]:
        module, x = tiny(name)
        path = tmp_path_factory.mktemp("exported") / f"{name}.onnx"
        axes = {0: "batch", 1: "length"} if x.ndim == 2 else {0: "batch"}
        shapes: dict[str, Any] = {"dynamic_shapes": {"x": axes}} if dynamo else {"dynamic_axes": {"x": axes}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(module, (x,), str(path), input_names=["x"], dynamo=dynamo, verbose=False, **shapes)
        return graphopt.load(path), x

    return export


def as_expected(graph: graphopt.Graph, x: torch.Tensor, name: str) -> None:
    assert check(graph, [x]) == EXPECTED[name]
    (mlp,) = find(graph, "mlp").sites
    act, form = MEANT[name]
    assert (mlp.activation, mlp.gate is not None) == (act, name == "llama")
    assert {site.form for site in find(graph, "norm").sites} == {form}
    assert [site.role for site in find(graph, "softmax").sites] == ["attention"]
    assert len(find(graph, "mlp").refusals) == 0


@pytest.mark.parametrize("name", EXPECTED)
def test_transformers_modules(name: str) -> None:
    module, x = tiny(name)
    as_expected(graphopt.load(module, (x,)), x, name)


@pytest.mark.parametrize(
    ("name", "dynamo"), [("bert", False), ("vit", False), ("bert", True), ("gpt2", True), ("llama", True)]
)
def test_transformers_exported(exported: Any, name: str, dynamo: bool) -> None:
    as_expected(*exported(name, dynamo), name)


# Models from public repositories.

# What is found in those that hold anything: linear, softmax, norm, mlp.
ZOO = {
    "zoo/DTLN__model_1.onnx": (1, 0, 0, 0),
    "zoo/burn__large_constants.onnx": (1, 0, 0, 0),
    "zoo/godot_rl_agents_examples__JumperHard.onnx": (3, 0, 0, 1),
    "zoo/godot_rl_agents_examples__model_b.onnx": (3, 0, 0, 1),
    "zoo/godot_rl_agents_examples__model_b_b.onnx": (4, 0, 0, 1),
    "zoo/gtcrn__gtcrn_simple.onnx": (12, 0, 0, 0),
    "zoo/libonnx__light_bvlc_alexnet.onnx": (0, 1, 0, 0),
    "zoo/libonnx__light_inception_v2.onnx": (0, 1, 0, 0),
    "zoo/libonnx__light_resnet50.onnx": (0, 1, 0, 0),
    "zoo/libonnx__light_squeezenet.onnx": (0, 1, 0, 0),
    "zoo/libonnx__light_zfnet512.onnx": (0, 1, 0, 0),
    "zoo/magika__model.onnx": (2, 1, 0, 0),
    "zoo/onnx2c__lesson14.onnx": (4, 1, 0, 2),
    "zoo/onnx2c__lesson9.onnx": (2, 0, 0, 1),
    "zoo/onnxruntime-extensions__FastestDet.onnx": (0, 1, 0, 0),
    "zoo/onnxruntime-genai__decoder.onnx": (13, 0, 2, 2),
    "zoo/onnxruntime-genai__decoder_b.onnx": (1, 0, 0, 0),
    "zoo/onnxruntime-genai__dummy_text.onnx": (1, 0, 0, 0),
    "zoo/onnxruntime-genai__dummy_text_b.onnx": (1, 0, 0, 0),
    "zoo/onnxruntime-genai__past_b.onnx": (16, 0, 0, 5),
    "zoo/onnxruntime-genai__transformer.onnx": (4, 1, 0, 0),
    "zoo/onnxruntime-inference-examples__mnist_original.onnx": (2, 0, 0, 1),
    "zoo/onnxruntime-qnn__TFBertForSequenceClassification_1.onnx": (74, 12, 25, 13),
    "zoo/onnxruntime-qnn__attention_int32_mask.onnx": (4, 1, 1, 0),
    "zoo/onnxruntime-qnn__attention_mask_no_cast.onnx": (4, 1, 1, 0),
    "zoo/onnxruntime-qnn__attention_mha.onnx": (4, 0, 1, 0),
    "zoo/onnxruntime-qnn__attention_opt.onnx": (1, 0, 1, 0),
    "zoo/onnxruntime-qnn__attention_past_state.onnx": (0, 1, 0, 0),
    "zoo/onnxruntime-qnn__attention_past_state.u8u8.onnx": (0, 1, 0, 0),
    "zoo/onnxruntime-qnn__attention_symbolic_batch.onnx": (4, 1, 1, 0),
    "zoo/onnxruntime-qnn__bert_toy_optimized.onnx": (34, 5, 12, 6),
    "zoo/onnxruntime-qnn__decoder_with_past_self_mha_fused.onnx": (2, 0, 0, 0),
    "zoo/onnxruntime-qnn__decoder_with_past_self_mha_split_bias_fused.onnx": (2, 0, 0, 0),
    "zoo/onnxruntime-qnn__gpt2_attention_opt_no_skiplayernorm.onnx": (1, 0, 2, 0),
    "zoo/onnxruntime-qnn__gpt2_embedlayer_one_attn_exp.onnx": (1, 0, 0, 0),
    "zoo/onnxruntime-qnn__hf_fp16_decoder_attention_with_past.onnx": (8, 0, 1, 1),
    "zoo/onnxruntime-qnn__hf_fp16_decoder_attention_with_past_split_bias.onnx": (8, 0, 1, 1),
    "zoo/onnxruntime-qnn__hf_fp16_encoder_self_attention.onnx": (3, 0, 1, 1),
    "zoo/onnxruntime-qnn__hf_fp32_decoder_attention_with_past.onnx": (8, 0, 1, 1),
    "zoo/onnxruntime-qnn__hf_fp32_decoder_attention_with_past_split_bias.onnx": (8, 0, 1, 1),
    "zoo/onnxruntime-qnn__hf_fp32_encoder_self_attention.onnx": (3, 0, 1, 1),
    "zoo/onnxruntime-qnn__layer_norm_shared_input.onnx": (0, 0, 2, 0),
    "zoo/onnxruntime-qnn__oai_fp16_decoder_attention_no_past.onnx": (7, 0, 1, 1),
    "zoo/onnxruntime-qnn__oai_fp16_decoder_attention_no_past_split_bias.onnx": (7, 0, 1, 1),
    "zoo/onnxruntime-qnn__oai_fp16_decoder_attention_with_past.onnx": (8, 0, 1, 1),
    "zoo/onnxruntime-qnn__oai_fp16_decoder_attention_with_past_split_bias.onnx": (8, 0, 1, 1),
    "zoo/onnxruntime-qnn__oai_fp32_decoder_attention_no_past.onnx": (7, 0, 1, 1),
    "zoo/onnxruntime-qnn__oai_fp32_decoder_attention_no_past_split_bias.onnx": (7, 0, 1, 1),
    "zoo/onnxruntime-qnn__oai_fp32_decoder_attention_with_past.onnx": (8, 0, 1, 1),
    "zoo/onnxruntime-qnn__oai_fp32_decoder_attention_with_past_split_bias.onnx": (8, 0, 1, 1),
    "zoo/onnxruntime-qnn__pruned_attention_opt.onnx": (1, 0, 1, 0),
    "zoo/onnxruntime-qnn__skip_layer_norm_format1.onnx": (0, 0, 1, 0),
    "zoo/onnxruntime-qnn__skip_layer_norm_format1_graph_output_with_cast.onnx": (0, 0, 1, 0),
    "zoo/onnxruntime-qnn__skip_layer_norm_format1_partial.onnx": (0, 0, 1, 0),
    "zoo/onnxruntime-qnn__skip_layer_norm_format1_partial_with_cast.onnx": (0, 0, 1, 0),
    "zoo/onnxruntime-qnn__skip_layer_norm_format2_graph_output_with_cast.onnx": (0, 0, 1, 0),
    "zoo/onnxruntime-qnn__skip_layer_norm_format2_partial_with_cast.onnx": (0, 0, 1, 0),
    "zoo/onnxruntime-qnn__skip_layer_norm_format3_graph_output.onnx": (0, 0, 1, 0),
    "zoo/onnxruntime-qnn__skip_layer_norm_format3_graph_output_with_cast.onnx": (0, 0, 1, 0),
    "zoo/onnxruntime-qnn__skip_layer_norm_input_output_check.onnx": (1, 0, 1, 0),
    "zoo/onnxruntime-qnn__skip_layer_norm_input_output_with_cast_check.onnx": (1, 0, 1, 0),
    "zoo/onnxruntime-qnn__squeezenet_tensor_input.onnx": (1, 0, 0, 0),
    "zoo/optimum__model.onnx": (14, 2, 5, 3),
    "zoo/sample-apps__pairwise_ranker.onnx": (3, 0, 0, 0),
    "zoo/sample-apps__transformer.onnx": (8, 2, 4, 2),
    "zoo/voicevox_core__predict_spectrogram.onnx": (12, 2, 11, 0),
    "zoo_extra/bert_squad_fp16_ort_cpu.onnx": (73, 12, 25, 12),
    "zoo_extra/burn_mnist_cnn.onnx": (2, 0, 0, 1),
    "zoo_extra/dnsmos_p808_model_v8.onnx": (3, 0, 0, 1),
    "zoo_extra/hf_gpt2_nopast_12l.onnx": (48, 12, 25, 12),
    "zoo_extra/mujoco_apollo_policy.onnx": (4, 0, 0, 2),
    "zoo_extra/olive_ocr_crnn.onnx": (1, 1, 0, 0),
    "zoo_extra/ort_lstm_loops.onnx": (1, 0, 0, 0),
    "zoo_extra/silero_vad_v2_mini.onnx": (16, 4, 8, 4),
    "zoo_extra/tiny_random_llama_fp16/model.onnx": (15, 0, 2, 2),
    "zoo_extra/tribuo_tinybert.onnx": (7, 1, 3, 1),
}
# Its batch normalisation has one channel and five statistics.
NOT_RUNNABLE = {"zoo/onnxruntime-qnn__fuse-matmul-bn-only-reshape.onnx"}


def feeds(path: Path) -> dict[str, np.ndarray]:
    index = next(folder for folder in path.parents if (folder / "index.json").exists())
    entries = json.loads((index / "index.json").read_text())
    entry = next(e for e in entries if e["file"] == str(path.relative_to(index)))
    generator = np.random.default_rng(entry["seed"])
    found = {}
    for spec in entry["inputs"]:
        if spec["range"] == "normal":
            found[spec["name"]] = generator.standard_normal(spec["shape"]).astype(spec["dtype"])
        else:
            found[spec["name"]] = generator.integers(*spec["range"], size=spec["shape"]).astype(spec["dtype"])
    return found


@pytest.fixture
def observed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four finders on one graph: observe its shapes once."""
    known: dict[int, Any] = {}

    def remembered(graph: graphopt.Graph) -> Any:
        if id(graph) not in known:
            known[id(graph)] = shapes_of(graph)
        return known[id(graph)]

    monkeypatch.setattr(regions, "shapes_of", remembered)


@pytest.mark.usefixtures("observed_once")
@pytest.mark.parametrize("file", ZOO)
def test_real_models(shared_data: Path, file: str) -> None:
    path = shared_data / file
    graph = graphopt.load(path)
    found = check(graph, [from_numpy(v) for v in graph.ordered(feeds(path))])
    assert tuple(found.values()) == ZOO[file]


def test_real_models_without_any_site(shared_data: Path) -> None:
    others = {str(p.relative_to(shared_data)) for p in shared_data.glob("zoo*/**/*.onnx")} - ZOO.keys() - NOT_RUNNABLE
    assert len(others) > 30
    for file in sorted(others):
        graph = graphopt.load(shared_data / file)
        assert [site for kind in KINDS for site in find(graph, kind).sites] == [], file
