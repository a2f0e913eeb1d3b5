"""Operators without a torch meaning run on onnxruntime, one node at a time; nothing is refused at import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
import onnx.helper
import torch

from graphopt.errors import GraphOptError
from graphopt.onnxfile.tensors import ONNX_DTYPES, from_numpy, to_numpy, to_tensor_proto

# Runtimes lag behind the onnx package in IR version; a single node needs no new IR feature.
_IR_VERSION = 10
# A session belongs to one set of input shapes (some operators want them known); old ones are dropped.
_KEPT_SESSIONS = 8


class OpaqueOperator(torch.nn.Module):
    """One ONNX node as a module; its inputs are the node's inputs, then the values that its subgraphs capture.

    Not differentiable. Needs onnxruntime when it is called, not when it is imported.
    """

    def __init__(
        self,
        proto: onnx.NodeProto,
        captured: Sequence[str],
        opsets: Sequence[onnx.OperatorSetIdProto],
        functions: Sequence[onnx.FunctionProto],
        constants: dict[int, tuple[Any, onnx.TensorProto]],
    ) -> None:
        super().__init__()
        self.proto = proto
        # By position: a pass may give two inputs that had one name different values.
        self.names = [f"graphopt_input_{i}" if name else "" for i, name in enumerate(proto.input)] + list(captured)
        self._opsets = list(opsets)
        self._functions = list(functions)
        # Some operators insist on constant inputs, and sub-byte types exist only in their TensorProto.
        self._constants = constants
        self._sessions: dict[Any, Any] = {}

    def extra_repr(self) -> str:
        """What a printed module shows."""
        return f"{self.proto.domain or 'ai.onnx'}::{self.proto.op_type}"

    def __deepcopy__(self, memo: dict[int, Any]) -> OpaqueOperator:
        return self  # it has no state of its own, and sessions cannot be copied

    def forward(self, *values: Any) -> Any:
        """Run the node; one value, or a tuple where it declares several outputs."""
        key = tuple(self._signature(i, v) for i, v in enumerate(values))
        if key not in self._sessions:
            if len(self._sessions) == _KEPT_SESSIONS:
                del self._sessions[next(iter(self._sessions))]
            self._sessions[key] = self._session(values)
        feeds = {
            self.names[i]: to_numpy(v)
            for i, v in enumerate(values)
            if v is not None and not self._constant(i, v) and self.names[i]
        }
        outputs = [name for name in self.proto.output if name]
        try:
            results = iter(self._sessions[key].run(outputs, feeds))
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            reason = next(iter(str(error).splitlines()), "")
            raise GraphOptError(f"operator {self.extra_repr()} failed on onnxruntime: {reason}") from error
        returned = tuple(_from_runtime(next(results)) if name else None for name in self.proto.output)
        return returned[0] if len(returned) == 1 else returned

    def _constant(self, index: int, value: Any) -> bool:
        return index in self._constants and self._constants[index][0] is value

    def _signature(self, index: int, value: Any) -> Any:
        if value is None or self._constant(index, value):
            return index if value is not None else None
        if isinstance(value, (list, tuple)):
            return ("sequence", self._signature(index, value[0]) if value else None)
        return (str(getattr(value, "dtype", type(value))), tuple(getattr(value, "shape", ())))

    def _session(self, values: Sequence[Any]) -> Any:
        try:
            import onnxruntime
        except ImportError as error:
            raise GraphOptError(
                f"operator {self.extra_repr()} has no torch meaning and runs on onnxruntime, which is not installed; "
                "install graphopt[cpu]"
            ) from error
        graph = onnx.GraphProto(name="opaque")
        node = graph.node.add()
        node.CopyFrom(self.proto)
        for i in range(len(node.input)):
            node.input[i] = self.names[i]
        seen: set[str] = set()
        for index, value in enumerate(values):
            name = self.names[index]
            if value is None or not name or name in seen:
                continue
            seen.add(name)
            if self._constant(index, value):
                graph.initializer.append(self._constants[index][1])
                graph.initializer[-1].name = name
            else:
                graph.input.append(onnx.ValueInfoProto(name=name, type=_type_of(value)))
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.proto.output if name)
        model = onnx.ModelProto(
            ir_version=_IR_VERSION, graph=graph, opset_import=self._opsets, functions=self._functions
        )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise GraphOptError(
                f"operator {self.extra_repr()} has no torch meaning, and onnxruntime cannot run it either: {error}"
            ) from error


def as_constant(name: str, proto: onnx.TensorProto, value: Any) -> onnx.TensorProto:
    """The initialiser that a single-node model embeds: `proto` itself, its bytes pulled in from outside."""
    if proto.data_location == onnx.TensorProto.EXTERNAL:
        return to_tensor_proto(name, value)
    twin = onnx.TensorProto()
    twin.CopyFrom(proto)
    twin.name = name
    return twin


def _type_of(value: Any) -> onnx.TypeProto:
    if isinstance(value, (list, tuple)):
        element = _type_of(value[0]) if value else onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None)
        return onnx.helper.make_sequence_type_proto(element)
    if isinstance(value, torch.Tensor):
        return onnx.helper.make_tensor_type_proto(ONNX_DTYPES[value.dtype], list(value.shape))
    return onnx.helper.make_tensor_type_proto(onnx.TensorProto.STRING, list(getattr(value, "shape", ())))


def _from_runtime(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_runtime(v) for v in value]
    if isinstance(value, dict) or value is None:
        return value
    return from_numpy(value)
