"""The ONNX forms of the rational operators in onnxruntime, against loops in fp64."""

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from torch import nn

import graphopt
from graphopt.backends.onnx import group_rational as lowering
from graphopt.backends.onnxruntime import Session
from graphopt.ops import group_rational, linear_rational
from graphopt.ops.group_rational import FORMS
from graphopt.rewrite.splice import splice
from graphopt.sites.base import Site

TARGETS = ("onnx", "onnxruntime")
K, C = 6, 24
# fp32: ten roundings of terms up to a hundred times the result; fp16: one rounding of the result, and of the product.
CLOSE = {np.float32: {"rtol": 2e-5, "atol": 2e-5}, np.float64: {"rtol": 1e-12, "atol": 1e-12}}
CLOSE[np.float16] = {"rtol": 2e-3, "atol": 2e-3}
TYPES = {np.float16: "float16", np.float32: "float", np.float64: "double"}


class Rational(nn.Module):
    def __init__(self, form="abs_sum", split=False, groups=4, shared="", m=4, n=6, dtype=torch.float32):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        count_a, count_b = (1 if name in shared else groups for name in "ab")
        self.numerator = nn.Parameter(torch.randn(count_a, m + 1, generator=g).to(dtype))
        self.denominator = nn.Parameter(torch.randn(count_b, n, generator=g).to(dtype))
        self.form, self.split = form, split

    def forward(self, x):
        return group_rational(x, self.numerator, self.denominator, self.form, self.split)


class LinearRational(Rational):
    def __init__(self, bias, **options):
        super().__init__(**options)
        g = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(C, K, generator=g) / 2)
        self.bias = nn.Parameter(torch.randn(C, generator=g)) if bias else None

    def forward(self, x):
        options = (self.numerator, self.denominator, self.form, self.split)
        return linear_rational(x, self.weight, self.bias, *options)


def loop(x, module):
    """Number by number in fp64, powers in place of Horner's rule; x [.., C]."""
    a, b = (p.detach().double().tolist() for p in (module.numerator, module.denominator))
    width = x.shape[-1] // max(len(a), len(b))
    out = np.empty(x.shape)
    for index in np.ndindex(*x.shape):
        value, group = float(x[index]), index[-1] // width
        t = min(abs(value), 4096.0) if module.split else value
        top = sum(c * t**i for i, c in enumerate(a[group % len(a)]))
        below = [(c, i) for i, c in enumerate(b[group % len(b)], 1)]
        if module.form == "abs_sum":
            q = 1 + abs(sum(c * t**i for c, i in below))
        else:
            q = 1 + sum(abs(c) * abs(t) ** i for c, i in below)
        out[index] = max(value, 0.0) - top / q if module.split else top / q
    return out


def linear_loop(x, module):
    z = x.astype(np.float64) @ module.weight.detach().double().numpy().T
    return loop(z if module.bias is None else z + module.bias.detach().double().numpy(), module)


def lower(path, module, x, *, target, opset=17, out=C):
    """Through a site of an .onnx file, with open sizes."""
    kind = TYPES[x.dtype.type]
    dims = ",".join(f"d{i}" for i in range(x.ndim - 1))
    text = f"({kind}[{dims},{x.shape[-1]}] x) => ({kind}[{dims},{out}] y)"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> g {text} {{ y = Identity(x) }}')
    onnx.save(model, path)
    graph = graphopt.load(path)
    (node,) = [n for n in graph.nodes if n.op == "call_function"]
    splice(graph, Site("s", node, (node,), (node.args[0],)), module, "graphopt.s", (torch.from_numpy(x),))
    graph.save(path, target=target)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    return Session(path)


def values(*shape, dtype=np.float32, seed=0):
    return (2 * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def check(session, x, expected):
    (found,) = session.run({"x": x}).values()
    assert (found.dtype, found.shape) == (x.dtype, expected.shape)
    np.testing.assert_allclose(found, expected, **CLOSE[x.dtype.type])


@pytest.fixture
def small_blocks(monkeypatch):
    """Values of a few hundred entries go through Scan."""
    monkeypatch.setattr(lowering, "_LARGE", 300)
    monkeypatch.setattr(lowering, "_LEAST", 2 * C)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("groups", "shared"), [(1, ""), (4, ""), (4, "a"), (4, "b")])
def test_values(tmp_path, small_blocks, target, form, split, groups, shared):
    module = Rational(form, split, groups, shared)
    session = lower(tmp_path / "m.onnx", module, values(4, 5, C), target=target)
    for shape in [(4, 5, C), (2, 7, C), (3, 7, C), (1, 1, C), (0, 5, C), (32, 2, C)]:
        x = values(*shape)
        check(session, x, loop(x, module))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("m", "n"), [(0, 3), (3, 0), (1, 1), (7, 7)])
def test_degrees(tmp_path, small_blocks, target, m, n):
    module, x = Rational(split=True, m=m, n=n), values(8, 5, C)
    check(lower(tmp_path / "m.onnx", module, x, target=target), x, loop(x, module))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("opset", [10, 11, 13, 18, 20])
def test_opsets(tmp_path, small_blocks, target, opset):
    module, x = Rational(split=True), values(8, 5, C)
    check(lower(tmp_path / "m.onnx", module, x, target=target, opset=opset), x, loop(x, module))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_types(tmp_path, small_blocks, target, dtype):
    wide = torch.float64 if dtype == np.float64 else torch.float32
    module, x = Rational(split=True, dtype=wide), values(8, 5, C, dtype=dtype)
    check(lower(tmp_path / "m.onnx", module, x, target=target), x, loop(x, module))


@pytest.mark.parametrize("target", TARGETS)
def test_far_out_and_nan(tmp_path, small_blocks, target):
    x = values(16, 4, C)
    x[0, 0, :6] = [np.inf, -np.inf, np.nan, 1e38, -1e38, 0.0]
    session = lower(tmp_path / "m.onnx", Rational(split=True), x, target=target)
    (found,) = session.run({"x": x}).values()
    expected = loop(np.nan_to_num(x, posinf=1e30, neginf=-1e30), Rational(split=True))
    expected[0, 0, 0], expected[0, 0, 2] = np.inf, np.nan
    np.testing.assert_allclose(found, expected, **CLOSE[np.float32])


def test_on_onnxruntime_large_values_go_through_blocks(tmp_path, small_blocks):
    x = values(16, 4, C)
    lower(tmp_path / "m.onnx", Rational(), x, target="onnxruntime")
    lower(tmp_path / "n.onnx", Rational(), x, target="onnx")
    kinds = [{n.op_type for f in onnx.load(tmp_path / name).functions for n in f.node} for name in ("m.onnx", "n.onnx")]
    assert "If" in kinds[0]
    assert "If" not in kinds[1]


def test_blocks_hold_whole_rows_that_divide_them_all(tmp_path, small_blocks, monkeypatch):
    """Every number of rows gives every row once, also where the least block is above what divides the rows."""
    for least in (1, 4 * C):
        monkeypatch.setattr(lowering, "_LEAST", least)
        module = Rational(split=True)
        session = lower(tmp_path / "m.onnx", module, values(13, C), target="onnxruntime")
        for rows in (13, 14, 16, 36, 40, 64):
            x = values(rows, C, seed=rows)
            check(session, x, loop(x, module))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_linear_layer_in_front(tmp_path, small_blocks, target, bias, groups):
    module = LinearRational(bias, split=True, groups=groups)
    session = lower(tmp_path / "m.onnx", module, values(4, 5, K), target=target)
    for shape in [(4, 5, K), (1, 3, K), (16, 2, K)]:
        x = values(*shape)
        check(session, x, linear_loop(x, module))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("module", [Rational(split=True), LinearRational(True), LinearRational(False)])
def test_through_torchs_exporter(tmp_path, small_blocks, target, module):
    given = C if type(module) is Rational else K
    sizes = ({0: torch.export.Dim("rows", min=2)},)
    graph = graphopt.load(module, (torch.from_numpy(values(4, 5, given)),), dynamic_shapes=sizes)
    graph.save(tmp_path / "m.onnx", target=target)
    session = Session(tmp_path / "m.onnx")
    for rows in (3, 8):
        x = values(rows, 5, given)
        check(session, x, loop(x, module) if given == C else linear_loop(x, module))
