"""The kernels of softplus attention against one query at a time in fp64; run by ../test_softplus.py."""

import math
from typing import Any

import pytest
import torch

from graphopt.backends.triton import enable
from graphopt.backends.triton.launch import Kernel
from graphopt.backends.triton.softplus_attention import backward, forward
from graphopt.backends.triton.softplus_backward import softplus_key_kernel, softplus_query_kernel
from graphopt.backends.triton.softplus_forward import softplus_attention_kernel
from graphopt.errors import GraphOptError
from graphopt.ops import softplus_attention
from graphopt.ops.softplus_attention import reference

torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOW = pytest.mark.slow
NAMES = ("q", "k", "v")
# RMS(error) / RMS(value). fp32 rounds scores of up to 20 by 6e-8 of themselves, and a power of 15 multiplies a relative
# error by 15, or by more where the mean is subtracted from a number close to it. (Where a power leaves a row nearly one
# key, gradients are differences of equal numbers, in the reference as well; no row here is of that kind alone.)
FP32 = 1e-5
# The 16-bit types round weights, gradients of scores and results, each by 1.7e-3 in bf16 and an eighth of it in fp16.
HALF = {torch.float16: 6e-4, torch.bfloat16: 4e-3}


def loop(q, k, v, weight, power, causal):
    """Each query and head on its own; every key that it sees by its number."""
    (B, H, T, D), S, groups = q.shape, k.shape[2], q.shape[1] // k.shape[1]
    zero = v.new_zeros(v.shape[-1])
    rows = []
    for b in range(B):
        shown = [j for j in range(S) if weight is None or float(weight[b, 0, j, 0]) != 0]
        for h in range(H):
            for i in range(T):
                seen = [j for j in shown if not causal or j <= i + S - T]
                if not seen:
                    rows.append(zero)
                    continue
                keys, values, N = k[b, h // groups, seen], v[b, h // groups, seen], len(seen)
                cosines = (keys / keys.norm(dim=-1, keepdim=True)) @ (q[b, h, i] / q[b, h, i].norm())
                a = torch.log(1 + torch.exp(math.log(D) * math.log(N) * cosines))
                a = a / a.sum()
                if power:
                    w = (N * a - (1 if N > 3 else 0)).clamp(min=0) ** power
                    if float(w.detach().sum()) > 0:
                        a = w / w.sum()
                rows.append(a @ values)
    return torch.stack(rows).view(B, H, T, -1)


def inputs(
    T: int, S: int, *, B: int = 1, H: int = 2, HKV: int = 1, D: int = 16, V: int = 16, hidden: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[Any]:  # fmt: skip
    make = torch.Generator().manual_seed(T + S + D)
    shapes = (B, H, T, D), (B, HKV, S, D), (B, HKV, S, V)
    made: list[Any] = [torch.randn(shape, generator=make).to(DEVICE, dtype) for shape in shapes]
    weight = None
    if hidden:
        weight = torch.ones(B, 1, S, 1, device=DEVICE)
        weight[0, :, :hidden] = 0  # the first sequence is padded on the left
    return [*made, weight]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-3))


def check(tensors: list[Any], power: int, causal: bool, limit: float) -> None:
    *values, weight = tensors
    exact = [x.double().requires_grad_() for x in values]
    out = loop(*exact, weight, power, causal)
    found = forward(*values, weight, power, causal)
    assert (found.shape, found.dtype) == (out.shape, values[2].dtype)
    assert error(found, out.detach()) < limit
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, values[2].dtype)
    right = torch.autograd.grad(out, exact, dout.double())
    gradients = backward(dout, *values, weight, power, causal)
    assert gradients[3] is None
    for name, x, gradient, expected in zip(NAMES, values, gradients, right, strict=False):
        assert (gradient.shape, gradient.dtype) == (x.shape, x.dtype)
        assert error(gradient, expected) < limit, name


SIZES = [
    {"T": 20, "S": 20},
    {"T": 5, "S": 75, "B": 2, "H": 4, "HKV": 2, "D": 20, "V": 24, "hidden": 30},  # a cache, groups, padding
    {"T": 1, "S": 40, "D": 24},  # a step of decoding
    {"T": 12, "S": 5, "H": 1},  # queries that see nothing
    {"T": 70, "S": 70, "H": 1},  # two blocks of keys
]


@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=SLOW)], ids=["causal", "all"])
@pytest.mark.parametrize("power", [0, 3, pytest.param(1, marks=SLOW), pytest.param(15, marks=SLOW)])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_outputs_and_gradients(sizes: dict[str, int], power: int, causal: bool) -> None:
    check(inputs(**sizes), power, causal, FP32)


@pytest.mark.parametrize("power", [0, 1, 15])
def test_without_an_order(power: int) -> None:
    check(inputs(6, 20, hidden=4), power, False, FP32)


@pytest.mark.parametrize("power", [0, 15])
@pytest.mark.parametrize("dtype", list(HALF), ids=str)
def test_half_precision(dtype: torch.dtype, power: int) -> None:
    check(inputs(30, 30, D=32, V=32, dtype=dtype), power, True, HALF[dtype])


def test_blocks_smaller_than_the_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in (softplus_attention_kernel, softplus_query_kernel, softplus_key_kernel):
        monkeypatch.setattr(kernel, "configs", kernel.configs[:1])
    check(inputs(40, 70, H=1, hidden=3), 3, True, FP32)


def test_strides_of_projections_and_one_mask_for_all() -> None:
    *values, _ = inputs(10, 10, B=2, HKV=2)
    values = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in values]
    weight = torch.ones(1, 1, 10, 1, device=DEVICE)
    weight[0, 0, 4] = 0
    expected = loop(*(x.double() for x in values), weight.expand(2, -1, -1, -1), 3, True)
    assert error(forward(*values, weight, 3), expected) < FP32


@pytest.mark.parametrize("power", [1, 3, 15])
def test_uniform_rows_are_not_sharpened(power: int) -> None:
    # All keys in one direction, of any lengths: cosines that differ by rounding only.
    q, k, v, _ = inputs(30, 30, H=1)
    k = k[:, :, :1] * torch.linspace(0.5, 7, 30, device=DEVICE)[:, None]
    found = forward(q, k, v, None, power)
    means = v.double().cumsum(2) / torch.arange(1, 31, device=DEVICE)[:, None]
    # Up to three keys are sharpened without an offset, which keeps a uniform row as well.
    assert error(found, means) < FP32
    gradients = backward(torch.ones_like(found), q, k, v, None, power)
    assert all(torch.isfinite(x).all() for x in gradients[:3])


@pytest.mark.parametrize("power", [0, 3])
def test_vectors_without_a_direction(power: int) -> None:
    tensors = inputs(12, 12, H=1)
    tensors[0][:, :, 7], tensors[1][:, :, 2] = 0, 0
    exact = [x.double().requires_grad_() for x in tensors[:3]]
    out = reference(*exact, None, power)
    found = forward(*tensors, power)
    assert error(found, out.detach()) < FP32
    gradients = backward(torch.ones_like(found), *tensors, power)
    for gradient, expected in zip(gradients, torch.autograd.grad(out.sum(), exact), strict=False):
        assert error(gradient, expected) < FP32
    assert not gradients[0][:, :, 7].any()
    assert not gradients[1][:, :, 2].any()


@pytest.mark.parametrize("power", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_that_see_nothing_are_zero_and_pass_no_gradient(dtype: torch.dtype, power: int) -> None:
    tensors = inputs(10, 10, hidden=4, dtype=dtype)
    found = forward(*tensors, power)
    assert not found[0, :, :4].any()
    gradients = backward(torch.ones_like(found), *tensors, power)
    assert all(torch.isfinite(x).all() for x in gradients[:3])
    assert not gradients[0][0, :, :4].any()
    assert not gradients[1][0, :, :4].any()
    assert not gradients[2][0, :, :4].any()


def test_keys_opposed_to_their_query() -> None:
    # Scores near -15: e^-15 is 3e-7, of which 1 + e^-15 keeps two bits in fp32.
    q, k, v, _ = inputs(3, 40, H=1, D=64)
    tensors = [q[:, :, :1].expand(-1, -1, 3, -1).contiguous(), 0.2 * k - q[:, :, :1], v]
    check([*tensors, None], 0, False, FP32)


def test_lengths_of_vectors_do_not_matter() -> None:
    q, k, v, _ = inputs(12, 12)
    large = forward(1e8 * q, 1e-6 * k, v, None, 3)
    assert error(large, forward(q, k, v, None, 3).double()) < FP32


def test_prefill_and_decoding_equal_one_run() -> None:
    q, k, v, weight = inputs(24, 24, hidden=2)
    whole = forward(q, k, v, weight, 3)
    parts = [
        forward(q[:, :, first:last], k[:, :, :last], v[:, :, :last], weight[:, :, :last], 3)
        for first, last in ((0, 12), (12, 13), (13, 24))
    ]
    assert error(torch.cat(parts, 2), whole.double()) < FP32


def test_the_operator_takes_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    enable(DEVICE)
    names: list[str] = []
    start = Kernel.__call__

    def counting(self: Kernel, *args: object, **kwargs: object) -> None:
        names.append(self.name)
        start(self, *args, **kwargs)

    monkeypatch.setattr(Kernel, "__call__", counting)
    tensors = inputs(10, 16, hidden=3)
    found = [x.clone().requires_grad_() for x in tensors[:3]]
    exact = [x.double().requires_grad_() for x in tensors[:3]]
    out, right = softplus_attention(*found, tensors[3], 3), loop(*exact, tensors[3], 3, True)
    out.sin().sum().backward()
    right.sin().sum().backward()
    for x, expected in zip(found, exact, strict=True):
        assert error(x.grad, expected.grad) < FP32
    forms = ["_softplus_attention_kernel", "_softplus_query_kernel", "_softplus_key_kernel"]
    assert names == [forms[0], *forms]
    names.clear()
    softplus_attention(*(x.double() for x in tensors[:3]))
    softplus_attention(*tensors[:3], None, 33)
    assert names == []


def test_refusals() -> None:
    *values, _ = inputs(4, 4)
    with pytest.raises(GraphOptError, match="a power of 0 to 32"):
        forward(*values, None, 33)
    with pytest.raises(GraphOptError, match="expected fp16, bf16 or fp32"):
        forward(*(x.double() for x in values))
