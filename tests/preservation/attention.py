"""Attention beside something odd."""

import functools
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.compose
import torch
from onnx import ModelProto

# Tests are imported by path: this folder is no package.
_spec = importlib.util.spec_from_file_location(
    "attention_models", Path(__file__).parents[1] / "passes" / "attention_models.py"
)
models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models)

PREFIX = "attention/"
OPSET = 17


class _Row(torch.nn.Module):
    """Blocks one behind another."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(models.Block("causal") for _ in range(count))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, mask)
        return x


@functools.cache
def _exported(count: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        models.export(_Row(count), Path(folder) / "m.onnx", opset=OPSET)
        return (Path(folder) / "m.onnx").read_bytes()


def attention(count: int = 1) -> ModelProto:
    """Causal self-attention: x [batch, seq, 32] and mask [batch, seq] -> y."""
    return ModelProto.FromString(_exported(count))


def batches(count: int = 2) -> list[dict[str, Any]]:
    """What to feed it."""
    found = []
    for i in range(count):
        x, mask = models.example(length=7 + i, seed=i)
        found.append({"x": x.numpy(), "mask": mask.numpy()})
    return found


def beside(odd: ModelProto) -> ModelProto:
    """The odd model, and an attention that has nothing to do with it behind it, all of its names under a prefix."""
    both, other = ModelProto(), onnx.compose.add_prefix(attention(), PREFIX)
    both.CopyFrom(odd)
    for field in ("node", "initializer", "input", "output", "value_info"):
        getattr(both.graph, field).extend(getattr(other.graph, field))
    return both


def feeds(odd: dict[str, Any], index: int) -> dict[str, np.ndarray[Any, Any]]:
    """What to feed a model of `beside`."""
    return {**odd, **{PREFIX + name: value for name, value in batches(index + 1)[index].items()}}


def without_attention(both: ModelProto) -> ModelProto:
    """The model without all that carries the prefix, or that a rewrite of the attention has added."""
    left = ModelProto()
    left.CopyFrom(both)
    for field in ("initializer", "input", "output", "value_info"):
        kept = [each for each in getattr(both.graph, field) if PREFIX.strip("/") not in each.name]
        del getattr(left.graph, field)[:]
        getattr(left.graph, field).extend(kept)
    del left.graph.node[:], left.functions[:], left.opset_import[:]
    left.graph.node.extend(n for n in both.graph.node if not any(PREFIX.strip("/") in name for name in n.output))
    left.functions.extend(f for f in both.functions if f.domain != "graphopt")
    left.opset_import.extend(o for o in both.opset_import if o.domain != "graphopt")
    return left
