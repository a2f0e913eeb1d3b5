"""FLOPs of matrix products, convolutions, attention and recurrent layers."""

from __future__ import annotations

import sympy

from graphopt.cost.pointwise import rational_steps
from graphopt.cost.table import Call, MissingShapeError, Shape, elements, flops

# Softmax: maximum, subtract, exp, sum, divide.
SOFTMAX = 5


@flops(
    "MatMul", "MatMulInteger", "com.microsoft::MatMulInteger16", "com.microsoft::MatMulIntegerToFloat",
    "com.microsoft::DynamicQuantizeMatMul", "aten::mm", "aten::bmm", "aten::matmul", "aten::mv", "aten::dot",
    contraction=True,
)  # fmt: skip
def matmul(call: Call) -> sympy.Expr:
    """`[..., M, K] @ [..., K, N]`: 2 M N K for each pair of matrices."""
    return 2 * elements(call.output()) * call.input(0)[-1]


@flops("com.microsoft::FusedMatMul", contraction=True)
def fused_matmul(call: Call) -> sympy.Expr:
    """A product of possibly transposed operands."""
    a = call.input(0)
    if call.attrs.get("transBatchA"):
        raise MissingShapeError("a batch axis inside the matrix is not counted")
    return 2 * elements(call.output()) * a[-2 if call.attrs.get("transA") and len(a) > 1 else -1]


@flops("QLinearMatMul", contraction=True)
def qlinear_matmul(call: Call) -> sympy.Expr:
    """A quantised product and its requantisation (multiply, round, add)."""
    return elements(call.output()) * (2 * call.input(0)[-1] + 3)


@flops("com.microsoft::MatMulNBits", contraction=True)
def matmul_nbits(call: Call) -> sympy.Expr:
    """A product with a packed weight; dequantisation is 2 per element of the weight."""
    K, N = int(call.attrs["K"]), int(call.attrs["N"])
    return 2 * elements(call.output()) * K + 2 * sympy.Integer(K * N)


@flops("Gemm", contraction=True)
def gemm(call: Call) -> sympy.Expr:
    """`[M, K] @ [K, N] + [N]`."""
    a = call.input(0)
    inner = a[0] if call.attrs.get("transA") else a[1]
    return elements(call.output()) * (2 * inner + int(call.has(2)))


@flops("aten::addmm", "aten::baddbmm", contraction=True)
def addmm(call: Call) -> sympy.Expr:
    """A product added to the first operand."""
    return elements(call.output()) * (2 * call.input(1)[-1] + 1)


@flops("aten::linear", contraction=True)
def linear(call: Call) -> sympy.Expr:
    """`[..., I]` by `[O, I]`, and a bias."""
    return elements(call.output()) * (2 * call.input(0)[-1] + int(call.has(2)))


@flops("graphopt::linear_rational", contraction=True)
def linear_rational(call: Call) -> sympy.Expr:
    """A linear layer, and the steps of the rational function, which are few beside its products."""
    steps = rational_steps(call, 3, bool(call.attrs.get("split")))
    return elements(call.output()) * (2 * call.input(0)[-1] + int(call.has(2)) + steps)


@flops("Conv", "ConvInteger", "com.microsoft::FusedConv", "com.microsoft::NhwcConv", "aten::conv1d", "aten::conv2d",
       "aten::conv3d", "aten::_conv_depthwise2d", contraction=True)  # fmt: skip
def convolution(call: Call) -> sympy.Expr:
    """Each output is a sum over the taps and the channels of its group: `weight[1:]`."""
    bias = call.kind != "ConvInteger" and call.has(2)
    return elements(call.output()) * (2 * elements(call.input(1)[1:]) + int(bias))


@flops("QLinearConv", contraction=True)
def qlinear_convolution(call: Call) -> sympy.Expr:
    """A quantised convolution and its requantisation (multiply, round, add)."""
    return elements(call.output()) * (2 * elements(call.input(3)[1:]) + 3 + int(call.has(8)))


@flops("ConvTranspose", "aten::conv_transpose1d", "aten::conv_transpose2d", "aten::conv_transpose3d",
       contraction=True)  # fmt: skip
def transposed_convolution(call: Call) -> sympy.Expr:
    """Each input is spread over the taps and the channels of its group: `weight[1:]`."""
    spread = 2 * elements(call.input(0)) * elements(call.input(1)[1:])
    return spread + (elements(call.output()) if call.has(2) else 0)


@flops("aten::convolution", "aten::_convolution", contraction=True)
def aten_convolution(call: Call) -> sympy.Expr:
    """Either direction, by its flag."""
    return (transposed_convolution if call.attrs.get("transposed") else convolution)(call)


@flops("Einsum", "aten::einsum", contraction=True)
def einsum(call: Call) -> sympy.Expr:
    """One pass over all index combinations: 2 FLOPs for two operands, one more for each further one."""
    equation = str(call.attrs["equation"]).replace(" ", "")
    if "." in equation:
        raise MissingShapeError("an ellipsis in the equation is not counted")
    sizes: dict[str, sympy.Expr] = {}
    for labels, shape in zip(equation.split("->")[0].split(","), call.tensors, strict=True):
        for label, size in zip(labels, shape, strict=True):
            # A size of one broadcasts against the other operand's.
            sizes[label] = size if sizes.get(label, 1) == 1 else sizes[label]
    return max(len(call.tensors), 1) * sympy.Mul(*sizes.values())


def attention_core(
    batch: sympy.Expr,
    heads: sympy.Expr,
    queries: sympy.Expr,
    keys: sympy.Expr,
    width: sympy.Expr,
    value: sympy.Expr,
    masks: int,
) -> sympy.Expr:
    """Scores, scale, masks, softmax, and the mixture of values; width and value are those of all heads together."""
    pairs = batch * queries * keys
    return 2 * pairs * (width + value) + (1 + masks + SOFTMAX) * heads * pairs


@flops("Attention", contraction=True)
def attention(call: Call) -> sympy.Expr:
    """ai.onnx Attention on `[B, H, T, D]` or packed `[B, T, H * D]`; a causal mask does not save work."""
    q, k, y = call.input(0), call.input(1), call.output()
    S = k[-2] + (call.input(4)[2] if call.has(4) else 0)
    masks = int(call.has(3)) + int(bool(call.attrs.get("is_causal")))
    if len(q) == 4:
        return attention_core(q[0], q[1], q[2], S, q[1] * q[3], y[1] * y[3], masks)
    return attention_core(q[0], sympy.Integer(call.attrs["q_num_heads"]), q[1], S, q[2], y[2], masks)


@flops("com.microsoft::Attention", contraction=True)
def merged_attention(call: Call) -> sympy.Expr:
    """One projection to q, k and v, then attention."""
    x, weight, y = call.input(0), call.input(1), call.output()
    S = x[1] + (call.input(4)[3] if call.has(4) else 0)
    project = x[0] * x[1] * weight[1] * (2 * x[2] + int(call.has(2)))
    masks = int(call.has(3)) + int(call.has(5)) + int(bool(call.attrs.get("unidirectional")))
    widths = call.attrs.get("qkv_hidden_sizes")
    width = sympy.Integer(widths[0]) if widths else weight[1] / 3
    return project + attention_core(x[0], sympy.Integer(call.attrs["num_heads"]), x[1], S, width, y[2], masks)


@flops("com.microsoft::MultiHeadAttention", "com.microsoft::DecoderMaskedMultiHeadAttention", contraction=True)
def multi_head_attention(call: Call) -> sympy.Expr:
    """Attention on packed projections, with biases added first."""
    q, y = call.input(0), call.output()
    packed = len(q) == 5
    key: Shape = call.input(1) if call.has(1) else q
    S = key[2] if len(key) == 4 else key[1]
    S = S + (call.input(6)[2] if call.has(6) else 0)
    width = q[2] * q[4] if packed else q[2]
    masks = int(call.has(4)) + int(call.has(5)) + int(bool(call.attrs.get("unidirectional")))
    bias = q[0] * q[1] * (2 * width + y[2]) if call.has(3) else 0
    return bias + attention_core(q[0], sympy.Integer(call.attrs["num_heads"]), q[1], S, width, y[2], masks)


@flops("com.microsoft::GroupQueryAttention", contraction=True)
def group_query_attention(call: Call) -> sympy.Expr:
    """Attention over the cache that it returns; rotary embedding is 3 per channel."""
    y, cache = call.output(), call.output(1)
    heads = sympy.Integer(call.attrs["num_heads"])
    rotary = 3 * (elements(y) + y[0] * y[1] * cache[1] * cache[3]) if call.attrs.get("do_rotary") else 0
    return rotary + attention_core(y[0], heads, y[1], cache[2], y[2], y[2], 1 + int(call.has(10)))


@flops("aten::scaled_dot_product_attention", "aten::_scaled_dot_product_flash_attention_for_cpu",
       "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_flash_attention",
       contraction=True)  # fmt: skip
def sdpa(call: Call) -> sympy.Expr:
    """`[..., T, D]` on `[..., S, D]`."""
    q, k, v = call.input(0), call.input(1), call.input(2)
    masks = int(call.has(3)) + int(bool(call.attrs.get("is_causal")))
    rest = elements(q[:-3])
    return attention_core(rest, q[-3], q[-2], k[-2], q[-3] * q[-1], q[-3] * v[-1], masks)


@flops("LinearAttention", "com.microsoft::LinearAttention", contraction=True)
def onnx_linear_attention(call: Call) -> sympy.Expr:
    """The recurrence step by step: update of the state and the read-out, 2 FLOPs each per element of the state."""
    q, state = call.input(0), call.output(1)
    rule = str(call.attrs.get("update_rule", "gated_delta"))
    # The gate scales the state; the delta rule reads the state once more.
    steps = 4 + ("gated" in rule) + 2 * ("delta" in rule)
    return steps * q[1] * elements(state)


# What a gate does per hidden unit besides its products: nonlinearities, mixtures and cell updates.
_UNIT = {"aten::lstm": 18, "aten::gru": 14, "aten::rnn_tanh": 1, "aten::rnn_relu": 1}


@flops("aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu", contraction=True)
def aten_recurrent(call: Call) -> sympy.Expr:
    """All layers and directions: their weights are the matrices among the operands, input and recurrent in turn."""
    x = call.input(0)
    matrices = [shape for shape in call.tensors[1:] if len(shape) == 2]
    products = sympy.Add(*(2 * elements(m) for m in matrices))
    biases = sympy.Add(*(shape[0] for shape in call.tensors[1:] if len(shape) == 1))
    hidden = sympy.Add(*(m[1] for m in matrices[1::2]))
    return x[0] * x[1] * (products + biases + _UNIT[call.kind] * hidden)


def _recurrent(call: Call, gates: int, pointwise: int) -> sympy.Expr:
    x, w, r = call.input(0), call.input(1), call.input(2)
    steps = x[0] * x[1] * w[0]
    hidden = r[2]
    return steps * (2 * gates * hidden * (w[2] + hidden) + pointwise * hidden)


@flops("RNN", contraction=True)
def rnn(call: Call) -> sympy.Expr:
    """One gate: two products, bias, tanh."""
    return _recurrent(call, 1, 4)


@flops("GRU", contraction=True)
def gru(call: Call) -> sympy.Expr:
    """Three gates: products and biases, two sigmoids, one tanh, the mixture."""
    return _recurrent(call, 3, 3 * 3 + 2 * 4 + 1 + 5)


@flops("LSTM", contraction=True)
def lstm(call: Call) -> sympy.Expr:
    """Four gates: products and biases, three sigmoids, two tanh, the cell."""
    return _recurrent(call, 4, 4 * 3 + 3 * 4 + 2 + 4)
