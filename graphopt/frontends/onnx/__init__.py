"""An ONNX model as a Graph: each ONNX node becomes one fx node that remembers where it came from."""

from __future__ import annotations

from pathlib import Path

from graphopt.errors import GraphOptError
from graphopt.frontends.onnx.functions import Functions
from graphopt.frontends.onnx.scope import Scope, Shared, opsets_of
from graphopt.graph import Graph
from graphopt.onnxfile import OnnxFile, TensorReader, read
from graphopt.onnxfile.checks import check_model

__all__ = ["load_onnx"]


def load_onnx(source: str | Path | OnnxFile) -> Graph:
    """Read an .onnx file into a Graph; weights stay on disk until they are used.

    Raises:
        GraphOptError: the file is no readable ONNX model.
    """
    if isinstance(source, OnnxFile):
        check_model(source.proto)
    file = source if isinstance(source, OnnxFile) else read(source)
    functions = Functions(file.proto.functions)
    shared = Shared(file, TensorReader(file.folder), functions, opsets_of(file.proto.opset_import))
    try:
        return Scope(shared, file.proto.graph).run()
    except MemoryError as error:
        raise GraphOptError("the model needs more memory than there is; load it on a larger machine") from error
    except RecursionError as error:
        raise GraphOptError("the model's subgraphs are nested too deeply to be read; the file is corrupt") from error
