"""Model-local functions."""

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import onnx
import onnx.helper
from onnx import ModelProto

from .odd import BOTH, FLAT, FUNCTIONS, Odd, P, one, parsed, several


@one
def functions_that_call_functions() -> ModelProto:
    return parsed(FUNCTIONS)


@one
def functions_that_nobody_calls() -> ModelProto:
    proto = parsed(FLAT)
    proto.functions.extend(parsed(FUNCTIONS).functions)
    return proto


@one
def overloads() -> ModelProto:
    proto = parsed("""g (float[N, 4] x) => (float[N, 4] y) { h = own.f(x) y = own.f(h) }
        <domain: "own", opset_import: ["": 21]> f (v) => (r) { r = Neg(v) }
        <domain: "own", opset_import: ["": 21]> g (v) => (r) { r = Exp(v) }""")
    proto.functions[0].overload, proto.functions[1].overload = "one", "two"
    proto.functions[1].name = "f"
    proto.graph.node[0].overload, proto.graph.node[1].overload = "one", "two"
    return proto


@one
def attributes_of_a_function_in_its_branches() -> Odd:
    return Odd(
        parsed("""g (float[N, 4] x, bool c) => (float[N, 4] y) { h = own.f<slope = 0.25>(x, c) y = own.f(h, c) }
            <domain: "own", opset_import: ["": 21]> f <slope: float = 0.5>(v, c) => (r) {
                w = Constant<value = float[4] {1, 2, 3, 4}>()
                n = Neg(v)
                r = If(c) <then_branch = t () => (float[N, 4] p) { p = LeakyRelu<alpha: float = @slope>(n) },
                           else_branch = e () => (float[N, 4] q) {
                               u = Elu<alpha: float = @slope>(v) q = Mul(u, w) }> }"""),
        BOTH,
    )


@one
def functions_of_every_kind_of_attribute() -> ModelProto:
    return parsed("""g (float[N, 4] x) => (float[N, 4] y) {
            h = own.f<perm = [1, 0], what = "none", to = 1, w = float[4] {1, 2, 3, 4}>(x)
            y = own.f<perm = [0, 1], to = 1, w = float[1] {2}>(h) }
        <domain: "own", opset_import: ["": 21]> f <perm, to, w, what: string = "tanh">(v) => (r) {
            a = Transpose<perm: ints = @perm>(v) b = Transpose<perm: ints = @perm>(a)
            k = Constant<value: tensor = @w>() d = Mul(b, k)
            e = Gelu<approximate: string = @what>(d) r = Cast<to: int = @to>(e) }""")


@one
def a_function_with_an_output_that_is_not_read() -> ModelProto:
    return parsed("""g (float[N, 4] x) => (float[N, 4] y) {
            a, b = own.halves(x) c, d = own.halves(x) e = Concat<axis = 1>(a, d) y = own.first(e) }
        <domain: "own", opset_import: ["": 21]> halves (v) => (r, s) { r, s = Split<axis = 1, num_outputs = 2>(v) }
        <domain: "own", opset_import: ["": 21]> first (v) => (r) {
            r, m = Dropout(v) s, t = Split<axis = 1, num_outputs = 2>(v) }""")


@one
def a_function_with_an_input_that_may_be_left_out() -> ModelProto:
    return parsed("""g (float[N, 4] x) => (float[N, 4] y) <float most = {1.5}> {
            h = own.clip(x, , most) y = own.clip(h) }
        <domain: "own", opset_import: ["": 21]> clip (v, low, high) => (r) { r = Clip(v, low, high) }""")


@one
def a_function_that_returns_what_it_is_given() -> ModelProto:
    return parsed("""g (float[N, 4] x) => (float[N, 4] y) { a, b = own.swap(x, x) y = Add(a, b) }
        <domain: "own", opset_import: ["": 21]> swap (v, w) => (r, s) { r = Identity(w) s = Exp(v) }""")


@one
def a_function_with_names_of_the_main_graph() -> Odd:
    return Odd(
        parsed("""g (float[N, 4] x, bool c) => (float[N, 4] y) <float[4] w = {1, 2, 3, 4}> {
            h = own.f(x)
            z = If(c) <then_branch = t () => (float[N, 4] p) { u = Abs(h) p = Mul(u, w) },
                       else_branch = e () => (float[N, 4] q) { u = Exp(h) q = Neg(u) }>
            y = own.f(z) }
            <domain: "own", opset_import: ["": 21]> f (x) => (y) {
                w = Constant<value = float[4] {2, 2, 2, 2}>() u = Mul(x, w) h = Neg(u) y = Add(h, x) }"""),
        BOTH,
    )


@one
def a_function_of_the_domain_of_another_runtime() -> ModelProto:
    return parsed(
        """g (float[N, 4] x) => (float[N, 4] y) { h = own.f(x) y = Neg(h) }
        <domain: "own", opset_import: ["": 21, "com.microsoft": 1]> f (v) => (r) { r = com.microsoft.QuickGelu(v) }"""
    )


@one
def a_function_with_named_nodes() -> ModelProto:
    """onnxruntime wants node names to be unique in a graph, and this function comes there three times."""
    return parsed("""g (float[N, 4] x) => (float[N, 4] y) {
            [first] a = own.f(x) [n] b = Neg(a) [second] d = own.f(b) y = own.f(d) }
        <domain: "own", opset_import: ["": 21]> f (v) => (r) { [n] a = Exp(v) [m] b = Neg(a) [n_1] r = Abs(b) }""")


@one
def a_function_whose_nodes_have_outputs_that_nobody_reads() -> ModelProto:
    return parsed("""g (float[N, 4] x) => (float[N, 4] y) {
            a, b = own.halves(x) c, d = own.halves(a) e = Concat<axis = 1>(a, c, c) y = own.inner(e) }
        <domain: "own", opset_import: ["": 21]> halves (v) => (r, s) { r, s = Split<axis = 1, num_outputs = 2>(v) }
        <domain: "own", opset_import: ["": 21]> inner (v) => (r) {
            p, s = Split<axis = 1, num_outputs = 2>(v) r = Concat<axis = 1>(p, p) }""")


@one
def functions_that_return_constants() -> ModelProto:
    return parsed("""g (float[N, 4] x) => (float[N, 4] y, float[4] z) { h = own.four() y = Mul(x, h) z = own.four() }
        <domain: "own", opset_import: ["": 21]> four () => (r) { r = Constant<value = float[4] {1, 2, 3, 4}>() }""")


@several
def constants_of_functions() -> Iterator[tuple[str, Odd]]:
    def function(body: str, output: str = "float[N, 4]") -> ModelProto:
        return parsed(
            f"""g (float[N, 4] x) => (float[N, 4] y, {output} z) {{ z = own.f(x) y = Neg(x) }}
            <domain: "own", opset_import: ["": 21]> f (x) => (r) {{ {body} }}""",
            opsets='"": 21, "own": 1',
        )

    packed = function("s = Constant<value_float = 0.5>() d = DequantizeLinear(w, s) r = Mul(x, d)")
    value = onnx.helper.make_tensor("", P.INT4, [4], np.array([1, -2, 3, -8]).astype(ml_dtypes.int4))
    packed.functions[0].node.insert(0, onnx.helper.make_node("Constant", [], ["w"], value=value))
    yield "4-bit constant of a function", Odd(packed)
    moved = function("s = Constant<value_float = 0.5>() t = Reshape(w, n) d = DequantizeLinear(t, s) r = Mul(x, d)")
    shape = onnx.helper.make_node("Constant", [], ["n"], value_ints=[1, 4])
    for node in (shape, packed.functions[0].node[0]):
        moved.functions[0].node.insert(0, node)
    yield "4-bit constant that a function reshapes", Odd(moved, runs=False)  # onnxruntime has no kernel
    text = function('k = Constant<value_strings = ["a", "b"]>() r = Identity(k)', "string[2]")
    yield "text of a function", Odd(text)
    described = function("[k] w = Constant<value_floats = [1.0, 2.0, 3.0, 4.0]>() r = Mul(x, w)")
    described.functions[0].node[0].doc_string = "four numbers"
    described.functions[0].node[0].metadata_props.add(key="of", value="a constant")
    yield "described constant of a function", Odd(described)


@one
def a_function_with_loops_and_branches() -> Odd:
    """Called with two values of an attribute that a body knows as a weight; `u` and `p` are names of the main graph."""
    return Odd(
        parsed("""g (float[N, 4] x, bool c) => (float[N, 4] y) <float[4] w = {9, 9, 9, 9}> {
            [n] u = Mul(x, w) p = own.f<w = float[4] {1, 2, 3, 4}>(x, c) q = own.f<w = float[1] {2}>(x, c)
            r = own.f<w = float[4] {1, 2, 3, 4}>(u, c) s = Sum(p, q, r) y = Mul(s, w) }
        <domain: "own", opset_import: ["": 21]> f <w>(v, c) => (r) {
            w = Constant<value: tensor = @w>() n = Constant<value_int = 2>() h = Neg(v)
            r = Loop(n, , h) <body = b (int64 i, bool go, float[N, 4] s) => (bool on, float[N, 4] p) {
                on = Identity(go)
                p = If(c) <then_branch = t () => (float[N, 4] q) { [n] u = Mul(s, w) q = Sub(u, v) },
                           else_branch = e () => (float[N, 4] q) <float[4] m = {1, 1, 2, 2}> {
                               u, l = Split<axis = 1, num_outputs = 2>(h) z = Concat<axis = 1>(u, u)
                               a = Mul(z, m) q = Mul(a, w) }> }> }"""),
        BOTH,
    )


@one
def a_function_with_constants_in_its_branches() -> Odd:
    """Called beside, and inside of, a graph with the same names."""
    return Odd(
        parsed("""g (float[N, 4] x, bool c) => (float[N, 4] y) {
            k = Constant<value_float = 0.5>() h = Mul(x, k) z = own.f(h, c)
            y = If(c) <then_branch = t () => (float[N, 4] p) {
                           l = Constant<value_float = 4.0>() u = own.f(z, c) p = Mul(u, l) },
                       else_branch = e () => (float[N, 4] q) { q = own.f(h, c) }> }
        <domain: "own", opset_import: ["": 21]> f (v, c) => (r) {
            r = If(c) <then_branch = t () => (float[N, 4] p) {
                           k = Constant<value_float = 2.0>() l = Constant<value_floats = [1.0, 2.0, 3.0, 4.0]>()
                           u = Mul(v, k) p = Sub(u, l) },
                       else_branch = e () => (float[N, 4] q) { k = Constant<value_float = 3.0>() q = Mul(v, k) }> }"""),
        BOTH,
    )


@one
def a_function_that_is_called_in_branches() -> Odd:
    return Odd(
        parsed("""g (float[N, 4] x, bool c) => (float[N, 4] y) <float[4] w = {1, 2, 3, 4}> {
            h = Neg(x)
            y = If(c) <then_branch = t () => (float[N, 4] p) { k = Mul(h, w) p = own.f(k) },
                       else_branch = e () => (float[N, 4] p) { k = Div(h, w) l = own.f(k) p = own.f(l) }> }
        <domain: "own", opset_import: ["": 21]> f (h) => (w) {
            k = Constant<value = float[4] {1, 2, 3, 4}>() [n] p = Mul(h, k) w = Exp(p) }"""),
        BOTH,
    )


@one
def a_function_that_returns_an_input() -> Odd:
    return Odd(
        parsed("""g (float[N, 4] x) => (float[N, 4] y, float[N, 4] z) { z, y = own.both(x, x) }
            <domain: "own", opset_import: ["": 21]> both (v, w) => (r, w) { r = Neg(v) }"""),
        runs=False,  # onnxruntime refuses the output
    )
