"""com.microsoft operators on quantised tensors against onnxruntime's CPU kernels, or a formula."""

from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto
from torch import Tensor

from graphopt.dialect import lookup

DOMAIN = "com.microsoft"
TYPES = {torch.uint8: (0, 256), torch.int8: (-128, 128)}
BOTH = pytest.mark.parametrize("dtype", TYPES, ids=["uint8", "int8"])
# Where a sum of floats is rounded to an integer, another order of the sum may turn a tie: one step.
STEP = {"atol": 1.0}
# Exact integer sums, scaled in float32.
SCALED = {"rtol": 1e-5, "atol": 1e-5}


def codes(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    low, high = TYPES[dtype]
    generator = torch.Generator().manual_seed(100 * seed + sum(shape))
    return torch.randint(low, high, shape, generator=generator).to(dtype)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + sum(shape)))


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def zero(dtype: torch.dtype, offset: int = 0) -> Tensor:
    """A zero point beside the middle of the range."""
    low, high = TYPES[dtype]
    return torch.tensor((low + high) // 2 + offset, dtype=dtype)


def real(x: Tensor, scale: Tensor | float, point: Tensor | int) -> np.ndarray:
    return (x.numpy().astype(np.float32) - np.asarray(point, np.float32)) * np.asarray(scale, np.float32)


def stored(x: np.ndarray, scale: float, point: Tensor) -> np.ndarray:
    limits = torch.iinfo(point.dtype)
    return np.clip(np.round(x / np.float32(scale)) + point.item(), limits.min, limits.max)


@BOTH
@pytest.mark.parametrize("name", ["QLinearAdd", "QLinearMul"])
@pytest.mark.parametrize("shape", [(40, 50), (50,), (40, 1), (1, 1), ()])
def test_pairs(contrib: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = [codes(dtype, 40, 50), number(0.031), zero(dtype, 9), codes(dtype, *shape, seed=1), number(0.017)]
    inputs += [zero(dtype, -7), number(0.05), zero(dtype, 4)]
    contrib.compare(name, inputs, **STEP)
    contrib.compare(name, [*inputs[3:6], *inputs[:3], *inputs[6:]], **STEP)


@BOTH
def test_missing_zero_points_are_zero(dtype: torch.dtype) -> None:
    # onnxruntime refuses or crashes on such nodes.
    a, b = codes(dtype, 4, 5), codes(dtype, 5)
    point = torch.zeros((), dtype=dtype)
    for name in ("QLinearAdd", "QLinearMul"):
        function = lookup(DOMAIN, name, 1).function
        given = function(a, number(0.1), point, b, number(0.2), point, number(0.3), point)
        assert torch.equal(function(a, number(0.1), None, b, number(0.2), None, number(0.3)), given)
    for name, options in (
        ("QLinearSigmoid", {}),
        ("QLinearLeakyRelu", {}),
        ("QLinearAveragePool", {"kernel_shape": [3]}),
        ("QLinearReduceMean", {"axes": [1], "keepdims": 0}),
    ):
        function = lookup(DOMAIN, name, 1).function
        x = codes(dtype, 1, 4, 5)
        given = function(x, number(0.1), point, number(0.3), point, **options)
        assert torch.equal(function(x, number(0.1), None, number(0.3), **options), given)


@BOTH
def test_activations_are_exact(contrib: Any, dtype: torch.dtype) -> None:
    every = torch.arange(*TYPES[dtype]).to(dtype)
    inputs = [every, number(0.05), zero(dtype, 9), number(1 / 256), torch.tensor(TYPES[dtype][0], dtype=dtype)]
    contrib.compare("QLinearSigmoid", inputs)
    contrib.compare("QLinearLeakyRelu", [*inputs[:3], number(0.04), zero(dtype, -20)], alpha=0.3)


@BOTH
@pytest.mark.parametrize("opset", [12, 13])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("scale", [0.02, 0.3])
def test_softmax(contrib: Any, axis: int, opset: int, scale: float, dtype: torch.dtype) -> None:
    point = torch.tensor(TYPES[dtype][0], dtype=dtype)
    inputs = [codes(dtype, 3, 4, 7), number(scale), zero(dtype), number(1 / 256), point]
    contrib.compare("QLinearSoftmax", inputs, opset=opset, axis=axis, **STEP)
    contrib.compare("QLinearSoftmax", [*inputs[:2], None, *inputs[3:]], opset=opset, axis=axis, **STEP)


@BOTH
@pytest.mark.parametrize("shapes", [[(4, 5)] * 3, [(4, 1), (1, 5), (4, 5)], [(5,), (4, 1), ()]])
def test_where(contrib: Any, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    condition = rand(*shapes[0]) > 0.5
    inputs = [condition, codes(dtype, *shapes[1]), number(0.031), zero(dtype, 9), codes(dtype, *shapes[2], seed=1)]
    contrib.compare("QLinearWhere", [*inputs, number(0.017), zero(dtype, -7), number(0.02), zero(dtype, 4)])


@BOTH
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_concat(contrib: Any, axis: int, dtype: torch.dtype) -> None:
    sizes = [[3, 4, 2], [3, 4, 2], [3, 4, 2]]
    sizes[1][axis], sizes[2][axis] = 5, 1
    inputs = [number(0.02), zero(dtype, 4)]
    for i, size in enumerate(sizes):
        # The first is stored as the result is.
        inputs += [codes(dtype, *size), number(0.02 + 0.01 * i), zero(dtype, 4 - 9 * i)]
    contrib.compare("QLinearConcat", inputs, axis=axis)


POOLS = [
    ((2, 3, 9), {"kernel_shape": [3]}),
    ((2, 3, 9, 8), {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1]}),
    ((2, 3, 9, 8), {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1], "count_include_pad": 1}),
    ((2, 3, 9, 8), {"kernel_shape": [2, 3], "strides": [2, 2], "ceil_mode": 1}),
    ((2, 3, 9, 8), {"kernel_shape": [3, 2], "auto_pad": "SAME_UPPER"}),
    ((2, 3, 4, 5, 6), {"kernel_shape": [2, 3, 2]}),
]


@BOTH
@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize(("shape", "options"), POOLS)
def test_average_pool(
    contrib: Any, shape: tuple[int, ...], options: dict[str, Any], last: int, dtype: torch.dtype
) -> None:
    x = codes(dtype, *shape)
    x = x.movedim(1, -1).contiguous() if last else x
    inputs = [x, number(0.031), zero(dtype, 9), number(0.02), zero(dtype, -4)]
    contrib.compare("QLinearAveragePool", inputs, channels_last=last, **options, **STEP)
    contrib.compare("QLinearGlobalAveragePool", inputs, channels_last=last, **STEP)


@BOTH
@pytest.mark.parametrize(("axes", "keep"), [([1], 1), ([0, -1], 0), ([], 0)])
def test_reduce_mean(axes: list[int], keep: int, dtype: torch.dtype) -> None:
    # onnxruntime declares it without a kernel.
    x, points = codes(dtype, 3, 4, 5), (zero(dtype, 9), zero(dtype, -4))
    mean = real(x, 0.03, points[0]).mean(tuple(axes) or None, keepdims=bool(keep))
    function = lookup(DOMAIN, "QLinearReduceMean", 1).function
    found = function(x, number(0.03), points[0], number(0.01), points[1], axes=axes, keepdims=keep)
    assert found.dtype == dtype
    np.testing.assert_allclose(found.numpy(), stored(mean, 0.01, points[1]), atol=1)


STORED = {
    TensorProto.UINT8: torch.uint8,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT16: torch.uint16,
    TensorProto.INT16: torch.int16,
    TensorProto.UINT4: torch.uint8,
    TensorProto.INT4: torch.int8,
}


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize("kind", STORED, ids=TensorProto.DataType.Name)
@pytest.mark.parametrize("pointed", [True, False])
def test_quantize_and_dequantize(contrib: Any, kind: int, axis: int | None, pointed: bool) -> None:
    x = randn(3, 4, 5) * 10
    # Halves, which are rounded to even.
    x[0, 0] = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    shape = () if axis is None else (x.shape[axis],)
    scale = torch.ones(()) if axis is None else rand(*shape) + 0.1
    points = torch.full(shape, 3).to(STORED[kind])
    options = {} if axis is None else {"axis": axis}
    packed = kind in (TensorProto.UINT4, TensorProto.INT4)
    if pointed or kind == TensorProto.UINT8:
        inputs = [x, scale, points if pointed else None]
        found = contrib.compare("QuantizeLinear", inputs, types={2: kind}, declared={0: kind}, **options)[0]
        limits = (0, 15) if kind == TensorProto.UINT4 else (-8, 7)
        assert not packed or (found.min().item(), found.max().item()) == limits
    else:
        low = 0 if kind in (TensorProto.UINT4, TensorProto.UINT16) else -8
        found = torch.arange(low, low + 16).to(STORED[kind]).expand(3, 4, 16)[..., :5].contiguous()
    inputs = [found, scale, points if pointed else None]
    contrib.compare("DequantizeLinear", inputs, types={0: kind, 2: kind}, **options)


def test_dequantize_wide_integers(contrib: Any) -> None:
    x = torch.arange(-60, 60, dtype=torch.int32).reshape(4, 30) * 1000
    contrib.compare("DequantizeLinear", [x, number(0.01)])
    contrib.compare("DequantizeLinear", [x, rand(4)], axis=0)


PRODUCTS = pytest.mark.parametrize(
    ("left", "right"), [(torch.uint8, torch.uint8), (torch.uint8, torch.int8), (torch.int8, torch.int8)]
)
COLUMNS = pytest.mark.parametrize("columns", [False, True], ids=["one scale", "scale per column"])


def parameters(dtype: torch.dtype, columns: bool, count: int) -> tuple[Tensor, Tensor]:
    """A scale and a zero point of the right factor."""
    if not columns:
        return number(0.03), zero(dtype, 5)
    return rand(count) * 0.1 + 0.01, codes(dtype, count)


@PRODUCTS
@COLUMNS
@pytest.mark.parametrize("transposed", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("added", [None, (7,), (9, 1), (9, 7)])
def test_gemm(
    contrib: Any,
    left: torch.dtype,
    right: torch.dtype,
    columns: bool,
    transposed: tuple[int, int],
    added: tuple[int, ...] | None,
) -> None:
    a, b = codes(left, 9, 5), codes(right, 5, 7)
    a, b = (x.t().contiguous() if turned else x for x, turned in zip((a, b), transposed, strict=True))
    c = None if added is None else (randn(*added) * 1000).to(torch.int32)
    inputs = [a, number(0.02), zero(left, 9), b, *parameters(right, columns, 7), c]
    options = {"transA": transposed[0], "transB": transposed[1], "alpha": 0.5}
    contrib.compare("QGemm", inputs, **options, **SCALED)
    contrib.compare("QGemm", [*inputs, number(0.5), zero(left, 3)], **options, **STEP)


@PRODUCTS
@COLUMNS
@pytest.mark.parametrize("pointed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_products_to_float(
    contrib: Any, left: torch.dtype, right: torch.dtype, columns: bool, pointed: bool, biased: bool
) -> None:
    b, (scale, point) = codes(right, 8, 5), parameters(right, columns, 5)
    bias = randn(5) if biased else None
    points = [zero(left, 9), point] if pointed else [None, None]
    inputs = [codes(left, 2, 3, 8), b, number(0.02), scale, *points, bias]
    contrib.compare("MatMulIntegerToFloat", inputs, **SCALED)
    inputs = [randn(2, 3, 8), b, scale, points[1], bias]
    contrib.compare("DynamicQuantizeMatMul", inputs, **SCALED)
    contrib.compare("DynamicQuantizeMatMul", inputs, constant=(1, 2, 3), **SCALED)


def test_products_of_several_matrices(contrib: Any) -> None:
    points = codes(torch.uint8, 2, 1, 5)
    b, scale = codes(torch.uint8, 2, 8, 5), rand(2, 1, 5)
    inputs = [codes(torch.uint8, 2, 3, 8), b, number(0.02), scale, zero(torch.uint8, 9), points]
    contrib.compare("MatMulIntegerToFloat", inputs, **SCALED)
    contrib.compare("DynamicQuantizeMatMul", [randn(2, 3, 8), b, scale, points], **SCALED)


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("weights", TYPES, ids=["uint8", "int8"])
@pytest.mark.parametrize("channels", [False, True], ids=["one scale", "scale per channel"])
def test_convolution(contrib: Any, last: int, weights: torch.dtype, channels: bool) -> None:
    x = codes(torch.uint8, 1, 4, 9, 8)
    x = x.movedim(1, -1).contiguous() if last else x
    point = zero(weights, 3)
    inputs = [x, number(0.02), zero(torch.uint8, 9), codes(weights, 6, 2, 3, 2)]
    inputs += [rand(6) * 0.05 if channels else number(0.03), point.expand(6).contiguous() if channels else point]
    inputs += [number(0.3), zero(torch.uint8, -9), (randn(6) * 300).to(torch.int32)]
    contrib.compare(
        "QLinearConv", inputs, channels_last=last, group=2, pads=[1, 0, 0, 1], strides=[2, 1], constant=(3,), **STEP
    )


@pytest.mark.parametrize("segments", [False, True])
@BOTH
def test_embedding(contrib: Any, segments: bool, dtype: torch.dtype) -> None:
    def ids(high: int) -> Tensor:
        return torch.randint(0, high, (2, 5), generator=torch.Generator().manual_seed(high)).to(torch.int32)

    names = ["words", "places", "segments", "gamma", "beta"]
    tables = [codes(dtype, *shape) for shape in ((10, 8), (7, 8), (3, 8), (8,), (8,))]
    scales, points = [number(0.01 + 0.01 * i) for i in range(5)], [zero(dtype, 3 * i) for i in range(5)]
    if not segments:
        at = names.index("segments")
        tables[at] = scales[at] = points[at] = None
    mask = ids(2) if segments else None
    inputs = [ids(10), ids(3) if segments else None, *tables, mask, *scales, *points]
    contrib.compare("QEmbedLayerNormalization", inputs, 2, epsilon=1e-5, rtol=1e-4, atol=1e-4)


# Gates of float32, and a state whose rounding is the same on either side.
RECURRENT = {"rtol": 1e-4, "atol": 1e-5}
STATES = {
    "nothing": [None] * 5,
    "bias": [randn(2, 48), None, None, None, None],
    "states": [None, None, randn(2, 3, 6), randn(2, 3, 6, seed=1), None],
    "lengths": [randn(2, 48), torch.tensor([5, 3, 1]).to(torch.int32), None, None, None],
    "everything": [
        randn(2, 48), torch.tensor([2, 5, 3]).to(torch.int32), randn(2, 3, 6), randn(2, 3, 6, seed=1), randn(2, 18)
    ],
}  # fmt: skip


@COLUMNS
@pytest.mark.parametrize("weights", TYPES, ids=["uint8", "int8"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("state", STATES)
def test_recurrent_network(contrib: Any, weights: torch.dtype, columns: bool, direction: str, state: str) -> None:
    ways = 2 if direction == "bidirectional" else 1
    rest = [None if x is None else x if x.dtype == torch.int32 else x[:ways].contiguous() for x in STATES[state]]
    shape = (ways, 24) if columns else (ways,)
    inputs = [randn(5, 3, 4), codes(weights, ways, 4, 24), codes(weights, ways, 6, 24), *rest]
    for seed in (1, 2):
        # onnxruntime wants the zero points of all columns to be equal, and those of signed weights to be zero.
        point = 0 if columns and weights == torch.int8 else zero(weights, seed).item()
        inputs += [rand(*shape) * 0.02 + 0.005 * seed, torch.full(shape, point, dtype=weights)]
    options = {"input_forget": 1, "clip": 0.9} if state == "everything" else {}
    contrib.compare(
        "DynamicQuantizeLSTM",
        inputs,
        3,
        hidden_size=6,
        direction=direction,
        constant=(1, 2, 8, 9, 10, 11),
        **options,
        **RECURRENT,
    )


def test_gradients_of_scales() -> None:
    def double(*shape: int) -> Tensor:
        return rand(*shape).double().requires_grad_()

    x = codes(torch.uint8, 3, 4)
    dequantise = lookup(DOMAIN, "DequantizeLinear", 1).function
    assert torch.autograd.gradcheck(lambda scale: dequantise(x, scale, codes(torch.uint8, 4), axis=1), double(4))
    multiply = lookup(DOMAIN, "MatMulIntegerToFloat", 1).function
    assert torch.autograd.gradcheck(
        lambda a, b, bias: multiply(x, codes(torch.int8, 4, 2), a, b, None, None, bias),
        (double(), double(2), double(2)),
    )
