"""`softplus` and `stablemax`: what they compute, saved and run by onnxruntime; what they leave alone, and why."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import graphopt
import graphopt.ops
from graphopt.backends.onnxruntime import Session
from graphopt.decoders import generate, logits
from graphopt.errors import GraphOptError

# Tests are imported by path: this folder is no package.
_spec = importlib.util.spec_from_file_location("attention_models", Path(__file__).with_name("attention_models.py"))
models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models)

# fp32 sums in another order, to the power of 15 and through two layers, on logits of size 10.
CLOSE = {"rtol": 1e-3, "atol": 2e-3}


def calibration(graph, texts):
    return [{graph.inputs[0].name: texts[i : i + 2]} for i in (0, 2)]


def feeds(length, seed=1, batch=2):
    x, mask = models.example(batch, length, seed=seed)
    return {"x": x.numpy(), "mask": mask.numpy()}


def dense(module, x, mask, power):
    """The block with softplus attention of whole matrices in fp64; padding and later keys are left out of each row."""
    module, x = module.double(), x.double()
    heads = []
    for p, n in ((module.q, module.heads), (module.k, module.kv_heads), (module.v, module.kv_heads)):
        heads.append(p(x).view(*x.shape[:2], n, module.dim).transpose(1, 2).repeat_interleave(module.heads // n, 1))
    q, k, v = heads
    visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).expand(len(x), 1, -1, -1)
    if module.kind in ("causal", "both"):
        visible = visible.tril()
    if module.kind != "causal":
        visible = visible & mask[:, None, None, :].bool()
    N = visible.sum(-1, keepdim=True)
    cosines = (q @ k.transpose(-1, -2)) / (q.norm(dim=-1)[..., None] * k.norm(dim=-1)[..., None, :])
    A = torch.log1p(torch.exp(math.log(module.dim) * N.log() * cosines)) * visible
    A = A / A.sum(-1, keepdim=True)
    if power:
        A = torch.relu(N * A - (N > 3).double()) ** power
        A = A / A.sum(-1, keepdim=True)
    out = module.o((A @ v).transpose(1, 2).flatten(-2))
    return out * mask[..., None] if module.kind == "causal" else out


@pytest.mark.parametrize("power", [0, 3])
@pytest.mark.parametrize("target", ["onnx", "onnxruntime"])
@pytest.mark.parametrize(
    "kind", ["bidirectional", "expanded", "causal", "both", "grouped both", "grouped bidirectional"]
)
def test_against_dense_attention(kind, power, target, tmp_path):
    module = models.Block(kind.split()[-1], kv_heads=2 if "grouped" in kind else 4)
    models.export(module, tmp_path / "m.onnx", opset=13)
    result = graphopt.load(tmp_path / "m.onnx").apply(f"softplus{{reweight={power}}}", calibration=[feeds(12)])
    (site,) = result.report.passes[0].sites
    assert site.status == "rewritten"
    result.graph.save(tmp_path / "out.onnx", target=target)
    session = Session(tmp_path / "out.onnx")
    for length in (1, 2, 9, 80):
        x, mask = models.example(2, length)
        # A sequence without any token sees nothing, which the dense form does not define.
        mask[:, 0] = 1
        expected = dense(module, x, mask, power).detach().numpy()
        values = {"x": x.numpy(), "mask": mask.numpy()}
        # fp32 against fp64.
        np.testing.assert_allclose(result.graph.run(values)["y"], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(session.run(values)["y"], expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module", params=[0, 15])
def student(request, with_cache, texts):
    graph = with_cache(4, 2)
    result = graph.apply(f"softplus{{reweight={request.param},train=none}}", calibration=calibration(graph, texts))
    assert [s.status for s in result.report.passes[0].sites] == ["rewritten"] * 2
    return result.graph


@pytest.mark.parametrize("split", [1, 4, 30, 44])
def test_prefill_and_decoding_agree(student, texts, split):
    np.testing.assert_allclose(logits(student, texts, split=split), logits(student, texts), **CLOSE)


@pytest.mark.parametrize("target", ["onnx", "onnxruntime"])
def test_on_onnxruntime(student, texts, target, tmp_path):
    student.save(tmp_path / "m.onnx", target=target)
    before, after = student.onnx.proto.graph, onnx.load(tmp_path / "m.onnx")
    assert after.graph.input == before.input
    assert after.graph.output == before.output
    onnx.checker.check_model(after, full_check=True)
    assert any(f.name.startswith("SoftplusAttention") for f in after.functions)
    expected = logits(student, texts)
    for split in (None, 1, 20):
        np.testing.assert_allclose(logits(tmp_path / "m.onnx", texts, split=split), expected, **CLOSE)
    expected = generate(student, texts[:2, :5], new_tokens=8)
    np.testing.assert_array_equal(generate(tmp_path / "m.onnx", texts[:2, :5], new_tokens=8), expected)


@pytest.mark.parametrize("padding", [1, 13])
def test_padding_on_the_left_changes_nothing(student, texts, padding):
    junk = np.full((len(texts), padding), 7)
    mask = np.concatenate([np.zeros_like(junk), np.ones_like(texts)], 1)
    padded = np.concatenate([junk, texts], 1)
    for split in (None, padding + 3):
        found = logits(student, padded, split=split, mask=mask)[:, padding:]
        np.testing.assert_allclose(found, logits(student, texts), **CLOSE)


def test_what_follows_changes_nothing(student, texts):
    for length in (1, 3, 29):
        np.testing.assert_allclose(logits(student, texts[:, :length]), logits(student, texts)[:, :length], **CLOSE)


def test_with_and_without_a_cache_are_the_same_model(with_cache, without_cache, texts):
    found = []
    for graph in (with_cache(4, 2), without_cache(4, 2)):
        new = graph.apply("softplus{reweight=3,train=none}", calibration=calibration(graph, texts)).graph
        found.append(logits(new, texts))
    np.testing.assert_allclose(*found, **CLOSE)


@pytest.mark.parametrize("objective", ["teacher", "text"])
def test_training_lowers_the_loss(with_cache, texts, objective):
    graph = with_cache(4, 2)
    options = f"lora_steps=40,lora_rate=0.01,lora_targets=all,objective={objective}"
    before, after = (
        graph.apply(f"softplus{{{options},train={train}}}", calibration=calibration(graph, texts)).graph
        for train in ("none", "full")
    )

    def loss(student):
        scores = torch.log_softmax(torch.from_numpy(logits(student, texts[:4])), -1)
        if objective == "text":
            return -scores[:, :-1].gather(-1, torch.from_numpy(texts[:4, 1:, None])).mean()
        wanted = torch.log_softmax(torch.from_numpy(logits(graph, texts[:4])), -1)
        return (wanted.exp() * (wanted - scores)).sum(-1).mean()

    assert loss(after) < 0.9 * loss(before)
    np.testing.assert_allclose(logits(after, texts, split=20), logits(after, texts), **CLOSE)


def test_layers_that_stay(with_cache, texts):
    graph = with_cache(4, 2)
    for options in ("layers=1:", "keep_every=2"):
        result = graph.apply(f"softplus{{train=none,{options}}}", calibration=calibration(graph, texts))
        sites = result.report.passes[0].sites
        assert sorted(s.status for s in sites) == ["refused", "rewritten"]
        assert any("left as it is by layers=" in s.reason for s in sites)
        np.testing.assert_allclose(logits(result.graph, texts, split=20), logits(result.graph, texts), **CLOSE)


def test_position_bias_is_refused(tmp_path):
    models.export(models.Block("alibi"), tmp_path / "m.onnx")
    result = graphopt.load(tmp_path / "m.onnx").apply("softplus", calibration=[feeds(9)])
    (site,) = result.report.passes[0].sites
    assert site.status == "refused"
    assert "finite biases" in site.reason


ATTENTION = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[B,2,T,4] q, float[B,2,T,4] k, float[B,2,T,4] v) => (float[B,2,T,4] y{extra})
<float five = {{5.0}}, float half = {{0.5}}, int64 one = {{1}}, int64 zero = {{0}}, int64 two = {{2}},
 float low = {{-1e9}}, float nothing = {{0.0}}, int64 window = {{4}}, int64[1] ends = {{1}}>
{{
  t = Transpose <perm = [0, 1, 3, 2]> (k)
  raw = MatMul(q, t)
  s = Mul(raw, half)
  {body}
  p = Softmax(m)
  y = MatMul(p, v)
}}
"""
CAPPED = "d = Div(s, five)\n  h = Tanh(d)\n  m = Mul(h, five)"
SLIDING = """shape = Shape(q)
  n = Gather(shape, two)
  at = Range(zero, n, one)
  row = Unsqueeze(at, zero)
  column = Unsqueeze(at, ends)
  apart = Sub(column, row)
  late = Less(apart, window)
  early = Less(apart, zero)
  past = Not(early)
  seen = And(late, past)
  mask = Where(seen, nothing, low)
  m = Add(s, mask)"""


@pytest.mark.parametrize(
    ("body", "extra", "reason"),
    [
        (CAPPED, "", "its scores are capped at 5"),
        (SLIDING, "", "only a sliding window"),
        ("m = Identity(s)", ", float[B,2,T,T] p", "its scores or weights are used outside"),
    ],
    ids=["softcap", "sliding window", "weights exposed"],
)
def test_refusals(body, extra, reason, tmp_path):
    onnx.save(onnx.parser.parse_model(ATTENTION.format(body=body, extra=extra)), tmp_path / "m.onnx")
    graph = graphopt.load(tmp_path / "m.onnx")
    data = [{n: np.random.default_rng(0).standard_normal((2, 2, 9, 4)).astype(np.float32) for n in "qkv"}]
    (site,) = graph.apply("softplus", calibration=data).report.passes[0].sites
    assert site.status == "refused"
    assert reason in site.reason


FUSED = """
<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
g (float[B,T,16] q, float[B,T,16] k, float[B,T,16] v, float[B,2,P,8] past_k, float[B,2,P,8] past_v)
=> (float[B,T,16] y, float[B,2,S,8] present_k, float[B,2,S,8] present_v)
{
  y, present_k, present_v = com.microsoft.MultiHeadAttention <num_heads = 2, unidirectional = 1>
    (q, k, v, , , , past_k, past_v)
}
"""


def test_an_operator_that_writes_its_cache(tmp_path):
    """It stays for the sake of the cache, and the report says so; what it attended to is counted on from the past."""
    onnx.save(onnx.parser.parse_model(FUSED), tmp_path / "m.onnx")
    rng = np.random.default_rng(0)

    def values(T, P):
        shapes = [(2, T, 16)] * 3 + [(2, 2, P, 8)] * 2
        names = ["q", "k", "v", "past_k", "past_v"]
        return {n: rng.standard_normal(s, np.float32) for n, s in zip(names, shapes, strict=True)}

    result = graphopt.load(tmp_path / "m.onnx").apply("softplus{reweight=3}", calibration=[values(5, 3)])
    assert [s.status for s in result.report.passes[0].sites] == ["rewritten"]
    assert any("stay beside their replacements" in note for note in result.report.passes[0].notes)
    result.graph.save(tmp_path / "out.onnx", target="onnxruntime")
    session = Session(tmp_path / "out.onnx")
    for T, P in ((1, 7), (6, 2)):
        given = values(T, P)
        found = session.run(given)
        np.testing.assert_array_equal(found["present_k"][:, :, :P], given["past_k"])
        q = torch.from_numpy(given["q"]).view(2, T, 2, 8).transpose(1, 2)
        k, v = (torch.from_numpy(found[n]) for n in ("present_k", "present_v"))
        expected = graphopt.ops.softplus_attention(q, k, v, None, 3).transpose(1, 2).flatten(2)
        np.testing.assert_allclose(found["y"], expected.numpy(), rtol=1e-4, atol=1e-5)


def test_from_a_module():
    module = models.Block("both").eval()
    x, mask = models.example()
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq")}
    options = {"dynamic_shapes": {"x": dims, "mask": dims}, "calibration": [feeds(12)]}
    new = graphopt.transform(module, "softplus{reweight=3}", example_inputs=(x, mask), **options)
    assert set(module.state_dict()) == set(new.state_dict())
    x, mask = models.example(length=31, seed=5)
    new(x, mask).square().mean().backward()
    assert new.q.weight.grad.abs().max() > 0
    expected = dense(models.Block("both"), x, mask, 3).float()
    torch.testing.assert_close(new(x, mask), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("layers=x", "expected layers to be a slice such as 2: or :-1, got 'x'"),
        ("reweight=-1", "expected reweight to be at least 0, got -1"),
        ("lora_rank=0", "expected lora_rank to be above 0, got 0"),
        ("lora_steps=-1", "expected lora_steps to be at least 0, got -1"),
        ("train=transfer", "expected train to be full|none"),
        ("window=3", "has no option 'window'"),
    ],
)
def test_wrong_options(with_cache, options, message):
    with pytest.raises(GraphOptError, match=message.replace("|", r"\|")):
        with_cache(4, 2).apply(f"softplus{{{options}}}")


CLASSES = """
<ir_version: 8, opset_import: ["" : 13]>
g (float[B,T,6] x, float[B,T,T] s) => (float[B,T,6] y, float[B,T,6] z, float[B,T] r)
{
  y = Softmax(x)
  w = Softmax(s)
  z = MatMul(w, x)
  o = Softmax <axis = 1> (x)
  i = Constant <value_ints = [2]> ()
  r = ReduceSum <keepdims = 0> (o, i)
}
"""


def test_stablemax_takes_classifiers_alone(tmp_path):
    onnx.save(onnx.parser.parse_model(CLASSES), tmp_path / "m.onnx")
    rng = np.random.default_rng(0)
    data = [
        {"x": (4 * rng.standard_normal((3, 5, 6))).astype(np.float32), "s": rng.standard_normal((3, 5, 5), np.float32)}
        for _ in range(3)
    ]
    result = graphopt.load(tmp_path / "m.onnx").apply("stablemax", calibration=data)
    sites = {s.status: s for s in result.report.passes[0].sites}
    assert [s.status for s in result.report.passes[0].sites].count("refused") == 2
    assert all("stablemax is for the classes" in s.reason for s in result.report.passes[0].sites if s.status[2] == "f")
    assert sites["rewritten"].reason == "the largest class is the same in all 45 rows of the calibration data"
    for target in ("onnx", "onnxruntime"):
        result.graph.save(tmp_path / "out.onnx", target=target)
        onnx.checker.check_model(onnx.load(tmp_path / "out.onnx"))
        found, original = Session(tmp_path / "out.onnx").run(data[0]), Session(tmp_path / "m.onnx").run(data[0])
        x = data[0]["x"].astype(np.float64)
        weights = np.where(x >= 0, x + 1, 1 / (1 - np.minimum(x, 0)))
        np.testing.assert_allclose(found["y"], weights / weights.sum(-1, keepdims=True), rtol=1e-6)
        np.testing.assert_array_equal(found["y"].argmax(-1), original["y"].argmax(-1))
        for name in ("z", "r"):
            np.testing.assert_array_equal(found[name], original[name])


def test_stablemax_from_a_module_with_a_type():
    class Classifier(torch.nn.Module):
        def forward(self, x):
            return torch.softmax(x, -1, dtype=torch.float64)

    x = 3 * torch.randn(4, 10)
    new = graphopt.transform(Classifier(), "stablemax", example_inputs=(x,), calibration=[(x,)])
    wide = x.double()
    weights = torch.where(wide >= 0, wide + 1, 1 / (1 - wide.clamp(max=0)))
    torch.testing.assert_close(new(x), weights / weights.sum(-1, keepdim=True), rtol=1e-12, atol=0)
