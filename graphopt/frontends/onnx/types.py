"""Element types that torch cannot tell apart: int4 travels in an int8 tensor, and some operators have to know."""

from __future__ import annotations

from collections.abc import Iterable

import onnx


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


# Operators whose first output has the element type of their first input, among those that take packed types.
_KEEPING = words(
    "Identity Reshape Transpose Squeeze Unsqueeze Flatten Gather GatherElements GatherND Slice Concat Split Expand "
    "Tile Pad ScatterElements ScatterND DepthToSpace SpaceToDepth ReverseSequence"
)


class ElementTypes:
    """ONNX element type codes by value name, as far as the file says; 0 where it does not."""

    def __init__(self, outer: ElementTypes | None = None) -> None:
        self._codes: dict[str, int] = {}
        self._outer = outer

    def __getitem__(self, name: str) -> int:
        found = self._codes.get(name)
        if found is None:
            return self._outer[name] if self._outer is not None else 0
        return found

    def set(self, name: str, code: int) -> None:
        """Note a value's element type."""
        self._codes[name] = code

    def declare(self, values: Iterable[onnx.ValueInfoProto]) -> None:
        """Take over declared types."""
        for value in values:
            if value.type.HasField("tensor_type") and value.type.tensor_type.elem_type:
                self._codes[value.name] = value.type.tensor_type.elem_type

    def follow(self, node: onnx.NodeProto) -> None:
        """Note the type of the node's first output where the node itself says it."""
        if not node.output or self[node.output[0]]:
            return
        code = next((a.i for a in node.attribute if a.name in ("to", "output_dtype", "dtype")), 0)
        if not code and node.op_type == "QuantizeLinear" and len(node.input) > 2:
            code = self[node.input[2]]
        elif not code and node.op_type == "CastLike" and len(node.input) > 1:
            code = self[node.input[1]]
        elif not code and node.op_type in _KEEPING and node.input:
            code = self[node.input[0]]
        if code:
            self._codes[node.output[0]] = code
