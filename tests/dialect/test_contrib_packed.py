"""com.microsoft operators on packed weights against onnxruntime's CPU kernels, or a formula; derivatives."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import Tensor

from graphopt.dialect import lookup

DOMAIN = "com.microsoft"
# float32 sums in another order; in float16 onnxruntime computes in float32 and rounds once, torch rounds in between.
SINGLE, HALF = {"rtol": 1e-4, "atol": 1e-4}, {"rtol": 1e-2, "atol": 1e-2}
FEATURES, OUT = 70, 5


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + sum((i + 1) * n for i, n in enumerate(shape)))
    return torch.randn(shape, generator=generator).to(dtype)


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def codes(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The integers in the bytes of the last axis, bit by bit."""
    each = np.unpackbits(packed, axis=-1, bitorder="little").reshape(*packed.shape[:-1], -1, bits)
    return (each * 2 ** np.arange(bits)).sum(-1)[..., :count].astype(np.float32)


def function(name: str) -> Any:
    return lookup(DOMAIN, name, 1).function


def packed(bits: int, block: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, scales, and both kinds of zero points."""
    blocks = -(-FEATURES // block)
    weight = integers(0, 256, OUT, blocks, block * bits // 8)
    scales = rand(OUT, blocks, dtype=dtype) * 2.0 ** (1 - bits)
    zeros = integers(0, 256, OUT, -(-blocks * bits // 8))
    return weight, scales, zeros, randn(OUT, blocks, dtype=dtype) + 2 ** (bits - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("constant", [(), (1, 2, 3)], ids=["fed", "stored"])
@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize(
    ("bits", "kind"),
    # onnxruntime has float zero points for 2 and 4 bits only.
    [*((bits, kind) for bits in (2, 4, 8) for kind in ("none", "packed")), (2, "float"), (4, "float")],
)
def test_mat_mul_n_bits(
    contrib: Any, bits: int, block: int, kind: str, constant: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight, scales, zeros, floats = packed(bits, block, dtype)
    zero = {"none": None, "packed": zeros, "float": floats}[kind]
    inputs = [randn(2, 3, FEATURES, dtype=dtype), weight, scales, zero, None, randn(OUT, dtype=dtype)]
    tolerance = SINGLE if dtype == torch.float32 else HALF
    contrib.compare(
        "MatMulNBits", inputs, K=FEATURES, N=OUT, bits=bits, block_size=block, constant=constant, **tolerance
    )


@pytest.mark.parametrize("bits", [2, 4])
def test_mat_mul_n_bits_of_early_models(contrib: Any, bits: int) -> None:
    # Scales and zero points flat.
    weight, scales, zeros, floats = packed(bits, 16, torch.float32)
    for zero in (zeros.flatten(), floats.flatten()):
        inputs = [randn(FEATURES), weight, scales.flatten(), zero]
        contrib.compare("MatMulNBits", inputs, K=FEATURES, N=OUT, bits=bits, block_size=16, **SINGLE)


@pytest.mark.parametrize("length", [FEATURES, 80])
def test_mat_mul_n_bits_with_groups(contrib: Any, length: int) -> None:
    weight, scales, _, _ = packed(4, 16, torch.float32)
    group = integers(0, 5, length, dtype=torch.int32)
    inputs = [randn(2, FEATURES), weight, scales, None, group]
    contrib.compare("MatMulNBits", inputs, K=FEATURES, N=OUT, bits=4, block_size=16, **SINGLE)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_groups_have_zero_points_of_their_own(bits: int) -> None:
    # onnxruntime's kernel passes over the zero points here, and over the width.
    weight, scales, zeros, floats = packed(bits, 16, torch.float32)
    group = integers(0, 5, FEATURES, dtype=torch.int32)
    x = randn(2, FEATURES)
    elements = codes(weight.reshape(OUT, -1).numpy(), bits, FEATURES)
    for zero, spread in ((zeros, codes(zeros.numpy(), bits, 5)), (floats, floats.numpy())):
        matrix = (elements - spread[:, group.numpy()]) * scales.numpy()[:, group.numpy()]
        found = function("MatMulNBits")(x, weight, scales, zero, group, K=FEATURES, N=OUT, bits=bits, block_size=16)
        np.testing.assert_allclose(found.numpy(), x.numpy() @ matrix.T, **SINGLE)


@pytest.mark.parametrize("kind", [0, 1], ids=["FP4", "NF4"])
def test_mat_mul_bnb4(contrib: Any, kind: int) -> None:
    weight, absmax = integers(0, 256, (33 * 6 + 1) // 2), rand(-(-33 * 6 // 16))
    options = {"K": 33, "N": 6, "block_size": 16, "quant_type": kind}
    contrib.compare("MatMulBnb4", [randn(2, 33), weight, absmax], **options, **SINGLE)
    # onnxruntime has the product with the other side of the matrix on CUDA only.
    matrix = contrib.onnxruntime("MatMulBnb4", [torch.eye(33), weight, absmax], **options)[0].T
    x = randn(2, 6)
    found = function("MatMulBnb4")(x, weight, absmax, transB=0, **options)
    np.testing.assert_allclose(found.numpy(), x.numpy() @ matrix, **SINGLE)


INDICES = torch.tensor([[0, -1, 3], [2, 9, -7]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gather_of_bytes(contrib: Any, bits: int, zero: bool, dtype: torch.dtype) -> None:
    for shape, axis in (((6,), 1), ((6, 3), -1)):
        data, scales = integers(0, 256, *shape, 40 * bits // 8), rand(*shape, 3, dtype=dtype)
        zeros = integers(0, 256, *shape, -(-3 * bits // 8)) if zero else None
        inputs, options = [data, INDICES, scales, zeros], {"bits": bits, "block_size": 16, "quantize_axis": axis}
        contrib.compare("GatherBlockQuantized", inputs, constant=(0, 2, 3), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("kind", [TensorProto.INT4, TensorProto.UINT4], ids=["int4", "uint4"])
@pytest.mark.parametrize("axes", [(0, 1), (1, 0), (0, 0), (-1, -1)])
def test_gather_of_four_bits(contrib: Any, axes: tuple[int, int], kind: int, zero: bool, dtype: torch.dtype) -> None:
    low, high, carrier = (-8, 8, torch.int8) if kind == TensorProto.INT4 else (0, 16, torch.uint8)
    shape, blocks = [18, 20], [18, 20]
    blocks[axes[1]] = 2
    data, scales = integers(low, high, *shape, dtype=carrier), rand(*blocks, dtype=dtype)
    zeros = integers(low, high, *blocks, dtype=carrier) if zero else None
    contrib.compare(
        "GatherBlockQuantized",
        [data, INDICES.to(torch.int32), scales, zeros],
        types={0: kind, 3: kind},
        constant=(0, 2, 3),
        block_size=16,
        gather_axis=axes[0],
        quantize_axis=axes[1],
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize(("blocks", "block"), [((6, 3), 16), ((1, 3), 16), ((6, 1), 0), ((1, 1), 0)])
def test_gather_of_small_floats(contrib: Any, dtype: torch.dtype, blocks: tuple[int, int], block: int) -> None:
    inputs = [randn(6, 40).to(dtype), INDICES, rand(*blocks)]
    contrib.compare("GatherBlockQuantized", inputs, constant=(0, 2), block_size=block)


def test_fused_projections_equal_separate_ones() -> None:
    # onnxruntime has the fusions on WebGPU only.
    parts = [packed(4, 32, torch.float32)[:2] for _ in range(3)]
    options = {"K": FEATURES, "bits": 4, "block_size": 32}
    a, skip, scale = randn(2, 3, FEATURES), randn(2, 3, FEATURES, seed=1), randn(FEATURES)
    total = a + skip
    normed = F.rms_norm(total, (FEATURES,), scale, 1e-5)
    plain = function("MatMulNBits")
    products = [plain(normed, *part, bias=randn(OUT, seed=i), N=OUT, **options) for i, part in enumerate(parts)]
    given = [x for i, part in enumerate(parts) for x in (*part, randn(OUT, seed=i))]
    found = function("MatMulNBitsQkv")(a, skip, scale, *given, Nq=OUT, Nkv=OUT, epsilon=1e-5, outputs=4, **options)
    torch.testing.assert_close(list(found), [*products, total])
    mlp = function("MatMulNBitsMlp")
    y, shown = mlp(a, skip, scale, *given[:6], N=OUT, activation="silu", outputs=2, **options)
    torch.testing.assert_close([y, shown], [F.silu(products[0]) * products[1], total])
    bare = mlp(a, None, None, *given[:6], N=OUT, activation="silu", outputs=1, **options)
    raw = [plain(a, *part, bias=randn(OUT, seed=i), N=OUT, **options) for i, part in enumerate(parts[:2])]
    torch.testing.assert_close(bare, F.silu(raw[0]) * raw[1])


TOKENS, HIDDEN, INNER, EXPERTS = 5, 64, 32, 4
SWIGLU = {"activation_type": "swiglu", "swiglu_fusion": 1, "swiglu_limit": 1.0, "activation_alpha": 1.7}


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("normalise", [0, 1])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "identity", "swiglu"])
@pytest.mark.parametrize("biased", [False, True])
def test_moe(contrib: Any, activation: str, k: int, normalise: int, batched: bool, biased: bool) -> None:
    wide = 2 * INNER if activation == "swiglu" else INNER
    x = randn(1, TOKENS, HIDDEN) if batched else randn(TOKENS, HIDDEN)
    inputs = [x, randn(TOKENS, EXPERTS), randn(EXPERTS, wide, HIDDEN) / 8, randn(EXPERTS, wide) if biased else None]
    inputs += [randn(EXPERTS, HIDDEN, INNER) / 8, randn(EXPERTS, HIDDEN) if biased else None]
    options: dict[str, Any] = {"activation_type": activation, "k": k, "normalize_routing_weights": normalise}
    options |= {**SWIGLU, "activation_beta": 1.0} if activation == "swiglu" else {}
    contrib.compare("MoE", inputs, **options, **SINGLE)


@pytest.mark.parametrize("block", [0, 16, 32])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_q_moe(contrib: Any, activation: str, bits: int, zero: bool, block: int) -> None:
    wide = 2 * INNER if activation == "swiglu" else INNER

    def layer(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor | None]:
        weights = integers(0, 256, EXPERTS, rows, columns * bits // 8)
        blocks = columns // block if block else 1
        scales = rand(*(EXPERTS, rows, blocks) if block else (EXPERTS, rows)) * 2.0**-bits
        shape = (EXPERTS, rows, -(-blocks * bits // 8)) if block else (EXPERTS, rows * bits // 8)
        return weights, scales, integers(0, 256, *shape) if zero else None

    up, down = layer(wide, HIDDEN), layer(HIDDEN, INNER)
    inputs = [randn(TOKENS, HIDDEN), randn(TOKENS, EXPERTS), *up[:2], randn(EXPERTS, wide)]
    inputs += [*down[:2], randn(EXPERTS, HIDDEN), None, None, None, up[2], down[2]]
    options = {"k": 2, "expert_weight_bits": bits, **(SWIGLU if activation == "swiglu" else {})}
    options |= {"block_size": block} if block else {}
    for normalise in (0, 1):
        contrib.compare("QMoE", inputs, normalize_routing_weights=normalise, **options, **SINGLE)


@pytest.mark.parametrize("normalise", [0, 1])
def test_q_moe_with_shares_of_their_own(contrib: Any, normalise: int) -> None:
    inputs = [randn(TOKENS, HIDDEN), randn(TOKENS, EXPERTS), integers(0, 256, EXPERTS, INNER, HIDDEN // 2)]
    inputs += [rand(EXPERTS, INNER) / 16, None, integers(0, 256, EXPERTS, HIDDEN, INNER // 2), rand(EXPERTS, HIDDEN)]
    inputs += [None] * 7 + [rand(TOKENS, EXPERTS)]
    contrib.compare("QMoE", inputs, k=2, normalize_routing_weights=normalise, **SINGLE)


@pytest.mark.parametrize("activation", ["silu", "swiglu"])
def test_experts_with_a_third_layer(activation: str) -> None:
    # onnxruntime has it on CUDA only.
    x, router = randn(TOKENS, 8), randn(TOKENS, 3)
    up, down, beside = randn(3, 6, 8), randn(3, 8, 6), randn(3, 6, 8, seed=1)
    found = function("MoE")(x, router, up, None, down, None, beside, randn(3, 6), k=3, activation_type=activation)
    gate = torch.einsum("th,eih->eti", x, up)
    inner = F.silu(gate) * (torch.einsum("th,eih->eti", x, beside) + randn(3, 6).unsqueeze(1))
    wanted = torch.einsum("eti,ehi,te->th", inner, down, torch.softmax(router, -1))
    torch.testing.assert_close(found, wanted)
    halves = function("MoE")(
        x, router, torch.cat((up, beside), 1), torch.cat((torch.zeros(3, 6), randn(3, 6)), 1), down, k=3,
        activation_type="swiglu", swiglu_fusion=2,
    )  # fmt: skip
    torch.testing.assert_close(halves, wanted)


def test_what_is_not_covered_says_so() -> None:
    x, weight, scales = randn(2, 32), integers(0, 256, 4, 1, 16), rand(4, 1)
    with pytest.raises(NotImplementedError, match="found 3"):
        function("MatMulNBits")(x, weight, scales, K=32, N=4, block_size=32, bits=3)
    with pytest.raises(NotImplementedError, match="layout of one kernel"):
        function("MatMulNBits")(x, weight, scales, K=32, N=4, block_size=32, weight_prepacked=1)
    with pytest.raises(NotImplementedError, match="sparse mixer"):
        function("MoE")(x, x, x, None, x, use_sparse_mixer=1)
    with pytest.raises(NotImplementedError, match="integer weights"):
        function("QMoE")(x, x, x, x, None, x, quant_type="fp8")


def doubles(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [randn(*shape, seed=i, dtype=torch.float64).requires_grad_() for i, shape in enumerate(shapes)]


def test_gradients() -> None:
    weight = integers(0, 256, 3, 2, 8)
    options = {"K": 20, "N": 3, "block_size": 16}
    assert torch.autograd.gradcheck(
        lambda x, scales, zeros, bias: function("MatMulNBits")(x, weight, scales, zeros, None, bias, **options),
        doubles((2, 20), (3, 2), (3, 2), (3,)),
    )
    assert torch.autograd.gradcheck(
        lambda scales: function("GatherBlockQuantized")(integers(0, 256, 4, 10), INDICES, scales, block_size=16),
        doubles((4, 2)),
    )
    assert torch.autograd.gradcheck(
        lambda x, router, up, b, down, c: function("MoE")(
            x, router, up, b, down, c, k=2, activation_type="swiglu", swiglu_fusion=1, normalize_routing_weights=1
        ),
        doubles((3, 4), (3, 3), (3, 4, 4), (3, 4), (3, 4, 2), (3, 4)),
    )


def test_shapes_without_data() -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    y = function("MatMulNBits")(
        meta(2, 3, 70), meta(5, 5, 8, dtype=torch.uint8), meta(5, 5), meta(5, 3, dtype=torch.uint8), K=70, N=5,
        block_size=16,
    )  # fmt: skip
    assert y.shape == (2, 3, 5)
    index = meta(2, 3, dtype=torch.int64)
    rows = function("GatherBlockQuantized")(meta(6, 20, dtype=torch.uint8), index, meta(6, 3), block_size=16)
    assert rows.shape == (2, 3, 40)
    mixed = function("MoE")(meta(5, 8), meta(5, 3), meta(3, 6, 8), None, meta(3, 8, 6), k=2)
    assert mixed.shape == (5, 8)
