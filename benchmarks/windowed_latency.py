"""LoLCATs' hybrid operator alone against softmax attention over everything, on onnxruntime: prefill and decoding."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import torch

import graphopt
from benchmarks.attention_latency import pair, session
from benchmarks.common import show, store
from graphopt.ops import windowed_linear_attention

HEADS, KEY_HEADS, WINDOW = 8, 4, 64
LENGTHS = (512, 1024, 4096)
_FEW = 9
"""Runs where one takes a second."""


class Prefill(torch.nn.Module):
    """q, k, v [B, T, H D] as a projection leaves them, features [B, H, T, F] as a map per head does."""

    def forward(self, q: Any, k: Any, v: Any, query_features: Any, key_features: Any, gate: Any) -> Any:
        """[B, T, H D]."""
        width = q.shape[-1] // HEADS
        q, k, v = (x.unflatten(-1, (HEADS, width)).transpose(1, 2) for x in (q, k, v))
        out, _ = torch.ops.graphopt.windowed_linear_attention(
            q, k, v, query_features, key_features, gate, None, None, WINDOW, 0, width**-0.5
        )
        return out.transpose(1, 2).flatten(-2)


class Decode(torch.nn.Module):
    """One query [B, 1, H D]; the window's keys and values [B, Hkv, S, D] and the state from a cache."""

    def forward(
        self, q: Any, keys: Any, values: Any, query_features: Any, key_features: Any, gate: Any, state: Any
    ) -> Any:
        """[B, 1, H D] and the next state."""
        width = q.shape[-1] // HEADS
        out, state = torch.ops.graphopt.windowed_linear_attention(
            q.unflatten(-1, (HEADS, width)).transpose(1, 2),
            keys, values, query_features, key_features, gate, None, state, WINDOW, 0, width**-0.5,
        )  # fmt: skip
        return out.transpose(1, 2).flatten(-2), state


def prefill_values(length: int, width: int, features: int) -> dict[str, torch.Tensor]:
    """Operands of `Prefill`."""
    g = torch.Generator().manual_seed(length)
    packed = {name: torch.randn(1, length, HEADS * width, generator=g) for name in "qkv"}
    maps = {n: torch.rand(1, HEADS, length, features, generator=g) for n in ("query_features", "key_features")}
    return packed | maps | {"gate": torch.rand(1, HEADS, 1, 1, generator=g)}


def decode_values(width: int) -> dict[str, torch.Tensor]:
    """Operands of `Decode`: the cache holds `WINDOW` keys, and the new one is behind them."""
    g = torch.Generator().manual_seed(width)
    kept = {n: torch.randn(1, KEY_HEADS, WINDOW + 1, width, generator=g) for n in ("keys", "values")}
    return {
        "q": torch.randn(1, 1, HEADS * width, generator=g),
        **kept,
        "query_features": torch.rand(1, HEADS, 1, width, generator=g),
        "key_features": torch.rand(1, HEADS, WINDOW + 1, width, generator=g),
        "gate": torch.rand(1, HEADS, 1, 1, generator=g),
        "state": torch.rand(1, HEADS, width, width + 1, generator=g),
    }


def save(module: torch.nn.Module, values: dict[str, torch.Tensor], path: Path, dynamic: dict[str, int]) -> None:
    """Lower for onnxruntime; `dynamic` says which axis of an operand has the length."""
    length = torch.export.Dim("length", min=2)
    shapes = tuple({dynamic[name]: length} if name in dynamic else None for name in values)
    program = torch.export.export(module, tuple(values.values()), dynamic_shapes=shapes)
    graphopt.load(program).save(path, target="onnxruntime")


def softmax(causal: bool) -> bytes:
    """MultiHeadAttention on packed q, and k and v packed or [B, H, S, D]."""
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]> g (float[] q, float[] k, float[] v) => (float[] y)'
        f"{{ y = com.microsoft.MultiHeadAttention<num_heads = {HEADS}, unidirectional = {int(causal)}>(q, k, v) }}"
    )
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    data: bytes = model.SerializeToString()
    return data


def check(hybrid: Any, module: torch.nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Hold the session against the reference in fp64."""
    expected = module(*(x.double() for x in values.values()))
    found = hybrid.run(None, {n: x.numpy() for n, x in values.items()})
    for a, b in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-4, atol=1e-4)


def run() -> None:
    """Check, then time with one and with two threads."""
    assert windowed_linear_attention is not None  # registers torch.ops.graphopt
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for threads in (1, 2):
            for features in (64, 128):
                path = Path(folder) / f"prefill{features}.onnx"
                packed = dict.fromkeys("qkv", 1) | {"query_features": 2, "key_features": 2}
                save(Prefill(), prefill_values(100, 64, features), path, packed)
                hybrid, full = session(path, threads), session(softmax(True), threads)
                check(hybrid, Prefill(), prefill_values(200, 64, features))
                for length in LENGTHS:
                    feeds = {n: x.numpy() for n, x in prefill_values(length, 64, features).items()}
                    time = pair(full, hybrid, feeds, _FEW if length > 1024 else 21)
                    results.append(_row("prefill", threads, length, features, time))
            for width in (32, 64):
                path = Path(folder) / f"decode{width}.onnx"
                values = decode_values(width)
                save(Decode(), values, path, {})
                hybrid, full = session(path, threads), session(softmax(False), threads)
                check(hybrid, Decode(), values)
                for length in LENGTHS:
                    feeds = {n: x.numpy() for n, x in values.items()}
                    feeds |= {n: np.random.default_rng(0).random((1, HEADS, length, width), np.float32) for n in "kv"}
                    results.append(
                        _row(f"decode, {width} wide", threads, length, width, pair(full, hybrid, feeds, 201))
                    )
    columns = ["case", "threads", "length", "features", "softmax ms", "hybrid ms", "ratio", "quartiles"]
    rows = [
        [
            *(r[name] for name in ("case", "threads", "length", "features")),
            *(r["time"][name] for name in ("original_ms", "linear_ms", "ratio")),
            f"{r['time']['ratio_q1']:.2f}-{r['time']['ratio_q3']:.2f}",
        ]
        for r in results
    ]
    show("Hybrid attention (B 1, H 8, window 64), softmax / hybrid", columns, rows)
    store("windowed_latency", {"rows": results})


def _row(case: str, threads: int, length: int, features: int, time: dict[str, float]) -> dict[str, Any]:
    row = {"case": case, "threads": threads, "length": length, "features": features, "time": time}
    print(row, file=sys.stderr)
    return row
