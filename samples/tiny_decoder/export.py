"""Write the decoder as two .onnx files, without and with a cache, and check both in onnxruntime.

python samples/tiny_decoder/export.py --out FOLDER [--llama2c FOLDER]
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_decoder.checkpoint import load_llama2c, load_tiny
from tiny_decoder.model import CachedDecoder, Config, Decoder

OPSET = 18  # any runtime of the last years loads it
TOLERANCE = 1e-4
TRACED = {"batch": 2, "length": 3, "past": 4}  # sizes of the example inputs; none appears in the files

PLAIN = "decoder.onnx"
CACHED = "decoder_with_past.onnx"


def export(decoder: Decoder, folder: Path) -> None:
    """Write `decoder.onnx` (input_ids -> logits) and `decoder_with_past.onnx` (with the names of Optimum)."""
    folder.mkdir(parents=True, exist_ok=True)
    decoder = decoder.eval()
    batch, length, past = TRACED["batch"], TRACED["length"], TRACED["past"]
    ids = torch.zeros(batch, length, dtype=torch.int64)
    names = {0: "batch_size", 1: "sequence_length"}
    _write(decoder, (ids,), folder / PLAIN, ["input_ids"], ["logits"], {"input_ids": names})

    config = decoder.config
    mask = torch.ones(batch, past + length, dtype=torch.int64)
    positions = torch.arange(past, past + length).expand(batch, length)
    shape = (batch, config.kv_heads, past, config.head_dim)
    cache = {0: "batch_size", 2: "past_sequence_length"}
    _write(
        CachedDecoder(decoder),
        (ids, mask, positions, [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.layers)]),
        folder / CACHED,
        ["input_ids", "attention_mask", "position_ids", *cache_names("past_key_values", config)],
        ["logits", *cache_names("present", config)],
        {
            "input_ids": names,
            "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
            "position_ids": names,
            "past_key_values": [(cache, cache)] * config.layers,
        },
    )


def cache_names(prefix: str, config: Config) -> list[str]:
    """`prefix.0.key`, `prefix.0.value`, `prefix.1.key`, ..."""
    return [f"{prefix}.{layer}.{part}" for layer in range(config.layers) for part in ("key", "value")]


class CachedSession:
    """Runs `decoder_with_past.onnx` for `batch` sequences and keeps their cache, empty at first."""

    def __init__(self, path: Path, config: Config, batch: int) -> None:
        self.session = session(path)
        empty = np.zeros((batch, config.kv_heads, 0, config.head_dim), np.float32)
        self.cache = dict.fromkeys(cache_names("past_key_values", config), empty)
        self.mask = np.zeros((batch, 0), np.int64)

    def advance(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Logits [B, T, V] of the next ids [B, T]; in `mask` [B, T] padding is 0."""
        new = np.ones_like(ids) if mask is None else mask
        self.mask = np.concatenate((self.mask, new), axis=1)
        positions = np.maximum(self.mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        feeds = {"input_ids": ids, "attention_mask": self.mask, "position_ids": positions, **self.cache}
        logits, *presents = self.session.run(None, feeds)
        self.cache = dict(zip(self.cache, presents, strict=True))
        return logits


def session(path: Path) -> onnxruntime.InferenceSession:
    """The file in onnxruntime on the CPU, quietly."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def worst_errors(decoder: Decoder, folder: Path, batch: int = 3, prompt: int = 7, decoded: int = 5) -> dict[str, float]:
    """Largest deviations of both files' logits from torch's full forward, on random tokens.

    The file with a cache takes the prompt at once, and then one token at a time.
    """
    ids = torch.randint(decoder.config.vocab, (batch, prompt + decoded), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = decoder(ids).numpy()
    ids = ids.numpy()
    full = session(folder / PLAIN).run(None, {"input_ids": ids})[0]
    cached = CachedSession(folder / CACHED, decoder.config, batch)
    parts = [cached.advance(part) for part in np.split(ids, range(prompt, prompt + decoded), axis=1)]
    return {
        PLAIN: float(np.abs(full - expected).max()),
        CACHED: float(np.abs(np.concatenate(parts, axis=1) - expected).max()),
    }


def _write(
    model: torch.nn.Module,
    arguments: tuple[object, ...],
    path: Path,
    inputs: list[str],
    outputs: list[str],
    dynamic_shapes: Mapping[str, object],
) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it mentions every optional package it lacks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            arguments,
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=dynamic_shapes,
        )
    proto = program.model_proto
    for value in [*proto.graph.output, *proto.graph.value_info]:
        for dim in value.type.tensor_type.shape.dim:
            # The exporter spells this out, although an input has a name for it.
            if dim.dim_param == "past_sequence_length + sequence_length":
                dim.dim_param = "total_sequence_length"
    onnx.save(proto, path)


def main() -> None:
    """Export, and say how far the files are from torch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the .onnx files")
    parser.add_argument("--llama2c", type=Path, help="folder with a llama2.c checkpoint, in place of the tiny decoder")
    arguments = parser.parse_args()
    decoder = load_llama2c(arguments.llama2c) if arguments.llama2c else load_tiny()
    export(decoder, arguments.out)
    errors = worst_errors(decoder, arguments.out)
    for name, error in errors.items():
        print(f"{arguments.out / name}: largest deviation from torch {error:.1e}")
    if max(errors.values()) > TOLERANCE:
        sys.exit(f"expected logits within {TOLERANCE:.0e} of torch's; do not use these files")


if __name__ == "__main__":
    main()
