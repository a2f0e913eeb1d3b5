"""The Triton kernels on a GPU at real sizes, against the operators' references in fp64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from graphopt.ops.linear_attention import chunked
from graphopt.ops.windowed_linear_attention import reference

pytestmark = pytest.mark.gpu

# Rule, decay per feature, and RMS(error) / RMS(value) of outputs and gradients in bf16. Storing a value in bf16 alone
# costs 1.7e-3, which leaves the additive rules 4e-3; the delta rules as in flash-linear-attention's tests.
RULES = [
    ("linear", False, 4e-3, 4e-3),
    ("gated", False, 4e-3, 4e-3),
    ("gated", True, 4e-3, 4e-3),
    ("delta", False, 6e-3, 8e-3),
    ("gated_delta", False, 6e-3, 8e-3),
]
# B, H, Hkv, T, K, V
SIZES = [(1, 8, 8, 8192, 128, 128), (4, 4, 2, 4096, 128, 128), (2, 4, 1, 1000, 60, 100), (1, 2, 2, 500, 256, 256)]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def inputs(rule: str, fine: bool, size: tuple[int, ...]) -> list[Any]:
    B, H, HKV, T, K, V = size
    make = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make, device="cuda")

    q, k, v = normal(B, H, T, K), F.normalize(normal(B, HKV, T, K), dim=-1), normal(B, HKV, T, V)
    decay = F.logsigmoid(normal(B, HKV, T, K if fine else 1)) / 16 if rule.startswith("gated") else None
    beta = normal(B, HKV, T, 1).sigmoid() if rule.endswith("delta") else None
    return [q.bfloat16(), k.bfloat16(), v.bfloat16(), decay, beta, normal(B, HKV, K, V)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("rule", "fine", "limit", "gradient_limit"), RULES)
def test_linear_attention(rule: str, fine: bool, limit: float, gradient_limit: float, size: tuple[int, ...]) -> None:
    pytest.importorskip("triton")
    from graphopt.backends.triton.linear_attention import forward
    from graphopt.backends.triton.linear_gradients import backward

    tensors = inputs(rule, fine, size)
    scale = size[4] ** -0.5
    exact = [None if x is None else x.double().requires_grad_() for x in tensors]
    out, final = chunked(*exact, rule, scale)
    for form in ("fused", "parallel", *(["recurrent"] if size[3] <= 1000 else [])):
        found, state = forward(*tensors, rule, scale, form=form)
        assert error(found, out) < limit, form
        assert error(state, final) < limit, form
    dout, dfinal = torch.randn_like(tensors[0][..., :1].expand(*out.shape)), torch.randn_like(tensors[5])
    wanted = [x for x in exact if x is not None]
    right = torch.autograd.grad([out, final], wanted, [dout.double(), dfinal.double()])
    gradients = [x for x in backward(dout, dfinal, *tensors, rule, scale) if x is not None]
    for i, (gradient, expected) in enumerate(zip(gradients, right, strict=True)):
        assert error(gradient, expected) < gradient_limit, i


@pytest.mark.parametrize("size", SIZES[:3], ids=str)
def test_windowed_linear_attention(size: tuple[int, ...]) -> None:
    pytest.importorskip("triton")
    from graphopt.backends.triton.windowed_attention import forward
    from graphopt.backends.triton.windowed_gradients import backward

    _, H, _, _, K, _ = size
    q, k, v, *_ = inputs("linear", False, size)
    k = k * K**0.5  # scores of ordinary size
    fq, fk = q.float().softmax(-1).bfloat16(), k.float().softmax(-1).bfloat16()
    gate = torch.full((1, H, 1, 1), 0.1, device="cuda")
    tensors = [q, k, v, fq, fk.repeat_interleave(H // fk.shape[1], 1), gate]
    exact = [x.double().requires_grad_() for x in tensors]
    out, final = reference(*exact, None, None, 64, 4, K**-0.5)
    found, state = forward(*tensors, None, None, 64, 4, K**-0.5)
    assert error(found, out) < 6e-3  # a quotient of two sums with the errors above
    assert error(state, final) < 4e-3
    dout = torch.randn_like(found)
    right = torch.autograd.grad(out, exact, dout.double())
    gradients = backward(dout, None, *tensors, None, None, 64, 4, K**-0.5)
    for i, expected in enumerate(right):
        assert error(gradients[i], expected) < 1e-2, i  # type: ignore[arg-type]  # a mask has no gradient


def test_operators_dispatch_to_the_kernels() -> None:
    pytest.importorskip("triton")
    from graphopt.backends.triton import enable
    from graphopt.ops import kernels, linear_attention

    enable()
    assert kernels.registered(linear_attention, "cuda") is not None
    q, k, v, *_ = (x for x in inputs("linear", False, (1, 4, 2, 300, 64, 64)) if x is not None)
    q.requires_grad_()
    out, _ = linear_attention(q, k, v)
    expected, _ = chunked(q.detach().double(), k.double(), v.double())
    assert error(out, expected) < 4e-3
    out.sum().backward()
    assert q.grad is not None
