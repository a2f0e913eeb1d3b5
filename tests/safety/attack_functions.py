"""Functions and bodies: recursive, nested, multiplying."""

import onnx
from onnx import AttributeProto as A
from onnx import helper

from .registry import EITHER, LOADS, attack, float_value, parsed

_CALLING = "then_branch = g () => (t) { t = local.F(a) }, else_branch = h () => (e) { e = Relu(a) }"
CALL = "g (float[4] x) => (float[4] y) { y = local.F(x) }"
_HEAD = '<domain: "local", opset_import: ["": 17, "local": 1]>'


@attack("calls itself", bodies=["F (a) => (b) { b = local.F(a) }"])
@attack("calls itself", bodies=["F (a) => (b) { b = local.G(a) }", "G (a) => (b) { b = local.F(a) }"])
@attack("calls itself", bodies=["G (a) => (b) { b = local.G(a) }", "F (a) => (b) { b = Relu(a) }"])
@attack(
    "calls itself",
    bodies=[f"F (a) => (b) {{ c = Less(a, a) b = If(c) <{_CALLING}> }}"],
)
@attack("same name", bodies=["F (a) => (b) { b = Relu(a) }", "F (a) => (b) { b = Neg(a) }"])
@attack("name of its own", bodies=["F (a, a) => (b) { b = Relu(a) }"])
@attack(EITHER, bodies=["F () => (b) { b = Constant<value_int = 1>() }"])
@attack(EITHER, bodies=["F (a) => (b, c, d) { b = Relu(a) }"])
@attack(EITHER, bodies=["F (a) => (a) { }"])
@attack(EITHER, bodies=["F (a) => (b) { b = Relu(nowhere) }"])
@attack(EITHER, bodies=["F (a, b, c) => (d) { d = Sum(a, b, c) }"])
@attack(EITHER, bodies=["F <missing> (a) => (b) { b = LeakyRelu<alpha: float = @missing>(a) }"])
def functions(bodies):
    return parsed(CALL, "\n".join(_HEAD + body for body in bodies))


@attack("unfold", levels=60, calls=2)
@attack("unfold", levels=6, calls=10)
@attack("unfold", levels=5000, calls=2)
@attack("calls deep|calls; inline", levels=5000, calls=1)
@attack(EITHER, levels=40, calls=1)
@attack(EITHER, levels=10, calls=2)
def functions_that_multiply(levels, calls):
    model = parsed(CALL)
    for level in range(levels):
        target, domain = (f"F{level + 1}", "local") if level + 1 < levels else ("Neg", "")
        body = [helper.make_node(target, [f"a{i}"], [f"a{i + 1}"], domain=domain) for i in range(calls)]
        name = f"F{level}" if level else "F"
        function = helper.make_function("local", name, ["a0"], [f"a{calls}"], body, model.opset_import)
        model.functions.append(function)
    return model


def _field(number: int, content: bytes) -> bytes:
    size, encoded = len(content), b""
    while size > 127:
        encoded, size = encoded + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + encoded + bytes([size]) + content


@attack(LOADS, depth=8)
@attack(LOADS, depth=31)
@attack("does not parse", depth=40)
@attack("does not parse", depth=2000)
def bodies_in_bodies(depth):
    """If inside If inside If, in wire format: protobuf builds what it would not parse."""
    output = _field(12, float_value("o", 4).SerializeToString())
    inner = leaf = _field(1, helper.make_node("Relu", ["x"], ["o"]).SerializeToString()) + _field(2, b"g") + output
    for _ in range(depth):
        node = helper.make_node("If", ["c"], ["o"]).SerializeToString()
        for name, branch in ((b"then_branch", inner), (b"else_branch", leaf)):
            node += _field(5, _field(1, name) + _field(6, branch) + bytes([160, 1, A.GRAPH]))
        inner = _field(1, node) + _field(2, b"g") + output
    head = onnx.ModelProto(ir_version=8, opset_import=[helper.make_opsetid("", 17)]).SerializeToString()
    values = (float_value("x", 4), helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, []))
    return head + _field(7, inner + b"".join(_field(11, value.SerializeToString()) for value in values))
