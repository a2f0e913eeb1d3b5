"""The CPU kernels of the rational operators against the references in fp64."""

import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

numba = pytest.importorskip("numba")

import graphopt  # noqa: E402
from graphopt import registry  # noqa: E402
from graphopt.backends.cpu import launch_rational as launch  # noqa: E402  # imports numba
from graphopt.backends.cpu import rational as compiled  # noqa: E402
from graphopt.backends.cpu import register  # noqa: E402
from graphopt.ops import group_rational, linear_rational  # noqa: E402
from graphopt.ops.group_rational import FARTHEST, FORMS, gradients, reference  # noqa: E402

INF, NAN = float("inf"), float("nan")
HALF_ULP = 2.0**-24


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(launch, "GRAIN", 1 << 11)  # so that small tensors are spread as well
    monkeypatch.setattr(launch, "PIECE", 3000)
    yield
    torch.set_num_threads(before)


def operands(rows=(37,), channels=132, groups=4, m=4, n=6, shared="", seed=0, scale=1.5):
    g = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(*rows, channels, generator=g)
    a = torch.randn(1 if "a" in shared else groups, m + 1, generator=g)
    b = torch.randn(1 if "b" in shared else groups, n, generator=g)
    return x, a, b


def wide(*tensors):
    return [t.detach().double() for t in tensors]


def sizes(x, a, b, split):
    """What rounding errors are relative to: P / Q' and dP / dx with the absolute values of all terms, and Q."""
    groups = max(len(a), len(b))
    t = x.abs().clamp(max=FARTHEST) if split else x.abs()
    t = t.unflatten(-1, (groups, -1))
    top = sum(c.abs()[:, None] * t**i for i, c in enumerate(a.unbind(1)))
    slope = sum(i * c.abs()[:, None] * t ** (i - 1) for i, c in enumerate(a.unbind(1)) if i)
    below = sum((c.abs()[:, None] * t**i for i, c in enumerate(b.unbind(1), 1)), torch.zeros_like(t))
    inner = sum((i * c.abs()[:, None] * t ** (i - 1) for i, c in enumerate(b.unbind(1), 1)), torch.zeros_like(t))
    return t, top, slope + torch.zeros_like(t), below, inner


def value_bound(x, a, b, form, split):
    """Horner's rule rounds twice per power, of terms that may cancel; one division, one difference."""
    _, top, _, below, _ = sizes(x, a, b, split)
    q = denominators(x, a, b, form, split)
    error = (2 * max(a.shape[1], b.shape[1]) + 4) * HALF_ULP * (top / q) * (1 + (1 + below) / q)
    return error.flatten(-2) + 2 * HALF_ULP * x.abs()


def denominators(x, a, b, form, split):
    ones = torch.zeros(len(a), 1, dtype=x.dtype)
    ones[:] = 1
    value = reference(x.abs().clamp(max=FARTHEST) if split else x, ones, b, form)
    return 1 / value.unflatten(-1, (max(len(a), len(b)), -1))


def check_values(x, a, b, form, split):
    found = group_rational(x, a, b, form, split)
    assert (found.dtype, found.shape) == (x.dtype, x.shape)
    expected = reference(*wide(x, a, b), form, split)
    error = (found.double() - expected).abs()
    bound = value_bound(*wide(x, a, b), form, split)
    if x.dtype != torch.float32:
        bound = rounded(bound, expected, x.dtype)
    assert (error <= bound).all(), f"{(error / bound).max():.2f} times what rounding explains"
    return found


def rounded(bound, expected, dtype):
    """The bound and one rounding to the type, of which the least are half of its smallest number."""
    info = torch.finfo(dtype)
    return bound + info.eps / 2 * (expected.abs() + bound) + info.eps * info.tiny / 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    ("groups", "shared", "m", "n"),
    [(1, "", 4, 6), (4, "", 5, 4), (4, "a", 5, 4), (4, "b", 4, 6), (132, "", 4, 6), (4, "", 0, 3), (4, "", 3, 0)],
)
def test_values(form, split, groups, shared, m, n):
    for count in (1, 2):
        torch.set_num_threads(count)
        check_values(*operands(groups=groups, shared=shared, m=m, n=n), form, split)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("rows", [(1, 33), (5, 7), (2, 3, 11), (4097,)])
def test_odd_sizes(split, rows):
    check_values(*operands(rows, channels=129, groups=3), "abs_sum", split)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_half_types_round_once(dtype, form):
    x, a, b = operands()
    check_values(x.to(dtype), a, b, form, True)
    check_values(x.to(dtype), a.to(dtype), b.to(dtype), form, False)


def test_axes_in_another_order():
    x, a, b = operands((8, 40, 132), channels=7)
    x = x.transpose(1, 2).movedim(0, -1).transpose(-1, -2)
    x = x[..., :4].movedim(1, -1)  # channels neither contiguous nor last in memory
    assert not x.is_contiguous()
    found = check_values(x, a, b, "abs_sum", True)
    assert found.stride() == torch.empty_like(x).stride()


def test_nothing_is_nothing():
    x, a, b = operands((0,))
    assert group_rational(x, a, b).shape == (0, 132)
    assert launch.group_rational(x, a, b).shape == (0, 132)
    with torch.no_grad():
        dx, da, db = launch.gradients(x, x, a, b)
    assert dx.shape == x.shape
    assert not da.any()
    assert not db.any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("m", "n"), [(4, 6), (0, 3), (3, 0), (5, 4)])
def test_what_is_not_finite(form, split, m, n):
    x, a, b = operands(m=m, n=n)
    special = torch.tensor([INF, -INF, NAN, 3e38, -3e38, 0.0, -0.0, 1e-40, FARTHEST, -FARTHEST, 5000.0, -5000.0])
    x[:, :12] = special
    x[:, 40:52] = special
    found, expected = group_rational(x, a, b, form, split), reference(x, a, b, form, split)
    assert torch.equal(found.isfinite(), expected.isfinite())
    torch.testing.assert_close(found[~found.isfinite()], expected[~found.isfinite()], equal_nan=True)
    x, g = x.requires_grad_(), torch.ones_like(x)
    (dx,) = torch.autograd.grad(group_rational(x, a, b, form, split), x, g)
    right = gradients(g, x.detach(), a, b, form, split)[0]
    assert torch.equal(dx.isnan(), right.isnan())
    if split:
        far = x.detach().abs() > FARTHEST
        assert torch.equal(dx[far], (x.detach()[far] > 0).float())


def check_gradients(x, a, b, form, split):
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).to(x.dtype)
    used = [t.requires_grad_() for t in (x, a, b) if t.numel()]
    found = torch.autograd.grad(group_rational(x, a, b, form, split), used, g)
    x, a, b = x.detach(), a.detach(), b.detach()
    expected = [e for e in gradients(*wide(g, x, a, b), form, split) if e.numel()]
    t, top, slope, below, inner = sizes(*wide(x, a, b), split)
    q = denominators(*wide(x, a, b), form, split)
    scaled = g.double().abs().unflatten(-1, q.shape[-2:]) / q
    # Each factor is off by a few ulps of the sum of its terms' magnitudes; lanes add up to 64 terms in fp32.
    units = (4 * max(a.shape[1], b.shape[1]) + 64) * HALF_ULP
    grown = scaled * (1 + (1 + below) / q)
    bound = units * (grown * (slope + top / q * inner * 2)).flatten(-2) + 2 * HALF_ULP * g.double().abs()
    bounds = [bound]
    if a.numel():
        bounds.append(units * total([grown * t**i for i in range(a.shape[1])], a))
    if b.numel():
        bounds.append(units * total([grown * top / q * t**i * 2 for i in range(1, b.shape[1] + 1)], b))
    for value, right, allowed, like in zip(found, expected, bounds, used, strict=True):
        assert (value.dtype, value.shape) == (like.dtype, like.shape)
        if like.dtype != torch.float32:
            allowed = rounded(allowed, right, like.dtype)
        error = (value.double() - right).abs()
        assert (error <= allowed).all(), f"{(error / allowed).max():.2f} times what rounding explains"


def total(terms, like):
    kept = torch.stack([term.sum(-1).flatten(0, -2).sum(0) for term in terms], 1)
    return kept if len(like) > 1 else kept.sum(0, keepdim=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    ("groups", "shared", "m", "n"), [(1, "", 4, 6), (4, "a", 5, 4), (4, "b", 4, 6), (4, "", 0, 3), (4, "", 3, 0)]
)
def test_gradients(form, split, groups, shared, m, n):
    for count in (1, 2):
        torch.set_num_threads(count)
        check_gradients(*operands((61,), groups=groups, shared=shared, m=m, n=n), form, split)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_half_types(dtype):
    x, a, b = operands()
    check_gradients(x.to(dtype), a, b, "sum_abs", True)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 90),
    width=st.integers(1, 70),
    groups=st.integers(1, 5),
    shared=st.sampled_from(["", "a", "b"]),
    form=st.sampled_from(FORMS),
    split=st.booleans(),
    scale=st.floats(1e-3, 30.0),
)
def test_any_sizes(seed, rows, width, groups, shared, form, split, scale):
    given = operands((rows,), width * groups, groups, 3, 4, shared, seed, scale)
    check_values(*given, form, split)
    check_gradients(*given, form, split)


@pytest.mark.parametrize("groups", [1, 4])
def test_threads_change_no_bit(groups):
    x, a, b = operands((301,), groups=groups)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        with torch.no_grad():
            results.append((launch.group_rational(x, a, b, "abs_sum", True), *launch.gradients(g, x, a, b)))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_gradients_of_gradients_are_the_references():
    x, a, b = (t.requires_grad_() for t in operands((40,)))
    (dx,) = torch.autograd.grad(group_rational(x, a, b, "abs_sum", True).sum(), x, create_graph=True)
    found = torch.autograd.grad(dx.square().sum(), (x, a, b))
    twins = [t.requires_grad_() for t in wide(x, a, b)]
    (right,) = torch.autograd.grad(reference(*twins, "abs_sum", True).sum(), twins[0], create_graph=True)
    for value, expected in zip(found, torch.autograd.grad(right.square().sum(), twins), strict=True):
        # Relative to the largest: second derivatives near a zero of Q's polynomial are large, and their sums cancel.
        torch.testing.assert_close(value.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def linear_operands(rows=(3, 43), K=24, C=60, groups=4, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x, w, bias = (torch.randn(s, generator=g).to(dtype) for s in ((*rows, K), (C, K), (C,)))
    _, a, b = operands(groups=groups)
    return x, w / K**0.5, bias, a, b


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("order", ["rows", "columns", "strided"])
def test_a_linear_layer_in_front(monkeypatch, onednn, bias, order):
    if not onednn:
        monkeypatch.setattr(launch, "onednn", lambda: None)
    x, w, added, a, b = linear_operands()
    if order == "columns":
        w = w.t().contiguous().t()
    elif order == "strided":
        w = torch.stack([w, w], -1)[..., 0]
    added = added if bias else None
    found = linear_rational(x, w, added, a, b, "abs_sum", True)
    z = F.linear(*wide(x, w), None if added is None else added.double())
    expected = reference(z, *wide(a, b), "abs_sum", True)
    # z is off by up to K + 1 roundings of its terms, which the slope of the function passes on.
    slope = gradients(torch.ones_like(z), z, *wide(a, b), "abs_sum", True)[0].abs()
    terms = F.linear(*wide(x.abs(), w.abs()), None if added is None else added.abs().double())
    bound = value_bound(z, *wide(a, b), "abs_sum", True) + 25 * HALF_ULP * slope * terms
    assert ((found.double() - expected).abs() <= bound).all()


def test_gradients_of_a_linear_layer_in_front():
    given = [t.requires_grad_() for t in linear_operands()]
    g = torch.randn(3, 43, 60, generator=torch.Generator().manual_seed(5))
    found = torch.autograd.grad(linear_rational(*given, "sum_abs", True), given, g)
    twins = [t.requires_grad_() for t in wide(*given)]
    y = reference(F.linear(*twins[:3]), *twins[3:], "sum_abs", True)
    for value, expected in zip(found, torch.autograd.grad(y, twins, g.double()), strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_one_bias_for_all_channels_and_a_single_row():
    x, w, _, a, b = linear_operands(K=9, C=4096, rows=())
    bias = torch.tensor([0.3], requires_grad=True)
    expected = reference(F.linear(*wide(x, w, bias)), *wide(a, b), "abs_sum", True)
    found = linear_rational(x, w, bias, a, b, "abs_sum", True)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_behind_a_linear_layer(dtype):
    x, w, bias, a, b = linear_operands(dtype=dtype)
    found = linear_rational(x, w, bias, a, b, "abs_sum", True)
    z = F.linear(x, w, bias)
    torch.testing.assert_close(found, group_rational(z, a, b, "abs_sum", True), rtol=0, atol=0)


def test_which_calls_run_the_kernels(monkeypatch):
    calls = []
    monkeypatch.setattr(launch, "group_rational", lambda x, *rest: calls.append(x.shape) or x.clone())
    monkeypatch.setattr(launch, "linear_rational", lambda x, w, *rest: calls.append("linear") or F.linear(x, w))
    x, a, b = operands()
    group_rational(x, a, b)
    group_rational(x.double(), a, b)
    group_rational(x[:2], a, b)
    linear_rational(*linear_operands())
    linear_rational(*linear_operands(rows=(3,)))
    linear_rational(*linear_operands(dtype=torch.float64))
    assert calls == [(37, 132), "linear"]
    assert x[:2].numel() < register.SMALLEST


def test_what_does_not_fit_is_refused():
    x, a, b = operands(channels=130)
    with pytest.raises(ValueError, match="a number of channels that 4 groups divide, got 130"):
        group_rational(x, a, b)
    x, w, bias, a, b = linear_operands(rows=(200,), C=42)
    with pytest.raises(ValueError, match="a number of channels that 4 groups divide, got 42"):
        linear_rational(x, w, bias, a, b)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.numerator, self.denominator = (torch.nn.Parameter(t) for t in operands()[1:])

    def forward(self, x):
        return group_rational(x, self.numerator, self.denominator, "abs_sum", True)


def test_the_target_trains_with_the_kernels(monkeypatch):
    x = operands()[0]
    module = registry.backend("cpu").lower(graphopt.load(Model(), (x,)))
    for parameter in module.parameters():
        parameter.requires_grad_()
    calls = []
    backward = compiled.backward
    monkeypatch.setattr(compiled, "backward", lambda *given: calls.append(1) or backward(*given))
    module(x).sum().backward()
    assert calls
    assert module.numerator.grad.shape == (4, 5)


SCRIPT = """
import sys
sys.modules["numba"] = None
import torch
from graphopt.ops import group_rational, linear_rational
x, a, b = torch.randn(64, 128), torch.randn(4, 5), torch.randn(4, 6)
w = torch.randn(32, 128)
a.requires_grad_()
(group_rational(x, a, b, "abs_sum", True).sum() + linear_rational(x, w, None, a, b).sum()).backward()
assert a.grad is not None
"""


def test_without_numba_the_references_run():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


ROW, FLAG = "float32[::1]", "boolean"
TUPLES = ("UniTuple(float32, 5)", "UniTuple(float32, 6)", "UniTuple(float32, 4)")


@pytest.mark.parametrize(
    ("function", "signature", "instruction"),
    [
        (compiled.evaluate, (ROW, ROW, *TUPLES[:2], FLAG, FLAG), r"vfn?madd\d+ps"),
        (compiled.evaluate_in_place, (ROW, *TUPLES[:2], FLAG, FLAG), r"vfn?madd\d+ps"),
        (compiled.differentiate, (*[ROW] * 6, *TUPLES[:2], TUPLES[2], TUPLES[1], FLAG, FLAG), r"vfn?madd\d+ps"),
        (compiled.summed, (ROW, ROW, FLAG), r"vaddps"),
    ],
)
def test_loops_are_vectorised(function, signature, instruction):
    """What the speed rests on: `ps` is packed; `ss` would be one number at a time."""
    options = {key: function.targetoptions[key] for key in ("fastmath", "error_model") if key in function.targetoptions}
    fresh = numba.njit(**options)(function.py_func)
    fresh.compile(f"({', '.join(signature)})")  # what comes from the cache on disk cannot be inspected
    (assembly,) = fresh.inspect_asm().values()
    if "%xmm" not in assembly:
        pytest.skip("not an x86 processor")
    assert re.search(instruction, assembly)
