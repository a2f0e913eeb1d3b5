"""Softmax within blocks against a loop over rows, in fp64, with all gradients, at odd sizes."""

import math

import pytest
import torch

from graphopt.ops.block_attention import block_attention


def operands(T, Hq=4, Hkv=2, D=6, V=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(T)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731  # short
    return make(2, Hq, T, D), make(2, Hkv, T, D), make(2, Hkv, T, V)


def naive(q, k, v, key_weight, block, causal, scale):
    """One row after the other, each over the keys of its block."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    groups, T = q.shape[1] // k.shape[1], q.shape[2]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(T):
                first = i // block * block
                terms = []
                for j in range(first, i + 1 if causal else min(first + block, T)):
                    w = 1.0 if key_weight is None else float(key_weight[b % key_weight.shape[0], 0, j, 0])
                    score = scale * float(q[b, h, i] @ k[b, h // groups, j])
                    terms.append((w * math.exp(score), v[b, h // groups, j]))
                mass = sum(w for w, _ in terms)
                if mass:
                    out[b, h, i] = sum(w * x for w, x in terms) / mass
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("T", "block"), [(1, 4), (3, 4), (4, 4), (9, 4), (8, 1), (13, 64)])
def test_against_the_definition(T, block, causal):
    q, k, v = operands(T)
    weight = (torch.rand(2, 1, T, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) > 0.5).double()
    for key_weight in (None, weight, 0.3 * weight):
        found = block_attention(q, k, v, key_weight, block, causal, 0.4)
        expected = naive(q, k, v, key_weight, block, causal, 0.4)
        # fp64 sums in another order: a few ulp. Rows without visible keys are zero in both.
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients(causal):
    q, k, v = operands(5, Hq=2, Hkv=1, D=3, V=2)
    weight = torch.rand(1, 1, 5, 1, dtype=torch.float64) + 0.1
    values = [x.requires_grad_(True) for x in (q, k, v, weight)]
    assert torch.autograd.gradcheck(lambda *x: block_attention(*x, 3, causal, 0.7), values)


def test_rows_without_visible_keys_pass_no_gradient():
    values = [x.requires_grad_(True) for x in operands(6)]
    weight = torch.ones(1, 1, 6, 1, dtype=torch.float64)
    weight[:, :, :3] = 0
    out = block_attention(*values, weight, 3, True, 1.0)
    assert (out[:, :, :3] == 0).all()
    gradients = torch.autograd.grad(out.sum(), values)
    assert all(torch.isfinite(g).all() and (g[:, :, :3] == 0).all() for g in gradients)


def test_causal_blocks_count_from_the_first_token():
    q, k, v = operands(21)
    whole = block_attention(q, k, v, None, 8, True, 0.4)
    for T in (3, 8, 13):
        part = block_attention(*(x[:, :, :T] for x in (q, k, v)), None, 8, True, 0.4)
        torch.testing.assert_close(whole[:, :, :T], part, rtol=1e-13, atol=1e-13)


def test_low_precision_computes_in_fp32():
    q, k, v = operands(70, dtype=torch.float16)
    found = block_attention(q, k, v, None, 32, False, 0.4)
    expected = block_attention(q.double(), k.double(), v.double(), None, 32, False, 0.4)
    assert found.dtype == torch.float16
    # Only the result is rounded: half an ulp, and the fp32 error of the sums.
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(torch.float16).eps, atol=1e-5)


def test_other_keys_than_queries_are_an_error():
    q, k, v = operands(8)
    with pytest.raises(ValueError, match="as many keys as queries"):
        block_attention(q[:, :, :5], k, v, None, 4, False, 1.0)
