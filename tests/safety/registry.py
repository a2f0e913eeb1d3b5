"""What an attack is: a builder of a hostile file, and what loading that file has to end in."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

LOADS = "loads"
EITHER = "either"
STAGES = ("load", "save", "cleanup", "inspect")
_MODEL = '<ir_version: 8, opset_import: ["": 17, "local": 1]>'


@dataclass(frozen=True)
class Attack:
    """A hostile file."""

    name: str
    make: Callable[[Path], Path]
    """Writes the file into a folder; files for the attack to reach lie in its sibling `outside`."""
    expect: str
    """`LOADS`; `EITHER`; else a part of the sentence that refuses the file."""
    stages: tuple[str, ...] = STAGES
    """What is done with the file; not all of it where it takes long for an honest reason."""


ATTACKS: dict[str, Attack] = {}


def attack(expect: str, *, stages: str = "", **arguments: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a builder, which returns a path, the bytes of a file, or a ModelProto."""

    def enter(build: Callable[..., Any]) -> Callable[..., Any]:
        text = "-".join([build.__name__, *(str(value)[:40] for value in arguments.values())])
        label = re.sub(r"[^\w.+-]+", "_", text, flags=re.ASCII)
        while label in ATTACKS:
            label += "_"

        def make(folder: Path) -> Path:
            given = {"folder": folder} if "folder" in build.__code__.co_varnames[: build.__code__.co_argcount] else {}
            made = build(**given, **arguments)
            if isinstance(made, Path):
                return made
            path = folder / "model.onnx"
            path.write_bytes(made.SerializeToString() if isinstance(made, onnx.ModelProto) else made)
            return path

        ATTACKS[label] = Attack(label, make, expect, tuple(stages.split()) or STAGES)
        return build

    return enter


def parsed(graph: str, functions: str = "", header: str = _MODEL) -> onnx.ModelProto:
    """A model from ONNX text: `g (float[4] x) => (float[4] y) { y = Relu(x) }`."""
    return onnx.parser.parse_model(f"{header} {graph} {functions}")


def adding(weight: onnx.TensorProto | None = None) -> onnx.ModelProto:
    """y = x + w; by default w is of four floats."""
    model = parsed("g (float[4] x) => (float[4] y) { y = Add(x, w) }")
    if weight is None:
        weight = onnx.TensorProto(data_type=1, dims=[4], raw_data=bytes(16))
    model.graph.initializer.add().CopyFrom(weight)
    model.graph.initializer[0].name = weight.name or "w"
    model.graph.node[0].input[1] = model.graph.initializer[0].name
    return model


def float_value(name: str, *dims: int | str) -> onnx.ValueInfoProto:
    """The declaration of a float tensor."""
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(dims))
