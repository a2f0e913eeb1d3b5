"""What the ONNX standard says of an operator's attributes, inputs and outputs."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx.defs

from graphopt.errors import GraphOptError


@dataclass(frozen=True)
class Operands:
    """How many inputs or outputs there are, and which of them may not be left out; the last one may be repeated."""

    least: int
    most: int
    needed: tuple[bool, ...]

    def check(self, names: Sequence[str], label: str) -> None:
        """Check a node's operands; onnx's own shape inference reads beyond those that are missing.

        Raises:
            GraphOptError: there are too few or too many, or one that is needed has no name.
        """
        if not self.least <= len(names) <= self.most:
            wanted = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
            raise GraphOptError(f"expected {wanted} {label}, found {len(names)}; fix the model")
        for i, name in enumerate(names):
            if not name and self.needed[min(i, len(self.needed) - 1)]:
                raise GraphOptError(f"number {i} of the {label} is left out, but it is not optional; fix the model")


@dataclass(frozen=True)
class Signature:
    """One operator in one opset."""

    attributes: Mapping[str, int]
    """Types by name."""
    required: tuple[str, ...]
    """Names of the attributes without a default."""
    inputs: Operands
    outputs: Operands


def signature_of(op_type: str, version: int, domain: str) -> Signature | None:
    """The operator's signature, or None where this onnx package does not know it in that version."""
    if version > _LATEST.get(domain, 0) or not onnx.defs.has(op_type, version, domain):
        return None
    return _known(op_type, version, domain)


@functools.lru_cache(maxsize=1024)
def _known(op_type: str, version: int, domain: str) -> Signature:
    schema = onnx.defs.get_schema(op_type, version, domain)
    return Signature(
        {name: _code(a.type) for name, a in schema.attributes.items()},
        tuple(name for name, a in schema.attributes.items() if a.required),
        _operands(schema.inputs, schema.min_input, schema.max_input, variadic=True),
        _operands(schema.outputs, schema.min_output, schema.max_output, variadic=False),
    )


def _code(kind: Any) -> int:
    return int(kind.value)


def _operands(formal: Sequence[Any], least: int, most: int, *, variadic: bool) -> Operands:
    """Args: variadic: whether the entries of a repeated operand are needed."""
    option = onnx.defs.OpSchema.FormalParameterOption
    needed = (option.Single, option.Variadic) if variadic else (option.Single,)
    return Operands(least, most, tuple(f.option in needed for f in formal) or (False,))


_LATEST: dict[str, int] = {}
for _schema in onnx.defs.get_all_schemas():
    _LATEST[_schema.domain] = max(_schema.since_version, _LATEST.get(_schema.domain, 0))
_LATEST[""] = onnx.defs.onnx_opset_version()
