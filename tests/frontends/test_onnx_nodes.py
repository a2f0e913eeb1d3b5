"""Nodes of odd shapes, as fuzzing found them."""

import onnx
import onnx.helper

from graphopt.backends.onnx import to_proto
from graphopt.frontends.onnx import load_onnx
from graphopt.onnxfile import OnnxFile


def test_a_node_with_a_tensor_attribute_and_no_output():
    value = onnx.helper.make_tensor("v", onnx.TensorProto.FLOAT, [1], [2.0])
    node = onnx.helper.make_node("ConstantOfShape", ["s"], [], value=value)
    shape = onnx.helper.make_tensor("s", onnx.TensorProto.INT64, [1], [3])
    graph = onnx.helper.make_graph([node], "g", [], [], [shape])
    # An operator set that is newer than the installed onnx: nothing is known of how many outputs there have to be.
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 99)])
    assert to_proto(load_onnx(OnnxFile(model)), rebuild=True) == model
