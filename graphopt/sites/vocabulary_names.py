"""Canonical operator names: what ATen, ONNX and com.microsoft call the same thing."""

from __future__ import annotations


def _inverted(names: dict[str, str]) -> dict[str, str]:
    return {name: canonical for canonical, several in names.items() for name in several.split()}


# Canonical name: ATen packets; packets that are not listed keep their own name.
ATEN = _inverted(
    {
        "matmul": "bmm mm",
        "softmax": "_softmax _safe_softmax",
        "log_softmax": "_log_softmax",
        "transpose": "permute t numpy_T mT swapaxes movedim",
        "reshape": "view _unsafe_view _reshape_alias flatten unflatten view_as",
        "expand": "expand_as broadcast_to",
        "tile": "repeat",
        "cast": "_to_copy to type_as",
        "identity": "clone contiguous alias detach detach_ lift_fresh_copy lift_fresh",
        "concat": "cat",
        "split": "split_with_sizes chunk",
        "dropout": "native_dropout feature_dropout alpha_dropout",
        "layer_norm": "native_layer_norm",
        "gemm": "addmm",
        "sdpa": (
            "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu "
            "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention"
        ),
        "not": "bitwise_not logical_not",
        "and": "bitwise_and logical_and __and__",
        "or": "bitwise_or logical_or __or__",
        "equal": "eq",
        "not_equal": "ne",
        "greater": "gt",
        "greater_equal": "ge",
        "less": "lt",
        "less_equal": "le",
        "shape": "sym_size",
        "size": "sym_numel numel",
        "gather": "index_select",
        "div": "true_divide divide",
        "mul": "multiply",
        "sub": "subtract",
        "neg": "negative",
        "rms_norm": "fused_rms_norm _fused_rms_norm",
        "clip": "clamp",
        "range": "arange",
        "max_reduce": "amax",
        "min_reduce": "amin",
        "sum_reduce": "sum",
    }
)
# Canonical name: ONNX operators; those that are not listed get their own name in snake case.
ONNX = _inverted(
    {
        "matmul": "MatMul",
        "gemm": "Gemm",
        "squeeze": "Squeeze",
        "reshape": "Flatten",
        "cast": "CastLike",
        "mean": "ReduceMean",
        "sum_reduce": "ReduceSum",
        "max_reduce": "ReduceMax",
        "min_reduce": "ReduceMin",
        "layer_norm": "LayerNormalization",
        "rms_norm": "RMSNormalization SimplifiedLayerNormalization",
        "isnan": "IsNaN",
        "isinf": "IsInf",
        "and": "And",
        "or": "Or",
        "not": "Not",
        "xor": "Xor",
        "greater_equal": "GreaterOrEqual",
        "less_equal": "LessOrEqual",
        "onnx_attention": "Attention",
        "variadic_mean": "Mean",
        "add": "Sum",
        "log_softmax": "LogSoftmax",
        "prelu": "PRelu",
        "swish": "Swish",
        "swiglu": "SwiGLU",
        "cumsum": "CumSum",
        "one_hot": "OneHot",
        "gather_nd": "GatherND",
        "scatter_nd": "ScatterND",
        "topk": "TopK",
        "lstm": "LSTM",
        "gru": "GRU",
        "rnn": "RNN",
    }
)
# The same for com.microsoft.
MICROSOFT = _inverted(
    {
        "microsoft_attention": "Attention",
        "fused_matmul": "FusedMatMul",
        "gelu": "Gelu",
        "fast_gelu": "FastGelu",
        "bias_gelu": "BiasGelu",
        "quantised_attention": "QAttention",
        "rotary_embedding": "RotaryEmbedding",
        "skip_rms_norm": "SkipSimplifiedLayerNormalization",
        "skip_layer_norm": "SkipLayerNormalization",
        "linear_attention": "LinearAttention",
    }
)

_CHEAP = (
    "identity cast unsqueeze squeeze reshape transpose expand concat slice gather "
    "add sub rsub mul div floordiv pow neg sqrt rsqrt reciprocal abs floor erf exp "
    "constant_of_shape full scalar_tensor ones zeros fill"
)
FOLDABLE = frozenset(_CHEAP.split())
"""Cheap and pure kinds: folded when every operand is constant."""
