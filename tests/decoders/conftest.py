"""A language model of one layer whose logits are a short sum, with every kind of memory, and real ones.

    y_t = sum_{t-w < j <= t} x_j + 0.5 sum_{j <= t-w} x_j,    x_j = mask_j (table[token_j] + places[position_j])

and the logits are y_t W. `expected` computes that with a loop over the tokens.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt.graph import Graph

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
VOCABULARY, WIDTH, PLACES = 11, 4, 64
_RNG = np.random.default_rng(7)
TABLE = _RNG.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
POSITIONS = _RNG.normal(size=(PLACES, WIDTH)).astype(np.float32)
# Small, so that sums over many tokens leave no token certain.
HEAD = (0.3 * _RNG.normal(size=(WIDTH, VOCABULARY))).astype(np.float32)
NAMES = {
    "tokens": "input_ids",
    "mask": "attention_mask",
    "positions": "position_ids",
    "past": "past_key_values.0.key",
    "present": "present.0.key",
    "past_state": "past_state.0",
    "present_state": "present_state.0",
    "logits": "logits",
}


def expected(tokens: Any, mask: Any = None, window: int = 10**6) -> np.ndarray:
    """Logits [B, T, V] in fp64, token by token."""
    tokens = np.asarray(tokens)
    mask = np.ones_like(tokens) if mask is None else np.asarray(mask)
    out = np.zeros((*tokens.shape, VOCABULARY))
    for b, row in enumerate(tokens):
        x, place = [], 0
        for t, token in enumerate(row):
            visible = int(mask[b, t])
            x.append(visible * (TABLE[token].astype(np.float64) + POSITIONS[place]))
            place += visible
            y = sum(value * (1.0 if t - j < window else 0.5) for j, value in enumerate(x))
            out[b, t] = y @ HEAD.astype(np.float64)
    return out


def toy(memory: str, *, window: int = 3, names: dict[str, str] | None = None) -> onnx.ModelProto:
    """The model with memory "none", "cache" (all tokens), or "state" (a window of tokens and a sum of older ones)."""
    n = NAMES | (names or {})
    window = window if memory == "state" else PLACES
    constants = {
        "table": TABLE,
        "places": POSITIONS,
        "head": HEAD,
        "half": np.float32(0.5),
        "zero": np.array([0]),
        "one": np.array([1]),
        "two": np.array([2]),
        "axes": np.array([1, 3]),
        "axis": np.array(2),
        "before": np.array([0, 0, window, 0, 0, 0, 0, 0]),
        "cached": np.array([0, 0, window - 1, 0, 0, 0, 0, 0]),
        "last": np.array([1 - window]),
        "end": np.array([2**62]),
    }
    rows = [
        ("Gather", ["table", n["tokens"]], "e"),
        ("Gather", ["places", n["positions"]], "p"),
        ("Add", ["e", "p"], "ep"),
        ("Unsqueeze", ["ep", "one"], "new"),
        ("Concat", [n["past"], "new"], "x", {"axis": 2}) if memory != "none" else ("Identity", ["new"], "x"),
        ("Cast", [n["mask"]], "m", {"to": 1}),
        ("Unsqueeze", ["m", "axes"], "m4"),
        ("Mul", ["x", "m4"], "xm"),
        ("CumSum", ["xm", "axis"], "sums"),
        ("Shape", ["x"], "total", {"start": 2, "end": 3}),
        ("Shape", ["new"], "length", {"start": 2, "end": 3}),
        ("Sub", ["total", "length"], "start"),
        ("Slice", ["sums", "start", "total", "two"], "upto"),
    ]
    if memory == "state":
        rows += [
            ("Pad", ["sums", "before"], "shifted"),
            ("Slice", ["shifted", "start", "total", "two"], "left"),
            ("Sub", ["upto", "left"], "near"),
            ("Add", ["left", n["past_state"]], "far"),
            ("Mul", ["far", "half"], "faint"),
            ("Add", ["near", "faint"], "y"),
            ("Slice", ["xm", "last", "end", "two"], n["present"]),
            ("Pad", ["sums", "cached"], "gone"),
            ("Sub", ["total", "one"], "final"),
            ("Slice", ["gone", "final", "total", "two"], "leaving"),
            ("Add", ["leaving", n["past_state"]], n["present_state"]),
        ]
    else:
        rows += [("Identity", ["upto"], "y")]
        rows += [("Identity", ["xm"], n["present"])] if memory == "cache" else []
    rows += [("Squeeze", ["y", "one"], "flat"), ("MatMul", ["flat", "head"], n["logits"])]
    nodes = [helper.make_node(op, ins, [out], name=out, **(more[0] if more else {})) for op, ins, out, *more in rows]

    def integers(name: str, *shape: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(n[name], TensorProto.INT64, shape)

    def floats(name: str, *shape: str | int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(n[name], TensorProto.FLOAT, shape)

    # Not in the usual order: roles are found by what the inputs are.
    inputs = [integers("positions", "B", "T"), integers("mask", "B", "A" if memory != "none" else "T")]
    outputs = []
    if memory != "none":
        inputs.append(floats("past", "B", 1, "P", WIDTH))
        outputs.append(floats("present", "B", 1, "N", WIDTH))
    if memory == "state":
        inputs.append(floats("past_state", "B", 1, 1, WIDTH))
        outputs.append(floats("present_state", "B", 1, 1, WIDTH))
    inputs.append(integers("tokens", "B", "T"))
    outputs.append(floats("logits", "B", "T", VOCABULARY))
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files of the model, by kind of memory; the window of "state" is 3."""
    folder = tmp_path_factory.mktemp("toys")
    for memory in ("none", "cache", "state"):
        onnx.save(toy(memory), folder / f"{memory}.onnx")
    return {path.stem: path for path in folder.glob("*.onnx")}


@pytest.fixture(scope="session")
def toy_model() -> Callable[..., onnx.ModelProto]:
    return toy


@pytest.fixture(scope="session")
def reference() -> Callable[..., np.ndarray]:
    return expected


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, (3, 9))


@pytest.fixture(scope="session")
def llama(shared_data: Path) -> Path:
    """A random Llama in fp16 with contrib operators and a cache."""
    return shared_data / "zoo_extra" / "tiny_random_llama_fp16" / "model.onnx"


@pytest.fixture(scope="session")
def sample_module() -> Callable[[str], Any]:
    """Imports a module of the sample `tiny_decoder`."""
    if not (SAMPLES / "tiny_decoder" / "model.py").exists():
        pytest.skip("samples/tiny_decoder is not there")
    if str(SAMPLES) not in sys.path:
        sys.path.append(str(SAMPLES))
    return lambda name: importlib.import_module(f"tiny_decoder.{name}")


@pytest.fixture(scope="session")
def stories_module(sample_module: Callable[[str], Any], shared_data: Path) -> torch.nn.Module:
    """The pretrained stories260K as an nn.Module."""
    module: torch.nn.Module = sample_module("checkpoint").load_llama2c(shared_data / "stories260k")
    return module


@pytest.fixture(scope="session")
def stories(sample_module: Callable[[str], Any], stories_module: torch.nn.Module) -> Graph:
    """The same as a graph with a cache, whose inputs and outputs carry the names that torch.export makes up."""
    from torch.export import Dim

    model = sample_module("model")
    heads, features = stories_module.config.kv_heads, stories_module.config.head_dim
    layers = range(stories_module.config.layers)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    cache = [(torch.zeros(2, heads, 4, features), torch.zeros(2, heads, 4, features)) for _ in layers]
    batch = Dim("batch")
    tokens, sizes = {0: batch, 1: Dim.AUTO}, {0: batch, 2: Dim.AUTO}
    return graphopt.load(
        model.CachedDecoder(stories_module),
        (ids, torch.ones(2, 7, dtype=torch.int64), ids, cache),
        (tokens, tokens, tokens, [(sizes, sizes) for _ in layers]),
    )
