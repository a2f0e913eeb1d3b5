"""Control flow, and operators that nobody knows."""

import onnx
import onnx.helper
from onnx import AttributeProto, ModelProto

from .odd import BOTH, Odd, P, X, one, parsed

# Control flow.


@one
def bodies_four_deep() -> Odd:
    """Each level has a weight, a value and a constant of its own, and the innermost uses all of them."""
    return Odd(
        parsed("""g (float[N, 4] x, bool c) => (float[N, 4] y) <int64 n = {2}, float[4] w0 = {1, 2, 3, 4}> {
            v0 = Neg(x) k0 = Constant<value_float = 0.5>()
            y = Loop(n, , x) <body = b1 (int64 i1, bool go1, float[N, 4] s1) => (bool on1, float[N, 4] r1)
                    <float[4] w1 = {0.5, 0.25, 1, 2}> {
                on1 = Identity(go1) v1 = Add(s1, v0) k1 = Constant<value_float = 0.25>()
                r1 = If(c) <then_branch = t2 () => (float[N, 4] r2) <float[4] w2 = {2, 1, 2, 1}> {
                        v2 = Mul(v1, w1) k2 = Constant<value_float = 2.0>()
                        r2, o2 = Scan<num_scan_inputs = 1, body = b3 (float[N, 4] s3, float[4] e3)
                                => (float[N, 4] r3, float[4] o3) <float[4] w3 = {0.125, 1, 1, 1}> {
                            v3 = Add(s3, e3) k3 = Constant<value_float = 4.0>() o3 = Identity(e3)
                            r3 = If(go1) <then_branch = t4 () => (float[N, 4] r4) <float[4] w4 = {1, 1, 0.5, 1}> {
                                    f = Cast<to = 1>(i1)
                                    a = Sum(x, v0, v1, v2, v3, s1, s3, e3, f)
                                    b = Sum(w0, w1, w2, w3, w4) d = Sum(k0, k1, k2, k3)
                                    e = Mul(a, b) r4 = Mul(e, d) },
                                else_branch = e4 () => (float[N, 4] r4) { r4 = Sub(v3, w2) }> }>(v2, v0) },
                    else_branch = e2 () => (float[N, 4] q2) { q2 = Mul(v1, w0) }> }> }"""),
        BOTH,
    )


@one
def a_body_that_declares_no_shapes() -> ModelProto:
    proto = parsed("""g (float[N, 4] x) => (float[N, 4] y) <int64 n = {2}> {
        h = Neg(x)
        y = Loop(n, , x) <body = b (int64 i, bool go, float s) => (bool on, float r) {
            on = Identity(go) r = Add(s, h) }> }""")
    body = proto.graph.node[-1].attribute[0].g
    for value in (body.input[2], body.output[1]):
        value.type.tensor_type.ClearField("shape")
    return proto


@one
def a_scan_of_the_first_kind() -> Odd:
    proto = parsed(
        """g (float[1, T, 4] x) => (float[1, 4] y, float[1, T, 4] z) <float[1, 4] s = {0, 0, 0, 0}> {
            h = Neg(x)
            y, z = Scan<num_scan_inputs = 1, body = b (float[4] t, float[4] v) => (float[4] r, float[4] o) {
                r = Add(t, v) o = Mul(r, v) }>(, s, h) }""",
        opsets='"": 8',
        ir=4,
    )
    return Odd(proto, ({"x": X[None]},))


# Bodies that passes open, merge, or rewire.


@one
def a_constant_branch_with_weights_and_names_of_its_own() -> ModelProto:
    """The other If has the same names inside; so has the main graph, behind both."""
    proto = parsed("""g (float[N, 4] x) => (float[N, 4] y) <bool yes = {1}, float[4] w = {1, 2, 3, 4}> {
        h = Neg(x)
        [first] a = If(yes) <then_branch = t () => (float[N, 4] p) <float[4] w = {5, 6, 7, 8}, float[1] v = {2}> {
                         [inner] u = Abs(h) k = Constant<value_floats = [1.0, 2.0, 3.0, 4.0]>()
                         m = Mul(u, w) d = Div(m, v) p = Mul(d, k) },
                     else_branch = e () => (float[N, 4] q) { q = Neg(h) }>
        c = IsNaN(a) n = Cast<to = 1>(c) s = ReduceSum<keepdims = 0>(n) t = Cast<to = 9>(s)
        [second] b = If(t) <then_branch = t () => (float[N, 4] p) { [inner] u = Abs(h) p = Mul(u, w) },
                     else_branch = e () => (float[N, 4] q) { [inner] u = Exp(a) q = Neg(u) }>
        [inner] u = Add(a, b) p = Neg(u) y = Mul(p, w) }""")
    return proto


@one
def a_constant_branch_with_branches_inside() -> Odd:
    return Odd(
        parsed("""g (float[N, 4] x, bool c) => (float[N, 4] y) <bool no = {0}, float[4] o = {1, 2, 1, 2}> {
            h = Neg(x)
            a = If(no) <then_branch = t () => (float[N, 4] p) { p = Neg(h) },
                        else_branch = e () => (float[N, 4] q) <float[4] w = {5, 6, 7, 8}> {
                            k = Constant<value_float = 0.5>() u = Exp(h)
                            r = If(c) <then_branch = t () => (float[N, 4] p) {
                                           d = Mul(u, w) i = Mul(d, k) p = Mul(i, o) },
                                       else_branch = e () => (float[N, 4] q) <float[4] l = {1, 2, 3, 4}> {
                                           z = Mul(u, l) q = Mul(z, w) }>
                            q = Add(r, u) }>
            y = Neg(a) }"""),
        BOTH,
    )


@one
def a_constant_branch_that_uses_constants_around_it() -> ModelProto:
    """Nothing but the branch uses them; once they stand beside its nodes they have to stand in front of those."""
    return parsed("""g (float[N, 4] x) => (float[N, 4] y) <int64 n = {2}, bool yes = {1}, float[4] o = {1, 2, 1, 2}> {
        k = Constant<value_float = 0.5>()
        a = If(yes) <then_branch = t () => (float[N, 4] p) { u = Exp(x) d = Mul(u, k) p = Mul(d, o) },
                     else_branch = e () => (float[N, 4] q) { q = Neg(x) }>
        y = Loop(n, , a) <body = b (int64 i, bool go, float[N, 4] s) => (bool on, float[N, 4] r) {
            on = Identity(go) l = Constant<value_floats = [1.0, 2.0, 3.0, 4.0]>()
            r = If(yes) <then_branch = t () => (float[N, 4] p) { d = Mul(s, l) p = Sub(d, o) },
                         else_branch = e () => (float[N, 4] q) { q = Neg(s) }> }> }""")


@one
def a_constant_branch_that_returns_a_weight() -> ModelProto:
    return parsed("""g (float[N, 4] x) => (float[N, 4] y, float[4] z) <bool yes = {1}, float[4] o = {1, 2, 1, 2}> {
        h = Neg(x)
        a, b = If(yes) <then_branch = t () => (float[4] p, float[4] q) <float[4] w = {5, 6, 7, 8}> {
                            p = Identity(w) q = Constant<value_floats = [1.0, 2.0, 3.0, 4.0]>() },
                        else_branch = e () => (float[4] p, float[4] q) { p = Identity(o) q = Neg(o) }>
        y = Mul(h, a) z = Identity(b) }""")


@one
def values_that_are_merged_into_one_that_a_body_shadows() -> ModelProto:
    """`b` is computed as `a` is, and the body has an `a` of its own."""
    return parsed("""g (float[N, 4] x) => (float[N, 4] y) <int64 n = {2}> {
        a = Exp(x) b = Exp(x)
        y = Loop(n, , a) <body = l (int64 i, bool go, float[N, 4] a) => (bool on, float[N, 4] r) {
            on = Identity(go) r = Sub(b, a) }> }""")


@one
def a_body_with_needless_nodes_of_its_own() -> Odd:
    return Odd(
        parsed("""g (float[N, 4] x, bool c) => (float[N, 4] y) <float one = {1}, float[4] w = {1, 2, 3, 4}> {
            h = Neg(x)
            y = If(c) <then_branch = t () => (float[N, 4] p) { u = Mul(h, one) v = Neg(u) t = Neg(v) p = Mul(t, w) },
                       else_branch = e () => (float[N, 4] q) <float[1] v = {1}> { u = Div(x, v) q = Sub(u, w) }> }"""),
        BOTH,
    )


@one
def constants_to_fold_where_weights_are_inputs() -> ModelProto:
    proto = parsed(
        """g (float[N, 4] x, float[4] w, float[4] v) => (float[N, 4] y) <
        float[4] w = {1, 2, 3, 4}, float[4] v = {4, 3, 2, 1}> { k = Add(w, v) y = Mul(x, k) }""",
        ir=3,
        opsets='"": 9',
    )
    assert len(proto.graph.input) == 3
    return proto


@one
def names_that_new_nodes_would_take() -> ModelProto:
    """Transposes are joined into a new node; nodes and values of the model have the names that it could get."""
    return parsed(
        """g (float[N, 4] x) => (float[N, 4] y, float[N, 4] z) {
        [t0] a = Transpose<perm = [1, 0]>(x) [t1] b = Neg(a) [t2] c = Transpose<perm = [1, 0]>(b) [t3] y = Neg(c)
        [transpose] d = Unsqueeze(x, axes) [transpose_1] e = Transpose<perm = [1, 2, 0]>(d)
        [transpose_default] f = Transpose<perm = [2, 1, 0]>(e) [v] i = Neg(f)
        [transpose_11] k = Transpose<perm = [2, 1, 0]>(i) [transpose_10] l = Transpose<perm = [2, 0, 1]>(k)
        [graphopt] z = Squeeze(l, axes) }""".replace(") {", ") <int64[1] axes = {0}> {", 1)
    )


# Operators that nobody knows.


@one
def an_unknown_operator() -> Odd:
    proto = parsed(
        """g (float[N, 4] x) => (float[N, 4] y) <float[4] w = {1, 2, 3, 4}> {
            h = Exp(x)
            b, , d = secret.Frobnicate<mode = "größe", level = 3, table = [1.5, 2.5]>(h, , w)
            y = Add(b, d) }""",
        opsets='"": 21, "secret": 7',
    )
    proto.graph.node[1].name = "frob"
    proto.graph.node[1].overload = "wide"
    return Odd(proto, runs=False)


@one
def an_unknown_operator_with_bodies() -> Odd:
    proto = parsed(
        """g (float[N, 4] x) => (float[N, 4] y) <float[4] w = {1, 2, 3, 4}> {
            h = Exp(x) k = Constant<value_float = 0.5>()
            y = secret.Apply<body = b (float[N, 4] s) => (float[N, 4] r) { a = Add(s, h) d = Mul(a, w) r = Mul(d, k) },
                             other = o () => (float[N, 4] q) <float[4] w = {1, 1, 1, 1}> { q = Mul(x, w) }>(x) }""",
        opsets='"": 21, "secret": 7',
    )
    several_graphs = proto.graph.node[-1].attribute.add(name="more", type=AttributeProto.GRAPHS)
    for attribute in proto.graph.node[-1].attribute[:2]:
        several_graphs.graphs.add().CopyFrom(attribute.g)
    typed = proto.graph.node[-1].attribute.add(name="kind", type=AttributeProto.TYPE_PROTO)
    typed.tp.CopyFrom(onnx.helper.make_tensor_type_proto(P.FLOAT, ["N"]))
    return Odd(proto, runs=False)


@one
def an_unknown_operator_in_a_branch() -> Odd:
    proto = parsed(
        """g (float[N, 4] x, bool c) => (float[N, 4] y) <float[4] w = {1, 2, 3, 4}> {
            h = Exp(x)
            y = If(c) <then_branch = t () => (float[N, 4] p) { a = Add(x, w) p = secret.Frobnicate<level = 3>(a, h) },
                       else_branch = e () => (float[N, 4] q) { q = Neg(h) }> }""",
        opsets='"": 21, "secret": 7',
    )
    return Odd(proto, BOTH, runs=False)


@one
def unknown_operators_that_nothing_reads() -> Odd:
    """They may print, or log, or check something."""
    proto = parsed(
        """g (float[N, 4] x, bool c) => (float[N, 4] y) <bool yes = {1}> {
            h = Exp(x) z = secret.Print(h)
            a = If(c) <then_branch = t () => (float[N, 4] p) { p = secret.Print(x) },
                       else_branch = e () => (float[N, 4] q) { q = Neg(x) }>
            b = If(yes) <then_branch = t () => (float[N, 4] p) { p = secret.Print(x) },
                         else_branch = e () => (float[N, 4] q) { q = Neg(x) }>
            d = own.log(x) y = Neg(h) }
        <domain: "own", opset_import: ["": 21, "secret": 7]> log (v) => (r) { r = secret.Print(v) }""",
        opsets='"": 21, "secret": 7, "own": 1',
    )
    del proto.graph.node[1].output[:]  # nor need they have results
    return Odd(proto, BOTH, runs=False)
