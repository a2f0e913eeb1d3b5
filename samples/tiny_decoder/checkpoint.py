"""Weights in files: ours as safetensors with a JSON of the sizes, and those of llama2.c."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from tiny_decoder.model import Config, Decoder

FOLDER = Path(__file__).resolve().parent


def save(decoder: Decoder, folder: Path) -> None:
    """Write `weights.safetensors`, in fp16, and `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().to(torch.float16).contiguous() for name, value in decoder.state_dict().items()}
    if decoder.config.tied:
        del weights["lm_head.weight"]
    partial = folder / "weights.safetensors.partial"
    partial.write_bytes(serialize(weights))
    partial.replace(folder / "weights.safetensors")  # a reader never sees half a file
    (folder / "config.json").write_text(json.dumps(asdict(decoder.config), indent=2) + "\n")


def load(folder: Path) -> Decoder:
    """Read what `save` wrote, as fp32."""
    config = Config(**json.loads((folder / "config.json").read_text()))
    return _filled(config, load_file(folder / "weights.safetensors"))


def load_tiny() -> Decoder:
    """The byte-level model of Python source text in this folder."""
    return load(FOLDER)


def load_llama2c(folder: Path) -> Decoder:
    """Read the one legacy checkpoint (version 0) of llama2.c in a folder, such as stories260K.bin.

    The file is seven int32 sizes and then fp32 arrays, each stacked over the layers. It rotates neighbouring dimensions
    (2i, 2i + 1) where this decoder rotates (i, i + D/2), so the rows of wq and wk are put in that order.
    """
    paths = [path for path in sorted(folder.glob("*.bin")) if not path.name.startswith("tok")]
    if len(paths) != 1:
        raise ValueError(f"expected one checkpoint .bin in {folder}, found {len(paths)}; leave only one there")
    data = paths[0].read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, context = np.frombuffer(data, "<i4", 7).tolist()
    config = Config(abs(vocab), dim, layers, heads, kv_heads, hidden, context, tied=vocab > 0)
    arrays = _Reader(np.frombuffer(data, "<f4", offset=28))
    kv_dim = kv_heads * config.head_dim

    embedding = arrays.take(config.vocab, dim)
    stacked = {
        "input_layernorm": arrays.take(layers, dim),
        "self_attn.q_proj": half_rotated(arrays.take(layers, dim, dim), heads),
        "self_attn.k_proj": half_rotated(arrays.take(layers, kv_dim, dim), kv_heads),
        "self_attn.v_proj": arrays.take(layers, kv_dim, dim),
        "self_attn.o_proj": arrays.take(layers, dim, dim),
        "post_attention_layernorm": arrays.take(layers, dim),
        "mlp.gate_proj": arrays.take(layers, hidden, dim),
        "mlp.down_proj": arrays.take(layers, dim, hidden),
        "mlp.up_proj": arrays.take(layers, hidden, dim),
    }
    weights = {"embed_tokens.weight": embedding, "norm.weight": arrays.take(dim)}
    for name, stack in stacked.items():
        weights |= {f"layers.{index}.{name}.weight": stack[index] for index in range(layers)}
    if not config.tied:
        arrays.take(2, context, config.head_dim // 2)  # tables of cosines and sines, computed here
        weights["lm_head.weight"] = arrays.take(config.vocab, dim)
    return _filled(config, weights)


def half_rotated(weight: Tensor, heads: int) -> Tensor:
    """Reorder rows [..., heads * D, dim] from pairs (2i, 2i + 1) to pairs (i, i + D/2) of each head."""
    pairs = weight.unflatten(-2, (heads, -1, 2))
    return pairs.transpose(-3, -2).flatten(-4, -2)


class _Reader:
    """Takes arrays of given shapes from a flat one, in order."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def take(self, *shape: int) -> Tensor:
        size = int(np.prod(shape))
        if size > len(self.values):
            raise ValueError(
                f"expected {size} more numbers in the checkpoint, found {len(self.values)}; is it cut off?"
            )
        taken, self.values = self.values[:size], self.values[size:]
        return torch.from_numpy(taken.reshape(shape).copy())


def _filled(config: Config, weights: dict[str, Tensor]) -> Decoder:
    decoder = Decoder(config)
    if config.tied:
        weights = weights | {"lm_head.weight": weights["embed_tokens.weight"]}
    decoder.load_state_dict({name: value.float() for name, value in weights.items()})
    return decoder.eval()
