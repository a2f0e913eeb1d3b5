"""Causal linear attention: every rule against a loop over tokens in fp64, with all gradients, at odd sizes."""

import pytest
import torch
import torch.nn.functional as F

from graphopt.ops.linear_attention import RULES, chunked, linear_attention, recurrent


def naive(q, k, v, decay=None, beta=None, state=None, rule="linear", scale=1.0):
    """The equations for one head and one batch at a time."""
    groups = q.shape[1] // k.shape[1]
    outputs = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    states = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1], dtype=q.dtype) if state is None else state.clone()
    result = []
    for b in range(q.shape[0]):
        for h in range(k.shape[1]):
            S = states[b, h]
            for t in range(q.shape[2]):
                if decay is not None:
                    S = torch.diag(decay[b, h, t].exp().expand(k.shape[-1])) @ S
                key, value = k[b, h, t], v[b, h, t]
                S = S + (
                    torch.outer(key, value) if beta is None else beta[b, h, t] * torch.outer(key, value - S.T @ key)
                )
                for g in range(groups):
                    outputs[b, h * groups + g, t] = scale * S.T @ q[b, h * groups + g, t]
            result.append(S)
    return outputs, torch.stack(result).view(*k.shape[:2], k.shape[-1], v.shape[-1])


def operands(T, rule, *, fine=False, heads=(4, 2), K=6, V=5, state=False, dtype=torch.float64, seed=0, B=2):
    """Arguments of the operator; keys are unit vectors, as the delta rules need them."""
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731  # short
    H, Hkv = heads
    q, k, v = make(B, H, T, K), F.normalize(make(B, Hkv, T, K), dim=-1), make(B, Hkv, T, V)
    decay = -make(B, Hkv, T, K if fine else 1).abs() if rule.startswith("gated") else None
    beta = 2 * torch.sigmoid(make(B, Hkv, T, 1)) if rule.endswith("delta") else None
    initial = make(B, Hkv, K, V) if state else None
    tensors = (q, k, v, decay, beta, initial)
    return (*(None if x is None else x.to(dtype) for x in tensors), rule)


CASES = [(rule, False) for rule in RULES] + [("gated", True)]


@pytest.mark.parametrize("T", [1, 17, 63, 64, 65, 100])
@pytest.mark.parametrize(("rule", "fine"), CASES, ids=str)
def test_against_the_definition(T, rule, fine):
    arguments = operands(T, rule, fine=fine, state=T % 2 == 1)
    expected = naive(*arguments, 0.5)
    for form in (recurrent, chunked, linear_attention):
        found = form(*arguments, 0.5)
        # fp64 in another order; the delta rules with beta up to 2 keep the size of the state.
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (6, 3), (4, 1)], ids=str)
def test_groups_of_queries(heads):
    arguments = operands(20, "gated_delta", heads=heads)
    torch.testing.assert_close(linear_attention(*arguments), naive(*arguments), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("rule", "fine"), CASES, ids=str)
def test_gradients(rule, fine):
    *tensors, rule = operands(5, rule, fine=fine, heads=(2, 1), K=3, V=2, state=True)
    values = [None if x is None else x.requires_grad_(True) for x in tensors]
    given = [x for x in values if x is not None]
    upstream = torch.randn(2, 2, 5, 2, dtype=torch.float64), torch.randn(2, 1, 3, 2, dtype=torch.float64)
    found = torch.autograd.grad(linear_attention(*values, rule), given, upstream)
    expected = torch.autograd.grad(naive(*values, rule), given, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("rule", "fine"), CASES, ids=str)
def test_gradients_over_several_chunks(rule, fine):
    *tensors, rule = operands(70, rule, fine=fine, heads=(2, 2), K=3, V=2, B=1)
    values = [None if x is None else x.requires_grad_(True) for x in tensors]
    given = [x for x in values if x is not None]
    upstream = torch.randn(1, 2, 70, 2, dtype=torch.float64)
    found = torch.autograd.grad(linear_attention(*values, rule)[0], given, upstream)
    expected = torch.autograd.grad(recurrent(*values, rule)[0], given, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("rule", "fine"), CASES, ids=str)
def test_going_on_from_a_state(rule, fine):
    q, k, v, decay, beta, _, rule = operands(90, rule, fine=fine)
    whole, last = linear_attention(q, k, v, decay, beta, None, rule)
    cut = lambda x, part: None if x is None else x[:, :, part]  # noqa: E731  # short
    state, outputs = None, []
    for part in (slice(0, 37), slice(37, 38), slice(38, 90)):
        out, state = linear_attention(*(cut(x, part) for x in (q, k, v, decay, beta)), state, rule)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 2), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rule", RULES)
def test_prefix_invariance(rule):
    q, k, v, decay, beta, _, rule = operands(90, rule)
    whole, _ = linear_attention(q, k, v, decay, beta, None, rule)
    cut = lambda x: None if x is None else x[:, :, :41]  # noqa: E731  # short
    part, _ = linear_attention(*(cut(x) for x in (q, k, v, decay, beta)), None, rule)
    torch.testing.assert_close(whole[:, :, :41], part, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rule", "fine"), CASES, ids=str)
def test_low_precision_accumulates_in_fp32(rule, fine, dtype):
    arguments = operands(300, rule, fine=fine, dtype=dtype)
    found, state = linear_attention(*arguments)
    wide = [x.double() if isinstance(x, torch.Tensor) else x for x in arguments]
    expected, last = recurrent(*wide)
    assert found.dtype == dtype
    assert state.dtype == torch.float32
    # The result is rounded once: half an ulp, and the fp32 sums' error relative to the largest value.
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=2e-5 * expected.abs().max())
    torch.testing.assert_close(state.double(), last, rtol=1e-4, atol=1e-4)


def test_strong_decays_do_not_overflow():
    q, k, v, _, _, _, rule = operands(130, "gated", dtype=torch.float32)
    decay = torch.full((2, 2, 130, 6), -50.0)
    found, state = linear_attention(q, k, v, decay, None, None, rule)
    expected, last = naive(q, k, v, decay, None, None, rule)
    torch.testing.assert_close((found, state), (expected, last), rtol=1e-5, atol=1e-6)


def test_wrong_arguments():
    q, k, v, *_ = operands(3, "linear")
    with pytest.raises(ValueError, match="expected rule to be one of linear, gated"):
        linear_attention(q, k, v, None, None, None, "other")
    with pytest.raises(ValueError, match=r"got \[\] for rule 'gated'"):
        linear_attention(q, k, v, None, None, None, "gated")


@pytest.mark.parametrize("rule", RULES)
def test_library_registration(rule):
    values = [
        x.requires_grad_(True) if isinstance(x, torch.Tensor) else x for x in operands(9, rule, dtype=torch.float32)
    ]
    torch.library.opcheck(torch.ops.graphopt.linear_attention.default, tuple(values))
