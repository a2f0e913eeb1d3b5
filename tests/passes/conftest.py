"""Small random decoders of the Llama architecture, as .onnx files with a cache and without one."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import graphopt
from graphopt.graph import Graph

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
VOCABULARY, LAYERS = 40, 2


@pytest.fixture(scope="session")
def decoder_files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """Folder with decoder.onnx and decoder_with_past.onnx, by numbers of query and key heads."""
    if str(SAMPLES) not in sys.path:
        sys.path.append(str(SAMPLES))
    model = importlib.import_module("tiny_decoder.model")
    export = importlib.import_module("tiny_decoder.export")
    made: dict[tuple[int, int], Path] = {}

    def folder(heads: int = 4, kv_heads: int = 2) -> Path:
        if (heads, kv_heads) not in made:
            torch.manual_seed(0)
            config = model.Config(
                vocab=VOCABULARY, dim=8 * heads, layers=LAYERS, heads=heads, kv_heads=kv_heads, hidden=32, context=256
            )
            decoder = model.Decoder(config)
            # Logits of a few units: random weights as they come attend to all keys alike.
            for parameter in decoder.parameters():
                parameter.data.mul_(3.0 if parameter.dim() > 1 else 1.0)
            made[heads, kv_heads] = tmp_path_factory.mktemp("decoder")
            export.export(decoder, made[heads, kv_heads])
        return made[heads, kv_heads]

    return folder


@pytest.fixture(scope="session")
def with_cache(decoder_files: Callable[..., Path]) -> Callable[..., Graph]:
    """A decoder with inputs input_ids, attention_mask, position_ids and caches."""
    return lambda *heads: graphopt.load(decoder_files(*heads) / "decoder_with_past.onnx")


@pytest.fixture(scope="session")
def without_cache(decoder_files: Callable[..., Path]) -> Callable[..., Graph]:
    """The same decoder with input_ids alone."""
    return lambda *heads: graphopt.load(decoder_files(*heads) / "decoder.onnx")


@pytest.fixture(scope="session")
def texts() -> np.ndarray:
    """Random tokens [6, 45]."""
    return np.random.default_rng(0).integers(0, VOCABULARY, (6, 45))
