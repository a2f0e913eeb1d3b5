"""One node on onnxruntime, with inputs and outputs of any element type."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto as P
from onnx import helper

# onnxruntime takes and returns what numpy itself has; the rest passes as a type that holds all of its values.
STAND_INS = {
    **dict.fromkeys((P.BFLOAT16, P.FLOAT8E4M3FN, P.FLOAT8E4M3FNUZ, P.FLOAT8E5M2, P.FLOAT8E5M2FNUZ), P.FLOAT),
    P.FLOAT8E8M0: P.FLOAT,
    **dict.fromkeys((P.INT4, P.INT2), P.INT8),
    **dict.fromkeys((P.UINT4, P.UINT2), P.UINT8),
}
EIGHT_BIT_FLOATS = (P.FLOAT8E4M3FN, P.FLOAT8E4M3FNUZ, P.FLOAT8E5M2, P.FLOAT8E5M2FNUZ, P.FLOAT8E8M0)
CODES = {f"tensor({name})": getattr(P, name.upper()) for name in map(str.lower, P.DataType.keys())}


def numpy_type(code: int) -> np.dtype[Any]:
    return np.dtype(helper.tensor_dtype_to_np_dtype(code))


def code_of(array: np.ndarray[Any, Any]) -> int:
    return helper.np_dtype_to_tensor_dtype(array.dtype)


def _cast(given: str, made: str, code: int) -> onnx.NodeProto:
    node = helper.make_node("Cast", [given], [made], to=code)
    if code in EIGHT_BIT_FLOATS:
        node.attribute.append(helper.make_attribute("saturate", 0))
    return node


def _session(graph: onnx.GraphProto, opset: int) -> onnxruntime.InferenceSession:
    imports = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), settings, ["CPUExecutionProvider"])


def on_onnxruntime(
    node: onnx.NodeProto, inputs: Sequence[np.ndarray[Any, Any] | None], opset: int
) -> list[np.ndarray[Any, Any]]:
    """The node's outputs; it stands between casts where its types need stand-ins. Raises where it has no kernel."""
    nodes, declared, feeds = [], [], {}
    for name, array in zip(node.input, inputs, strict=True):
        if not name or array is None or name in feeds or f"fed_{name}" in feeds:
            continue
        code = code_of(array)
        label = name if code not in STAND_INS else f"fed_{name}"
        if code in STAND_INS:
            nodes.append(_cast(label, name, code))
        given = STAND_INS.get(code, code)
        declared.append(helper.make_tensor_value_info(label, given, array.shape))
        feeds[label] = array.astype(numpy_type(given))
    outputs = [name for name in node.output if name]
    graph = helper.make_graph([*nodes, node], "one", declared, [onnx.ValueInfoProto(name=name) for name in outputs])
    session = _session(graph, opset)
    codes = [CODES.get(output.type, 0) for output in session.get_outputs()]
    if not STAND_INS.keys().isdisjoint(codes):
        del graph.output[:]
        for i, (name, code) in enumerate(zip(outputs, codes, strict=True)):
            if code in STAND_INS:
                outputs[i] = f"returned_{name}"
                graph.node.append(_cast(name, outputs[i], STAND_INS[code]))
            graph.output.append(onnx.ValueInfoProto(name=outputs[i]))
        session = _session(graph, opset)
    results = session.run(outputs, feeds)
    return [y.astype(numpy_type(code)) if code in STAND_INS else y for y, code in zip(results, codes, strict=True)]
