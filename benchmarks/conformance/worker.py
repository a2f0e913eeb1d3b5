"""One tool in a process of its own: a crash ends the process, and not the benchmark.

Reads pickled requests `(model, feeds)` from standard input and writes a pickled dict for each. It is run as a script,
and imports on use: a tool may live in an environment without this project's packages.
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np
import onnx

# The folder that holds `benchmarks`.
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def graphopt(data: bytes) -> bytes:
    """Load and lower without a pass."""
    from graphopt.frontends.onnx import load_onnx
    from graphopt.onnxfile import OnnxFile, parse
    from graphopt.registry import backend

    proto: onnx.ModelProto = backend("onnx").lower(load_onnx(OnnxFile(parse(data))))
    return proto.SerializeToString()


def onnx_ir(data: bytes) -> bytes:
    """Deserialize and serialize."""
    import onnx_ir

    return onnx_ir.to_proto(onnx_ir.from_proto(onnx.ModelProto.FromString(data))).SerializeToString()


def onnxscript(data: bytes) -> bytes:
    """Its optimizer, as it stands."""
    import onnx_ir
    import onnxscript.optimizer

    model = onnx_ir.from_proto(onnx.ModelProto.FromString(data))
    onnxscript.optimizer.optimize(model)
    return onnx_ir.to_proto(model).SerializeToString()


def onnxslim(data: bytes) -> bytes:
    """Its optimizer, as it stands."""
    import onnxslim

    model: onnx.ModelProto = onnxslim.slim(onnx.ModelProto.FromString(data))
    return model.SerializeToString()


def run_graphopt(data: bytes, feeds: Mapping[str, Any]) -> list[Any]:
    """Load and run."""
    from graphopt.frontends.onnx import load_onnx
    from graphopt.onnxfile import OnnxFile, parse

    return list(load_onnx(OnnxFile(parse(data))).run(feeds).values())


def run_onnx2torch(data: bytes, feeds: Mapping[str, Any]) -> list[Any]:
    """Convert and call."""
    import torch
    from onnx2torch import convert

    model = onnx.ModelProto.FromString(data)
    module = convert(model).eval()
    with torch.no_grad():
        result = module(*map(_to_torch, feeds.values()))
    several = isinstance(result, (list, tuple)) and len(model.graph.output) > 1
    return [_to_numpy(x) for x in (result if several else [result])]


def _to_torch(value: Any) -> Any:
    import torch

    if isinstance(value, list):
        return [_to_torch(x) for x in value]
    if isinstance(value, np.ndarray) and hasattr(torch, value.dtype.name) and value.dtype.isbuiltin == 2:
        # A type that ml_dtypes adds to numpy: by its bits.
        bits = value.view(np.uint8 if value.dtype.itemsize == 1 else np.int16)
        return torch.from_numpy(bits.copy()).view(getattr(torch, value.dtype.name))
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value


def _to_numpy(value: Any) -> Any:
    import ml_dtypes
    import torch

    if isinstance(value, (list, tuple)):
        return [_to_numpy(x) for x in value]
    if not isinstance(value, torch.Tensor):
        return value
    name = str(value.dtype).removeprefix("torch.")
    if hasattr(ml_dtypes, name):
        bits = torch.uint8 if value.itemsize == 1 else torch.int16
        return value.contiguous().view(bits).numpy().view(getattr(ml_dtypes, name))
    return value.numpy()


REWRITERS: dict[str, Callable[[bytes], bytes]] = {
    "graphopt": graphopt,
    "onnx_ir": onnx_ir,
    "onnxscript.optimizer": onnxscript,
    "OnnxSlim": onnxslim,
}
RUNNERS: dict[str, Callable[[bytes, Mapping[str, Any]], list[Any]]] = {
    "graphopt": run_graphopt,
    "onnx2torch": run_onnx2torch,
}


def rewrite(tool: str, data: bytes, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Rewrite a model and run the result on onnxruntime; `kind` says how far it came."""
    suite = importlib.import_module("benchmarks.conformance.suite")
    start = time.perf_counter()
    try:
        model = REWRITERS[tool](data)
    except Exception as error:
        return {"kind": "raises", "error": _first_line(error), "seconds": time.perf_counter() - start}
    answer: dict[str, Any] = {"model": model}
    try:
        session = suite.session(model)
        inputs = {value.name for value in session.get_inputs()}
        answer["dropped"] = sorted(feeds.keys() - inputs)
        answer["outputs"] = suite.run(session, {name: feeds[name] for name in feeds if name in inputs})
    except Exception as error:
        answer |= {"kind": "invalid model", "error": _first_line(error)}
    return answer | {"seconds": time.perf_counter() - start}


def evaluate(tool: str, data: bytes, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Run a model in the tool itself."""
    start = time.perf_counter()
    try:
        outputs = RUNNERS[tool](data, feeds)
    except Exception as error:
        return {"kind": "raises", "error": _first_line(error), "seconds": time.perf_counter() - start}
    return {"outputs": outputs, "seconds": time.perf_counter() - start}


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200]


def serve(action: str, tool: str, source: BinaryIO, target: BinaryIO) -> None:
    """Answer until the source ends."""
    answer = {"rewrite": rewrite, "evaluate": evaluate}[action]
    while True:
        try:
            data, feeds = pickle.load(source)
        except EOFError:
            return
        pickle.dump(answer(tool, data, feeds), target)
        target.flush()


if __name__ == "__main__":
    sys.path.insert(0, ROOT)
    # Tools print; what they print is not part of an answer.
    target = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.argv[1], sys.argv[2], sys.stdin.buffer, target)
