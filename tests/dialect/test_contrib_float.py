"""com.microsoft operators on floats against onnxruntime's CPU kernels, or a formula where there is none."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.dialect import lookup

DOMAIN = "com.microsoft"
# float32 sums in another order; in float16 onnxruntime computes in float32 and rounds once, torch rounds in between.
SINGLE, HALF = {"rtol": 1e-4, "atol": 1e-5}, {"rtol": 5e-3, "atol": 5e-3}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + sum((i + 1) * n for i, n in enumerate(shape)))
    return torch.randn(shape, generator=generator).to(dtype)


def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(high)).to(dtype)


def function(name: str) -> Any:
    return lookup(DOMAIN, name, 1).function


def case(name: str, *inputs: Any, outputs: int = 1, **options: Any) -> Any:
    """A node; a tuple stands for random floats of that shape."""
    shown = [f"{key}={value}" for key, value in options.items()]
    return pytest.param(name, inputs, outputs, options, id="-".join([name, *shown, f"{len(inputs)}in"]))


FLOATS = [
    *(case(name, (2, 3, 5)) for name in ("Gelu", "FastGelu", "QuickGelu")),
    *(case(name, (2, 3, 5), (5,)) for name in ("BiasGelu", "FastGelu")),
    case("QuickGelu", (2, 3), alpha=1.2),
    case("TransposeMatMul", (2, 4, 3), (2, 5, 4), transA=1, transB=1, alpha=0.5),
    case("FusedMatMul", (4, 2, 3), (2, 5, 3), transBatchA=1, transB=1),
    case("FusedMatMul", (4, 2, 3), (4, 2, 5), transBatchB=1, transA=1, transBatchA=1, alpha=2.0),
    *(
        case("FusedGemm", (4, 3), (4, 5), shape, transA=1, alpha=0.5, beta=2.0, activation=name, **options)
        for shape, name, options in [
            (None, "Relu", {}),
            ((5,), "Tanh", {}),
            ((3, 1), "Sigmoid", {}),
            ((3, 5), "Softplus", {}),
            ((3, 5), "Softsign", {}),
            ((3, 5), "LeakyRelu", {"activation_alpha": 0.3}),
            ((3, 5), "Elu", {"activation_alpha": 0.3}),
            ((3, 5), "Celu", {"activation_alpha": 0.3}),
            ((3, 5), "ThresholdedRelu", {"activation_alpha": 0.3}),
            ((3, 5), "Selu", {"activation_alpha": 0.3, "activation_gamma": 0.6}),
            ((3, 5), "HardSigmoid", {"activation_alpha": 0.3, "activation_beta": 0.6}),
            ((3, 5), "ParametricSoftplus", {"activation_alpha": 0.3, "activation_beta": 0.6}),
            ((3, 5), "ScaledTanh", {"activation_alpha": 0.3, "activation_beta": 0.6}),
        ]
    ),
    *(
        case("FusedConv", (2, 4, 7, 6), (6, 2, 3, 2), (6,), added, group=2, strides=[2, 1], **options)
        for added, options in [
            (None, {}),
            ((2, 6, 3, 5), {"activation": "Relu"}),
            (None, {"activation": "Tanh"}),
            (None, {"activation": "Sigmoid"}),
            ((2, 6, 3, 5), {"activation": "LeakyRelu", "activation_params": [0.1]}),
            (None, {"activation": "Clip", "activation_params": [-0.5, 0.5]}),
            (None, {"activation": "HardSigmoid", "activation_params": [0.3, 0.6]}),
            (None, {"activation": "HardSwish"}),
            (None, {"activation": "HardSwish", "activation_params": [0.3, 0.6]}),
        ]
    ),
    case("FusedConv", (1, 2, 7), (3, 2, 3), activation="Relu", dilations=[2], pads=[2, 1]),
    case("FusedConv", (1, 2, 5, 6), (3, 2, 3, 3), activation="Relu", auto_pad="SAME_LOWER", strides=[2, 2]),
    case(
        "ConvTransposeWithDynamicPads", (1, 2, 4, 5), (2, 3, 3, 2), ints(0, 1, 1, 0, dtype=torch.int64), (3,),
        strides=[2, 2], output_padding=[1, 0],
    ),
    *(
        case("CausalConvWithState", (2, 3, steps), (3, 1, 4), bias, past, outputs=2, **options)
        for steps in (1, 6)
        for bias, past, options in [
            (None, None, {}),
            ((3,), None, {"activation": "silu"}),
            ((3,), (2, 3, 3), {"activation": "swish"}),
            ((3,), (2, 3, 6), {"dilation": 2}),
        ]
    ),
    case("CausalConvWithState", (2, 5, 2, 3), (6, 1, 4), (6,), (2, 3, 2, 3), outputs=2, channels_last=1),
    case("CausalConvWithState", (2, 5, 6), (6, 1, 1), outputs=2, channels_last=1),
    *(
        case("GridSample", (1, 2, 4, 5), (1, 3, 3, 2), mode=mode, padding_mode=padding, align_corners=corners)
        for mode in ("bilinear", "nearest", "bicubic")
        for padding, corners in (("zeros", 0), ("border", 1), ("reflection", 0))
    ),
    *(
        case("SkipLayerNormalization", (2, 3, 6), skip, (6,), *rest, outputs=outputs, epsilon=1e-5)
        for skip in ((2, 3, 6), (1, 3, 6), (3, 6))
        for rest in ((), ((6,),), ((6,), (6,)), (None, (6,)))
        for outputs in (1, 4)
    ),
    *(
        case("SkipSimplifiedLayerNormalization", (2, 3, 6), (2, 3, 6), (6,), *rest, outputs=1)
        for rest in ((), ((6,),))
    ),
    *(case("GatedRMSNorm", (2, 3, 8), (4,), (2, 3, 8), activation=name) for name in ("silu", "swish", "sigmoid")),
    case("GatedAdd", (2, 3, 4), (2, 3, 4), (2, 3, 1)),
    case("ScaledSiLU", (2, 3), alpha=1.3),
    case("ScaledSiLU", (2, 3), ()),
    *(case("BranchwiseRMSNorm", (2, 3, 4), *scale) for scale in ((), ((12,),), ((3, 4),), ((4,),))),
    *(case("BranchwiseRMSNorm", (2, 12), *scale, num_branches=3) for scale in ((), ((12,),), ((3, 4),), ((4,),))),
    *(
        case("HyperConnectionPreMix", streams, mix, reduction_scale=0.5, **options)
        for mix in ((2, 5, 3), (2, 5, 3, 1), (2, 5, 3, 4))
        for streams, options in (((2, 5, 3, 4), {}), ((2, 5, 12), {"num_branches": 3}))
    ),
    case("HyperConnectionPreMix", (2, 5, 12), (2, 5, 12), num_branches=3),
    *(
        case("HyperConnectionPostMix", streams, (2, 5, 4), mix, *matrix, **options)
        for mix in ((2, 5, 3), (2, 5, 3, 1), (2, 5, 3, 4))
        for matrix in ((), ((2, 5, 3, 3),))
        for streams, options in (((2, 5, 3, 4), {}), ((2, 5, 12), {"num_branches": 3}))
    ),
    case("EngramGate", (2, 3, 4, 8), (2, 3, 4, 8), (2, 3, 8), (4, 8), (4, 8)),
    case("EngramGate", (2, 3, 4, 8), (2, 3, 4, 8), (2, 3, 8), (4, 8), (4, 8), (4, 8), outputs=2),
    case("Inverse", (2, 4, 4)),
    case("CDist", (5, 3), (4, 3)),
    case("CDist", (40, 3), (50, 3), metric="euclidean"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "inputs", "outputs", "options"), FLOATS)
def test_floats(contrib: Any, name: str, inputs: tuple[Any, ...], outputs: int, options: dict[str, Any]) -> None:
    tensors = [randn(*x, seed=i) if isinstance(x, tuple) else x for i, x in enumerate(inputs)]
    contrib.compare(name, tensors, outputs, **options, **SINGLE)
    # float16 is no input of CDist, and has too few digits for positions and inverses.
    if name not in ("CDist", "GridSample", "Inverse"):
        halves = [x.half() if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in tensors]
        contrib.compare(name, halves, outputs, **options, **HALF)


BOXES = torch.tensor([[0.1, 0.2, 0.9, 0.7], [0, 0, 1, 1], [-0.2, 0.3, 1.3, 0.6], [0.8, 0.9, 0.1, 0.2], [0.5] * 4])
IDS, SEGMENTS = integers(0, 10, 2, 5), integers(0, 3, 2, 5)
PLACES = integers(0, 7, 2, 5)
TOKENS = ints(1, 2, 3, 1, 2, 4, 4, 4, 4, 4, 1, 2, 3, 4, 5, dtype=torch.int64).reshape(3, 5)

OTHERS = [
    *(
        case("CropAndResize", (2, 3, 7, 6), BOXES, ints(0, 1, 1, 0, 0), ints(*size), mode=mode, extrapolation_value=7.0)
        for mode in ("bilinear", "nearest")
        for size in ((3, 4), (1, 1), (7, 6), (2, 1))
    ),
    *(
        case("EmbedLayerNormalization", IDS, *given, outputs=3, epsilon=1e-5)
        for given in [
            (SEGMENTS, (10, 8), (7, 8), (3, 8), (8,), (8,)),
            (SEGMENTS, (10, 8), (7, 8), (3, 8), (8,), (8,), integers(0, 2, 2, 5)),
            (None, (10, 8), (7, 8), None, (8,), (8,), None, PLACES),
            (None, (10, 8), (7, 8), None, (8,), (8,), integers(-1, 3, 2, 5), PLACES[:1]),
        ]
    ),
    case("LinearAttentionGate", (2, 3, 4), (4,), (4,), (2, 3, 4), outputs=2),
    case("LinearAttentionGate", (2, 3, 4), (4,), (4,)),
    case("Pad", (4, 5), ints(1, 2, 0, 3, dtype=torch.int64), torch.tensor(1.5)),
    case("Pad", (4, 5), ints(1, -1, 0, 2, dtype=torch.int64).reshape(1, 4), torch.tensor([1.5])),
    *(case("Pad", (4, 5), ints(1, -1, 0, 2, dtype=torch.int64), mode=mode) for mode in ("reflect", "edge")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "inputs", "outputs", "options"), OTHERS)
def test_floats_with_integers(
    contrib: Any, name: str, inputs: tuple[Any, ...], outputs: int, options: dict[str, Any]
) -> None:
    tensors = [randn(*x, seed=i) if isinstance(x, tuple) else x for i, x in enumerate(inputs)]
    contrib.compare(name, tensors, outputs, **options, **SINGLE)


BYTES = integers(0, 256, 2, 4, 5, 6, dtype=torch.uint8)

ELEMENTS = [
    *(case("Trilu", integers(-9, 9, 2, 4, 5, dtype=torch.int64), k, upper=upper) for upper in (0, 1) for k in (
        None, torch.tensor(1), torch.tensor(-2), torch.tensor([2])
    )),
    *(
        case("Range", *(torch.tensor(n, dtype=dtype) for n in given))
        for dtype in (torch.int16, torch.int32, torch.int64, torch.float32, torch.float64)
        for given in ((1, 9), (1, 9, 3), (9, 1, -3), ([2], [9]), (3, 1))
    ),
    *(case("ExpandDims", integers(0, 9, 2, 3), torch.tensor(axis, dtype=torch.int32)) for axis in (0, 1, 2, -1, -3)),
    case("Unique", torch.tensor([2.0, 1, 1, 3, 4, 3, -1, 2]), outputs=3),
    case("GatherND", integers(0, 99, 3, 4, 5), torch.tensor([[[0, 1], [2, -1]]])),
    case("GatherND", randn(3, 4), ints(0, 1, 2, 3).reshape(2, 2)),
    case("SampleOp", randn(2, 3)),
    *(case("UnfoldTensor", integers(0, 99, 7, 6, 5), dim=dim, size=3, step=2) for dim in (-1, 0, 1)),
    *(case("NGramRepeatBlock", TOKENS, randn(3, 8), ngram_size=size) for size in (1, 2, 3, 5, 6)),
    case("NhwcMaxPool", BYTES[:, 0], kernel_shape=[3]),
    case("NhwcMaxPool", BYTES, kernel_shape=[3, 2], strides=[2, 3], pads=[1, 0, 1, 1]),
    case("NhwcMaxPool", BYTES.to(torch.int8), kernel_shape=[3, 2], auto_pad="SAME_LOWER", ceil_mode=1),
    case("NhwcMaxPool", BYTES.reshape(1, 4, 5, 6, 2), kernel_shape=[2, 2, 3]),
    case("NhwcMaxPool", BYTES, kernel_shape=[2, 2], dilations=[2, 1]),
    case(
        "MatMulInteger16", integers(-32768, 32768, 2, 3, 40, dtype=torch.int16),
        integers(-32768, 32767, 40, 5, dtype=torch.int16),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "inputs", "outputs", "options"), ELEMENTS)
def test_elements_are_exact(
    contrib: Any, name: str, inputs: tuple[Any, ...], outputs: int, options: dict[str, Any]
) -> None:
    contrib.compare(name, inputs, outputs, **options)


def test_sums_of_a_skip_norm(contrib: Any) -> None:
    # The second output is never written; onnxruntime has the third on GPUs only.
    inputs = [randn(2, 3, 6), randn(2, 3, 6, seed=1), randn(6), randn(6, seed=1)]
    y, mean, inverse, total = contrib.torch("SkipSimplifiedLayerNormalization", inputs, 4)
    assert mean is None
    torch.testing.assert_close(total, inputs[0] + inputs[1] + inputs[3])
    torch.testing.assert_close(inverse, total.square().mean(-1, keepdim=True).rsqrt())
    torch.testing.assert_close(y, total * inverse * inputs[2])


# From here on: operators without a CPU kernel, whose formula their documentation states.


def close(found: Tensor, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("activation", [0, 1])
@pytest.mark.parametrize("skip", ["full", "channels", "wide"])
def test_group_norms(last: int, activation: int, skip: str) -> None:
    x, added, bias = randn(2, 6, 3, 5).numpy(), randn(2, 6, 3, 5, seed=1).numpy(), randn(6).numpy()
    gamma, beta = randn(6, seed=2).numpy(), randn(6, seed=3).numpy()
    added = added if skip == "full" else added[:, :, :1, :1]

    def order(a: np.ndarray) -> Tensor:
        return torch.from_numpy(np.moveaxis(a, 1, -1).copy() if last else a)

    def expected(total: np.ndarray) -> np.ndarray:
        groups = total.reshape(2, 3, -1)
        normed = (groups - groups.mean(-1, keepdims=True)) / np.sqrt(groups.var(-1, keepdims=True) + 1e-3)
        y = normed.reshape(total.shape) * gamma[:, None, None] + beta[:, None, None]
        return y / (1 + np.exp(-y)) if activation else y

    options = {"groups": 3, "activation": activation, "channels_last": last, "epsilon": 1e-3}
    weights = torch.from_numpy(gamma), torch.from_numpy(beta)
    close(function("GroupNorm")(order(x), *weights, **options), order(expected(x)).numpy())
    given = torch.from_numpy(added[:, :, 0, 0].copy()) if skip == "channels" else order(added)
    total = x + added + bias[:, None, None]
    y, shown = function("SkipGroupNorm")(order(x), *weights, given, torch.from_numpy(bias), outputs=2, **options)
    close(shown, order(total).numpy())
    close(y, order(expected(total)).numpy())


def test_fused_biases() -> None:
    x, bias, skip = randn(2, 3, 8), randn(8), randn(2, 3, 8, seed=1)
    close(function("BiasAdd")(x, bias, skip), x.numpy() + bias.numpy() + skip.numpy())
    value, gate = np.split(x.numpy() + bias.numpy(), 2, -1)
    close(function("BiasSplitGelu")(x, bias), value * F.gelu(torch.from_numpy(gate)).numpy())
    weight = randn(8, 4)
    product = torch.from_numpy(x.numpy() @ weight.numpy() + bias.numpy()[:4])
    wanted = F.gelu(product, approximate="tanh").numpy()
    close(function("GemmFastGelu")(x, weight, bias[:4]), wanted)


@pytest.mark.parametrize(("shape", "inner"), [((2, 1, 1, 5), 1), ((1, 1, 4, 5), 0), ((4, 5), 0)])
def test_bias_softmax(shape: tuple[int, ...], inner: int) -> None:
    scores, bias = randn(2, 3, 4, 5), randn(*shape)
    total = np.exp(scores.numpy() + bias.numpy())
    found = function("BiasSoftmax")(scores, bias, axis=3, is_inner_broadcast=inner)
    close(found, total / total.sum(-1, keepdims=True))
    found = function("BiasSoftmax")(scores, bias, axis=2, is_inner_broadcast=inner)
    close(found, total / total.sum((-2, -1), keepdims=True))


def test_fused_activations_of_a_product() -> None:
    a, b = randn(2, 4, 3), randn(2, 4, 5)
    product = 0.5 * np.swapaxes(a.numpy(), 1, 2) @ b.numpy()
    fused = function("FusedMatMulActivation")
    options = {"transA": 1, "alpha": 0.5}
    close(fused(a, b, activation="Relu", **options), np.maximum(product, 0))
    close(
        fused(a, b, activation="HardSigmoid", activation_alpha=0.3, activation_beta=0.6, **options),
        np.clip(0.3 * product + 0.6, 0, 1),
    )
    share = np.exp(product) / np.exp(product).sum(1, keepdims=True)
    close(fused(a, b, activation="Softmax", activation_axis=1, **options), share)
    close(fused(a, b, activation="LogSoftmax", activation_axis=1, **options), np.log(share))
    with pytest.raises(NotImplementedError, match="'Shrink' is not covered"):
        fused(a, b, activation="Shrink", **options)


def test_convolutions_with_the_channels_behind() -> None:
    convolve = lookup("", "Conv", 22).function
    x, weight, bias, added = randn(2, 7, 6, 4), randn(6, 2, 3, 2), randn(6), randn(2, 3, 5, 6)
    options = {"group": 2, "strides": [2, 1]}
    wanted = convolve(x.permute(0, 3, 1, 2), weight, bias, **options).permute(0, 2, 3, 1).numpy()
    close(function("NhwcConv")(x, weight, bias, **options), wanted)
    found = function("NhwcFusedConv")(x, weight, bias, added, activation="Relu", **options)
    close(found, np.maximum(wanted + added.numpy(), 0))


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("window", [1, 3, 8])
def test_causal_convolution_keeps_the_states_of_the_last_steps(contrib: Any, window: int, last: int) -> None:
    # onnxruntime has windows on CUDA only: each slot is what it gives for so many steps.
    steps = 5
    x, past = (randn(2, steps, 3), randn(2, 6, 3)) if last else (randn(2, 3, steps), randn(2, 3, 6))
    weight, bias = randn(3, 1, 4), randn(3)
    options = {"dilation": 2, "channels_last": last}
    windowed = torch.stack([torch.full_like(past, 9.0)] * (window - 1) + [past])
    inputs = [x, weight, bias, windowed]
    y, states = contrib.torch("CausalConvWithState", inputs, 2, state_window=window, **options)
    for slot in range(window):
        count = steps - window + slot + 1
        if count < 1:
            assert not states[slot].any()
            continue
        cut = x.narrow(1 if last else 2, 0, count).contiguous()
        expected = contrib.onnxruntime("CausalConvWithState", [cut, weight, bias, past], 2, **options)
        close(states[slot], expected[1])
    close(y, expected[0])


def test_embedding_of_torch() -> None:
    weight, indices = randn(7, 3), torch.tensor([[0, 6], [2, 2]])
    close(function("TorchEmbedding")(weight, indices, torch.tensor(2)), weight.numpy()[indices.numpy()])


def test_integer_products() -> None:
    a, b = integers(-128, 128, 3, 4, dtype=torch.int8), integers(-128, 127, 4, dtype=torch.int8)
    wanted = (a.numpy().astype(np.int32) - 5) * (b.numpy().astype(np.int32) + 7)
    found = function("MulInteger")(a, torch.tensor(5, dtype=torch.int8), b, torch.tensor(-7, dtype=torch.int8))
    np.testing.assert_array_equal(found.numpy(), wanted)
    unsigned = integers(0, 65536, 3, 40, dtype=torch.uint16), integers(0, 65535, 40, 2, dtype=torch.uint16)
    wide = unsigned[0].numpy().astype(np.uint32) @ unsigned[1].numpy().astype(np.uint32)
    np.testing.assert_array_equal(function("MatMulInteger16")(*unsigned).numpy(), wide)


def test_what_is_not_covered_says_so() -> None:
    with pytest.raises(NotImplementedError, match="metric 'cosine'"):
        function("CDist")(randn(2, 2), randn(2, 2), metric="cosine")
    with pytest.raises(NotImplementedError, match="several spatial axes"):
        function("CausalConvWithState")(randn(1, 1, 2, 2), randn(1, 1, 1, 1), ndim=2)


def doubles(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [randn(*shape, seed=i, dtype=torch.float64).requires_grad_() for i, shape in enumerate(shapes)]


SMOOTH = {
    "BiasSplitGelu": ([(2, 4), (4,)], {}),
    "BiasAdd": ([(2, 4), (4,), (2, 4)], {}),
    "BiasSoftmax": ([(2, 4), (4,)], {"is_inner_broadcast": 0}),
    "GemmFastGelu": ([(2, 4), (4, 2), (2,)], {}),
    "FusedGemm": ([(2, 4), (4, 2), (2,)], {"activation": "Tanh"}),
    "FusedMatMulActivation": (
        [(2, 4), (4, 2)],
        {"activation": "Selu", "activation_alpha": 0.3, "activation_gamma": 2.0},
    ),
    "TransposeMatMul": ([(2, 4), (3, 4)], {"transB": 1}),
    "FusedConv": ([(1, 2, 4), (2, 2, 2), (2,), (1, 2, 3)], {"activation": "Sigmoid"}),
    "NhwcFusedConv": ([(1, 4, 2), (2, 2, 2), (2,), (1, 3, 2)], {"activation": "Softplus"}),
    "CausalConvWithState": ([(1, 2, 3), (2, 1, 3), (2,), (2, 1, 2, 2)], {"activation": "silu", "state_window": 2}),
    "GroupNorm": ([(1, 2, 4), (4,), (4,)], {"groups": 2, "activation": 1}),
    "SkipGroupNorm": ([(1, 2, 4), (4,), (4,), (1, 4), (4,)], {"groups": 2, "activation": 0, "outputs": 2}),
    "SkipSimplifiedLayerNormalization": ([(1, 2, 4), (1, 2, 4), (4,), (4,)], {"outputs": 1}),
    "GatedRMSNorm": ([(2, 4), (2,), (2, 4)], {}),
    "GatedAdd": ([(2, 4), (2, 4), (2, 1)], {}),
    "ScaledSiLU": ([(2, 4), ()], {}),
    "BranchwiseRMSNorm": ([(2, 4), (4,)], {"num_branches": 2}),
    "LinearAttentionGate": ([(1, 2, 3), (3,), (3,), (1, 2, 3)], {"outputs": 2}),
    "HyperConnectionPreMix": ([(2, 3, 4), (2, 3)], {"reduction_scale": 0.5}),
    "HyperConnectionPostMix": ([(2, 3, 4), (2, 4), (2, 3), (2, 3, 3)], {}),
    "EngramGate": ([(1, 2, 2, 3), (1, 2, 2, 3), (1, 2, 3), (2, 3), (2, 3), (2, 3)], {"outputs": 2}),
    "Inverse": ([(3, 3)], {}),
    "CDist": ([(3, 2), (2, 2)], {"metric": "euclidean"}),
    "UnfoldTensor": ([(5, 2)], {"dim": 0, "size": 3, "step": 2}),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_gradient(name: str) -> None:
    shapes, options = SMOOTH[name]
    assert torch.autograd.gradcheck(lambda *inputs: function(name)(*inputs, **options), doubles(*shapes))


def test_gradients_beside_integers() -> None:
    boxes = BOXES.double()[[0, 3]].requires_grad_()
    crop = function("CropAndResize")
    images = doubles((1, 2, 5, 4))
    assert torch.autograd.gradcheck(lambda x, r: crop(x, r, ints(0, 0), ints(2, 2)), (*images, boxes))
    embed = function("EmbedLayerNormalization")
    assert torch.autograd.gradcheck(
        lambda word, place, segment, gamma, beta: embed(
            IDS[:, :2] % 3, SEGMENTS[:, :2], word, place, segment, gamma, beta, epsilon=1e-5, outputs=3
        )[::2],
        doubles((3, 4), (2, 4), (3, 4), (4,), (4,)),
    )


def test_shapes_without_data() -> None:
    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    y, state = function("CausalConvWithState")(meta(2, 3, 5), meta(3, 1, 4), state_window=2)
    assert (y.shape, state.shape) == ((2, 3, 5), (2, 2, 3, 3))
    images = function("CropAndResize")(meta(2, 3, 7, 6), meta(5, 4), meta(5).to(torch.int32), ints(3, 4))
    assert images.shape == (5, 3, 3, 4)
    words = function("EmbedLayerNormalization")(
        meta(2, 5).to(torch.int32), None, meta(9, 8), meta(7, 8), None, meta(8), meta(8), outputs=3
    )
    assert [x.shape for x in words] == [(2, 5, 8), (2,), (2, 5, 8)]
