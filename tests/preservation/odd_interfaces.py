"""Inputs, outputs and weights that coincide, or that nothing uses; inputs that are no tensors."""

from collections.abc import Iterator

import numpy as np
import onnx
import onnx.helper
from onnx import ModelProto

from .odd import BOTH, BRANCHES, Odd, P, X, branch, info, one, parsed, several, tensor

# Inputs and outputs.


@one
def a_weight_that_can_be_fed() -> Odd:
    proto = parsed("g (float[N, 4] x, float[4] w, float[4] v) => (float[N, 4] y) { h = Mul(x, w) y = Add(h, u) }")
    proto.graph.initializer.append(tensor("w", np.float32([1, 1, 1, 1])))
    proto.graph.initializer.append(tensor("v", np.float32([0, 0, 0, 0])))  # nothing uses it, but it can be fed
    proto.graph.initializer.append(tensor("u", np.float32([1, 1, 1, 1])))  # equal to what is only a default
    return Odd(proto, ({"x": X}, {"x": X, "w": np.float32([1, 2, 3, 4])}))


@one
def a_weight_that_can_be_fed_and_that_a_branch_uses() -> Odd:
    proto = parsed(BRANCHES)
    proto.graph.input.append(info("w", 4))
    proto.graph.initializer.append(tensor("w", np.float32([1, 1, 1, 1])))
    branch(proto, 0).node[0].input[1] = "w"
    return Odd(proto, (*BOTH, {**BOTH[0], "w": np.float32([1, 2, 3, 4])}))


@one
def weights_among_the_inputs_as_once_required() -> ModelProto:
    proto = parsed("g (float[N, 4] x, float[4] w, float[4] v) => (float[N, 4] y) { h = Mul(x, w) y = Neg(h) }", ir=3)
    proto.graph.initializer.append(tensor("w", np.float32([1, 1, 1, 1])))
    proto.graph.initializer.append(tensor("v", np.float32([0, 0, 0, 0])))
    del proto.opset_import[:]
    proto.opset_import.add(domain="", version=9)
    return proto


@one
def a_weight_that_is_an_output() -> ModelProto:
    return parsed("""g (float[N, 4] x) => (float[N, 4] y, float[4] w, float[2] v)
        <float[4] w = {1, 1, 1, 1}, float[2] v = {1, 2}, float[4] u = {1, 1, 1, 1}> { h = Mul(x, w) y = Sub(h, u) }""")


@one
def a_constant_that_is_an_output() -> ModelProto:
    return parsed("""g (float[N, 4] x) => (float[N, 4] y, float[4] w) {
        w = Constant<value = float[4] {1, 2, 3, 4}>() h = Mul(x, w) y = Neg(h) }""")


@one
def an_input_that_is_an_output() -> Odd:
    return Odd(
        parsed("g (float[N, 4] x, float[N, 4] z) => (float[N, 4] y, float[N, 4] z) { y = Neg(x) }"),
        ({"x": X, "z": X},),
    )


@one
def an_output_listed_twice() -> ModelProto:
    return parsed("g (float[N, 4] x) => (float[N, 4] y, float[N, 4] y, float[N, 4] z) { y = Neg(x) z = Abs(y) }")


@one
def a_value_listed_twice_in_a_body() -> Odd:
    return Odd(
        parsed("""g (float[N, 4] x, bool c) => (float[N, 4] y, float[N, 4] z) {
            h = Neg(x)
            y, z = If(c) <then_branch = t () => (float[N, 4] p, float[N, 4] p) { p = Abs(h) },
                          else_branch = e () => (float[N, 4] h, float[N, 4] h) { }> }"""),
        # onnxruntime lets no branch return an outer value.
        BOTH,
        runs=False,
    )


@one
def inputs_and_weights_without_use() -> Odd:
    proto = parsed("""g (float[N, 4] x, float[M] z) => (float[N, 4] y) <float[4] w = {1, 2, 3, 4}> {
        h = Exp(x) y = Neg(h) }""")
    return Odd(proto, ({"x": X, "z": np.float32([1])},))


@one
def a_weight_without_use_in_a_body() -> Odd:
    proto = parsed(BRANCHES)
    branch(proto, 0).initializer.append(tensor("spare", np.float32([1])))
    return Odd(proto, BOTH)


@one
def a_weight_that_only_a_body_uses() -> Odd:
    proto = parsed(BRANCHES)
    proto.graph.initializer.append(tensor("w", np.float32([1, 2, 3, 4])))
    branch(proto, 0).node[0].input[1] = "w"
    return Odd(proto, BOTH)


@one
def a_constant_that_only_a_body_uses() -> Odd:
    proto = parsed(BRANCHES)
    constant = onnx.helper.make_node("Constant", [], ["w"], name="four", value_floats=[1.0, 2.0, 3.0, 4.0])
    proto.graph.node.insert(1, constant)
    branch(proto, 0).node[0].input[1] = "w"
    return Odd(proto, BOTH)


# Types of inputs and outputs.


TEXTS = np.array([["a"], ["größe"]], object)


@several
def types() -> Iterator[tuple[str, Odd]]:
    number = onnx.helper.make_tensor_type_proto(P.FLOAT, ["N", 4])
    sequence = onnx.helper.make_sequence_type_proto(number)
    optional = onnx.helper.make_optional_type_proto(number)
    nested = onnx.helper.make_optional_type_proto(sequence)
    labels = onnx.helper.make_map_type_proto(P.INT64, onnx.helper.make_tensor_type_proto(P.FLOAT, []))
    flat = ["y = Neg(x)"]
    for kind, name, nodes, output, value, runs in (
        ("a sequence", "s", ["z = SequenceInsert(s, x)", *flat], sequence, [X, X], True),
        ("an optional tensor", "o", ["z = OptionalGetElement(o)", *flat], number, X, True),
        ("an optional sequence", "o", ["z = OptionalGetElement(o)", *flat], sequence, [X], True),
        (
            "a map",
            "m",
            ["z = ai.onnx.ml.DictVectorizer<int64_vocabulary = [3, 1]>(m)", *flat],
            None,
            {1: 0.5, 3: 2.0},
            True,
        ),
    ):
        given = {"s": sequence, "m": labels}.get(name, nested if output is sequence else optional)
        proto = parsed(
            f"g (float[N, 4] x) => (float[N, 4] y) {{ {' '.join(nodes)} }}", opsets='"": 21, "ai.onnx.ml": 3'
        )
        proto.graph.input.append(onnx.helper.make_value_info(name, given))
        kept = output or onnx.helper.make_tensor_type_proto(P.FLOAT, [1, 2])
        proto.graph.output.append(onnx.helper.make_value_info("z", kept))
        yield f"{kind} as an input", Odd(proto, ({"x": X, name: value},), runs)
    proto = parsed(
        """g (float[N, 4] x) => (float[N, 4] y) {
            z = ai.onnx.ml.ZipMap<classlabels_int64s = [1, 2, 3, 4]>(x) y = Neg(x) }""",
        opsets='"": 21, "ai.onnx.ml": 3',
    )
    proto.graph.output.append(onnx.helper.make_value_info("z", onnx.helper.make_sequence_type_proto(labels)))
    yield "maps as an output", Odd(proto)
    proto = parsed(
        "g (float[N, 4] x, string[N, 1] t) => (float[N, 4] y, string[N, 1] u) { y = Neg(x) u = Identity(t) }"
    )
    yield "text as input and output", Odd(proto, ({"x": X[:2], "t": TEXTS},))
    proto = parsed("g (float x, int8[2, ?, N] i) => (float y, int8[2, ?, N] j) { y = Neg(x) j = Identity(i) }")
    proto.graph.input.add().CopyFrom(onnx.helper.make_tensor_value_info("r", P.FLOAT, None))
    yield (
        "sizes without a name, ranks unknown",
        Odd(proto, ({"x": np.array(2, np.float32), "i": np.zeros((2, 3, 1), np.int8), "r": X},)),
    )
