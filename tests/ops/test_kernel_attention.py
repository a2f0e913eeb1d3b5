"""Kernel attention over all keys against its definition, in fp64, with all gradients, at odd sizes."""

import pytest
import torch

from graphopt.ops import kernel_attention


def naive(q, k, v, key_weight=None, eps=1e-6):
    """The definition with the full [T, S] matrix."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    weights = q @ k.transpose(-1, -2)
    if key_weight is not None:
        weights = weights * key_weight.transpose(-1, -2).repeat_interleave(groups if key_weight.shape[1] > 1 else 1, 1)
    return weights @ v / (weights.sum(-1, keepdim=True) + eps)


def operands(T, S, Hq=4, Hkv=2, K=6, V=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(T * 1000 + S)
    make = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731  # short
    return make(2, Hq, T, K), make(2, Hkv, S, K), make(2, Hkv, S, V) - 0.5


@pytest.mark.parametrize("sizes", [(1, 1), (7, 7), (63, 63), (65, 65), (100, 131), (1, 70)], ids=str)
def test_against_the_definition(sizes):
    q, k, v = operands(*sizes)
    weight = (torch.rand(2, 1, sizes[1], 1, dtype=torch.float64) > 0.3).double()
    for key_weight in (None, weight):
        found = kernel_attention(q, k, v, key_weight)
        # fp64 sums in another order: a few ulp.
        torch.testing.assert_close(found, naive(q, k, v, key_weight), rtol=1e-11, atol=1e-11)


def test_gradients():
    q, k, v = operands(5, 9, Hq=2, Hkv=1, K=3, V=2)
    weight = torch.rand(2, 1, 9, 1, dtype=torch.float64)
    values = [x.requires_grad_(True) for x in (q, k, v, weight)]
    assert torch.autograd.gradcheck(kernel_attention, values)
    upstream = torch.randn(2, 2, 5, 2, dtype=torch.float64)
    found = torch.autograd.grad(kernel_attention(*values), values, upstream)
    expected = torch.autograd.grad(naive(*values), values, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_accumulates_in_fp32(dtype):
    q, k, v = operands(500, 500, dtype=dtype)
    found = kernel_attention(q, k, v)
    expected = naive(q.double(), k.double(), v.double())
    assert found.dtype == dtype
    # Only the result is rounded: half an ulp of values below 0.5, and the sums' fp32 error.
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_padding_and_rows_without_keys():
    q, k, v = operands(20, 20)
    hidden = torch.ones(2, 1, 20, 1, dtype=torch.float64)
    hidden[:, :, 13:] = 0
    found = kernel_attention(q, k, v, hidden)
    torch.testing.assert_close(found, kernel_attention(q, k[:, :, :13], v[:, :, :13]), rtol=1e-12, atol=1e-12)
    assert (kernel_attention(q, k, v, torch.zeros_like(hidden)) == 0).all()


def test_fake_tensors_and_export():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.map = torch.nn.Parameter(torch.eye(8).repeat(2, 1, 1))

        def forward(self, q, k, v):
            query, keys = (torch.ops.graphopt.hedgehog_map(x, self.map) for x in (q, k))
            return torch.ops.graphopt.kernel_attention(query, keys, v)

    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    length = torch.export.Dim("length", min=2)
    exported = torch.export.export(Model(), (q, k, v), dynamic_shapes=[{2: length}] * 3)
    longer = [torch.randn(1, 2, 33, 8) for _ in range(3)]
    torch.testing.assert_close(exported.module()(*longer), Model()(*longer))


def test_library_registration():
    values = tuple(x.requires_grad_(True) for x in operands(9, 9, dtype=torch.float32))
    torch.library.opcheck(torch.ops.graphopt.kernel_attention.default, values)
