"""Operators without a torch meaning run on onnxruntime, one node at a time; nothing is refused at import."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx.helper
import torch

from graphopt.errors import GraphOptError, NoRuntime
from graphopt.onnxfile.packed import CARRIERS
from graphopt.onnxfile.tensors import ONNX_DTYPES, TORCH_DTYPES, element_type, from_numpy, to_numpy, to_tensor_proto

# Runtimes lag behind the onnx package in IR version; a single node needs no new IR feature.
_IR_VERSION = 10
# Of the operator set that a single node of another domain needs beside its own, for the casts around it.
_CAST_OPSET = 25
# A session belongs to one set of input shapes (some operators want them known); old ones are dropped.
_KEPT_SESSIONS = 8
_P = onnx.TensorProto
_EIGHT_BIT_FLOATS = (_P.FLOAT8E4M3FN, _P.FLOAT8E4M3FNUZ, _P.FLOAT8E5M2, _P.FLOAT8E5M2FNUZ, _P.FLOAT8E8M0)
# numpy has no such types, so onnxruntime takes and returns none: values pass as a type that holds all of theirs.
_STAND_INS: dict[int, int] = {
    _P.INT4: _P.INT8,
    _P.INT2: _P.INT8,
    _P.UINT4: _P.UINT8,
    _P.UINT2: _P.UINT8,
    **dict.fromkeys((_P.BFLOAT16, *_EIGHT_BIT_FLOATS), _P.FLOAT),
}
# What onnxruntime says of an operator that it does not know, or has no kernel for: no other input would help.
_UNKNOWN = ("is not a registered function/op", "No Op registered for", "NOT_IMPLEMENTED")
_FED, _RETURNED = "graphopt_fed_", "graphopt_returned_"
_SCALARS: dict[type, int] = {int: _P.INT64, float: _P.FLOAT, str: _P.STRING}


_RUNTIME_DOMAINS = ("ai.onnx", "com.microsoft", "com.ms.")


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
        types: Sequence[int] = (),
        protos: Sequence[onnx.TypeProto | None] = (),
    ) -> None:
        """Set up the operator.

        Args:
            proto: the node.
            captured: names that the node's subgraphs take from outside.
            opsets: what the model imports.
            functions: the model's own functions.
            constants: by position, the inputs that are constants: the value and its tensor.
            types: by position, the ONNX element type of an input, or 0 where only the torch type is known.
            protos: by position, the declared type of an input, or None; says what an empty sequence is one of.
        """
        super().__init__()
        self.proto = proto
        # By position: a pass may give two inputs that had one name different values.
        self.names = [f"graphopt_input_{i}" if name else "" for i, name in enumerate(proto.input)] + list(captured)
        self._opsets = list(opsets)
        self._functions = list(functions)
        # Some operators insist on constant inputs.
        self._constants = constants
        self._types = dict(enumerate(types))
        self._protos = dict(enumerate(protos))
        self._sessions: dict[Any, _Session] = {}

    def extra_repr(self) -> str:
        """What a printed module shows."""
        return f"{self.proto.domain or 'ai.onnx'}::{self.proto.op_type}"[:100]

    def __deepcopy__(self, memo: dict[int, Any]) -> OpaqueOperator:
        return self  # it has no state of its own, and sessions cannot be copied

    def forward(self, *values: Any) -> Any:
        """Run the node; one value, or a tuple where it declares several outputs."""
        key = tuple(self._signature(i, v) for i, v in enumerate(values))
        if key not in self._sessions:
            if len(self._sessions) == _KEPT_SESSIONS:
                del self._sessions[next(iter(self._sessions))]
            self._sessions[key] = self._session(values)
        try:
            results = iter(self._sessions[key].run(values))
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            reason = next(iter(str(error).splitlines()), "")
            raise GraphOptError(f"operator {self.extra_repr()} failed on onnxruntime: {reason}") from error
        returned = tuple(next(results) if name else None for name in self.proto.output)
        return returned[0] if len(returned) == 1 else returned

    def _constant(self, index: int, value: Any) -> bool:
        return index in self._constants and self._constants[index][0] is value

    def _signature(self, index: int, value: Any) -> Any:
        if value is None or self._constant(index, value):
            return index if value is not None else None
        if isinstance(value, (list, tuple)):
            return ("sequence", self._signature(index, value[0]) if value else None)
        return (str(getattr(value, "dtype", type(value))), tuple(getattr(value, "shape", ())))

    def _type(self, index: int, value: Any) -> onnx.TypeProto | None:
        declared = self._protos.get(index)
        if declared is not None and not declared.HasField("tensor_type"):
            return declared
        code = self._types.get(index, 0) if declared is None else declared.tensor_type.elem_type
        return _type_of(value, code)

    def _session(self, values: Sequence[Any]) -> _Session:
        graph = onnx.GraphProto(name="opaque")
        node = onnx.NodeProto()
        node.CopyFrom(self.proto)
        feeds: dict[str, _Feed] = {}
        seen: set[str] = set()
        for index, value in enumerate(values):
            name = self.names[index]
            kind = self._type(index, value)
            if index < len(node.input):
                node.input[index] = name if kind is not None else ""
            if kind is None or not name or name in seen:
                continue
            seen.add(name)
            if self._constant(index, value):
                graph.initializer.append(_as_constant(name, self._constants[index][1], value))
                continue
            feed = _Feed(index, kind.tensor_type.elem_type)
            if feed.elem_type in _STAND_INS:
                graph.node.append(_cast(_FED + name, name, feed.elem_type))
                kind.tensor_type.elem_type = _STAND_INS[feed.elem_type]
                name = _FED + name
            graph.input.append(onnx.ValueInfoProto(name=name, type=kind))
            feeds[name] = feed
        graph.node.append(node)
        outputs = [name for name in node.output if name]
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        session = self._load(graph)
        codes = [
            element_type(output.type) if output.type.startswith("tensor") else 0 for output in session.get_outputs()
        ]
        if not _STAND_INS.keys().isdisjoint(codes):
            # numpy holds no such result; which results are of such a type only the first session tells.
            del graph.output[:]
            for i, (name, code) in enumerate(zip(outputs, codes, strict=True)):
                if code in _STAND_INS:
                    outputs[i] = _RETURNED + name
                    graph.node.append(_cast(name, outputs[i], _STAND_INS[code]))
                graph.output.append(onnx.ValueInfoProto(name=outputs[i]))
            session = self._load(graph)
        return _Session(session, feeds, outputs, codes)

    def _load(self, graph: onnx.GraphProto) -> Any:
        try:
            import onnxruntime
        except ImportError as error:
            raise NoRuntime(
                f"operator {self.extra_repr()} has no torch meaning and runs on onnxruntime, which is not installed; "
                "install graphopt[cpu]"
            ) from error
        own = {(function.domain, function.name) for function in self._functions}
        foreign = bool(self.proto.domain) and not self.proto.domain.startswith(_RUNTIME_DOMAINS)
        if foreign and (self.proto.domain, self.proto.op_type) not in own:
            # Asking onnxruntime takes milliseconds, and a model may hold thousands of such nodes.
            raise NoRuntime(f"operator {self.extra_repr()} has no torch meaning, and onnxruntime has no such domain")
        opsets = list(self._opsets)
        if not any(opset.domain in ("", "ai.onnx") for opset in opsets):
            opsets.append(onnx.helper.make_opsetid("", _CAST_OPSET))
        model = onnx.ModelProto(ir_version=_IR_VERSION, graph=graph, opset_import=opsets, functions=self._functions)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            reason = next(iter(str(error).splitlines()), "")[:300]
            unknown = any(text in reason for text in _UNKNOWN)
            raise (NoRuntime if unknown else GraphOptError)(
                f"operator {self.extra_repr()} has no torch meaning, and onnxruntime cannot run it either: {reason}"
            ) from error


@dataclass(frozen=True)
class _Feed:
    index: int
    """Of the value among the operator's inputs."""
    elem_type: int


@dataclass(frozen=True)
class _Session:
    """A session for one set of input types and shapes, and how values go in and come out."""

    session: Any
    feeds: dict[str, _Feed]
    outputs: list[str]
    codes: list[int]

    def run(self, values: Sequence[Any]) -> list[Any]:
        feeds = {name: _fed(values[feed.index], feed.elem_type) for name, feed in self.feeds.items()}
        results = self.session.run(self.outputs, feeds)
        return [_returned(value, code) for value, code in zip(results, self.codes, strict=True)]


def _fed(value: Any, elem_type: int) -> Any:
    if _STAND_INS.get(elem_type) == _P.FLOAT:
        value = value.to(torch.float32)
    return to_numpy(value)


def _returned(value: Any, elem_type: int) -> Any:
    if isinstance(value, list):
        return [_returned(v, 0) for v in value]
    if isinstance(value, dict) or value is None:
        return value
    found = from_numpy(value)
    wanted = TORCH_DTYPES.get(elem_type)
    return found.to(wanted) if isinstance(found, torch.Tensor) and wanted is not None else found


def _as_constant(name: str, proto: onnx.TensorProto, value: Any) -> onnx.TensorProto:
    """The initialiser that a single-node model embeds: `proto` itself, its bytes pulled in from outside."""
    if proto.data_location == onnx.TensorProto.EXTERNAL:
        return to_tensor_proto(name, value, proto.data_type)
    twin = onnx.TensorProto()
    twin.CopyFrom(proto)
    twin.name = name
    return twin


def _type_of(value: Any, elem_type: int = 0) -> onnx.TypeProto | None:
    """The ONNX type of a runtime value; None for an empty optional, of which it does not tell.

    Args:
        value: what the operator is called with.
        elem_type: the element type where it is known; not believed where another dtype holds the values.
    """
    if value is None:
        return None
    if isinstance(value, dict):
        key, item = next(iter(value.items()), (0, 0.0))
        item_type = onnx.helper.make_tensor_type_proto(_SCALARS[type(item)], ())
        return onnx.helper.make_map_type_proto(_SCALARS[type(key)], item_type)
    if isinstance(value, (list, tuple)):
        element = _type_of(value[0], elem_type) if value else None
        if element is None:
            element = onnx.helper.make_tensor_type_proto(elem_type or _P.FLOAT, None)
        elif element.HasField("tensor_type"):
            element.tensor_type.ClearField("shape")  # the others may be of another one
        return onnx.helper.make_sequence_type_proto(element)
    shape = list(getattr(value, "shape", ()))
    if not isinstance(value, torch.Tensor):
        return onnx.helper.make_tensor_type_proto(_P.STRING, shape)
    believed = value.dtype in (TORCH_DTYPES.get(elem_type), CARRIERS.get(elem_type))
    return onnx.helper.make_tensor_type_proto(elem_type if believed else ONNX_DTYPES[value.dtype], shape)


def _cast(given: str, made: str, elem_type: int) -> onnx.NodeProto:
    """A cast that keeps every value: what a float8 holds may be infinite."""
    node = onnx.helper.make_node("Cast", [given], [made], to=elem_type)
    if elem_type in _EIGHT_BIT_FLOATS:
        node.attribute.append(onnx.helper.make_attribute("saturate", 0))
    return node
