"""`two_pass`, `online` and `unified_max`: what they rewrite, what they measure, and where the runtime's own stays."""

import re
import sys
import types

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import graphopt
from graphopt.backends.onnxruntime import Session
from graphopt.bench import Timing
from graphopt.calibration import calibration_for
from graphopt.cli import app
from graphopt.cost import cost_of
from graphopt.errors import CheckFailed, GraphOptError
from graphopt.passes.attention import softmax_speed
from graphopt.passes.attention.online import Online
from graphopt.passes.attention.unified_max import HIGH, LOW, middle
from graphopt.rewrite import Context, Equivalence, parse
from graphopt.sites import SoftmaxSite, find

INF = float("inf")
PASSES = ("two_pass", "online", "unified_max")
ATTENTION = "g (float[B,2,T,S] x, float[B,2,S,4] v) => (float[B,2,T,4] y) { p = Softmax(x) y = MatMul(p, v) }"
CLASSIFIER = "g (float[B,T,6] x) => (float[B,T,6] y) { y = Softmax(x) }"
# Each role once, and a logarithm.
ROLES = """
g (float[B,2,T,S] x, float[B,2,S,4] v, float[B,9000] words, float[B,6] logits)
=> (float[B,2,T,4] a, float[B,9000] w, float[B,6] c, float[B,1] o, float[B,6] l)
{
  p = Softmax(x) a = MatMul(p, v)
  w = Softmax(words)
  c = Softmax(logits)
  q = Softmax(logits) o = ReduceMax<axes = [-1]>(q)
  l = LogSoftmax(logits)
}
"""


@pytest.fixture
def load(tmp_path):
    def from_text(text, opset=17):
        path = tmp_path / "m.onnx"
        onnx.save(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> {text}'), path)
        return graphopt.load(path)

    return from_text


def attention_feeds(count=3, scale=3.0, rows=5):
    rng = np.random.default_rng(0)
    return [
        {
            "x": (scale * rng.standard_normal((2, 2, rows, 40))).astype(np.float32),
            "v": rng.standard_normal((2, 2, 40, 4)).astype(np.float32),
        }
        for _ in range(count)
    ]


def classifier_feeds(count=2, seed=0):
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((2, 3, 6)).astype(np.float32)} for _ in range(count)]


def exact(x, axis=-1):
    wide = x.astype(np.float64)
    weights = np.exp(wide - wide.max(axis, keepdims=True))
    return weights / weights.sum(axis, keepdims=True)


def sites(result):
    return result.report.passes[0].sites


@pytest.mark.parametrize("name", PASSES)
def test_rewritten_saved_and_run(name, load, tmp_path):
    graph, feeds = load(ATTENTION), attention_feeds()
    result = graph.apply(f"{name}{{keep=never}}", calibration=feeds)
    assert [s.status for s in sites(result)] == ["rewritten"]
    assert find(result.graph, "softmax").sites == ()
    expected = exact(feeds[0]["x"]) @ feeds[0]["v"].astype(np.float64)
    for target in ("onnx", "onnxruntime"):
        result.graph.save(tmp_path / "out.onnx", target=target)
        found = Session(tmp_path / "out.onnx").run(feeds[0])["y"]
        # Sums of 40 products of fp32 in another order.
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(result.graph.run(feeds[0])["y"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PASSES)
def test_options_and_classes(name):
    item = parse(name)
    assert (item.roles, item.keep) == ("all", "faster")
    assert item.equivalence is (Equivalence.CALIBRATED if name == "unified_max" else Equivalence.REASSOCIATED)
    assert item.needs_calibration == (name == "unified_max")
    for wrong in ("roles=heads", "roles=attention+heads", "roles=", "keep=always"):
        with pytest.raises(GraphOptError, match=f"pass {name}: expected {wrong.split('=')[0]} to be"):
            parse(f"{name}{{{wrong}}}")
    limits = [item.tolerance(t).rel_rms for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)]
    assert limits == sorted(limits)
    assert limits[1] <= 1e-5


@pytest.mark.parametrize(
    ("roles", "rewritten"),
    [
        ("all", {"attention", "vocabulary", "classifier", "other"}),
        ("vocabulary+classifier", {"vocabulary", "classifier"}),
        ("other", {"other"}),
    ],
)
def test_roles(roles, rewritten, load):
    graph = load(ROLES)
    role_of = {s.name: s.role for s in find(graph, "softmax").sites}
    assert set(role_of.values()) == {"attention", "vocabulary", "classifier", "other"}
    result = graph.apply(f"online{{keep=never,roles={roles}}}", calibration=2)
    done = {role_of[s.name] for s in sites(result) if s.status == "rewritten"}
    assert done == rewritten
    left = {role_of[s.name]: s.reason for s in sites(result) if s.status == "refused"}
    assert left == {r: f"its role is {r}, left as it is by roles={roles}" for r in set(role_of.values()) - rewritten}


def test_log_softmax_is_not_touched(load):
    graph = load("g (float[B,6] x) => (float[B,6] y) { y = LogSoftmax(x) }")
    result = graph.apply("two_pass{keep=never}", calibration=2)
    assert (sites(result), result.graph) == ([], graph)

    class Log(nn.Module):
        def forward(self, x):
            return nn.functional.log_softmax(x, -1)

    assert sites(graphopt.load(Log(), (torch.randn(2, 3),)).apply("online{keep=never}", calibration=2)) == []


@pytest.mark.parametrize("name", PASSES)
def test_ulps_of_both_are_reported(name, load):
    feeds = [{"x": 8 * f["x"]} for f in classifier_feeds(count=1)]
    (site,) = sites(load(CLASSIFIER).apply(f"{name}{{keep=never}}", calibration=feeds))
    expected = exact(feeds[0]["x"])
    unit = np.spacing(expected.astype(np.float32)).astype(np.float64)
    original = torch.softmax(torch.from_numpy(feeds[0]["x"]), -1).double().numpy()
    assert site.errors["ulps_original"] == pytest.approx((np.abs(original - expected) / unit).max(), rel=1e-6)
    # The argument of the exponential is rounded to fp32: half an ulp of 32 is 16 ulps of the result.
    assert 0 < site.errors["ulps"] < 20
    assert re.match(r"[\d.]+ ulps of float32 from an fp64 softmax, the original [\d.]+", site.reason)


class Plain(nn.Module):
    def __init__(self, axis):
        super().__init__()
        self.axis = axis

    def forward(self, x):
        return torch.softmax(x, self.axis)


def typed_input(dtype):
    return torch.randn(3, 70, 5, generator=torch.Generator().manual_seed(0)).mul(4).to(dtype)


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_types_of_modules(name, dtype):
    axis, x = -1 if dtype.itemsize == 2 else 1, typed_input(dtype)
    result = graphopt.load(Plain(axis), (x,)).apply(f"{name}{{keep=never}}", calibration=[(x,)])
    (site,) = sites(result)
    assert site.status == "rewritten"
    # Narrow types are rounded once from fp32: half an ulp of theirs, and the error of fp32.
    assert site.errors["ulps"] < (0.51 if dtype.itemsize == 2 else 30)
    (found,) = result.graph.execute(x)
    assert found.dtype == dtype
    rtol = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-8, torch.float32: 5e-6, torch.float64: 1e-13}[dtype]
    atol = 6e-8 if dtype.itemsize == 2 else 1e-12
    torch.testing.assert_close(found.double(), torch.softmax(x.double(), axis), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_narrow_types_are_more_exact_than_the_original(name, dtype):
    """Along an inner axis torch rounds the exponentials to the narrow type, and then the quotient."""
    x = typed_input(dtype)
    graph = graphopt.load(Plain(1), (x,))
    _, (site,) = parse(f"{name}{{keep=never}}").run(graph, Context(calibration_for(graph, [(x,)])))
    assert site.status == "rewritten"
    assert site.errors["ulps"] < 0.51 < 1 < site.errors["ulps_original"]


class Converting(nn.Module):
    def forward(self, x):
        wide = nn.functional.softmax(x, 1, dtype=torch.float64)
        return wide, torch.softmax(x.to(torch.int64), -1, dtype=torch.float32)


@pytest.mark.parametrize("name", PASSES)
def test_softmax_that_converts(name, tmp_path):
    x = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0)) * 3
    result = graphopt.load(Converting(), (x,)).apply(f"{name}{{keep=never}}", calibration=[(x,)])
    assert [s.status for s in sites(result)] == ["rewritten", "rewritten"]
    wide, counted = result.graph.execute(x)
    assert (wide.dtype, counted.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(wide, torch.softmax(x.double(), 1), rtol=1e-13, atol=0)
    torch.testing.assert_close(counted, torch.softmax(x.long().double(), -1).float(), rtol=1e-6, atol=0)
    result.graph.save(tmp_path / "out.onnx")
    found = list(Session(tmp_path / "out.onnx").run({result.graph.inputs[0].name: x.numpy()}).values())
    np.testing.assert_allclose(found[0], exact(x.numpy(), 1), rtol=1e-13)
    assert [f.dtype for f in found] == [np.float64, np.float32]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_other_types_are_refused(dtype):
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 3, dtype=dtype)
    node = graph.call_function(torch.ops.aten.softmax.int, (x, -1))
    reason = Online().check(SoftmaxSite("s", node, (node,), (x,)))
    assert reason is not None
    assert reason.startswith(f"it computes in {dtype}, which online_softmax does not")


def test_softmax_before_opset_13(load, tmp_path):
    text = "g (float[B,3,1,1] x) => (float[B,3,1,1] y) { y = Softmax(x) }"
    x = np.random.default_rng(0).standard_normal((2, 3, 1, 1)).astype(np.float32)
    result = load(text, opset=9).apply("online{keep=never}", calibration=[{"x": x}])
    assert [s.status for s in sites(result)] == ["rewritten"]
    result.graph.save(tmp_path / "out.onnx")
    np.testing.assert_allclose(Session(tmp_path / "out.onnx").run({"x": x})["y"], exact(x, 1), rtol=1e-6)
    several = load("g (float[B,3,4] x) => (float[B,3,4] y) { y = Softmax(x) }", opset=11).apply("online", calibration=2)
    assert [s.reason for s in sites(several)] == [
        "it normalises all axes from 1 on together, as Softmax does before opset 13"
    ]
    old = load(text, opset=8).apply("online{keep=never}", calibration=[{"x": x}])
    assert [s.reason for s in sites(old)] == [
        "expected opset 9 or later for its ONNX form, found 8; convert the model to a later opset first"
    ]


def timing(own, ours):
    return lambda *given: Timing((own,) * 11, (ours,) * 11)


@pytest.mark.parametrize("name", PASSES)
def test_the_faster_one_is_kept(name, load, monkeypatch):
    graph, feeds = load(CLASSIFIER), classifier_feeds()
    monkeypatch.setattr(softmax_speed, "bench_pair", timing(4e-6, 36e-6))
    (site,) = sites(graph.apply(name, calibration=feeds))
    assert site.status == "refused"
    own = "onnxruntime's Softmax is faster and stays: 4 us against 36 us on float32[2, 3, 6]; "
    assert site.reason.startswith(own)
    monkeypatch.setattr(softmax_speed, "bench_pair", timing(2.5e-3, 36e-6))
    (site,) = sites(graph.apply(name, calibration=feeds))
    assert site.status == "rewritten"
    assert site.reason.startswith(
        "faster than onnxruntime's Softmax, which takes 2.5 ms against 36 us on float32[2, 3, 6]; "
    )


def test_a_difference_within_the_noise_is_none(load, monkeypatch):
    noise = Timing((1e-6, 2e-6, 1e-6, 2e-6) * 3, (1.4e-6,) * 12)
    monkeypatch.setattr(softmax_speed, "bench_pair", lambda *given: noise)
    (site,) = sites(load(CLASSIFIER).apply("online", calibration=classifier_feeds()))
    assert site.status == "refused"
    assert site.reason.startswith("onnxruntime's Softmax stays, as the difference is within the noise: ")


@pytest.mark.parametrize("opset", [9, 12, 13, 18])
def test_times_are_measured_in_onnxruntime(opset, load):
    text = "g (float[B,3,6,1] x) => (float[B,3,6,1] y) { y = Softmax<axis = 2>(x) }"
    x = np.random.default_rng(0).standard_normal((2, 3, 6, 1)).astype(np.float32)
    (site,) = sites(load(text, opset=opset).apply("two_pass", calibration=[{"x": x}]))
    number = r"[\d.e+]+ [um]s"
    assert re.search(rf"onnxruntime's Softmax.* {number} against {number} on float32\[2, 3, 6, 1\]; ", site.reason)


def test_times_are_measured_in_torch_for_modules():
    x = torch.randn(4, 16)
    model = nn.Sequential(nn.Linear(16, 8), nn.Softmax(-1)).eval()
    (site,) = sites(graphopt.load(model, (x,)).apply("two_pass", calibration=[(x,)]))
    number = r"[\d.e+]+ [um]s"
    assert re.search(rf"torch\.softmax.* {number} against {number} on float32\[4, 8\]; [\d.]+ ulps", site.reason)


def test_without_onnxruntime_its_own_stays(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    graph = load(CLASSIFIER)
    (site,) = sites(graph.apply("two_pass", calibration=classifier_feeds()))
    assert site.status == "refused"
    assert "the runtime's own softmax stays" in site.reason
    assert "onnxruntime, which is not installed" in site.reason
    assert [s.status for s in sites(graph.apply("two_pass{keep=never}", calibration=classifier_feeds()))] == [
        "rewritten"
    ]


def test_a_form_that_is_wrong_in_the_runtime_is_reverted(load, monkeypatch):
    monkeypatch.setattr(softmax_speed, "difference", lambda a, b: types.SimpleNamespace(rel_rms=0.25))
    (site,) = sites(load(CLASSIFIER).apply("two_pass", calibration=classifier_feeds()))
    assert (site.status, site.reason) == ("reverted", "its ONNX form is off by a relative RMS of 0.25 in onnxruntime")


def test_phi_is_the_middle_of_the_row_maxima(load, tmp_path):
    feeds = classifier_feeds(3)
    for i, each in enumerate(feeds):
        each["x"] += 5 * i
    maxima = np.concatenate([f["x"].max(-1).ravel() for f in feeds])
    result = load(CLASSIFIER).apply("unified_max{keep=never}", calibration=feeds)
    (site,) = sites(result)
    assert site.errors["phi"] == pytest.approx((maxima.max() + maxima.min()) / 2, rel=1e-6)
    assert site.errors["recomputed"] == 0
    assert f"phi = {site.errors['phi']:.4g}, 0.00% of the rows" in site.reason
    # Outside of what calibration saw, and of what fp32 holds: the guard takes over.
    result.graph.save(tmp_path / "out.onnx")
    session = Session(tmp_path / "out.onnx")
    for shift in (0.0, 100.0, -100.0, 1e4, -1e4):
        x = feeds[0]["x"] + np.float32(shift)
        for found in (result.graph.run({"x": x})["y"], session.run({"x": x})["y"]):
            np.testing.assert_allclose(found, exact(x), rtol=5e-6)


def test_the_share_that_is_computed_again_is_reported(load):
    feeds = classifier_feeds(2)
    feeds[0]["x"][0, 0] += 200
    feeds[1]["x"][1, 1:] = -INF
    # Of 12 rows one is far away, and two are masked.
    (site,) = sites(load(CLASSIFIER).apply("unified_max{keep=never}", calibration=[{"x": feeds[0]["x"]}]))
    assert site.errors["recomputed"] == pytest.approx(1 / 6)
    assert "16.67% of the rows in calibration are computed again" in site.reason


def test_the_middle_holds_most_rows():
    spread = torch.linspace(-20, 30, 100, dtype=torch.float64)
    phi = middle(spread)
    assert bool(((spread - phi > LOW) & (spread - phi < HIGH)).all())
    masked = torch.tensor([-3.4e38] * 10 + [-INF] * 10 + [1.0, 2.0, 3.0] * 4, dtype=torch.float64)
    assert middle(masked) == 2.0
    assert middle(torch.tensor([-INF, -INF])) == 0.0
    assert middle(torch.empty(0)) == 0.0
    assert middle(torch.tensor([7.5])) == 7.5


MASKED = """
g (float[B,2,T,S] x, float[B,1,T,S] mask, float[B,2,S,4] v) => (float[B,2,T,4] y)
<float hidden = {-INF}, float zero = {0.0}>
{ c = Cast<to = 9>(mask) s = Where(c, x, hidden) p = Softmax(s) %s y = MatMul(w, v) }
"""


def masked_model(load, cleaned):
    text = MASKED % ("n = IsNaN(p) w = Where(n, zero, p)" if cleaned else "w = Identity(p)")
    graph = load(text.replace("-INF", "-1.0"))
    for tensor in graph.onnx.proto.graph.initializer:
        if tensor.name == "hidden":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(-INF, np.float32), "hidden"))
    onnx.save(graph.onnx.proto, graph.onnx.path)
    (feeds,) = attention_feeds(1)
    mask = np.ones((2, 1, 5, 40), np.float32)
    mask[0, 0, 2], mask[1, 0, :, 30:] = 0, 0
    return graphopt.load(graph.onnx.path), {**feeds, "mask": mask}


@pytest.mark.parametrize("name", PASSES)
def test_masked_rows_that_the_model_cleans_up(name, load):
    graph, feeds = masked_model(load, cleaned=True)
    result = graph.apply(f"{name}{{keep=never}}", calibration=[feeds])
    (site,) = sites(result)
    assert site.status == "rewritten"
    assert "2 rows of -inf alone are 0, where the original may give NaN" in site.reason
    a, b = graph.run(feeds)["y"], result.graph.run(feeds)["y"]
    assert np.isfinite(a).all()
    np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)


def test_masked_rows_that_reach_an_output_fail_the_check(load):
    """There the rewritten model would differ: NaN of the original, zeros of the rewritten one."""
    graph, feeds = masked_model(load, cleaned=False)
    assert np.isnan(graph.run(feeds)["y"][0, :, 2]).all()
    with pytest.raises(CheckFailed, match="NaN, infinity or another shape where the original has none"):
        graph.apply("online{keep=never}", calibration=[feeds])


def test_cost(load):
    for name, factor in (("two_pass", 30), ("online", 7), ("unified_max", 5)):
        cost = cost_of(load(CLASSIFIER).apply(f"{name}{{keep=never}}", calibration=2).graph)
        assert cost.at({"B": 2, "T": 3})["flops"] == factor * 2 * 3 * 6
        assert not cost.unknown


BRANCH = """
g (bool c, float[B,6] x) => (float[B,6] y) {
  y = If (c) <
    then_branch = t () => (float[B,6] a) { a = Softmax(x) },
    else_branch = e () => (float[B,6] b) { b = Relu(x) }
  >
}
"""


def test_a_softmax_in_a_branch(load, tmp_path):
    (x,) = (f["x"][:, 0] for f in classifier_feeds(1))
    feeds = {"c": np.array(True), "x": x}
    result = load(BRANCH).apply("two_pass{keep=never}", calibration=[feeds])
    assert [s.status for s in sites(result)] == ["rewritten"]
    result.graph.save(tmp_path / "out.onnx")
    np.testing.assert_allclose(Session(tmp_path / "out.onnx").run(feeds)["y"], exact(x), rtol=1e-6)


def test_the_command_line(load, tmp_path):
    load(CLASSIFIER)
    source, out = str(tmp_path / "m.onnx"), tmp_path / "out.onnx"

    def transform(model, spelled):
        return CliRunner().invoke(app, ["transform", model, "--pass", spelled, "-o", str(out)])

    for spelled, message in (
        ("two_pass{keep=always}", "expected keep to be faster|never, got 'always'"),
        ("two_pass{roles=heads}", "expected roles to be all, or some of attention, vocabulary, classifier, other"),
        ("two_pass{phi=1}", "has no option 'phi'"),
    ):
        found = transform(source, spelled)
        assert found.exit_code == 2
        assert message in " ".join(found.output.split())
    found = transform(source, "two_pass{keep=never,roles=attention}")
    assert found.exit_code == 3
    assert "its role is classifier" in " ".join(found.output.split())
    assert not out.exists()
    found = transform(source, "unified_max{keep=never}")
    assert found.exit_code == 0, found.output
    assert {f.name.partition("_")[0] for f in onnx.load(out).functions} == {"UnifiedMaxSoftmax"}
