"""com.microsoft attention against onnxruntime's CPU kernels, and derivatives against finite differences."""

import itertools
from typing import Any

import pytest
import torch
from onnx import TensorProto
from torch import Tensor

from graphopt.dialect import lookup

# float32 sums in another order; in float16 onnxruntime computes in float32 and rounds once, torch rounds in between.
SINGLE, HALF = {"rtol": 1e-4, "atol": 1e-5}, {"rtol": 1e-2, "atol": 5e-3}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + sum((i + 1) * n for i, n in enumerate(shape)))
    return torch.randn(shape, generator=generator).to(dtype)


def ints(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


B, S, H, D, WIDTH = 2, 3, 2, 4, 5
MASKS = {
    "none": None,
    "ends": [2, 3],
    "ends and starts": [3, 2, 1, 0],
    "packed": [3, 2, 0, 1, 2, 0, 1, 2],
    "raw": [[1, 0, 1], [0, 1, 1]],
    "nothing": [[0, 0, 0], [1, 1, 1]],
    "dummy": [[0]],
    "square": [[[1, 0, 1], [1, 1, 0], [1, 1, 1]], [[1, 1, 1], [0, 1, 1], [1, 0, 0]]],
}


@pytest.mark.parametrize("unidirectional", [0, 1])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("added", [False, True])
def test_attention(contrib: Any, mask: str, unidirectional: int, added: bool) -> None:
    # Always with a bias, without which onnxruntime reads where there is nothing.
    inputs = [
        randn(B, S, WIDTH),
        randn(WIDTH, 3 * H * D),
        randn(3 * H * D),
        None if MASKS[mask] is None else ints(MASKS[mask]),
        None,
        randn(1, H, S, S) if added else None,
    ]
    options = {"num_heads": H, "unidirectional": unidirectional, "mask_filter_value": -100.0 if added else -10000.0}
    contrib.compare("Attention", inputs, 2, **options, **SINGLE)


@pytest.mark.parametrize("mask", [None, [7, 8], [[1, 1, 0, 1, 1, 1, 0, 1], [0, 0, 1, 1, 1, 1, 1, 1]]])
@pytest.mark.parametrize("unidirectional", [0, 1])
def test_attention_with_past(contrib: Any, mask: Any, unidirectional: int) -> None:
    inputs = [randn(B, S, WIDTH), randn(WIDTH, 24), randn(24), None if mask is None else ints(mask)]
    inputs += [randn(2, B, H, 5, D)]
    contrib.compare("Attention", inputs, 2, num_heads=H, unidirectional=unidirectional, scale=0.3, **SINGLE)


def test_attention_with_values_of_another_width(contrib: Any) -> None:
    inputs = [randn(B, S, WIDTH), randn(WIDTH, 20), randn(20)]
    contrib.compare("Attention", inputs, num_heads=H, qkv_hidden_sizes=[8, 8, 4], **SINGLE)


def test_attention_over_a_mask_of_all_positions() -> None:
    # onnxruntime has it on CUDA only: the rows of the queries count.
    attention = lookup("com.microsoft", "Attention", 1).function
    whole = torch.tril(torch.ones(B, 1, 9, 9, dtype=torch.int32))
    whole[:, :, :, 2] = 0
    inputs = randn(B, S, WIDTH), randn(WIDTH, 24), randn(24)
    past = randn(2, B, H, 5, D)
    rows = whole[:, 0, 5:8, :8].contiguous()
    expected = attention(*inputs, rows, past, num_heads=H, outputs=1)
    assert torch.equal(attention(*inputs, whole, past, num_heads=H, outputs=1), expected)


def test_attention_in_a_shared_buffer_equals_a_joined_past() -> None:
    # onnxruntime has it on CUDA only.
    attention = lookup("com.microsoft", "Attention", 1).function
    inputs, buffer = (randn(B, S, WIDTH), randn(WIDTH, 24), randn(24), None), randn(2, B, H, 9, D)
    options = {"num_heads": H, "unidirectional": 1, "outputs": 2}
    y, present = attention(*inputs, buffer, None, ints([5]), past_present_share_buffer=1, **options)
    expected, joined = attention(*inputs, buffer[:, :, :, :5], **options)
    assert torch.equal(y, expected)
    assert torch.equal(present, torch.cat((joined, buffer[:, :, :, 8:]), 3))


@pytest.mark.parametrize("signed", [False, True], ids=["uint8", "int8"])
@pytest.mark.parametrize("columns", [False, True], ids=["one scale", "scale per column"])
@pytest.mark.parametrize("past", [False, True])
def test_q_attention(contrib: Any, signed: bool, columns: bool, past: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (B, S, 8), generator=generator, dtype=torch.uint8)
    weight = torch.randint(-128 if signed else 0, 128, (8, 24), generator=generator).to(
        torch.int8 if signed else torch.uint8
    )
    scale = torch.rand(24, generator=generator) * 0.02 if columns else torch.tensor(0.01)
    zeros = torch.randint(0, 100, (24,) if columns else (), generator=generator).to(weight.dtype)
    inputs = [x, weight, randn(24), torch.tensor(0.02), scale, ints([3, 2]) if not past else None]
    inputs += [torch.tensor(120, dtype=torch.uint8), zeros, randn(2, B, H, 5, D) if past else None]
    contrib.compare("QAttention", inputs, 2, num_heads=H, unidirectional=1, constant=(1,), **SINGLE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("options", [{}, {"unidirectional": 1, "scale": 0.3}])
@pytest.mark.parametrize(
    ("bias", "mask", "added", "past"),
    list(itertools.product([False, True], ["none", "ends", "raw", "square"], *[[False, True]] * 2)),
)
def test_multi_head_attention(
    contrib: Any, bias: bool, mask: str, added: bool, past: bool, options: dict[str, Any], dtype: torch.dtype
) -> None:
    keys = 5 if past else S
    padding = MASKS[mask]
    if past and padding is not None:
        padding = {"ends": [4, 5], "raw": [[1, 0, 1, 1, 1], [0, 1, 1, 1, 0]]}.get(mask, torch.ones(B, S, 5).tolist())
    inputs = [randn(B, S, H * D, seed=i, dtype=dtype) for i in range(3)]
    inputs += [randn(3 * H * D, dtype=dtype) if bias else None, None if padding is None else ints(padding)]
    inputs += [randn(1, H, S, keys, dtype=dtype) if added else None]
    inputs += [randn(B, H, 2, D, seed=i, dtype=dtype) for i in range(2)] if past else []
    tolerance = SINGLE if dtype == torch.float32 else HALF
    # The scores of masked keys are the lowest numbers of float32, which float16 cannot hold.
    outputs = 4 if dtype == torch.float32 else 3
    contrib.compare(
        "MultiHeadAttention", inputs, outputs, num_heads=H, declared={3: TensorProto.FLOAT}, **options, **tolerance
    )


@pytest.mark.parametrize("bias", [False, True])
def test_multi_head_attention_to_given_heads(contrib: Any, bias: bool) -> None:
    inputs = [randn(B, S, H * D), randn(B, H, WIDTH, D), randn(B, H, WIDTH, D, seed=1), randn(24) if bias else None]
    contrib.compare("MultiHeadAttention", inputs, num_heads=H, **SINGLE)


def test_multi_head_attention_with_wider_values(contrib: Any) -> None:
    inputs = [randn(B, S, H * D), randn(B, WIDTH, H * D), randn(B, WIDTH, 6), randn(2 * H * D + 6)]
    contrib.compare("MultiHeadAttention", inputs, num_heads=H, **SINGLE)


@pytest.mark.parametrize("steps", [1, 3])
def test_multi_head_attention_in_a_shared_buffer(contrib: Any, steps: int) -> None:
    inputs = [randn(B, steps, H * D, seed=i) for i in range(3)]
    inputs += [None, None, randn(1, H, steps, 3 + steps), randn(B, H, 9, D), randn(B, H, 9, D, seed=1), ints([3])]
    contrib.compare("MultiHeadAttention", inputs, 3, num_heads=H, unidirectional=1, **SINGLE)


ORIGIN = ints([[[1, 0, 1, 0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0, 0]], [[0, 0, 0] + [0] * 6, [1, 0, 1] + [0] * 6]])


@pytest.mark.parametrize("beams", [False, True])
@pytest.mark.parametrize("name", ["MultiHeadAttention", "DecoderMaskedMultiHeadAttention"])
@pytest.mark.parametrize("extras", [False, True])
def test_decoding_step(contrib: Any, name: str, beams: bool, extras: bool) -> None:
    qkv = [randn(4, 1, H * D, seed=i) for i in range(3)]
    mask = ints([[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 1]]) if extras else None
    added, bias = randn(1, H, 1, 4) if extras else None, randn(24) if extras else None
    buffers = [randn(4, H, 9, D), randn(4, H, 9, D, seed=1), ints([3])]
    origin = [ORIGIN] if beams else []
    if name == "MultiHeadAttention":
        contrib.compare(name, [*qkv, bias, mask, added, *buffers, *origin], 3, num_heads=H, **SINGLE)
        return
    tail = [ints([2]), *origin] if beams else [None, None]
    inputs = [*qkv, mask, added, *buffers, *tail, bias]
    contrib.compare(name, inputs, 3, num_heads=H, past_present_share_buffer=1, **SINGLE)


@pytest.mark.parametrize("masked", [False, True])
def test_decoding_step_of_a_cross_attention(contrib: Any, masked: bool) -> None:
    inputs = [randn(B, 1, H * D), randn(B, H, 5, D), randn(B, H, 5, D, seed=1)]
    inputs += [ints([[1, 1, 0, 1, 1], [0, 1, 1, 1, 1]]) if masked else None]
    contrib.compare("DecoderMaskedMultiHeadAttention", inputs, num_heads=H, **SINGLE)


def test_decoding_step_of_packed_operands_equals_separate_ones() -> None:
    # onnxruntime has that layout on CUDA only.
    decode = lookup("com.microsoft", "DecoderMaskedMultiHeadAttention", 1).function
    q, k, v = (randn(B, 1, H * D, seed=i) for i in range(3))
    rest = [None, None, randn(B, H, 9, D), randn(B, H, 9, D, seed=1), ints([3])]
    options = {"num_heads": H, "past_present_share_buffer": 1, "outputs": 3}
    packed = decode(torch.cat((q, k, v), -1), None, None, *rest, **options)
    assert all(map(torch.equal, packed, decode(q, k, v, *rest, **options)))


RULES = ["linear", "gated", "delta", "gated_delta"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (1, 3)])
@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("each", [False, True], ids=["gate per head", "gate per channel"])
def test_linear_attention(contrib: Any, rule: str, heads: tuple[int, int], steps: int, past: bool, each: bool) -> None:
    inputs = linear_inputs(rule, heads, steps, past, each)
    options = {"q_num_heads": heads[0], "kv_num_heads": heads[1], "update_rule": rule, "scale": 0.6 * each}
    contrib.compare("LinearAttention", inputs, 2, **options, **SINGLE)


def linear_inputs(rule: str, heads: tuple[int, int], steps: int, past: bool, each: bool) -> list[Tensor | None]:
    queries, kv = heads
    inputs = [randn(B, steps, queries * 4), randn(B, steps, kv * 4) * 0.5, randn(B, steps, kv * 3)]
    inputs += [randn(B, kv, 4, 3) if past else None]
    inputs += [-randn(B, steps, kv * (4 if each else 1)).abs() if "gated" in rule else None]
    return [*inputs, torch.sigmoid(randn(B, steps, kv)) if "delta" in rule else None]


@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("rule", ["linear", "gated_delta"])
def test_linear_attention_keeps_the_states_of_the_last_steps(contrib: Any, window: int, rule: str) -> None:
    # onnxruntime has windows on CUDA only: each slot is what it gives for so many steps.
    steps, options = 5, {"q_num_heads": 2, "kv_num_heads": 2, "update_rule": rule}
    inputs = linear_inputs(rule, (2, 2), steps, True, False)
    start = inputs[3]
    windowed = [*inputs[:3], torch.stack([torch.full_like(start, 9.0)] * (window - 1) + [start]), *inputs[4:]]
    y, states = contrib.torch("LinearAttention", windowed, 2, state_window=window, **options)
    for slot in range(window):
        count = steps - window + slot + 1
        if count < 1:
            assert not states[slot].any()
            continue
        cut = [x if x is None or i == 3 else x[:, :count].contiguous() for i, x in enumerate(inputs)]
        expected = contrib.onnxruntime("LinearAttention", cut, 2, **options)
        torch.testing.assert_close(states[slot], torch.from_numpy(expected[1]), **SINGLE)
    torch.testing.assert_close(y, torch.from_numpy(expected[0]), **SINGLE)


def doubles(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [randn(*shape, seed=i, dtype=torch.float64).requires_grad_() for i, shape in enumerate(shapes)]


def test_gradients() -> None:
    def function(name: str) -> Any:
        return lookup("com.microsoft", name, 1).function

    attention = function("Attention")
    assert torch.autograd.gradcheck(
        lambda x, w, b, past: attention(x, w, b, ints([[1, 0, 1, 1]]), past, num_heads=2, unidirectional=1, outputs=2),
        doubles((1, 2, 3), (3, 12), (12,), (2, 1, 2, 2, 2)),
    )
    multi = function("MultiHeadAttention")
    assert torch.autograd.gradcheck(
        lambda q, k, v, b, added, pk, pv: multi(q, k, v, b, None, added, pk, pv, ints([1]), num_heads=2, outputs=4),
        doubles((1, 2, 4), (1, 2, 4), (1, 2, 4), (12,), (1, 2, 2, 3), (1, 2, 4, 2), (1, 2, 4, 2)),
    )
    decode = function("DecoderMaskedMultiHeadAttention")
    origin = ints([[[1, 0, 0], [0, 1, 0]]])
    assert torch.autograd.gradcheck(
        lambda q, k, v, pk, pv: decode(
            q, k, v, None, None, pk, pv, ints([2]), None, origin, num_heads=1, past_present_share_buffer=1, outputs=3
        ),
        doubles((2, 1, 2), (2, 1, 2), (2, 1, 2), (2, 1, 3, 2), (2, 1, 3, 2)),
    )
    linear = function("LinearAttention")
    assert torch.autograd.gradcheck(
        lambda q, k, v, s, g, b: linear(q, k, v, s, g, b, q_num_heads=2, kv_num_heads=1, state_window=2),
        doubles((1, 3, 4), (1, 3, 2), (1, 3, 2), (2, 1, 1, 2, 2), (1, 3, 1), (1, 3, 1)),
    )
