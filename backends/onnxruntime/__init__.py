"""The `onnxruntime` target: as `onnx`, with contrib operators where they have kernels, and sessions to run it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from graphopt.backends.onnx import OnnxBackend, to_proto
from graphopt.backends.onnxruntime import linear_attention as _linear_attention
from graphopt.backends.onnxruntime.session import Session
from graphopt.graph import Graph
from graphopt.onnxfile import write

_ = _linear_attention  # enters its lowerings into the table


class OnnxRuntimeBackend:
    """Lowers a graph for onnxruntime and runs it there."""

    name = "onnxruntime"

    def lower(self, graph: Graph) -> onnx.ModelProto:
        """The model as a protobuf, with `com.microsoft` operators."""
        if graph.onnx is not None:
            return to_proto(graph, self.name)
        from graphopt.backends.onnx.export import export

        return export(graph, self.name)

    def save(self, graph: Graph, path: Path, *, external: bool | None = None, **options: Any) -> None:
        """See `OnnxBackend.save`."""
        folder = graph.onnx.folder if graph.onnx is not None else None
        write(self.lower(graph), path, folder=folder, external=external)

    def session(self, graph: Graph, *, providers: tuple[str, ...] = ("cpu",), threads: int | None = None) -> Session:
        """A running session of the graph."""
        folder = graph.onnx.folder if graph.onnx is not None else None
        return Session.of(self.lower(graph), folder=folder, providers=providers, threads=threads)

    def run(self, graph: Graph, feeds: Mapping[str, np.ndarray[Any, Any]], **options: Any) -> dict[str, Any]:
        """Lower, load and run once."""
        return self.session(graph, **options).run(feeds)


__all__ = ["OnnxBackend", "OnnxRuntimeBackend", "Session"]
