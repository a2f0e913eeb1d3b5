"""Small models, each with one thing that tools lose; all hold a needless node, so that there is something to rewrite.

The needless node is `Identity(x) -> idle`, called "needless". What reads `idle` would read `x` without it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx.parser
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

P = TensorProto
X = np.random.default_rng(0).uniform(0.5, 2, (3, 4)).astype(np.float32)
YES, NO = np.array(True), np.array(False)


@dataclass
class Odd:
    """A model, what to feed it, and the runtimes that cannot run it."""

    model: ModelProto
    feeds: tuple[dict[str, Any], ...] = ({"x": X},)
    runs: bool = True
    """Whether onnxruntime runs it."""
    files: dict[str, bytes] = field(default_factory=dict)
    """External data by file name."""


Builder = Callable[[], Iterator[tuple[str, Odd]]]
_builders: list[Builder] = []


def several(builder: Builder) -> Builder:
    """Enter a builder of several models."""
    _builders.append(builder)
    return builder


def one(builder: Callable[[], Odd | ModelProto]) -> Callable[[], Odd | ModelProto]:
    """Enter a builder of one model, named after it."""

    def build() -> Iterator[tuple[str, Odd]]:
        made = builder()
        yield builder.__name__.replace("_", " "), made if isinstance(made, Odd) else Odd(made)

    _builders.append(build)
    return builder


def parsed(text: str, *, ir: int = 10, opsets: str = '"": 21, "own": 1') -> ModelProto:
    """A model from its text, without the header."""
    return onnx.parser.parse_model(f"<ir_version: {ir}, opset_import: [{opsets}]> {text}")


def needless(proto: ModelProto) -> NodeProto:
    """Let the main graph read `idle` in place of x, and put the needless node in front."""
    node = onnx.helper.make_node("Identity", ["x"], ["idle"], name="needless")
    for each in proto.graph.node:
        _read(each, "x", "idle")
    others = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([node, *others])
    return node


def _read(node: NodeProto, old: str, new: str) -> None:
    for i, name in enumerate(node.input):
        if name == old:
            node.input[i] = new
    for device in node.device_configurations:
        for spec in device.sharding_spec:
            spec.tensor_name = new if spec.tensor_name == old else spec.tensor_name
    for graph in subgraphs(node):
        if old in own_names(graph):
            continue
        for inner in graph.node:
            _read(inner, old, new)
        for output in graph.output:
            output.name = new if output.name == old else output.name


def subgraphs(node: NodeProto) -> list[GraphProto]:
    """The bodies of a node."""
    found = [a.g for a in node.attribute if a.type == AttributeProto.GRAPH]
    return found + [g for a in node.attribute for g in a.graphs]


def own_names(graph: GraphProto) -> set[str]:
    """The names that a graph defines."""
    found = {i.name for i in graph.input} | {t.name for t in graph.initializer}
    found |= {s.values.name for s in graph.sparse_initializer}
    return found | {name for node in graph.node for name in node.output}


def without_the_needless_node(proto: ModelProto) -> ModelProto:
    """What a tool should make of a model that is to lose its needless node and nothing else."""
    twin = ModelProto()
    twin.CopyFrom(proto)
    kept = [node for node in twin.graph.node if node.name != "needless"]
    del twin.graph.node[:]
    twin.graph.node.extend(kept)
    for node in twin.graph.node:
        _read(node, "idle", "x")
    described = [v for v in twin.graph.value_info if v.name != "idle"]
    del twin.graph.value_info[:]
    twin.graph.value_info.extend(described)
    return twin


def sparse(name: str) -> onnx.SparseTensorProto:
    """[4]: 2 at 0 and 3 at 3."""
    values = onnx.helper.make_tensor(name, P.FLOAT, [2], [2.0, 3.0])
    indices = onnx.helper.make_tensor(f"{name}_at" if name else "", P.INT64, [2], [0, 3])
    return onnx.helper.make_sparse_tensor(values, indices, [4])


def tensor(name: str, value: Any) -> TensorProto:
    """An initialiser."""
    return onnx.numpy_helper.from_array(np.asarray(value), name)


def info(name: str, *shape: Any, dtype: int = P.FLOAT) -> onnx.ValueInfoProto:
    """An input or output."""
    return onnx.helper.make_tensor_value_info(name, dtype, list(shape))


BRANCHES = """g (float[N, 4] x, bool c) => (float[N, 4] y) {
    h = Exp(x)
    y = If(c) <then_branch = t () => (float[N, 4] p) { p = Mul(h, x) },
               else_branch = e () => (float[N, 4] q) { q = Neg(h) }> }"""
BOTH = ({"x": X, "c": YES}, {"x": X, "c": NO})
FLAT = "g (float[N, 4] x) => (float[N, 4] y) { h = Exp(x) y = Neg(h) }"


def branch(proto: ModelProto, index: int) -> GraphProto:
    """A branch of the If that ends the main graph."""
    return proto.graph.node[-1].attribute[index].g


@one
def plain() -> ModelProto:
    return parsed(FLAT)


# Sparse tensors.


@one
def sparse_initialiser() -> ModelProto:
    proto = parsed("g (float[N, 4] x) => (float[N, 4] y) { y = Mul(x, w) }")
    proto.graph.sparse_initializer.append(sparse("w"))
    return proto


@one
def sparse_initialiser_without_use() -> ModelProto:
    proto = parsed(FLAT)
    proto.graph.sparse_initializer.append(sparse("w"))
    return proto


@one
def sparse_initialiser_of_a_branch() -> Odd:
    proto = parsed(BRANCHES)
    branch(proto, 0).sparse_initializer.append(sparse("w"))
    branch(proto, 0).node[0].input[1] = "w"
    return Odd(proto, BOTH)


@one
def sparse_initialiser_used_in_a_branch_only() -> Odd:
    proto = parsed(BRANCHES)
    proto.graph.sparse_initializer.append(sparse("w"))
    branch(proto, 0).node[0].input[1] = "w"
    return Odd(proto, BOTH)


def _sparse_constant() -> NodeProto:
    node = NodeProto(op_type="Constant", output=["w"], name="sparse")
    node.attribute.add(name="sparse_value", type=AttributeProto.SPARSE_TENSOR).sparse_tensor.CopyFrom(sparse(""))
    return node


@one
def sparse_constant() -> ModelProto:
    proto = parsed("g (float[N, 4] x) => (float[N, 4] y) { h = Exp(x) y = Mul(h, w) }")
    proto.graph.node.insert(0, _sparse_constant())
    return proto


@one
def sparse_constant_used_in_a_branch_only() -> Odd:
    proto = parsed(BRANCHES)
    proto.graph.node.insert(1, _sparse_constant())
    branch(proto, 0).node[0].input[1] = "w"
    return Odd(proto, BOTH)


@one
def sparse_constant_of_a_function() -> ModelProto:
    proto = parsed(FUNCTIONS)
    proto.functions[1].node.insert(0, _sparse_constant())
    proto.functions[1].node[1].input[0] = "m"
    proto.functions[1].node.insert(1, onnx.helper.make_node("Mul", ["v", "w"], ["m"]))
    return proto


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
    "größe", "変数", "x y", "/layer.0/Add", "a.b.c", "weight", "self", "class", "None", 'say "hi"', "it's", "back\\slash",
    "new\nline", "tab\t", "nul\0", "%s{0}", "0", ".", "..", "-", "a" * 5000, "forward", "__class__", "\u2028", "e\u0301",
    "x[0]", "a:0", "graphopt.cleanup.x", "h_1", " ", "µ", "input",
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


# Descriptions.


def props(owner: Any, where: str) -> None:
    """Metadata with a key of its own, one without a value, and one that is no identifier."""
    for key, value in ((f"where of {where}", where), ("größe", ""), ("a/b\n", "{x}")):
        owner.metadata_props.add(key=key, value=value)


@one
def metadata_everywhere() -> Odd:
    proto = parsed(BRANCHES)
    proto.functions.extend(parsed(FUNCTIONS).functions)
    proto.graph.initializer.append(tensor("w", np.float32([1])))
    proto.graph.value_info.append(info("h", "N", 4))
    proto.producer_name, proto.producer_version, proto.domain, proto.model_version = "tests", "1.0 β", "org.tests", 12
    _everywhere(proto, props)
    return Odd(proto, BOTH)


@one
def doc_strings_everywhere() -> Odd:
    proto = parsed(BRANCHES)
    proto.functions.extend(parsed(FUNCTIONS).functions)
    proto.graph.initializer.append(tensor("w", np.float32([1])))
    proto.graph.value_info.append(info("h", "N", 4))

    def describe(owner: Any, where: str) -> None:
        owner.doc_string = f"the {where}\nin two lines, ≥ 1"

    _everywhere(proto, describe)
    for node in proto.graph.node:
        for attribute in node.attribute:
            attribute.doc_string = f"attribute {attribute.name}"
    return Odd(proto, BOTH)


def _everywhere(proto: ModelProto, enter: Callable[[Any, str], None]) -> None:
    enter(proto, "model")
    for function in proto.functions:
        enter(function, f"function {function.name}")
        for node in function.node:
            enter(node, f"node of {function.name}")
    for graph in (proto.graph, branch(proto, 0), branch(proto, 1)):
        enter(graph, f"graph {graph.name}")
        for kind in ("node", "initializer", "input", "output", "value_info"):
            for i, item in enumerate(getattr(graph, kind)):
                enter(item, f"{kind} {i} of {graph.name}")


@one
def a_graph_without_a_name() -> ModelProto:
    proto = parsed(FLAT)
    proto.graph.name = ""
    return proto


@one
def descriptions_of_values_that_nothing_defines() -> Odd:
    proto = parsed(BRANCHES)
    proto.graph.value_info.extend([info("nowhere", 7), info("h", "N", 4)])
    branch(proto, 0).value_info.append(info("nowhere", 7))
    return Odd(proto, BOTH)


@one
def a_description_of_the_needless_value() -> ModelProto:
    proto = parsed(FLAT)
    proto.graph.value_info.extend([info("idle", "N", 4), info("h", "N", 4)])
    return proto


@one
def quantisation_annotations() -> ModelProto:
    proto = parsed("""g (float[N, 4] x) => (float[N, 4] y) <float scale = {0.5}, uint8 zero = {3}> {
        h = Exp(x) y = Neg(h) }""")
    for name in ("h", "y", "nowhere"):
        annotation = proto.graph.quantization_annotation.add(tensor_name=name)
        annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="scale")
        annotation.quant_parameter_tensor_names.add(key="ZERO_POINT_TENSOR", value="zero")
    return proto


@one
def denotations() -> ModelProto:
    proto = parsed(FLAT)
    proto.graph.value_info.append(info("h", "N", 4))
    for value in (proto.graph.input[0], proto.graph.output[0], proto.graph.value_info[0]):
        value.type.denotation = "TENSOR"
        value.type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
        value.type.tensor_type.shape.dim[1].denotation = "DATA_FEATURE"
    return proto


@one
def device_configurations() -> ModelProto:
    proto = parsed("g (float[N, 4] x) => (float[N, 4] y) <float[4] w = {1, 2, 3, 4}> { h = Mul(x, w) y = Neg(h) }", ir=11)
    proto.configuration.add(name="two", num_devices=2, device=["a", "b"])
    for node in proto.graph.node:
        device = node.device_configurations.add(configuration_id="two", pipeline_stage=1)
        for name in (*node.input, *node.output):
            spec = device.sharding_spec.add(tensor_name=name, device=[0, 1])
            spec.sharded_dim.add(axis=0).simple_sharding.add(dim_value=2, num_shards=2)
    return proto


@one
def training_info() -> ModelProto:
    """`w` is trained, `rate` is used by the training alone, `total` is what it keeps."""
    proto = parsed("""g (float[N, 4] x) => (float[N, 4] y)
        <float[4] w = {1, 1, 1, 1}, float[4] total = {0, 0, 0, 0}, float rate = {0.1}> {
        h = Mul(x, w) y = Neg(h) }""")
    info_ = proto.training_info.add()
    info_.initialization.CopyFrom(
        onnx.parser.parse_graph("start () => (float[4] zeros) { zeros = Constant<value = float[4] {0, 0, 0, 0}>() }")
    )
    info_.algorithm.CopyFrom(
        onnx.parser.parse_graph(
            "step () => (float[4] more, float[4] next) { d = Mul(w, rate) more = Add(total, d) next = Sub(w, d) }"
        )
    )
    info_.initialization_binding.add(key="total", value="zeros")
    info_.update_binding.add(key="total", value="more")
    info_.update_binding.add(key="w", value="next")
    return proto


@one
def fields_of_a_later_version_of_the_standard() -> Odd:
    """Protobuf keeps fields that it does not know; so should whoever puts a message together anew."""
    proto = parsed(BRANCHES)
    unknown = bytes([0xFA, 0x3E, 4]) + b"kept"  # field 1007, a string
    made = ModelProto()
    body = branch(proto, 0)
    for message in (body.node[0], body, proto.graph.input[0], proto.graph.node[0], proto.graph, proto):
        message.MergeFromString(unknown)
    made.ParseFromString(proto.SerializeToString())
    return Odd(made, BOTH)


# Functions.

FUNCTIONS = """g (float[N, 4] x) => (float[N, 4] y) { a = own.twice<alpha = 0.25>(x) y = own.leaky(a) }
    <domain: "own", opset_import: ["": 21, "own": 1]> twice <alpha>(v) => (r) {
        a = own.leaky<slope: float = @alpha>(v) r = own.leaky(a) }
    <domain: "own", opset_import: ["": 21]> leaky <slope: float = 0.5>(v) => (r) {
        r = LeakyRelu<alpha: float = @slope>(v) }"""


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


# Tensors.


@several
def element_types() -> Iterator[tuple[str, Odd]]:
    floats = {
        P.FLOAT16: np.float16, P.BFLOAT16: ml_dtypes.bfloat16, P.DOUBLE: np.float64, P.FLOAT8E4M3FN: ml_dtypes.float8_e4m3fn,
        P.FLOAT8E5M2: ml_dtypes.float8_e5m2, P.FLOAT8E4M3FNUZ: ml_dtypes.float8_e4m3fnuz,
        P.FLOAT8E5M2FNUZ: ml_dtypes.float8_e5m2fnuz, P.FLOAT4E2M1: ml_dtypes.float4_e2m1fn,
        P.FLOAT8E8M0: ml_dtypes.float8_e8m0fnu,
    }  # fmt: skip
    integers = {
        P.INT4: ml_dtypes.int4, P.UINT4: ml_dtypes.uint4, P.INT2: ml_dtypes.int2, P.UINT2: ml_dtypes.uint2, P.INT8: np.int8,
        P.UINT8: np.uint8, P.INT16: np.int16, P.UINT16: np.uint16, P.INT32: np.int32, P.UINT32: np.uint32,
        P.INT64: np.int64, P.UINT64: np.uint64, P.BOOL: np.bool_,
    }  # fmt: skip
    # No kernel of onnxruntime's CPU provider takes this one.
    unknown = {P.FLOAT4E2M1}
    for code, kind in (floats | integers).items():
        value = np.float32([1, 2, 1, 1]) if code in (P.FLOAT8E8M0, P.BOOL) else np.float32([1, 0, 1, 1])
        value = value.astype(kind)
        for packed in (True, False):
            stored = onnx.numpy_helper.from_array(value, "w")
            if not packed:
                stored = _typed(code, value)
            proto = parsed("g (float[N, 4] x) => (float[N, 4] y) { k = Cast<to = 1>(w) y = Mul(x, k) }", ir=12)
            proto.opset_import[0].version = 25 if code in (P.INT2, P.UINT2, P.FLOAT8E8M0) else 23
            proto.graph.initializer.append(stored)
            name = P.DataType.Name(code)
            yield f"{name} in {'raw_data' if packed else 'its own field'}", Odd(proto, runs=code not in unknown)


def _typed(code: int, value: Any) -> TensorProto:
    """The tensor with its values where they are as numbers."""
    flat = value.astype(np.float64) if code not in (P.UINT64, P.INT64) else value
    made = onnx.helper.make_tensor("w", code, value.shape, flat.tolist())
    assert not made.HasField("raw_data")
    return made


@one
def tensors_without_elements() -> ModelProto:
    proto = parsed("""g (float[N, 4] x) => (float[M, 4] y, float[0, 4] z) {
        y = Concat<axis = 0>(x, w) z = Identity(w) }""")
    proto.graph.initializer.append(TensorProto(name="w", data_type=P.FLOAT, dims=[0, 4]))
    proto.graph.initializer.append(TensorProto(name="v", data_type=P.FLOAT, dims=[0], raw_data=b""))
    return proto


@one
def scalars() -> ModelProto:
    proto = parsed("""g (float[N, 4] x) => (float[N, 4] y) <float half = {0.5}, float[1] two = {2}> {
        s = Constant<value_float = 3.0>() h = Mul(x, half) z = Div(h, two) y = Add(z, s) }""")
    assert not proto.graph.initializer[0].dims
    return proto


@one
def text_with_nul() -> ModelProto:
    proto = parsed("""g (float[N, 4] x) => (float[N, 4] y, string[3] s, string k) {
        k = Constant<value_string = "x">() s = Identity(t) y = Neg(x) }""")
    proto.graph.node[0].attribute[0].s = b"a\0b"
    texts = [b"a\0b", "größe\0".encode(), b""]
    proto.graph.initializer.append(TensorProto(name="t", data_type=P.STRING, dims=[3], string_data=texts))
    return proto


@one
def special_numbers() -> ModelProto:
    proto = parsed("g (float[N, 4] x) => (float[N, 4] y, float[4] z) { y = Min(x, w) z = Neg(w) }")
    bits = np.array([0x7FC00001, 0xFF800000, 0x80000000, 0x00000001], np.uint32)  # a NaN with a payload
    proto.graph.initializer.append(tensor("w", bits.view(np.float32)))
    return proto


@one
def external_data() -> Odd:
    proto = parsed("g (float[N, 4] x) => (float[N, 4] y) { h = Mul(x, w) y = Add(h, v) }")
    for name, offset in (("w", 16), ("v", 64)):
        stored = proto.graph.initializer.add(name=name, data_type=P.FLOAT, dims=[4], data_location=P.EXTERNAL)
        stored.doc_string = f"doc of {name}"
        keys = {"location": "odd weights.bin", "offset": offset, "length": 16, "checksum": "0123abcd"}
        for key, value in keys.items():
            stored.external_data.add(key=key, value=str(value))
    data = bytearray(b"\xff" * 80)
    data[16:32] = data[64:80] = np.float32([1, 2, 3, 4]).tobytes()
    return Odd(proto, files={"odd weights.bin": bytes(data)})


@one
def external_data_with_a_key_of_its_own() -> Odd:
    odd = external_data()
    assert isinstance(odd, Odd)
    odd.model.graph.initializer[0].external_data.add(key="größe", value="mine")
    return Odd(odd.model, files=odd.files, runs=False)


@one
def external_data_of_a_body_and_a_constant() -> Odd:
    proto = parsed(BRANCHES)
    stored = branch(proto, 0).initializer.add(name="w", data_type=P.FLOAT, dims=[4], data_location=P.EXTERNAL)
    stored.external_data.add(key="location", value="w.bin")  # neither offset nor length: the whole file
    branch(proto, 0).node[0].input[1] = "w"
    return Odd(proto, BOTH, files={"w.bin": np.float32([1, 2, 3, 4]).tobytes()})


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
        ("a map", "m", ["z = ai.onnx.ml.DictVectorizer<int64_vocabulary = [3, 1]>(m)", *flat], None, {1: 0.5, 3: 2.0}, True),
    ):
        given = {"s": sequence, "m": labels}.get(name, nested if output is sequence else optional)
        proto = parsed(f"g (float[N, 4] x) => (float[N, 4] y) {{ {' '.join(nodes)} }}", opsets='"": 21, "ai.onnx.ml": 3')
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
    proto = parsed("g (float[N, 4] x, string[N, 1] t) => (float[N, 4] y, string[N, 1] u) { y = Neg(x) u = Identity(t) }")
    yield "text as input and output", Odd(proto, ({"x": X[:2], "t": TEXTS},))
    proto = parsed("g (float x, int8[2, ?, N] i) => (float y, int8[2, ?, N] j) { y = Neg(x) j = Identity(i) }")
    proto.graph.input.add().CopyFrom(onnx.helper.make_tensor_value_info("r", P.FLOAT, None))
    yield "sizes without a name, ranks unknown", Odd(
        proto, ({"x": np.array(2, np.float32), "i": np.zeros((2, 3, 1), np.int8), "r": X},)
    )


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


def build() -> dict[str, Odd]:
    """All models by name, the needless node in each."""
    found: dict[str, Odd] = {}
    for builder in _builders:
        for name, odd in builder():
            assert name not in found, name
            needless(odd.model)
            found[name] = odd
    return found


MODELS = build()
