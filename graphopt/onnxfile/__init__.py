"""The .onnx container: reading it safely, its tensors without copies, and writing it back losslessly."""

from graphopt.onnxfile.read import OnnxFile, parse, read
from graphopt.onnxfile.tensors import TensorReader, to_tensor_proto
from graphopt.onnxfile.write import write

__all__ = ["OnnxFile", "TensorReader", "parse", "read", "to_tensor_proto", "write"]
