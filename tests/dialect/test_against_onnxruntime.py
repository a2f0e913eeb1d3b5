"""Operators without a published model: contributed ones, and meanings of opsets that have passed."""

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from graphopt.dialect import lookup

CODES = {torch.float32: TensorProto.FLOAT, torch.int64: TensorProto.INT64, torch.int32: TensorProto.INT32}
CODES |= {torch.uint8: TensorProto.UINT8, torch.int8: TensorProto.INT8, torch.bool: TensorProto.BOOL}
DOMAIN = "com.microsoft"


def run(name: str, domain: str, opset: int, inputs: list[Tensor | None], outputs: int, options: dict[str, Any]) -> Any:
    """One node on onnxruntime, as it stands: no optimiser may replace it."""
    names = ["" if x is None else f"x{i}" for i, x in enumerate(inputs)]
    results = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(name, names, results, domain=domain, **options)
    declared = [
        helper.make_tensor_value_info(n, CODES[x.dtype], x.shape)
        for n, x in zip(names, inputs, strict=True)
        if x is not None
    ]
    graph = helper.make_graph([node], "one", declared, [helper.make_empty_tensor_value_info(n) for n in results])
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=min(10, 3 + (opset > 9) * 7))
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, ["CPUExecutionProvider"])
    feed = {n: x.numpy() for n, x in zip(names, inputs, strict=True) if x is not None}
    return session.run(None, feed)


def case(name: str, *inputs: Any, domain: str = DOMAIN, opset: int = 17, outputs: int = 1, **options: Any) -> Any:
    """A node; a tuple stands for a random tensor of that shape."""
    shown = [f"{key}={value}" for key, value in options.items()]
    label = "-".join([name, str(opset), *shown, f"{len(inputs)}in{outputs}"]).replace(" ", "")
    return pytest.param(name, domain, opset, inputs, outputs, options, id=label)


def early(name: str, *inputs: Any, opset: int, outputs: int = 1, **options: Any) -> Any:
    return case(name, *inputs, domain="", opset=opset, outputs=outputs, **options)


def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


QKV = ((2, 3, 8), (2, 4, 8), (2, 4, 8))
CACHE = ((16, 2), (16, 2))
GROUPED_CACHE = ((16, 8), (16, 8))
TOTAL = torch.tensor(7, dtype=torch.int32)
PROMPT = torch.tensor(3, dtype=torch.int32)
LINEAR = {"q_num_heads": 2, "kv_num_heads": 1}

CASES = [
    *(case(name, (2, 3)) for name in ("Gelu", "FastGelu", "QuickGelu")),
    case("QuickGelu", (2, 3), alpha=1.0),
    *(case(name, (2, 3), (3,)) for name in ("BiasGelu", "FastGelu")),
    case("FusedMatMul", (2, 3, 4), (2, 5, 4), transB=1, alpha=0.5),
    case("FusedMatMul", (3, 2, 4), (2, 4, 5), transBatchA=1),
    case("FusedMatMul", (3, 2, 4), (2, 3, 5), transA=1, transBatchA=1),
    case("SkipLayerNormalization", (2, 3, 4), (2, 3, 4), (4,), (4,), (4,), epsilon=1e-5),
    case("SkipSimplifiedLayerNormalization", (2, 3, 4), (2, 3, 4), (4,), (4,)),
    early("SimplifiedLayerNormalization", (2, 3, 4), (4,), opset=17, axis=-1, epsilon=1e-6),
    early("LayerNormalization", (2, 3, 4), (4,), (4,), opset=12, axis=-1, outputs=3),
    case("MultiHeadAttention", *QKV, num_heads=2),
    case("MultiHeadAttention", *QKV, (24,), num_heads=2, scale=0.3),
    case("MultiHeadAttention", *QKV, None, ints(2, 4), num_heads=2),
    case("MultiHeadAttention", *QKV, None, torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1]]).int(), num_heads=2),
    case("MultiHeadAttention", *QKV, None, None, (1, 2, 3, 4), num_heads=2, unidirectional=0),
    case("MultiHeadAttention", (2, 3, 8), (2, 3, 8), (2, 3, 8), num_heads=2, unidirectional=1),
    case("MultiHeadAttention", (2, 3, 8), (2, 2, 4, 4), (2, 2, 4, 4), num_heads=2),
    case(
        "MultiHeadAttention", (2, 3, 8), (2, 3, 8), (2, 3, 8), None, None, None, (2, 2, 5, 4), (2, 2, 5, 4),
        num_heads=2, outputs=3, unidirectional=1,
    ),
    case("Attention", (2, 3, 6), (6, 24), (24,), num_heads=2),
    case("Attention", (2, 3, 6), (6, 24), (24,), ints(2, 3), num_heads=2, unidirectional=1),
    case("Attention", (2, 3, 6), (6, 24), (24,), ints(2, 3, 0, 1), num_heads=2),
    case("Attention", (2, 3, 6), (6, 24), (24,), torch.tensor([[1, 1, 0], [0, 1, 1]]).int(), num_heads=2),
    case("Attention", (2, 3, 6), (6, 20), (20,), num_heads=2, qkv_hidden_sizes=[8, 8, 4]),
    case(
        "Attention", (2, 3, 6), (6, 24), (24,), None, (2, 2, 2, 5, 4),
        num_heads=2, outputs=2, unidirectional=1,
    ),
    case("RotaryEmbedding", (2, 3, 8), torch.tensor([[0, 1, 2], [4, 5, 6]]), *CACHE),
    case("RotaryEmbedding", (2, 2, 3, 4), torch.tensor([3]), *CACHE, interleaved=1),
    case("RotaryEmbedding", (2, 3, 12), torch.tensor([3]), *CACHE, num_heads=2, rotary_embedding_dim=4),
    *(
        case(
            "GroupQueryAttention", (2, 3, 32), (2, 3, 16), (2, 3, 16), None, None, ints(2, 2), PROMPT,
            *caches, num_heads=2, kv_num_heads=1, outputs=3, **options,
        )
        for caches, options in [
            ((), {}),
            ((), {"local_window_size": 2}),
            ((), {"softcap": 2.0, "scale": 0.4}),
            ((), {"smooth_softmax": 1}),
            (GROUPED_CACHE, {"do_rotary": 1}),
            (GROUPED_CACHE, {"do_rotary": 1, "rotary_interleaved": 1}),
            ((None, None, None, None, (2,)), {}),
            ((None, None, None, (1, 2, 3, 3)), {}),
        ]
    ),
    case(
        "GroupQueryAttention", (2, 3, 64), None, None, None, None, ints(2, 2), PROMPT, *GROUPED_CACHE,
        num_heads=2, kv_num_heads=1, do_rotary=1, outputs=3,
    ),
    case(
        "GroupQueryAttention", (1, 2, 32), (1, 2, 16), (1, 2, 16), (1, 1, 5, 16), (1, 1, 5, 16), ints(6),
        TOTAL, *GROUPED_CACHE, num_heads=2, kv_num_heads=1, do_rotary=1, outputs=3,
    ),
    case("LinearAttention", (2, 5, 8), (2, 5, 4), (2, 5, 3), update_rule="linear", outputs=2, **LINEAR),
    case(
        "LinearAttention", (2, 70, 8), (2, 70, 4), (2, 70, 3), (2, 1, 4, 3), update_rule="linear",
        outputs=2, **LINEAR,
    ),
    *(
        case(
            "LinearAttention", (2, 5, 8), (2, 5, 4), (2, 5, 3), None, gate, update_rule="gated",
            outputs=2, **LINEAR,
        )
        for gate in ((2, 5, 4), (2, 5, 1))
    ),
    case(
        "LinearAttention", (2, 5, 8), (2, 5, 4), (2, 5, 3), None, None, (2, 5, 1), update_rule="delta",
        scale=0.7, outputs=2, **LINEAR,
    ),
    case(
        "LinearAttention", (2, 5, 4), (2, 5, 8), (2, 5, 6), (2, 2, 4, 3), (2, 5, 2), (2, 5, 2), outputs=2,
        q_num_heads=1, kv_num_heads=2,
    ),
    *(early(name, (2, 3, 4), opset=11) for name in ("Softmax", "LogSoftmax", "Hardmax")),
    early("Softmax", (2, 3, 4), opset=11, axis=-1),
    early("Clip", (2, 3), opset=10, min=-0.5, max=0.5),
    early("Slice", (4, 5), opset=9, starts=[1, -3], ends=[9, -1]),
    early("Slice", (4, 5), opset=9, starts=[0], ends=[-1], axes=[-1]),
    early("Squeeze", (1, 3, 1), opset=11, axes=[-1]),
    early("Unsqueeze", (2, 3), opset=11, axes=[0, -1]),
    early("Split", (5, 2), opset=11, split=[2, 3], outputs=2),
    early("Split", (4, 2), opset=11, outputs=2),
    early("Pad", (2, 3), opset=10, pads=[0, 1, 1, 0], mode="reflect"),
    early("Dropout", (2, 3), opset=11, ratio=0.3),
    early("TopK", (2, 5), opset=9, k=2, outputs=2),
    early("ReduceSum", (2, 3, 4), opset=11, axes=[0, -1], keepdims=0),
    early("ReduceMean", (2, 3, 4), opset=13, axes=[1]),
    early("Upsample", (1, 1, 2, 3), opset=8, scales=[1.0, 1.0, 2.0, 3.0], mode="nearest"),
    early("Upsample", (1, 1, 2, 3), torch.tensor([1.0, 1.0, 2.0, 2.0]), opset=9, mode="linear"),
    early("Resize", (1, 1, 4, 6), torch.tensor([1.0, 1.0, 0.6, 2.0]), opset=10, mode="nearest"),
    early("Resize", (1, 1, 4, 6), torch.tensor([1.0, 1.0, 0.6, 2.0]), opset=10, mode="linear"),
    early("BatchNormalization", (2, 3, 4), (3,), (3,), (3,), torch.ones(3), opset=9),
    early("GridSample", (1, 2, 4, 5), (1, 3, 3, 2), opset=16, mode="bicubic", padding_mode="border"),
    early("AveragePool", (1, 2, 7, 8), opset=11, kernel_shape=[3, 2], strides=[2, 3], auto_pad="SAME_LOWER"),
    early("MaxPool", (1, 2, 7, 8), opset=12, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    early("MaxPool", (1, 2, 7, 8), opset=12, kernel_shape=[3, 3], strides=[2, 2], dilations=[2, 1]),
    early("ConvTranspose", (1, 2, 4), (2, 3, 3), opset=11, strides=[2], output_shape=[9]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "domain", "opset", "inputs", "outputs", "options"), CASES)
def test_agrees_with_onnxruntime(
    name: str, domain: str, opset: int, inputs: tuple[Any, ...], outputs: int, options: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(7)
    tensors = [torch.randn(x, generator=generator) if isinstance(x, tuple) else x for x in inputs]
    wanted = run(name, domain, opset, tensors, outputs, options)
    entry = lookup(domain, name, 1 if domain else opset)
    counted = {"outputs": outputs} if entry.counted else {}
    result = entry.function(*tensors, **options, **counted)
    found = result if isinstance(result, tuple) else (result,)
    for mine, theirs in zip(found, wanted, strict=False):
        np.testing.assert_allclose(mine.numpy(), theirs, rtol=1e-3, atol=1e-5)
        assert mine.numpy().dtype == theirs.dtype


def test_samples_with_pasts_of_their_own_length() -> None:
    # Only the output: onnxruntime leaves the rows behind a sample's last step uninitialised.
    generator = torch.Generator().manual_seed(7)
    shapes = [(2, 1, 32), (2, 1, 16), (2, 1, 16), (2, 1, 5, 16), (2, 1, 5, 16)]
    inputs = [
        *(torch.randn(shape, generator=generator) for shape in shapes),
        ints(3, 5),
        torch.tensor(6).int(),
    ]
    heads = {"num_heads": 2, "kv_num_heads": 1}
    wanted = run("GroupQueryAttention", DOMAIN, 17, inputs, 3, heads)
    found = lookup(DOMAIN, "GroupQueryAttention", 1).function(*inputs, **heads, outputs=3)
    np.testing.assert_allclose(found[0].numpy(), wanted[0], rtol=1e-3, atol=1e-5)


def test_packed_projections_equal_separate_ones() -> None:
    # onnxruntime has these layouts on CUDA only.
    attention = lookup(DOMAIN, "MultiHeadAttention", 1).function
    q, k, v = (torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    separate = attention(q.flatten(2), k.flatten(2), v.flatten(2), num_heads=2, outputs=1)
    assert torch.equal(attention(torch.stack((q, k, v), 3), num_heads=2, outputs=1), separate)
    assert torch.equal(attention(q.flatten(2), torch.stack((k, v), 3), num_heads=2, outputs=1), separate)


def test_what_is_not_covered_says_so() -> None:
    x = torch.zeros(1, 2, 4)
    attention = lookup(DOMAIN, "GroupQueryAttention", 1).function
    with pytest.raises(NotImplementedError, match="quantised caches"):
        attention(
            x,
            x,
            x,
            None,
            None,
            ints(1),
            ints(2),
            num_heads=1,
            kv_num_heads=1,
            k_quant_type="PER_TENSOR",
            outputs=1,
        )
