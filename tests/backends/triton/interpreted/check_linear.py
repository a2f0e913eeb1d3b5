"""The kernels of linear attention against one token at a time in fp64; run by ../test_kernels.py."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from graphopt.backends.triton.backward import gradient_kernel, reverse_kernel
from graphopt.backends.triton.forward import forward_kernel, output_kernel
from graphopt.backends.triton.linear_attention import forward
from graphopt.backends.triton.linear_gradients import backward
from graphopt.backends.triton.pairs import pairs_backward_kernel, pairs_kernel
from graphopt.backends.triton.recurrent import recurrent_kernel
from graphopt.backends.triton.solve import solve_kernel
from graphopt.errors import GraphOptError
from graphopt.ops.linear_attention import chunked

torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Rule, and whether the decay is one per feature.
RULES = [("linear", False), ("gated", False), ("gated", True), ("delta", False), ("gated_delta", False)]
# The interpreter needs seconds where a decay is one per feature or keys are solved for: where the other rules show what
# a test is about, those are for `-m slow`.
SLOW = pytest.mark.slow
LATER = [
    ("gated", torch.float16),
    ("delta", torch.bfloat16),
    ("gated_delta", torch.float16),
    ("gated_delta", torch.bfloat16),
]
MOST = [*RULES[:2], pytest.param(*RULES[2], marks=SLOW), pytest.param(*RULES[3], marks=SLOW), RULES[4]]
PAIRS = (pairs_kernel, pairs_backward_kernel, solve_kernel)
NAMES = ("q", "k", "v", "decay", "beta", "state")
# fp32 rounds by 6e-8; sums over a hundred tokens, and the solve of the delta rules, add up to tens of that.
FP32 = 1e-5
# RMS(error) / RMS(value). fp16: as in flash-linear-attention's tests. bf16 holds three bits less: merely storing a
# value costs 1.7e-3, and the operands of two products are rounded before that.
HALF = {
    (torch.float16, "linear"): (1e-3, 1e-3),
    (torch.float16, "gated"): (4e-3, 4e-3),
    (torch.float16, "delta"): (6e-3, 8e-3),
    (torch.float16, "gated_delta"): (6e-3, 8e-3),
    (torch.bfloat16, "linear"): (3e-3, 3e-3),
    (torch.bfloat16, "gated"): (4e-3, 4e-3),
    (torch.bfloat16, "delta"): (6e-3, 8e-3),
    (torch.bfloat16, "gated_delta"): (6e-3, 8e-3),
}


def loop(q, k, v, decay, beta, state, scale):
    """S <- exp(decay) S; S <- S + k (beta (v - S^T k))^T or S + k v^T; o = scale S^T q."""
    groups = q.shape[1] // k.shape[1]
    k, v, decay, beta, S = (None if x is None else x.repeat_interleave(groups, 1) for x in (k, v, decay, beta, state))
    if S is None:
        S = q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1])
    outputs = []
    for t in range(q.shape[2]):
        value = v[:, :, t]
        if decay is not None:
            S = decay[:, :, t].exp().unsqueeze(-1) * S
        if beta is not None:
            value = beta[:, :, t] * (value - torch.einsum("bhkv,bhk->bhv", S, k[:, :, t]))
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, :, t], value)
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", S, q[:, :, t]))
    # Every head of a group computed the same state.
    return torch.stack(outputs, 2), S[:, ::groups]


def inputs(
    rule: str, fine: bool = False, T: int = 65, K: int = 32, V: int = 32, B: int = 1, H: int = 2, HKV: int = 1,
    dtype: torch.dtype = torch.float32, state: bool = True, seed: int = 0,
) -> list[Any]:  # fmt: skip
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make)

    q, k, v = normal(B, H, T, K), F.normalize(normal(B, HKV, T, K), dim=-1), normal(B, HKV, T, V)
    decay = F.logsigmoid(normal(B, HKV, T, K if fine else 1)) if rule.startswith("gated") else None
    beta = normal(B, HKV, T, 1).sigmoid() if rule.endswith("delta") else None
    start = normal(B, HKV, K, V) if state else None
    halves = [x.to(dtype) for x in (q, k, v)]
    return [None if x is None else x.to(DEVICE) for x in (*halves, decay, beta, start)]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference, size = found.double() - expected.double(), expected.double().norm()
    return float(difference.norm() / size.clamp(min=1e-30))


def check(
    tensors: list[Any],
    rule: str,
    limits: tuple[float, float],
    forms: tuple[str, ...],
    *,
    decays_against_terms: bool = False,
) -> None:
    """Outputs of all forms, the final state, and every gradient."""
    scale = tensors[0].shape[-1] ** -0.5
    exact = [None if x is None else x.double().requires_grad_() for x in tensors]
    out, final = loop(*exact, scale)
    for form in forms:
        found, state = forward(*tensors, rule, scale, form=form)
        assert found.dtype == tensors[2].dtype
        assert state.dtype == torch.float32
        assert error(found, out) < limits[0], form
        assert error(state, final) < limits[0], form
    make = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=make).to(DEVICE, tensors[0].dtype)
    dfinal = torch.randn(final.shape, generator=make).to(DEVICE)
    wanted = [x for x in exact if x is not None]
    expected = torch.autograd.grad([out, final], wanted, [dout.double(), dfinal.double()])
    found = backward(dout, dfinal, *tensors, rule, scale)
    assert [x is None for x in found] == [x is None for x in tensors]
    names = [name for name, x in zip(NAMES, tensors, strict=True) if x is not None]
    for name, given, gradient, right in zip(
        names, [x for x in tensors if x is not None], [x for x in found if x is not None], expected, strict=True
    ):
        assert (gradient.shape, gradient.dtype) == (given.shape, given.dtype)
        if name == "decay" and decays_against_terms:
            terms = (exact[0] * expected[0]).norm()
            assert (gradient.double() - right).norm() < limits[1] * terms
            continue
        assert error(gradient, right) < limits[1], name


# Lengths around the chunk of 64, dimensions around the blocks of a power of two.
SIZES = [(1, 16, 16), (17, 60, 100), (63, 100, 16), (65, 16, 60), (100, 16, 128), (64, 128, 16), (129, 16, 16)]


# The rules share the sizes between them; all of each are for `-m slow`.
FEW = {
    ("linear", False): (1, 63, 100, 64),
    ("gated", False): (1, 17, 65, 129),
    ("gated", True): (17,),
    ("delta", False): (65,),
    ("gated_delta", False): (129,),
}
CASES = [
    pytest.param(*rule, *size, marks=() if size[0] in FEW[rule] else SLOW)
    for rule in RULES
    for size in SIZES
    if not rule[1] or size[0] in (1, 17, 65)
]


@pytest.mark.parametrize(("rule", "fine", "T", "K", "V"), CASES)
def test_outputs_and_gradients(rule: str, fine: bool, T: int, K: int, V: int) -> None:
    forms = ("fused", "recurrent") if fine else ("fused", "parallel", "recurrent")
    check(inputs(rule, fine, T, K, V, H=1), rule, (FP32, FP32), forms if T < 100 else forms[:1])


@pytest.mark.parametrize(("rule", "fine"), [*RULES[:3], MOST[3], RULES[4]])
def test_blocks_smaller_than_the_dimensions(rule: str, fine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in (forward_kernel, output_kernel, recurrent_kernel, reverse_kernel, gradient_kernel, *PAIRS):
        monkeypatch.setattr(kernel, "configs", kernel.configs[:1])
    check(inputs(rule, fine, T=18, K=40, V=24, H=1), rule, (FP32, FP32), ("fused", "parallel", "recurrent"))


HALVES = [
    pytest.param(
        *rule, dtype, id=f"{rule[0]}-{rule[1]}-{dtype}", marks=SLOW if rule[1] or (rule[0], dtype) in LATER else ()
    )
    for rule in RULES
    for dtype in (torch.float16, torch.bfloat16)
]


@pytest.mark.parametrize(("rule", "fine", "dtype"), HALVES)
def test_half_precision(rule: str, fine: bool, dtype: torch.dtype) -> None:
    tensors = inputs(rule, fine, T=70, H=1, dtype=dtype)
    check(tensors, rule, HALF[dtype, rule], ("fused",) if fine else ("fused", "parallel", "recurrent"))


def test_half_precision_of_a_decay_per_feature() -> None:
    tensors = inputs("gated", True, T=17, K=16, V=16, H=1, dtype=torch.float16)
    check(tensors, "gated", HALF[torch.float16, "gated"], ("fused",))


@pytest.mark.parametrize(("rule", "fine"), MOST)
def test_groups_and_batches_without_a_state(rule: str, fine: bool) -> None:
    tensors = inputs(rule, fine, T=20, K=16, V=16, B=2 if rule == "linear" else 1, H=4, HKV=2, state=False)
    check(tensors, rule, (FP32, FP32), ("fused",) if fine else ("fused", "parallel", "recurrent"))


@pytest.mark.parametrize(("rule", "fine"), MOST)
def test_agrees_with_the_operator(rule: str, fine: bool) -> None:
    tensors = inputs(rule, fine, T=66, K=16, V=16, H=1)
    for found, expected in zip(forward(*tensors, rule, 0.3), chunked(*tensors, rule, 0.3), strict=True):
        assert error(found, expected) < FP32


@pytest.mark.parametrize(("rule", "fine"), MOST)
def test_the_state_continues(rule: str, fine: bool) -> None:
    q, k, v, decay, beta, state = inputs(rule, fine, T=80, K=16, V=16, H=1)
    whole, final = forward(q, k, v, decay, beta, state, rule)
    parts = []
    for first, last in ((0, 70), (70, 71), (71, 80)):
        pieces = [None if x is None else x[:, :, first:last] for x in (q, k, v, decay, beta)]
        out, state = forward(*pieces, state, rule)
        parts.append(out)
    assert error(torch.cat(parts, 2), whole) < FP32
    assert error(state, final) < FP32


@pytest.mark.parametrize(("rule", "fine"), MOST)
def test_strides_and_shared_decays(rule: str, fine: bool) -> None:
    # As projections leave them, [B, T, H, D]; decay and beta of one sequence for the whole batch.
    q, k, v, decay, beta, state = inputs(rule, fine, T=20, K=16, V=16, B=2, H=1)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    decay, beta = (None if x is None else x[:1] for x in (decay, beta))
    scale = 0.25
    shared = [None if x is None else x.double().requires_grad_() for x in (q, k, v, decay, beta, state)]
    repeated = [x.expand(2, -1, -1, -1) if x is not None and x.shape[0] == 1 else x for x in shared]
    out, final = loop(*repeated, scale)
    found, _ = forward(q, k, v, decay, beta, state, rule, scale)
    assert error(found, out) < FP32
    wanted = [x for x in shared if x is not None]
    expected = torch.autograd.grad(out.sum() + final.sum(), wanted)
    gradients = backward(
        torch.ones_like(found), torch.ones_like(final).float(), q, k, v, decay, beta, state, rule, scale
    )
    for gradient, right in zip([x for x in gradients if x is not None], expected, strict=True):
        assert gradient.shape == right.shape
        assert error(gradient, right) < FP32


@pytest.mark.parametrize(("rule", "fine"), [r for r in RULES if r[0].startswith("gated")])
def test_decays_far_below_what_an_exponential_holds(rule: str, fine: bool) -> None:
    # -30 per token is exp(-1900) over a chunk; its reciprocal, which a form of two factors would need, is infinite.
    tensors = inputs(rule, fine, T=66, K=16, V=16, H=1)
    tensors[3] = -30 * torch.rand(tensors[3].shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    # The gradient of a decay is a difference of sums of q dq and k dk, here a millionth of them: its error is theirs.
    check(tensors, rule, (FP32, FP32), ("fused", "recurrent"), decays_against_terms=True)


def test_equal_keys_in_the_delta_rule() -> None:
    # The triangle of ones: powers of M would reach 1e18 before they cancel.
    tensors = inputs("delta", T=64, K=16, V=16, H=1)
    tensors[1] = tensors[1][:, :, :1].expand(-1, -1, 64, -1).contiguous()
    tensors[4] = torch.full_like(tensors[4], 1.0)
    check(tensors, "delta", (FP32, FP32), ("fused", "parallel", "recurrent"))


def test_missing_output_gradients_are_zero() -> None:
    tensors = inputs("gated_delta", T=20, K=16, V=16)
    dout = torch.ones_like(tensors[0][..., :16])
    zero = torch.zeros_like(tensors[5])
    for found, expected in zip(
        backward(dout, None, *tensors, "gated_delta"), backward(dout, zero, *tensors, "gated_delta"), strict=True
    ):
        assert found is not None
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "gatd"}, "expected rule to be one of"),
        ({"rule": "gated"}, "expected decay for the gated rules"),
        ({"K": 257}, "dimensions up to 256"),
        ({"dtype": torch.float64}, "expected fp16, bf16 or fp32"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    sizes = {key: value for key, value in change.items() if key != "rule"}
    tensors = inputs("linear", T=2, **sizes)
    with pytest.raises(GraphOptError, match=message):
        forward(*tensors, change.get("rule", "linear"))
