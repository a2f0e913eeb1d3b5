"""The kernels of the windowed hybrid against one query at a time in fp64; run by ../test_kernels.py."""

from typing import Any

import pytest
import torch

from graphopt.backends.triton.windowed_attention import forward
from graphopt.backends.triton.windowed_gradients import backward
from graphopt.errors import GraphOptError
from graphopt.ops.windowed_linear_attention import reference

torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("q", "k", "v", "query_features", "key_features", "gate", "key_weight", "state")
# As in check_linear.py; a quotient of two such sums.
FP32 = 1e-5
HALF = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


def loop(q, k, v, fq, fk, gate, weight, state, window, sinks, scale):
    """Each query: its window and the sinks by softmax, all keys before by features, one denominator."""
    B, H, T, _ = q.shape
    S = k.shape[2]
    k, v, fk = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v, fk))
    weight = k.new_ones(B, 1, S, 1) if weight is None else weight
    ones = torch.cat([v, torch.ones_like(v[..., :1])], -1) * weight
    memory = k.new_zeros(B, H, fq.shape[-1], v.shape[-1] + 1)
    groups = 1
    if state is not None:
        groups = H // state.shape[1]
        memory = state.repeat_interleave(groups, 1)
    entered, rows = 0, []
    for i in range(T):
        at = i + S - T
        for j in range(entered, max(at - window + 1, 0)):
            if j >= sinks:
                memory = memory + fk[:, :, j, :, None] * ones[:, :, j, None, :]
        entered = max(entered, at - window + 1)
        near = [j for j in range(at + 1) if j < sinks or j > at - window]
        sums = torch.einsum("bhf,bhfv->bhv", fq[:, :, i], memory)
        if near:
            scores = scale * torch.einsum("bhd,bhjd->bhj", q[:, :, i], k[:, :, near])
            scores = scores.masked_fill((weight[:, :, near, 0] == 0), -torch.inf)
            # Its gradient goes to the first of equal scores.
            largest = scores.max(-1, keepdim=True).values.clamp(min=-1e300)
            sums = sums + gate[..., 0] * torch.einsum("bhj,bhjv->bhv", (scores - largest).exp(), ones[:, :, near])
        rows.append(sums[..., :-1] / sums[..., -1:].clamp(min=1e-30))
    shared = memory if state is None else memory[:, ::groups]
    return torch.stack(rows, 2), shared


def inputs(
    T: int, S: int, *, H: int = 2, HKV: int = 1, HF: int = 2, D: int = 16, V: int = 16, features: int = 16,
    B: int = 2, weight: bool = True, state: bool = True, dtype: torch.dtype = torch.float32,
) -> list[Any]:  # fmt: skip
    make = torch.Generator().manual_seed(T + S)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make)

    parts = [normal(B, H, T, D), normal(B, HKV, S, D), normal(B, HKV, S, V)]
    parts += [normal(B, H, T, features).softmax(-1), normal(B, HF, S, features).softmax(-1)]
    gate = torch.rand(1, H, 1, 1, generator=make) + 0.1
    mask = None
    if weight:
        mask = torch.ones(B, 1, S, 1)
        mask[0, :, :3] = 0  # the first sequence is padded on the left
    start = torch.rand(B, HF, features, V + 1, generator=make) if state else None
    return [None if x is None else x.to(DEVICE) for x in (*(x.to(dtype) for x in parts), gate, mask, start)]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-3))


def check(tensors: list[Any], window: int, sinks: int, limit: float, scale: float = 0.3) -> None:
    exact = [None if x is None else x.double() for x in tensors]
    wanted = [i for i, x in enumerate(exact) if x is not None and NAMES[i] != "key_weight"]
    for i in wanted:
        exact[i].requires_grad_()
    out, final = loop(*exact, window, sinks, scale)
    found, state = forward(*tensors, window, sinks, scale)
    assert error(found, out) < limit
    if tensors[7] is not None or tensors[4].shape[1] == tensors[0].shape[1]:
        assert error(state, final) < limit
    make = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=make).to(DEVICE, tensors[2].dtype)
    dfinal = torch.randn(state.shape, generator=make).to(DEVICE)
    if final.shape != dfinal.shape:  # without a first state the loop does not know which heads share one
        final = final[:, :: final.shape[1] // dfinal.shape[1]]
    right = torch.autograd.grad(
        [out, final], [exact[i] for i in wanted], [dout.double(), dfinal.double()], allow_unused=True
    )
    gradients = backward(dout, dfinal, *tensors, window, sinks, scale)
    for i, expected in zip(wanted, right, strict=True):
        gradient = gradients[i]
        assert gradient is not None
        assert (gradient.shape, gradient.dtype) == (tensors[i].shape, tensors[i].dtype)
        assert error(gradient, torch.zeros_like(gradient) if expected is None else expected) < limit, NAMES[i]


@pytest.mark.parametrize(
    ("T", "S", "window", "sinks"),
    [
        (65, 65, 16, 0),  # a window within a chunk
        (70, 70, 64, 4),  # as in the paper, with sinks
        (20, 90, 33, 2),  # a cache longer than the window
        (20, 30, 16, 0),  # and one shorter
        (1, 40, 16, 0),  # a step of decoding
        (17, 17, 40, 0),  # a window over everything
        (17, 17, 0, 0),  # no window at all
    ],
)
def test_outputs_and_gradients(T: int, S: int, window: int, sinks: int) -> None:
    check(inputs(T, S), window, sinks, FP32)


@pytest.mark.parametrize(
    "dims", [{"D": 60, "V": 100, "features": 24}, {"HKV": 2}, {"HF": 1}, {"H": 4, "HKV": 2, "HF": 2}]
)
def test_dimensions_and_groups(dims: dict[str, int]) -> None:
    check(inputs(20, 20, weight=False, B=1, **dims), 8, 0, FP32)


def test_without_a_state() -> None:
    check(inputs(30, 45, state=False, B=1), 8, 0, FP32)


@pytest.mark.parametrize("dtype", list(HALF), ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    check(inputs(40, 40, B=1, D=32, V=32, features=32, dtype=dtype), 16, 2, HALF[dtype])


def test_the_gradient_of_the_shift() -> None:
    # Much linear mass, which exp(-c) does not scale: taking c for a constant is wrong by more than q's gradient.
    tensors = inputs(40, 50)
    tensors[3], tensors[5] = 8 * tensors[3], 4 * tensors[5]
    check(tensors, 16, 3, FP32, 1.0)


def test_of_equal_scores_the_first_has_the_shift() -> None:
    # Small integers have exact products: many queries find their largest score more than once, in sinks and window.
    tensors = inputs(30, 36, B=1, state=False)
    tensors[0], tensors[1] = tensors[0].sign() * (torch.arange(16, device=DEVICE) < 2), tensors[1].sign()
    check(tensors, 12, 3, FP32, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_that_see_nothing_are_zero_and_pass_no_gradient(dtype: torch.dtype) -> None:
    tensors = inputs(10, 10, state=False, B=2, dtype=dtype)
    found, _ = forward(*tensors, 4, 0, 0.3)
    assert torch.equal(found[0, :, :3], torch.zeros_like(found[0, :, :3]))
    gradients = backward(torch.ones_like(found), None, *tensors, 4, 0, 0.3)
    assert all(torch.isfinite(x).all() for x in gradients if x is not None)


def test_prefill_and_decoding_equal_one_run() -> None:
    tensors = inputs(24, 24, state=False, B=1, weight=False)
    q, k, v, fq, fk, gate, _, _ = tensors
    whole, final = forward(*tensors, 8)
    parts, state = [], None
    for first, last in ((0, 12), (12, 13), (13, 24)):
        # A cache keeps the last `window` keys; the state has all before them.
        begin = max(first - 8, 0)
        pieces = (q[:, :, first:last], k[:, :, begin:last], v[:, :, begin:last])
        pieces += (fq[:, :, first:last], fk[:, :, begin:last])
        out, state = forward(*pieces, gate, None, state, 8)
        parts.append(out)
    assert error(torch.cat(parts, 2), whole) < FP32
    assert error(state, final) < FP32


def test_agrees_with_the_operator() -> None:
    tensors = inputs(40, 50)
    for i in (0, 1, 2, 3, 4, 5, 7):
        tensors[i].requires_grad_()
    expected = reference(*tensors, 16, 3, 0.3)
    with torch.no_grad():
        found = forward(*tensors, 16, 3, 0.3)
        gradients = backward(torch.ones_like(found[0]), None, *tensors, 16, 3, 0.3)
    assert error(found[0], expected[0].detach()) < FP32
    assert error(found[1], expected[1].detach()) < FP32
    expected[0].sum().backward()
    for name, gradient, x in zip(NAMES, gradients, tensors, strict=True):
        if gradient is not None:
            assert error(gradient, x.grad) < FP32, name


def test_refuses_fp64() -> None:
    tensors = [None if x is None else x.double() for x in inputs(4, 4)]
    with pytest.raises(GraphOptError, match="expected fp16, bf16 or fp32"):
        forward(*tensors, 2)
