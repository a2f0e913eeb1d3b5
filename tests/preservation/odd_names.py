"""Names and domains that are unusual, absent, or there more than once."""

from collections.abc import Iterator

import numpy as np
import onnx
import onnx.helper
from onnx import GraphProto, ModelProto

from .odd import BOTH, BRANCHES, FLAT, FUNCTIONS, Odd, X, branch, info, one, parsed, several, tensor

# Domains.


@several
def domains() -> Iterator[tuple[str, Odd]]:
    for imported in ("", "ai.onnx"):
        for used in ("", "ai.onnx"):
            proto = parsed(BRANCHES, opsets=f'"{imported}": 21')
            for node in (*proto.graph.node, *branch(proto, 0).node):
                node.domain = used
            # onnxruntime and the checker know the operators under the short name alone.
            yield f"domain {used!r} of nodes, imported as {imported!r}", Odd(proto, BOTH, runs=not used)
    yield "domain imported under both names", Odd(parsed(FLAT, opsets='"": 21, "ai.onnx": 21'))
    proto = parsed(FUNCTIONS)
    for function in proto.functions:
        function.opset_import[0].domain = "ai.onnx"
    yield "domain of a function imported by its long name", Odd(proto, runs=False)
    yield "domains that nothing uses", Odd(parsed(FLAT, opsets='"": 21, "com.microsoft": 1, "secret": 7, "own": 3'))


# Names.


@one
def nodes_without_names() -> Odd:
    proto = parsed(BRANCHES)
    assert not any(node.name for node in proto.graph.node)
    return Odd(proto, BOTH)


@one
def nodes_of_one_name() -> Odd:
    proto = parsed(BRANCHES)
    for node in (*proto.graph.node, *branch(proto, 0).node, *branch(proto, 1).node):
        node.name = "same"
    return Odd(proto, BOTH, runs=False)  # onnxruntime refuses the second node


@one
def nodes_of_one_name_in_two_graphs() -> Odd:
    proto = parsed(BRANCHES)
    for graph in (proto.graph, branch(proto, 0), branch(proto, 1)):
        graph.node[-1].name = "same"
    return Odd(proto, BOTH)


@one
def a_branch_whose_weight_shadows() -> Odd:
    return Odd(
        parsed("""g (float[N, 4] x, bool c) => (float[N, 4] y) <float[4] w = {1, 2, 3, 4}> {
            h = Mul(x, w)
            y = If(c) <then_branch = t () => (float[N, 4] p) <float[4] w = {5, 6, 7, 8}> { p = Mul(h, w) },
                       else_branch = e () => (float[N, 4] q) <float[4] w = {9, 9, 9, 9}> { q = Sub(h, w) }> }"""),
        BOTH,
    )


@one
def a_weight_that_one_branch_shadows_and_the_other_reads() -> Odd:
    return Odd(
        parsed("""g (float[N, 4] x, bool c) => (float[N, 4] y) <float[4] w = {1, 2, 3, 4}> {
            h = Mul(x, w)
            y = If(c) <then_branch = t () => (float[N, 4] p) <float[4] w = {5, 6, 7, 8}> { p = Mul(h, w) },
                       else_branch = e () => (float[N, 4] q) { q = Sub(h, w) }> }"""),
        BOTH,
        runs=False,  # onnxruntime takes the outer value for the inner one
    )


@one
def a_loop_whose_inputs_shadow() -> ModelProto:
    return parsed("""g (float[N, 4] x) => (float[N, 4] y) <int64 n = {3}, float[4] w = {1, 2, 3, 4}> {
        h = Neg(x) i = Abs(x) z = Add(h, i)
        y = Loop(n, , z) <body = b (int64 i, bool w, float[N, 4] h) => (bool on, float[N, 4] r) {
            on = Identity(w) k = Cast<to = 1>(i) r = Mul(h, k) }> }""")


@one
def a_branch_whose_node_shadows() -> Odd:
    # The standard forbids it, and onnxruntime refuses it.
    return Odd(
        parsed("""g (float[N, 4] x, bool c) => (float[N, 4] y) {
            a = Neg(x) b = Exp(x)
            y = If(c) <then_branch = t () => (float[N, 4] p) { a = Abs(b) p = Neg(a) },
                       else_branch = e () => (float[N, 4] q) { q = Neg(a) }> }"""),
        BOTH,
        runs=False,
    )


@one
def branches_with_names_in_common() -> Odd:
    return Odd(
        parsed("""g (float[N, 4] x, bool c) => (float[N, 4] y) {
            h = Neg(x)
            y = If(c) <then_branch = t () => (float[N, 4] p) <float[4] w = {1, 2, 3, 4}> {
                           u = Mul(h, w) p = Exp(u) },
                       else_branch = t () => (float[N, 4] p) <float[4] w = {5, 6, 7, 8}> {
                           u = Div(h, w) p = Neg(u) }> }"""),
        BOTH,
    )


@one
def names_that_come_again_behind_a_body() -> Odd:
    return Odd(
        parsed("""g (float[N, 4] x, bool c) => (float[N, 4] y) {
            h = Neg(x)
            a = If(c) <then_branch = t () => (float[N, 4] p) { u = Abs(h) p = Neg(u) },
                       else_branch = e () => (float[N, 4] q) { u = Exp(h) q = Neg(u) }>
            u = Add(a, h)
            p = If(c) <then_branch = t () => (float[N, 4] q) { q = Abs(u) },
                       else_branch = e () => (float[N, 4] r) { r = Exp(u) }>
            y = Neg(p) }"""),
        BOTH,
    )


NAMES = (
    "größe", "変数", "x y", "/layer.0/Add", "a.b.c", "weight", "self", "class", "None", 'say "hi"', "it's", "graphopt",
    "back\\slash", "new\nline", "tab\t", "nul\0", "%s{0}", "0", ".", "..", "-", "a" * 5000, "forward", "__class__",
    "\u2028", "e\u0301", "x[0]", "a:0", "graphopt.cleanup.x", "h_1", " ", "µ", "input",
)  # fmt: skip


@several
def names() -> Iterator[tuple[str, Odd]]:
    for place in ("inputs", "weights", "values", "outputs", "nodes", "sizes"):
        graph = GraphProto(name="g")
        use = {each: NAMES if place == each else [f"{each}_{i}" for i in range(len(NAMES))] for each in PLACES}
        graph.input.append(info("x", "N", 4))
        graph.input.extend(info(name, size, 4) for name, size in zip(use["inputs"], use["sizes"], strict=True))
        graph.output.extend(info(name, size, 4) for name, size in zip(use["outputs"], use["sizes"], strict=True))
        graph.initializer.extend(tensor(name, np.float32([i])) for i, name in enumerate(use["weights"]))
        for i in range(len(NAMES)):
            value, name = use["values"][i], use["nodes"][i]
            graph.node.append(onnx.helper.make_node("Mul", ["x", use["weights"][i]], [value], name=name))
            output = use["outputs"][i]
            graph.node.append(onnx.helper.make_node("Add", [value, use["inputs"][i]], [output], name=f"{name}/add"))
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
        yield f"odd names of {place}", Odd(model, ({"x": X, **{name: X for name in use["inputs"]}},))


PLACES = ("inputs", "weights", "values", "outputs", "nodes", "sizes")


@one
def odd_names_in_a_body() -> Odd:
    body = "".join(f"v{i} = Mul(h, w{i}) " for i in range(len(NAMES)))
    total = ", ".join(f"v{i}" for i in range(len(NAMES)))
    weights = ", ".join(f"float w{i} = {{{i}}}" for i in range(len(NAMES)))
    proto = parsed(f"""g (float[N, 4] x, bool c) => (float[N, 4] y) <{weights}> {{
        h = Neg(x)
        y = If(c) <then_branch = t () => (float[N, 4] p) {{ {body} p = Sum({total}) }},
                   else_branch = e () => (float[N, 4] q) {{ q = Neg(h) }}> }}""")
    for i, name in enumerate(NAMES):
        proto.graph.initializer[i].name = name
        node = branch(proto, 0).node[i]
        node.input[1], node.output[0] = name, f"{name}?"
        branch(proto, 0).node[-1].input[i] = f"{name}?"
    return Odd(proto, BOTH)


@one
def odd_names_of_graphs_and_functions() -> ModelProto:
    proto = parsed(FUNCTIONS)
    proto.graph.name = 'größe "x"\n'
    for function, name in zip(proto.functions, ("zweimal\n", "größe (2)"), strict=True):
        for node in (*proto.graph.node, *proto.functions[0].node):
            if node.op_type == function.name:
                node.op_type = name
        function.name = name
    return proto
