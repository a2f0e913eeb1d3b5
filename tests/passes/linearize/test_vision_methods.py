"""InLine, SOFT and TransNormer: each against a loop of its equation, fitted, saved, and run by onnxruntime."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

import graphopt
from graphopt.backends.onnxruntime import Session
from graphopt.cli import app
from graphopt.errors import GraphOptError
from graphopt.passes.attention.linearize.inline import InlineAttention
from graphopt.passes.attention.linearize.soft import SoftAttention
from graphopt.passes.attention.linearize.transnormer import BlockAttention, TransNormerAttention
from graphopt.rewrite import parse
from graphopt.sites import find

# Tests are imported by path: the folder above is no package.
_spec = importlib.util.spec_from_file_location("attention_models", Path(__file__).parents[1] / "attention_models.py")
models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models)

HEADS, KV_HEADS, D, DV, SCALE = 4, 2, 3, 5, 0.4


def site(**changes):
    """What the modules ask of a site."""
    given = {"query_heads": HEADS, "kv_heads": KV_HEADS, "head_dim": D, "value_dim": DV, "scale": SCALE}
    return SimpleNamespace(**given | {"name": "s", "causal": False, "past": None, "dtype": torch.float64} | changes)


def operands(T, S=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731  # short
    S = S or T
    return make(2, HEADS, T, D), make(2, KV_HEADS, S, D), make(2, KV_HEADS, S, DV)


def shaken(module, seed=1):
    """In fp64, away from where its parameters start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.double().parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return module


def hidden_keys(S):
    """Two sequences with other lengths, the second one with a key that counts half."""
    weight = torch.ones(2, 1, S, 1, dtype=torch.float64)
    weight[0, :, S - 2 :] = 0
    weight[1, :, :1] = 0
    weight[1, :, 1:2] = 0.5
    return weight


MODULES = {
    "inline": lambda **c: InlineAttention(site(**c)),
    "inline on a grid": lambda **c: InlineAttention(site(**c), grid=2),
    "soft": lambda **c: SoftAttention(site(**c), landmarks=4),
    "transnormer": lambda **c: TransNormerAttention(site(**c)),
    "blocks": lambda **c: BlockAttention(site(**c), block=4),
}


# Equations ------------------------------------------------------------------------------------------------------------


def inline_weights(module, q, k, weight):
    """The weight of each key for each query [B, H, T, S], one number at a time."""
    S = k.shape[2]
    mixed = module.query_map.weight.detach().numpy()
    shift = module.query_map.shift.detach().numpy()
    out = np.zeros((*q.shape[:3], S))
    for b, h, i in np.ndindex(*q.shape[:3]):
        row = SCALE * (q[b, h, i].numpy() + shift[h, 0]) @ mixed[h]
        w = weight[b, 0, :, 0].numpy()
        logits = np.array([row @ k[b, h // 2, j].numpy() for j in range(S)]) / w.sum()
        for j in range(S):
            out[b, h, i, j] = w[j] * (logits[j] + (1 - (w * logits).sum()) / w.sum())
    return torch.from_numpy(out)


@pytest.mark.parametrize("sizes", [(1, 1), (9, 9), (5, 12)], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["all keys", "padded"])
def test_inline(sizes, padded):
    if padded and sizes[1] == 1:
        pytest.skip("no key would be left")
    module, (q, k, v) = shaken(MODULES["inline"]()), operands(*sizes)
    weight = hidden_keys(sizes[1]) if padded else None
    weights = inline_weights(module, q, k, torch.ones_like(k[:, :1, :, :1]) if weight is None else weight)
    # Sums of a few products in fp64; 1e-12 is added to the number of keys.
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=1e-12, atol=1e-12)
    expected = weights @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(module.attend(q, k, v, weight), expected, rtol=1e-10, atol=1e-10)


def test_inline_starts_from_the_first_order_expansion_of_the_softmax():
    """The second-order rest falls with the square of the logits."""
    module, (q, k, v) = MODULES["inline"]().double(), operands(9)
    rests = []
    for size in (1e-2, 1e-3):
        expected = F.scaled_dot_product_attention(size * q, *(x.repeat_interleave(2, 1) for x in (k, v)), scale=SCALE)
        rests.append(float((module.attend(size * q, k, v, None) - expected).abs().max().detach()))
    assert 90 < rests[0] / rests[1] < 110


@pytest.mark.parametrize("extra", [0, 1, 3])
def test_inline_on_a_grid(extra):
    """The convolution is torch's own, over the last 6 x 6 tokens; those before have none."""
    module = shaken(InlineAttention(site(), grid=6))
    plain = InlineAttention(site()).double()
    plain.load_state_dict({n: x for n, x in module.state_dict().items() if n.startswith("query_map")})
    q, k, v = operands(36 + extra)
    mean = v.mean(2, keepdim=True)
    hidden = F.silu((mean + module.hidden.shift) @ module.hidden.weight)
    kernels = ((hidden + module.kernel.shift) @ module.kernel.weight).view(2, KV_HEADS, 3, 3)
    local = torch.zeros(2, KV_HEADS, 36 + extra, DV, dtype=torch.float64)
    for b, h in np.ndindex(2, KV_HEADS):
        image = v[b, h, extra:].T.reshape(1, DV, 6, 6)
        convolved = F.conv2d(image, kernels[b, h].repeat(DV, 1, 1, 1), padding=1, groups=DV)
        local[b, h, extra:] = convolved.reshape(DV, 36).T
    expected = plain.attend(q, k, v, None) + local.repeat_interleave(2, 1)
    torch.testing.assert_close(module.attend(q, k, v, None), expected, rtol=1e-10, atol=1e-10)


def test_inline_grid_starts_without_a_convolution():
    q, k, v = operands(9)
    grid, plain = InlineAttention(site(), grid=3).double(), InlineAttention(site()).double()
    assert torch.equal(grid.attend(q, k, v, None), plain.attend(q, k, v, None))


@pytest.mark.parametrize("padded", [False, True], ids=["all keys", "padded"])
def test_soft(padded):
    """With as many landmarks as keys: the dense kernel, and an inverse by LAPACK."""
    q, k, v = operands(7, 9)
    visible = [list(range(7)), list(range(1, 9))] if padded else [list(range(9))] * 2
    weight = torch.zeros(2, 1, 9, 1, dtype=torch.float64)
    for b in range(2):
        weight[b, 0, visible[b]] = 1
    for b in range(2):
        module = shaken(SoftAttention(site(), landmarks=len(visible[b])))
        found = module.attend(q, k, v, weight if padded else None)
        for h in range(HEADS):
            query, keys = (
                m.factor * ((x + m.shift[i]) @ m.weight[i]).detach()
                for m, x, i in ((module.query_map, q[b, h], h), (module.key_map, k[b, h // 2], h // 2))
            )
            keys, values = keys[visible[b]].numpy(), v[b, h // 2, visible[b]].numpy() / len(visible[b])
            dense = lambda x, y: np.exp(-np.square(x[:, None] - y[None]).sum(-1) / 2)  # noqa: E731  # short
            inverse = np.linalg.inv(dense(keys, keys) + 0.01 * np.eye(len(keys)))
            expected = dense(query.numpy(), keys) @ inverse @ dense(keys, keys) @ values
            expected *= float(module.log_gain[0, h].detach().exp())
            # Newton's iteration has converged to fp64 by its 20th step.
            np.testing.assert_allclose(found[b, h].detach(), expected, rtol=1e-9, atol=1e-9)


def features(module, q, k):
    """1 + elu of both maps, written with exp."""
    out = []
    for m, x in ((module.query_map, q), (module.key_map, k)):
        z = m.factor * ((x + m.shift) @ m.weight)
        out.append(torch.where(z > 0, z + 1, z.clamp(max=0).exp()))
    return out


def normalised(module, sums):
    return sums / (sums.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.gain


@pytest.mark.parametrize("padded", [False, True], ids=["all keys", "padded"])
@pytest.mark.parametrize("causal", [False, True])
def test_transnormer(causal, padded):
    T = 70  # more than a chunk
    module, (q, k, v) = shaken(MODULES["transnormer"](causal=causal)), operands(T)
    weight = hidden_keys(T) if padded else torch.ones(2, 1, T, 1, dtype=torch.float64)
    query, keys = features(module, q, k)
    sums = torch.zeros(2, HEADS, T, DV, dtype=torch.float64)
    for h in range(HEADS):
        state = torch.zeros(2, D, DV, dtype=torch.float64)
        for t in range(T):
            state = state + weight[:, 0, t, :, None] * keys[:, h // 2, t, :, None] * v[:, h // 2, t, None, :]
            sums[:, h, t] = torch.einsum("bk,bkv->bv", query[:, h, t], state)
        if not causal:
            sums[:, h] = torch.einsum("btk,bkv->btv", query[:, h], state)
    found = module.attend(q, k, v, weight if padded else None)
    # fp64 sums in another order, divided by their own size.
    torch.testing.assert_close(found, normalised(module, sums), rtol=1e-8, atol=1e-8)


def test_transnormer_token_by_token():
    """With a cache in front of the keys, each call takes the new tokens alone and a state from the calls before."""

    class Carried(TransNormerAttention):
        state = None

        def sums(self, query, keys, values):
            out, self.state = torch.ops.graphopt.linear_attention(
                query, keys, values, None, None, self.state, "linear", 1.0
            )
            return out

    q, k, v = operands(70)
    weight = hidden_keys(70)
    whole = shaken(TransNormerAttention(site(causal=True)))
    carried = Carried(site(causal=True, past=("k", "v"))).double()
    carried.load_state_dict(whole.state_dict())
    pieces = [(0, 66), (66, 67), (67, 70)]
    found = [carried.attend(q[:, :, a:b], k[:, :, :b], v[:, :, :b], weight[:, :, :b]) for a, b in pieces]
    torch.testing.assert_close(torch.cat(found, 2), whole.attend(q, k, v, weight), rtol=1e-9, atol=1e-9)
    assert carried.state.shape[1:] == whole.state_shape()


@pytest.mark.parametrize("name", ["transnormer", "blocks"])
def test_causal_prefixes(name):
    module, (q, k, v) = shaken(MODULES[name](causal=True)), operands(70)
    whole = module.attend(q, k, v, None)
    for T in (1, 3, 64, 69):
        part = module.attend(*(x[:, :, :T] for x in (q, k, v)), None)
        torch.testing.assert_close(whole[:, :, :T], part, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODULES)
def test_hidden_values_do_not_leak(name):
    """What stands at hidden keys changes nothing, in front and behind."""
    module, (q, k, v) = shaken(MODULES[name]()), operands(9)
    weight = hidden_keys(9)
    found = module.attend(q, k, v, weight)
    empty = weight == 0
    again = module.attend(q, torch.where(empty, 7.0, k), torch.where(empty, -5.0, v), weight)
    torch.testing.assert_close(found, again, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["inline", "soft", "transnormer"])
def test_the_length_of_padding_does_not_matter(name):
    """Also not to where SOFT puts its landmarks."""
    module, (q, k, v) = shaken(MODULES[name]()), operands(9)
    weight = torch.zeros(2, 1, 9, 1, dtype=torch.float64)
    for first, last in ((0, 5), (3, 9)):
        weight[:] = 0
        weight[:, :, first:last] = 1
        shorter = module.attend(q, k[:, :, first:last], v[:, :, first:last], None)
        torch.testing.assert_close(module.attend(q, k, v, weight), shorter, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("causal", [False, True])
def test_gradients(name, causal):
    """Of all parameters and operands."""
    if causal and name in ("inline", "inline on a grid", "soft"):
        pytest.skip("for sites without an order")
    module, (q, k, v) = shaken(MODULES[name](causal=causal)), operands(5)
    names = [n for n, _ in module.named_parameters()]
    values = [p.detach().clone().requires_grad_(True) for p in module.parameters()]
    given = [x[:1].clone().requires_grad_(True) for x in (q, k, v)]
    weight = hidden_keys(5)[1:]

    class Attend(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, q, k, v):
            return self.inner.attend(q, k, v, weight)

    def attend(*tensors):
        parameters = {f"inner.{n}": p for n, p in zip(names, tensors[3:], strict=True)}
        return torch.func.functional_call(Attend(), parameters, tensors[:3])

    assert torch.autograd.gradcheck(attend, [*given, *values], fast_mode=True)


# Whole models ---------------------------------------------------------------------------------------------------------


class TinyViT(torch.nn.Module):
    """Patches of an image, a class token, one encoder layer."""

    def __init__(self, width=32, heads=4, side=4):
        super().__init__()
        torch.manual_seed(0)
        self.heads = heads
        self.patch = torch.nn.Conv2d(3, width, 4, 4)
        self.token = torch.nn.Parameter(torch.randn(1, 1, width))
        self.place = torch.nn.Parameter(0.5 * torch.randn(1, side * side + 1, width))
        self.qkv, self.o = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.head = torch.nn.Linear(width, 5)
        with torch.no_grad():  # logits with a deviation of about 1, as a trained model has
            self.qkv.weight[: 2 * width] *= 2.0

    def forward(self, image):
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.head(x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


def images(count=12):
    generator = torch.Generator().manual_seed(3)
    return [{"image": torch.randn(8, 3, 16, 16, generator=generator).numpy()} for _ in range(count)]


def feeds(length, seed=1, dtype=torch.float32):
    x, mask = models.example(2, length, dtype=dtype, seed=seed)
    return {"x": x.numpy(), "mask": mask.numpy()}


def sentences(dtype=torch.float32):
    return [feeds(20 + i, 10 + i, dtype) for i in range(12)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A vision model as a module, and encoders and a decoder layer of text as files; with calibration data."""
    folder = tmp_path_factory.mktemp("models")
    module, data = TinyViT().eval(), images()
    example = (torch.from_numpy(data[0]["image"]),)
    found = {"vit": (graphopt.load(module, example, {"image": {0: torch.export.Dim("batch")}}), data)}
    for kind in ("bidirectional", "both"):
        block = models.Block(kind, kv_heads=2)
        with torch.no_grad():
            block.q.weight *= 5.0  # logits of about 1
        models.export(block, folder / f"{kind}.onnx")
        found[kind] = (graphopt.load(folder / f"{kind}.onnx"), sentences())
    return found | {"folder": folder}


def sites_of(result):
    return [s for p in result.report.passes for s in p.sites if s.kind == "attention"]


TARGETS = ["onnx", "onnxruntime"]
CASES = [
    # torch's exporter takes seconds, so that each of these is for one target.
    ("vit", "method=inline,grid=4", ["onnx"]),
    ("vit", "method=soft,landmarks=9", ["onnxruntime"]),
    ("vit", "method=transnormer", ["onnx"]),
    ("bidirectional", "method=inline", TARGETS),
    ("bidirectional", "method=soft,landmarks=9", TARGETS),
    ("bidirectional", "method=transnormer", TARGETS),
    ("both", "method=transnormer", TARGETS),
    ("both", "method=transnormer,block_layers=1,window=8", TARGETS),
]


@pytest.mark.parametrize(("source", "options", "targets"), CASES)
def test_fitted_saved_and_run(source, options, targets, sources, tmp_path):
    graph, data = sources[source]
    result = graph.apply(f"linearize{{{options},fit_steps=40,max_error=2}}", calibration=data)
    assert [s.status for s in sites_of(result)] == ["rewritten"]
    errors = sites_of(result)[0].errors
    assert errors["after_fit"] < errors["before_fit"]
    for target in targets:
        result.graph.save(tmp_path / "out.onnx", target=target)
        session = Session(tmp_path / "out.onnx")
        if source == "vit":
            given = [{"image": data[0]["image"][:n]} for n in (1, 5)]
        else:
            given = [feeds(n) for n in (1, 7, 33, 130)]
        for values in given:
            # Two implementations of the same fp32 sums.
            for name, value in session.run(values).items():
                np.testing.assert_allclose(value, result.graph.run(values)[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["inline", "soft,landmarks=5", "transnormer", "transnormer,block_layers=1,window=8"])
def test_half_precision(method, tmp_path):
    models.export(models.Block(kv_heads=2), tmp_path / "m.onnx", torch.float16)
    result = graphopt.load(tmp_path / "m.onnx").apply(
        f"linearize{{method={method},fit_steps=5,max_error=9}}", calibration=sentences(torch.float16)
    )
    assert [s.status for s in sites_of(result)] == ["rewritten"]
    result.graph.save(tmp_path / "out.onnx")
    values = feeds(19, dtype=torch.float16)
    found = Session(tmp_path / "out.onnx").run(values)["y"]
    assert found.dtype == np.float16
    # fp16 keeps 11 bits, and onnxruntime rounds the projections at other places than torch.
    np.testing.assert_allclose(found, result.graph.run(values)["y"], rtol=2e-2, atol=5e-3)


def test_sums_that_outgrow_half_precision():
    """The norm is taken before the result becomes fp16: 4,096 keys of size 60 add up to more than 65,504."""
    module = TransNormerAttention(site(dtype=torch.float16))
    q, k, v = (torch.full((1, h, 4096, w), 60.0).half() for h, w in ((HEADS, D), (KV_HEADS, D), (KV_HEADS, DV)))
    found = module.attend(q, k, v, None)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, torch.ones_like(found))


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["inline", "soft"])
def test_causal_sites_are_refused(method, sources, tmp_path):
    path, report = sources["folder"] / "both.onnx", tmp_path / "report.json"
    given = ["transform", str(path), "--pass", f"linearize{{method={method}}}", "-o", str(tmp_path / "out.onnx")]
    result = CliRunner().invoke(app, [*given, "--json", str(report)])
    assert result.exit_code == 3
    assert not (tmp_path / "out.onnx").exists()
    (found,) = json.loads(report.read_text())["passes"][0]["sites"]
    assert found["status"] == "refused"
    assert found["reason"] == f"method {method} looks at all tokens at once, but its mask is causal"


class Cached(torch.nn.Module):
    def forward(self, q, k, v, past_k, past_v):
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return F.scaled_dot_product_attention(q, k, v)


def test_cached_sites_are_refused_for_blocks():
    values = [torch.randn(1, 2, n, 4) for n in (6, 6, 6, 3, 3)]
    graph = graphopt.load(Cached().eval(), tuple(values))
    assert find(graph, "attention").sites[0].past is not None
    blocks, plain = (parse(f"linearize{{method=transnormer,window=4,block_layers={n}}}") for n in (1, 0))
    assert "each token's place in its block" in blocks.check(blocks.find(graph).sites[0])
    assert plain.check(plain.find(graph).sites[0]) is None


def test_only_the_first_of_the_chosen_sites_have_blocks():
    class Two(torch.nn.Module):
        def forward(self, q, k, v):
            x = F.scaled_dot_product_attention(q, k, v)
            return F.scaled_dot_product_attention(q, k, F.scaled_dot_product_attention(q, k, x))

    graph = graphopt.load(Two().eval(), tuple(torch.randn(1, 2, 6, 4) for _ in range(3)))
    item = parse("linearize{method=transnormer,window=4,block_layers=1,layers=1:}")
    context = SimpleNamespace(generator=torch.Generator)
    made = [type(item.build(s, context)) for s in item.find(graph).sites]
    assert made == [BlockAttention, TransNormerAttention]


def test_a_grid_that_is_not_the_models_own(sources):
    graph, data = sources["vit"]
    with pytest.raises(GraphOptError, match="at least 5 x 5 tokens for grid=5, found 17"):
        graph.apply("linearize{method=inline,grid=5}", calibration=data)


def test_blocks_of_two_sequences():
    q, k, v = operands(5, 7)
    with pytest.raises(GraphOptError, match="as many keys as queries for block_layers, found 7 and 5"):
        MODULES["blocks"]().attend(q, k, v, None)


@pytest.mark.parametrize(
    "options", ["landmarks=0", "grid=-1", "block_layers=-1", "method=transnormer,window=0,block_layers=1"]
)
def test_options_out_of_range(options):
    with pytest.raises((ValueError, GraphOptError), match=r"expected (landmarks|a window above 0 for block_layers)"):
        parse(f"linearize{{{options}}}")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "onnxruntime"])
def test_a_decoder_with_states(target, tmp_path):
    """A cache of bounded length and states in its place: one run over the text, and parts of it, agree."""
    pytest.importorskip("safetensors")
    sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "samples"))
    from tiny_decoder import export
    from tiny_decoder.model import Config, Decoder

    from graphopt.decoders.generate import logits

    torch.manual_seed(0)
    config = Config(vocab=50, dim=32, layers=2, heads=4, kv_heads=2, hidden=48, context=64)
    export.export(Decoder(config), tmp_path)
    ids = np.random.default_rng(0).integers(0, 50, (2, 24))
    result = graphopt.load(tmp_path / export.CACHED).apply(
        "linearize{method=transnormer,train=transfer,fit_steps=60,max_error=9}", calibration=[{"input_ids": ids}]
    )
    assert [s.status for s in sites_of(result)] == ["rewritten"] * 2
    result.graph.save(tmp_path / "out.onnx", target=target)
    whole = logits(result.graph, ids)
    for split in (None, 10):
        found = logits(tmp_path / "out.onnx", ids, split=split)
        # Two orders of summation in fp32, over logits of about 1.
        np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-4)
