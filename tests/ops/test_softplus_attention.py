"""Softplus attention against its definition, row by row, in fp64: outputs, gradients, padding, caches, edges."""

import math

import pytest
import torch

from graphopt.ops import softplus_attention
from graphopt.ops.softplus_attention import BLOCK

POWERS = [0, 3, 15]


def naive(q, k, v, key_weight=None, power=0, causal=True):
    """One query at a time, over the list of the keys that it sees; differentiable."""
    (B, H, T, D), S = q.shape, k.shape[2]
    rows = []
    for b in range(B):
        for h in range(H):
            kv = h * k.shape[1] // H
            for i in range(T):
                hidden = [] if key_weight is None else key_weight[b if len(key_weight) > 1 else 0, 0, :, 0].tolist()
                seen = [j for j in range(S) if (not causal or j <= i + S - T) and not (hidden and hidden[j] == 0)]
                rows.append(_row(q[b, h, i], k[b, kv][seen], v[b, kv][seen], power, math.log(D)))
    return torch.stack(rows).view(B, H, T, v.shape[-1])


def _row(q, k, v, power, log_width):
    N = len(k)
    if N == 0:
        return v.new_zeros(v.shape[-1])
    cosines = torch.stack([(q / q.norm()) @ (key / key.norm()) for key in k])
    A = torch.log1p(torch.exp(log_width * math.log(N) * cosines))
    A = A / A.sum()
    if power:
        W = torch.relu(N * A - (0 if N <= 3 else 1))
        if float(W.detach().max()) > 1e-9:
            W = (W / W.max().detach()) ** power
            A = W / W.sum()
    return A @ v


def operands(T, S=None, *, heads=(4, 2), D=6, V=5, B=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731  # short
    (H, Hkv), S = heads, T if S is None else S
    return [x.to(dtype) for x in (3 * make(B, H, T, D), make(B, Hkv, S, D), make(B, Hkv, S, V))]


def some_keys(S, B=2, seed=1):
    """Weights of 0 and 1, in the first sequence 0 for the first four keys."""
    weight = (torch.rand(B, 1, S, 1, generator=torch.Generator().manual_seed(seed)) > 0.3).double()
    weight[0, :, :4] = 0
    return weight


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 9), (3, 3), (7, 12), (17, 17), (BLOCK + 6, BLOCK + 9)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_against_the_definition(T, S, power, causal, padded):
    given = [*operands(T, S, B=2 if T < BLOCK else 1), some_keys(S, B=2 if T < BLOCK else 1) if padded else None]
    found = softplus_attention(*given, power, causal)
    torch.testing.assert_close(found, naive(*given, power, causal), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("power", [0, 15])
def test_groups_of_queries(heads, power):
    given = operands(9, 11, heads=heads)
    torch.testing.assert_close(
        softplus_attention(*given, None, power), naive(*given, None, power), rtol=1e-10, atol=1e-11
    )


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("T", "S"), [(6, 8), (BLOCK + 3, BLOCK + 3)])
def test_gradients(T, S, power, causal, padded):
    given = [x.requires_grad_(True) for x in operands(T, S, heads=(2, 1), D=3, V=2, B=1)]
    weight = some_keys(S, B=1) if padded else None
    upstream = torch.randn(1, 2, T, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found, expected = (
        torch.autograd.grad(f(*given, weight, power, causal), given, upstream) for f in (softplus_attention, naive)
    )
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("needed", [0, 1, 2])
def test_one_gradient_alone(needed):
    given = operands(5)
    given[needed].requires_grad_(True)
    (found,) = torch.autograd.grad(softplus_attention(*given, None, 3).square().sum(), given[needed])
    (expected,) = torch.autograd.grad(naive(*given, None, 3).square().sum(), given[needed])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("split", [1, 3, 4, BLOCK, BLOCK + 5])
def test_prefill_and_decode_equal_the_full_run(power, split):
    q, k, v = operands(BLOCK + 9)
    whole = softplus_attention(q, k, v, None, power)
    steps = [(0, split), *((i, i + 1) for i in range(split, BLOCK + 9))]
    parts = [softplus_attention(q[:, :, a:b], k[:, :, :b], v[:, :, :b], None, power) for a, b in steps]
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("power", [0, 15])
def test_later_tokens_change_nothing(power):
    q, k, v = operands(BLOCK + 30)
    whole = softplus_attention(q, k, v, None, power)
    for length in (1, 2, 5, BLOCK + 1):
        found = softplus_attention(*(x[:, :, :length] for x in (q, k, v)), None, power)
        torch.testing.assert_close(found, whole[:, :, :length], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("power", [0, 15])
@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_nothing(power, left):
    q, k, v = operands(12)
    expected = softplus_attention(q, k, v, None, power)

    def with_junk(x, value):
        junk = torch.full_like(x[:, :, :5], value)
        return torch.cat([junk, x] if left else [x, junk], 2)

    weight = with_junk(torch.ones(2, 1, 12, 1, dtype=torch.float64), 0.0)
    found = softplus_attention(*(with_junk(x, 7.0) for x in (q, k, v)), weight, power)
    torch.testing.assert_close(found[:, :, 5:] if left else found[:, :, :12], expected, rtol=1e-11, atol=1e-12)
    if left:
        assert (found[:, :, :5] == 0).all(), "those see nothing"


def test_rows_that_see_nothing():
    q, k, v = operands(7, 4)  # three queries stand before all keys
    weight = torch.zeros(2, 1, 4, 1, dtype=torch.float64)
    for power in POWERS:
        given = [x.clone().requires_grad_(True) for x in (q, k, v)]
        out = softplus_attention(*given, None, power)
        assert (out[:, :, :3] == 0).all()
        torch.testing.assert_close(out, naive(q, k, v, None, power), rtol=1e-10, atol=1e-11)
        hidden = softplus_attention(*given, weight, power, False)
        assert (hidden == 0).all()
        for found in torch.autograd.grad(hidden.sum(), given):
            assert (found == 0).all()
    for T, S in ((0, 4), (3, 0), (0, 0)):
        for causal in (True, False):
            assert torch.equal(softplus_attention(*operands(T, S), None, 3, causal), torch.zeros(2, 4, T, 5).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_uniform_rows_stay_uniform(dtype, direction):
    """Where all keys point the same way nothing exceeds the mean, whatever rounding makes of it."""
    q, k, v = operands(BLOCK + 40, heads=(2, 1), D=31, B=1, dtype=dtype)
    k = torch.linspace(0.5, 2, k.shape[2], dtype=dtype)[:, None] * k[:, :, :1]
    q = direction * k.expand(1, 2, -1, -1) + 0 * q
    given = [x.clone().requires_grad_(True) for x in (q, k, v)]
    out = softplus_attention(*given, None, 15)
    mean = v.double().cumsum(2) / torch.arange(1, v.shape[2] + 1, dtype=torch.float64)[:, None]
    torch.testing.assert_close(out.double(), mean.expand_as(out), rtol=1e-4, atol=1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.square().sum(), given))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("power", [0, 15])
def test_zero_vectors(dtype, power):
    given = operands(9, dtype=dtype)
    given[0][:, :, 4] = 0
    given[1][:, :, 6] = 0
    given = [x.requires_grad_(True) for x in given]
    out = softplus_attention(*given, None, power)
    mean = given[2][:, :, :5].mean(2).repeat_interleave(2, 1)  # the query without a direction sees five keys
    torch.testing.assert_close(out[:, :, 4], mean, rtol=2e-3, atol=2e-3)
    found = torch.autograd.grad(out.square().sum(), given)
    assert all(g.isfinite().all() for g in found)
    assert (found[0][:, :, 4] == 0).all()
    assert (found[1][:, :, 6] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("power", [0, 15])
def test_low_precision_computes_in_fp32(dtype, power):
    """(N A - 1)^15 would overflow fp16 from 2.1 on; a row of 1,500 keys has entries far above that."""
    given = operands(1500, heads=(2, 1), D=32, B=1, dtype=dtype)
    given[0][..., 1400:, :] = given[1][..., 700:701, :] * 50
    found = softplus_attention(*given, None, power)
    expected = softplus_attention(*(x.double() for x in given), None, power)
    assert found.dtype == dtype
    # The rounding of the result; fp32 weights to the power of 15 are off by 30 of their own roundings.
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=5e-6)


def test_nan_stays_visible():
    q, k, v = operands(6)
    q[0, 0, 3, 1] = torch.nan
    for power in (0, 3):
        found = softplus_attention(q, k, v, None, power)
        assert found[0, 0, 3].isnan().all()
        assert found.isnan().sum() == found.shape[-1]


@pytest.mark.parametrize("backward", [False, True])
def test_memory_does_not_grow_with_the_square_of_the_length(backward):
    """The largest value is a block of queries with all keys, forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    self.elements = max(self.elements, x.numel())
            return out

    T = 2048
    given = [x.requires_grad_(backward) for x in operands(T, heads=(1, 1), dtype=torch.float32, B=1)]
    with Largest() as mode:
        out = softplus_attention(*given, None, 15)
        if backward:
            out.sum().backward()
    assert mode.elements <= BLOCK * T


def test_wrong_power():
    with pytest.raises(ValueError, match="expected power to be at least 0, got -1"):
        softplus_attention(*operands(2), None, -1)


def test_library_registration():
    values = [x.requires_grad_(True) for x in operands(5, heads=(2, 1), B=1, dtype=torch.float32)]
    # Not with dynamic shapes: the number of blocks depends on them.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for weight in (None, torch.ones(1, 1, 5, 1)):
        arguments = (*values, weight, 3, True)
        torch.library.opcheck(torch.ops.graphopt.softplus_attention.default, arguments, test_utils=checks)
