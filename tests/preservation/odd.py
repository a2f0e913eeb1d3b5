"""Small models, each with one thing that tools lose; all hold a needless node, so that there is something to rewrite.

The needless node is `Identity(x) -> idle`, called "needless". What reads `idle` would read `x` without it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

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


# The functions of one of the models, which others bring along without calling them.
FUNCTIONS = """g (float[N, 4] x) => (float[N, 4] y) { a = own.twice<alpha = 0.25>(x) y = own.leaky(a) }
    <domain: "own", opset_import: ["": 21, "own": 1]> twice <alpha>(v) => (r) {
        a = own.leaky<slope: float = @alpha>(v) r = own.leaky(a) }
    <domain: "own", opset_import: ["": 21]> leaky <slope: float = 0.5>(v) => (r) {
        r = LeakyRelu<alpha: float = @slope>(v) }"""


def branch(proto: ModelProto, index: int) -> GraphProto:
    """A branch of the If that ends the main graph."""
    return proto.graph.node[-1].attribute[index].g


def build() -> dict[str, Odd]:
    """All models by name that builders were entered for, the needless node in each."""
    found: dict[str, Odd] = {}
    for builder in _builders:
        for name, odd in builder():
            assert name not in found, name
            needless(odd.model)
            found[name] = odd
    return found
