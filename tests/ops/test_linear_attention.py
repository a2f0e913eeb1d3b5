"""The operators against their definitions, in fp64, with all gradients, at odd sizes."""

import pytest
import torch

from graphopt.ops import hedgehog_map, linear_attention


def naive(q, k, v, key_weight=None, causal=False, normalize=True, eps=1e-6):
    """The definition with the full [T, S] matrix."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    weights = q @ k.transpose(-1, -2)
    if key_weight is not None:
        weights = weights * key_weight.transpose(-1, -2).repeat_interleave(groups if key_weight.shape[1] > 1 else 1, 1)
    T, S = weights.shape[-2:]
    if causal:
        weights = weights * torch.ones(T, S, dtype=weights.dtype).tril(S - T)
    out = weights @ v
    return out / (weights.sum(-1, keepdim=True) + eps) if normalize else out


def operands(T, S, Hq=4, Hkv=2, K=6, V=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(T * 1000 + S)
    make = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731  # short
    return make(2, Hq, T, K), make(2, Hkv, S, K), make(2, Hkv, S, V) - 0.5


SIZES = [(1, 1), (7, 7), (63, 63), (64, 64), (65, 65), (100, 131), (1, 70)]


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "plain"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_against_the_definition(sizes, causal, normalize):
    q, k, v = operands(*sizes)
    weight = (torch.rand(2, 1, sizes[1], 1, dtype=torch.float64) > 0.3).double()
    for key_weight in (None, weight):
        found = linear_attention(q, k, v, key_weight, causal, normalize)
        expected = naive(q, k, v, key_weight, causal, normalize)
        # fp64 sums in another order: a few ulp.
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_gradients(causal):
    q, k, v = operands(5, 9, Hq=2, Hkv=1, K=3, V=2)
    weight = torch.rand(2, 1, 9, 1, dtype=torch.float64)
    values = [x.requires_grad_(True) for x in (q, k, v, weight)]
    assert torch.autograd.gradcheck(lambda *x: linear_attention(*x, causal), values)
    upstream = torch.randn(2, 2, 5, 2, dtype=torch.float64)
    found = torch.autograd.grad(linear_attention(*values, causal), values, upstream)
    expected = torch.autograd.grad(naive(*values, causal), values, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_accumulates_in_fp32(dtype):
    q, k, v = operands(500, 500, dtype=dtype)
    found = linear_attention(q, k, v, None, True)
    expected = naive(q.double(), k.double(), v.double(), None, True)
    assert found.dtype == dtype
    # Only the result is rounded: half an ulp of values below 0.5, and the sums' fp32 error.
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_prefix_invariance():
    q, k, v = operands(150, 150)
    whole = linear_attention(q, k, v, None, True)
    part = linear_attention(q[:, :, :97], k[:, :, :97], v[:, :, :97], None, True)
    torch.testing.assert_close(whole[:, :, :97], part, rtol=1e-12, atol=1e-12)


def test_padding_and_rows_without_keys():
    q, k, v = operands(20, 20)
    hidden = torch.ones(2, 1, 20, 1, dtype=torch.float64)
    hidden[:, :, 13:] = 0
    found = linear_attention(q, k, v, hidden)
    torch.testing.assert_close(found, linear_attention(q, k[:, :, :13], v[:, :, :13]), rtol=1e-12, atol=1e-12)
    assert (linear_attention(q, k, v, torch.zeros_like(hidden)) == 0).all()


@pytest.mark.parametrize("activation", ["softmax", "exp"])
@pytest.mark.parametrize("biased", [True, False])
def test_feature_map(activation, biased):
    x = torch.randn(2, 3, 7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 1, 4, dtype=torch.float64, requires_grad=True) if biased else None
    found = hedgehog_map(x, weight, bias, activation)
    y = torch.einsum("bhtd,hdf->bhtf", x, weight) + (bias if biased else 0)
    f = (lambda z: z.softmax(-1)) if activation == "softmax" else torch.exp
    torch.testing.assert_close(found, torch.cat([f(y), f(-y)], -1), rtol=1e-12, atol=1e-12)
    values = [x, weight] + ([bias] if biased else [])
    assert torch.autograd.gradcheck(lambda *v: hedgehog_map(v[0], v[1], v[2] if biased else None, activation), values)


def test_unknown_activation():
    with pytest.raises(ValueError, match="expected activation"):
        hedgehog_map(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1), None, "relu")


def test_fake_tensors_and_export():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.map = torch.nn.Parameter(torch.eye(8).repeat(2, 1, 1))

        def forward(self, q, k, v):
            query, keys = (torch.ops.graphopt.hedgehog_map(x, self.map) for x in (q, k))
            return torch.ops.graphopt.linear_attention(query, keys, v, None, True)

    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    length = torch.export.Dim("length", min=2)
    exported = torch.export.export(Model(), (q, k, v), dynamic_shapes=[{2: length}] * 3)
    longer = [torch.randn(1, 2, 33, 8) for _ in range(3)]
    torch.testing.assert_close(exported.module()(*longer), Model()(*longer))


def test_library_registration():
    for op, values in (
        (torch.ops.graphopt.linear_attention.default, operands(9, 9, dtype=torch.float32)),
        (torch.ops.graphopt.hedgehog_map.default, (torch.randn(1, 2, 3, 4), torch.randn(2, 4, 4))),
    ):
        torch.library.opcheck(op, tuple(x.requires_grad_(True) for x in values))
