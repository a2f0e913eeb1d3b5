"""A one-layer decoder with attention: as an nn.Module, and as .onnx with and without a cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.export import Dim

import graphopt
from graphopt.graph import Graph

VOCABULARY, HEADS, SIZE = 13, 2, 4
WIDTH = HEADS * SIZE
_RNG = np.random.default_rng(3)
# Large queries and keys, so that attention is sharp and what is lost by a rewrite shows.
TABLE = _RNG.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
WEIGHTS = {n: _RNG.normal(size=(WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5 for n in "qkvo"}
HEAD = _RNG.normal(size=(WIDTH, VOCABULARY)).astype(np.float32) / WIDTH**0.5
PASS = "linearize{window=4,fit_steps=3,lora_steps=2}"


class Decoder(torch.nn.Module):
    """The same function as `decoder_file()` without a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.from_numpy(TABLE))
        self.weights = torch.nn.ParameterDict({n: torch.from_numpy(w) for n, w in WEIGHTS.items()})
        self.head = torch.nn.Parameter(torch.from_numpy(HEAD))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.embedding(input_ids, self.table)
        q, k, v = ((x @ self.weights[n]).unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for n in "qkv")
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return (x + y.transpose(1, 2).flatten(2) @ self.weights["o"]) @ self.head


def decoder_file(path: Path, *, cached: bool) -> Path:
    """input_ids, attention_mask [, caches] -> logits [, caches]."""
    constants = {
        "table": TABLE,
        **{f"w{n}": w for n, w in WEIGHTS.items()},
        "head": HEAD,
        "split": np.array([0, 0, HEADS, SIZE]),
        "join": np.array([0, 0, WIDTH]),
        "scale": np.array(SIZE**-0.5, np.float32),
        "zero": np.array(0),
        "one": np.array(1),
        "axis": np.array([1]),
        "axes": np.array([1, 2]),
        "open": np.array(0, np.float32),
        "hidden": np.array(-1e9, np.float32),
    }
    rows: list[tuple[Any, ...]] = [("Gather", ["table", "input_ids"], "x")]
    for n in "qkv":
        new = f"{n}_new" if cached and n != "q" else n
        rows += [
            ("MatMul", ["x", f"w{n}"], f"{n}_flat"),
            ("Reshape", [f"{n}_flat", "split"], f"{n}_split"),
            ("Transpose", [f"{n}_split"], new, {"perm": [0, 2, 1, 3]}),
        ]
    if cached:
        rows += [
            ("Concat", [f"past_key_values.0.{name}", f"{n}_new"], f"present.0.{name}", {"axis": 2})
            for n, name in (("k", "key"), ("v", "value"))
        ]
    keys, values = ("present.0.key", "present.0.value") if cached else ("k", "v")
    rows += [
        ("Shape", ["attention_mask"], "shape"),
        ("Gather", ["shape", "one"], "total", {"axis": 0}),
        ("Shape", ["input_ids"], "new_shape"),
        ("Gather", ["new_shape", "one"], "length", {"axis": 0}),
        ("Sub", ["total", "length"], "past"),
        ("Range", ["past", "total", "one"], "queries"),
        ("Unsqueeze", ["queries", "axis"], "query_column"),
        ("Range", ["zero", "total", "one"], "key_row"),
        ("LessOrEqual", ["key_row", "query_column"], "causal"),
        ("Cast", ["attention_mask"], "seen", {"to": TensorProto.BOOL}),
        ("Unsqueeze", ["seen", "axes"], "seen4"),
        ("And", ["causal", "seen4"], "visible"),
        ("Where", ["visible", "open", "hidden"], "bias"),
        ("Transpose", [keys], "k_turned", {"perm": [0, 1, 3, 2]}),
        ("MatMul", ["q", "k_turned"], "scores"),
        ("Mul", ["scores", "scale"], "scaled"),
        ("Add", ["scaled", "bias"], "masked"),
        ("Softmax", ["masked"], "weights", {"axis": -1}),
        ("MatMul", ["weights", values], "heads"),
        ("Transpose", ["heads"], "turned", {"perm": [0, 2, 1, 3]}),
        ("Reshape", ["turned", "join"], "joined"),
        ("MatMul", ["joined", "wo"], "y"),
        ("Add", ["x", "y"], "sum"),
        ("MatMul", ["sum", "head"], "logits"),
    ]
    nodes = [helper.make_node(op, ins, [out], name=out, **(more[0] if more else {})) for op, ins, out, *more in rows]
    total = "total_length" if cached else "length"
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", total]),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", VOCABULARY])]
    for name in ("key", "value") if cached else ():
        shape, longer = (["batch", HEADS, dim, SIZE] for dim in ("past_length", "total_length"))
        inputs.append(helper.make_tensor_value_info(f"past_key_values.0.{name}", TensorProto.FLOAT, shape))
        outputs.append(helper.make_tensor_value_info(f"present.0.{name}", TensorProto.FLOAT, longer))
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="session")
def decoder_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model as .onnx: `plain` and `cached`."""
    folder = tmp_path_factory.mktemp("decoders")
    return {name: decoder_file(folder / f"{name}.onnx", cached=name == "cached") for name in ("plain", "cached")}


@pytest.fixture(scope="session")
def module_graph() -> Graph:
    dims = ({0: Dim("batch"), 1: Dim("length", min=2, max=64)},)
    return graphopt.load(Decoder().eval(), (torch.zeros(2, 12, dtype=torch.int64),), dims)


@pytest.fixture(scope="session")
def module() -> Decoder:
    return Decoder().eval()


@pytest.fixture(scope="session")
def texts() -> Callable[[int, int, int], np.ndarray[Any, Any]]:
    """Random texts: (seed, count, length) -> tokens."""
    return lambda seed, count, length: np.random.default_rng(seed).integers(0, VOCABULARY, (count, length))
