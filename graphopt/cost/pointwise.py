"""FLOPs of everything that is no contraction: so many per element of the result, of the operand, or none."""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from graphopt.cost.table import Call, FlopFunction, elements, flops

_MOVES = """
    Identity Reshape Flatten Squeeze Unsqueeze Transpose Concat Split Slice Gather GatherElements
    GatherND Expand Tile Pad Shape Size Cast CastLike BitCast Constant ConstantOfShape Range EyeLike
    OneHot Trilu DepthToSpace SpaceToDepth CenterCropPad Scatter ScatterElements ScatterND TensorScatter
    ReverseSequence NonZero Compress Dropout SequenceConstruct SequenceAt SequenceEmpty SequenceInsert
    SequenceLength SplitToSequence ConcatFromSequence Optional Where MaxUnpool aten::view
    aten::_unsafe_view aten::reshape aten::permute aten::transpose aten::t aten::squeeze aten::unsqueeze
    aten::expand aten::expand_as aten::clone aten::contiguous aten::cat aten::stack aten::split
    aten::split_with_sizes aten::chunk aten::unbind aten::slice aten::select aten::index
    aten::index_select aten::gather aten::embedding aten::repeat aten::tile aten::repeat_interleave
    aten::constant_pad_nd aten::pad aten::_to_copy aten::to aten::copy aten::alias aten::detach
    aten::arange aten::full aten::full_like aten::zeros aten::zeros_like aten::ones aten::ones_like
    aten::empty aten::new_zeros aten::new_ones aten::new_full aten::scalar_tensor aten::eye aten::tril
    aten::triu aten::where aten::masked_fill aten::sym_size aten::sym_numel aten::lift_fresh_copy
    aten::flatten aten::unflatten aten::movedim aten::swapaxes aten::flip aten::roll aten::narrow
    aten::scatter aten::index_put aten::slice_scatter aten::select_scatter aten::copy_ aten::dropout
    aten::type_as aten::view_as aten::size aten::_assert_tensor_metadata aten::_assert_scalar
    aten::_assert_async aten::sym_constrain_range_for_size aten::_local_scalar_dense aten::item
    aten::broadcast_to aten::as_strided aten::diagonal aten::unfold aten::numel aten::alias_copy
    aten::lift aten::one_hot aten::nonzero aten::sym_constrain_range aten::fill aten::empty_like
    aten::mT aten::adjoint aten::numpy_T aten::split_copy aten::pixel_shuffle aten::pixel_unshuffle
"""

# Per element of the (first) result.
_PER_RESULT: Mapping[int, str] = {
    1: """
        Add Sub Mul Div Pow Mod Max Min Sum Mean Abs Neg Sign Floor Ceil Round Reciprocal Sqrt Exp Log
        Erf Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh Acosh Atanh Tanh Relu Equal Greater Less
        GreaterOrEqual LessOrEqual And Or Xor Not BitwiseAnd BitwiseOr BitwiseXor BitwiseNot BitShift
        IsNaN IsInf aten::add aten::sub aten::rsub aten::mul aten::div aten::pow aten::remainder
        aten::fmod aten::maximum aten::minimum aten::abs aten::neg aten::sign aten::floor aten::ceil
        aten::round aten::trunc aten::reciprocal aten::sqrt aten::rsqrt aten::exp aten::exp2 aten::expm1
        aten::log aten::log2 aten::log1p aten::erf aten::sin aten::cos aten::tan aten::atan aten::atan2
        aten::tanh aten::relu aten::eq aten::ne aten::lt aten::le aten::gt aten::ge aten::logical_and
        aten::logical_or aten::logical_not aten::logical_xor aten::bitwise_and aten::bitwise_or
        aten::bitwise_not aten::isnan aten::isinf aten::floor_divide aten::clamp_min aten::clamp_max
        aten::isfinite aten::square aten::__and__ aten::__or__ aten::__xor__ aten::diff
        aten::scatter_add aten::sgn aten::bitwise_xor aten::relu_ aten::add_ aten::mul_
    """,
    2: """
        Clip LeakyRelu PRelu ThresholdedRelu BatchNormalization DequantizeLinear
        com.microsoft::DequantizeLinear aten::clamp aten::hardtanh aten::relu6 aten::leaky_relu
        aten::prelu aten::batch_norm aten::_native_batch_norm_legit_no_training aten::addcmul
        aten::addcdiv aten::lerp
    """,
    3: """
        Elu Celu Selu Softplus Softsign Shrink HardSigmoid RotaryEmbedding
        com.microsoft::RotaryEmbedding Swish aten::elu aten::celu aten::selu aten::softplus
        aten::softsign aten::hardsigmoid
    """,
    4: """
        Sigmoid HardSwish QuantizeLinear com.microsoft::QuantizeLinear DynamicQuantizeLinear
        RMSNormalization SimplifiedLayerNormalization LpNormalization aten::sigmoid aten::hardswish
        aten::rms_norm
    """,
    5: """
        Softmax Hardmax Gelu com.microsoft::Gelu com.microsoft::QuickGelu aten::softmax aten::_softmax
        aten::silu com.microsoft::SkipSimplifiedLayerNormalization aten::_safe_softmax
        graphopt::stablemax
    """,
    6: """
        LogSoftmax Mish SwiGLU com.microsoft::BiasGelu aten::log_softmax aten::_log_softmax aten::mish
        aten::logit
    """,
    7: """
        LayerNormalization InstanceNormalization GroupNormalization MeanVarianceNormalization
        aten::layer_norm aten::native_layer_norm aten::group_norm aten::native_group_norm
        aten::instance_norm com.microsoft::GroupNorm com.microsoft::EmbedLayerNormalization
    """,
    8: """
        com.microsoft::FastGelu com.microsoft::SkipLayerNormalization Resize Upsample GridSample
        aten::upsample_bilinear2d aten::grid_sampler
    """,
}  # fmt: skip

# Per element of the first operand.
_PER_OPERAND: Mapping[int, str] = {
    1: """
        ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd GlobalAveragePool GlobalMaxPool ArgMax
        ArgMin CumSum CumProd aten::sum aten::mean aten::amax aten::amin aten::max aten::min aten::prod
        aten::argmax aten::argmin aten::cumsum aten::any aten::all aten::cumprod
        aten::adaptive_avg_pool2d aten::_adaptive_avg_pool2d aten::count_nonzero
        aten::adaptive_avg_pool1d aten::adaptive_max_pool2d
    """,
    2: """
        ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSum ReduceLogSumExp GlobalLpPool aten::norm
        aten::linalg_vector_norm aten::logsumexp
    """,
    4: "aten::var aten::std aten::var_mean",
}


def _per_result(factor: int) -> FlopFunction:
    return lambda call: factor * elements(call.output())


def _per_operand(factor: int) -> FlopFunction:
    return lambda call: factor * elements(call.input(0))


flops(*_MOVES.split())(lambda call: sympy.Integer(0))
for _factor, _kinds in _PER_RESULT.items():
    flops(*_kinds.split())(_per_result(_factor))
for _factor, _kinds in _PER_OPERAND.items():
    flops(*_kinds.split())(_per_operand(_factor))


@flops("aten::gelu")
def gelu(call: Call) -> sympy.Expr:
    """The exact form has 5 steps, the tanh form 8."""
    return (8 if call.attrs.get("approximate") == "tanh" else 5) * elements(call.output())


@flops("graphopt::group_rational")
def group_rational(call: Call) -> sympy.Expr:
    """A multiplication and an addition for each power above and below, the magnitude, and the quotient."""
    return rational_steps(call, 1, bool(call.attrs.get("split"))) * elements(call.output())


def rational_steps(call: Call, first: int, split: bool) -> sympy.Expr:
    """Per element, with the coefficients at `first` and behind; relu, magnitude and difference of `split` are three."""
    powers = call.input(first)[1] - 1 + call.input(first + 1)[1]
    return 2 * powers + 2 + 3 * int(split)


@flops("MaxPool", "AveragePool", "LpPool", "aten::max_pool2d", "aten::avg_pool2d", "aten::max_pool1d",
       "aten::avg_pool1d", "aten::max_pool2d_with_indices")  # fmt: skip
def pooling(call: Call) -> sympy.Expr:
    """One per element of each window."""
    kernel = call.attrs.get("kernel_shape") or call.attrs["kernel_size"]
    taps = [kernel] if isinstance(kernel, int) else list(kernel)
    if len(taps) == 1 and call.kind.endswith("2d"):
        taps = taps * 2
    return sympy.Mul(*taps) * elements(call.output())


@flops("LRN")
def local_response_normalization(call: Call) -> sympy.Expr:
    """Squares and sums over the window, then a power and a division."""
    return (int(call.attrs["size"]) + 5) * elements(call.output())


@flops("TopK", "aten::topk", "aten::sort", "aten::argsort", "Unique")
def sorting(call: Call) -> sympy.Expr:
    """Counted as one comparison per element: the real number depends on the data and the implementation."""
    return elements(call.input(0))
