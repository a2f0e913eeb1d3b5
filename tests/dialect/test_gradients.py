"""Derivatives in float64 against finite differences, for the operators that have them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt.dialect import lookup

NEWEST = 28


def case(name: str, *shapes: tuple[int, ...], domain: str = "", opset: int = NEWEST, **keywords: Any) -> Any:
    """An operator applied to random float64 inputs of the given shapes."""
    label = "-".join([name, str(opset), *(f"{k}={v}" for k, v in keywords.items() if not isinstance(v, Tensor))])
    return pytest.param(name, domain, opset, shapes, keywords, id=label.replace(" ", ""))


def positive(shape: tuple[int, ...]) -> Tensor:
    """Numbers in (0.2, 0.8): inside the domain of every function below, away from every kink."""
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return 0.2 + 0.6 * torch.rand(shape, dtype=torch.float64, generator=generator)


UNARY = (
    "Abs Neg Reciprocal Sqrt Exp Log Erf Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh Atanh Gelu Relu "
    "Sigmoid Tanh LeakyRelu Elu Celu Selu HardSigmoid HardSwish Mish Swish Softplus Softsign Softmax "
    "LogSoftmax Identity Flatten Transpose Squeeze ReduceSum ReduceMean ReduceProd ReduceMax ReduceMin "
    "ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSum ReduceLogSumExp LpNormalization"
)

CASES = [
    *(case(name, (2, 3)) for name in UNARY.split()),
    *(case(name, (2, 3, 2), opset=6) for name in ("Softmax", "LogSoftmax", "Clip", "ReduceSum")),
    *(case(name, (2, 3), (3,)) for name in ("Add", "Sub", "Mul", "Div", "Pow")),
    *(case(name, (2, 3), (3,)) for name in ("Max", "Min", "Mean", "PRelu")),
    case("SwiGLU", (2, 3), (2, 3)),
    case("Clip", (2, 3), (), (1,)),
    case("Acosh", (2,), shift=1.0),
    case("MatMul", (2, 3, 4), (4, 2)),
    case("Gemm", (3, 2), (4, 3), (4,), transA=1, transB=1, alpha=0.5, beta=2.0),
    case("Einsum", (2, 3), (3, 4), equation="ij,jk->ik"),
    case("Det", (2, 3, 3)),
    case("Concat", (2, 3), (2, 2), axis=-1),
    case("CumSum", (2, 3), after=[torch.tensor(1)], exclusive=1, reverse=1),
    case("Reshape", (2, 3), after=[torch.tensor([3, -1])]),
    case("Expand", (2, 1), after=[torch.tensor([2, 3])]),
    case("Tile", (2, 2), after=[torch.tensor([1, 2])]),
    case("Slice", (3, 4), after=[torch.tensor([n]) for n in (-1, -5, 1, -2)]),
    *(case("Pad", (3, 4), after=[torch.tensor([1, -1, 0, 2])], mode=mode) for mode in ("constant", "edge")),
    *(case("Pad", (3, 4), after=[torch.tensor([1, 1, 0, 2])], mode=mode) for mode in ("reflect", "wrap")),
    case("Gather", (3, 2), after=[torch.tensor([[0, -1]])]),
    case("GatherElements", (3, 2), after=[torch.tensor([[0, -1]])]),
    case("GatherND", (3, 2), after=[torch.tensor([[0], [-1]])]),
    case("TopK", (2, 4), after=[torch.tensor([2])]),
    case("Trilu", (3, 3), after=[torch.tensor(1)]),
    case("DepthToSpace", (1, 4, 2, 2), blocksize=2, mode="CRD"),
    case("SpaceToDepth", (1, 1, 4, 4), blocksize=2),
    case("Conv", (1, 2, 5, 4), (2, 1, 2, 3), (2,), group=2, pads=[0, 1, 1, 2], strides=[2, 1]),
    case("ConvTranspose", (1, 2, 3), (2, 2, 3), (2,), strides=[2], pads=[1, 0], output_padding=[1]),
    case("CausalConvWithState", (1, 2, 4), (2, 1, 3), (2,), (1, 2, 2), activation="silu"),
    case("MaxPool", (1, 1, 4, 5), kernel_shape=[2, 3], pads=[1, 0, 0, 1], ceil_mode=1, outputs=1),
    case("AveragePool", (1, 1, 4, 5), kernel_shape=[2, 3], pads=[1, 0, 0, 1], strides=[2, 2]),
    case("LpPool", (1, 1, 4), kernel_shape=[2]),
    case("GlobalAveragePool", (1, 2, 3, 3)),
    case("BatchNormalization", (2, 3, 2), (3,), (3,), (3,), (3,), outputs=1),
    case("BatchNormalization", (2, 3, 2), (3,), (3,), (3,), (3,), outputs=3, training_mode=1),
    case("InstanceNormalization", (2, 3, 4), (3,), (3,)),
    case("LayerNormalization", (2, 3, 4), (4,), (4,), outputs=3),
    case("GroupNormalization", (2, 4, 3), (4,), (4,), num_groups=2),
    case("RMSNormalization", (2, 4), (4,)),
    case("LRN", (1, 4, 2), size=3),
    case("Resize", (1, 1, 3, 3), after=[None, torch.tensor([1.0, 1.0, 1.6, 0.7])], mode="cubic", antialias=1),
    case("Resize", (1, 1, 3, 3), after=[None, None, torch.tensor([1, 1, 5, 2])], mode="linear"),
    case("GridSample", (1, 1, 3, 3), (1, 2, 2, 2)),
    case("Attention", (1, 2, 2, 2), (1, 1, 3, 2), (1, 1, 3, 2), (2, 3), is_causal=1, softcap=2.0, outputs=1),
    case("RotaryEmbedding", (1, 2, 3, 4), (1, 3, 2), (1, 3, 2), interleaved=1),
    *(
        case(
            "LinearAttention", (1, 3, 4), (1, 3, 2), (1, 3, 3), (1, 1, 2, 3), (1, 3, 1), (1, 3, 1),
            q_num_heads=2, kv_num_heads=1, update_rule=rule, chunk_size=2,
        )
        for rule in ("linear", "gated", "delta", "gated_delta")
    ),
    case("LSTM", (3, 2, 2), (2, 8, 2), (2, 8, 2), (2, 16), direction="bidirectional", outputs=3),
    case("GRU", (3, 2, 2), (1, 6, 2), (1, 6, 2), (1, 12), linear_before_reset=1, outputs=2),
    case("RNN", (3, 2, 2), (1, 2, 2), (1, 2, 2), outputs=2),
    *(case(name, (2, 3), (3,), domain="com.microsoft") for name in ("BiasGelu", "FastGelu")),
    case("FusedMatMul", (2, 3, 2), (2, 4, 3), domain="com.microsoft", transA=1, transB=1, alpha=0.5),
    case("SkipLayerNormalization", (1, 2, 3), (1, 2, 3), (3,), (3,), domain="com.microsoft", outputs=4),
    case(
        "MultiHeadAttention", (1, 2, 4), (1, 3, 4), (1, 3, 4), (12,), domain="com.microsoft", num_heads=2,
        outputs=1,
    ),
    case("SoftmaxCrossEntropyLoss", (2, 3), after=[torch.tensor([0, 2])], outputs=2),
    case("DequantizeLinear", (2, 3), (3,)),
]  # fmt: skip


def bound(function: Callable[..., Any], after: list[Tensor | None], keywords: dict[str, Any]) -> Callable[..., Any]:
    return lambda *inputs: function(*inputs, *after, **keywords)


@pytest.mark.parametrize(("name", "domain", "opset", "shapes", "keywords"), CASES)
def test_gradient(
    name: str, domain: str, opset: int, shapes: tuple[tuple[int, ...], ...], keywords: dict[str, Any]
) -> None:
    entry = lookup(domain, name, opset)
    options = {key: value for key, value in keywords.items() if key not in ("after", "shift")}
    inputs = [(positive(shape) + keywords.get("shift", 0.0)).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(bound(entry.function, keywords.get("after", []), options), inputs)


def test_a_row_that_attends_nothing_has_a_finite_gradient() -> None:
    q, k, v = (positive((1, 1, 2, 4)).requires_grad_() for _ in range(3))
    mask = torch.tensor([[True, True], [False, False]])
    y = lookup("", "Attention", NEWEST).function(q, k, v, mask, outputs=1)
    y.sum().backward()
    assert torch.equal(y[0, 0, 1], torch.zeros(4, dtype=torch.float64))
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


def test_inputs_are_left_alone() -> None:
    x, update = positive((3, 2)), positive((1, 2))
    before = x.clone()
    lookup("", "ScatterND", NEWEST).function(x, torch.tensor([[1]]), update, reduction="add")
    assert torch.equal(x, before)
