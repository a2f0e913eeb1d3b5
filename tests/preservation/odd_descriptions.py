"""What a file says beside what it computes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx import ModelProto

from .odd import BOTH, BRANCHES, FLAT, FUNCTIONS, Odd, branch, info, one, parsed, tensor


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
    proto = parsed(
        "g (float[N, 4] x) => (float[N, 4] y) <float[4] w = {1, 2, 3, 4}> { h = Mul(x, w) y = Neg(h) }", ir=11
    )
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
