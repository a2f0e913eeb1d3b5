"""What linearising costs two real decoders in perplexity, by method, by branch, by training, and by seed.

stories260K (five layers of width 64, grouped heads, a window of 16) on text that it wrote itself, and the byte-level
decoder of samples/tiny_decoder (2.8 M parameters, a window of 64, texts of 1,024) on Python sources. Both are the
exports with a cache that one would deploy. Held-out texts are seen by no training. Finished rows are kept in
results/linearize_quality.json, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import DATA, RESULTS, show, store, tiny_decoder

SENTENCE = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
SEEDS = tuple(range(5))


@dataclass(frozen=True)
class Row:
    """One rewritten model: which decoder, what is done to it, on which text."""

    model: str
    name: str
    options: str
    seed: int = 0
    text: str = "own"
    """`own`: written by the model itself; `real`."""

    @property
    def key(self) -> str:
        """Unique within the results."""
        return f"{self.model} | {self.name} | {self.options} | {self.seed} | {self.text}"


_STORIES = "window=16,max_error=9"
_STORIES_FIT = "fit_steps=200,lora_steps=600"
_TINY = "window=64,max_error=9"
_TINY_FIT = "fit_steps=80,lora_steps=40"


def rows() -> list[Row]:
    """All there is to measure, the most telling first."""
    stories = _of("stories260k", _STORIES, _STORIES_FIT, "own")
    tiny = _of("tiny", _TINY, _TINY_FIT, "real")
    seeds = [replace(row, seed=seed) for seed in SEEDS[1:] for row in (tiny["lolcats"], tiny["window alone"])]
    untrained = [found[name] for found in (stories, tiny) for name in found if "train=none" in found[name].options]
    first = [stories["lolcats"], stories["liger"], tiny["lolcats"], tiny["window alone"], tiny["liger"]]
    texts = [
        replace(tiny["lolcats"], text="own"),
        Row("stories260k", "lolcats, on text", f"{stories['lolcats'].options},objective=text"),
    ]
    return list(dict.fromkeys([*first, *seeds, *untrained, *stories.values(), *texts, *tiny.values()]))


def _of(model: str, base: str, fit: str, text: str) -> dict[str, Row]:
    options = {
        "window alone, untrained": f"{base},branches=window,train=none",
        "window + 4 sinks, untrained": f"{base},branches=window,sinks=4,train=none",
        "linear alone, untrained": f"{base},branches=linear,train=none",
        "lolcats, swapped": f"{base},train=none",
        "lolcats, transfer": f"{base},{fit},train=transfer",
        "lolcats": f"{base},{fit}",
        "lolcats, published start": f"{base},{fit},start=identity",
        "window alone": f"{base},{fit},branches=window",
        "linear alone": f"{base},{fit},branches=linear",
        "liger": f"{base},{fit},method=liger",
        "gated": f"{base},{fit},method=gated",
        "delta": f"{base},{fit},method=delta",
        "lolcats, 4 sinks": f"{base},{fit},sinks=4",
    }
    return {name: Row(model, name, spelled, text=text) for name, spelled in options.items()}


def prepare(folder: Path) -> None:
    """Export both decoders, let each write text, and cut real text; kept in `folder`."""
    from graphopt.decoders.driver import Driver
    from graphopt.decoders.sample import sample_tokens

    checkpoint, export, data = (tiny_decoder(name) for name in ("checkpoint", "export", "data"))
    decoders = {"tiny": checkpoint.load_tiny}
    if DATA.exists():
        decoders["stories260k"] = lambda: checkpoint.load_llama2c(DATA / "stories260k")
    for name, load in decoders.items():
        if (folder / name / "texts.npz").exists():
            continue
        export.export(load(), folder / name)
        driver = Driver(folder / name / "decoder_with_past.onnx")
        first, count, length, seeds = (1, 640, 256, (1, 0)) if name == "stories260k" else (0, 72, 1024, (0,))
        parts = [sample_tokens(driver, count, length, seed=seed, first=first) for seed in seeds]
        texts = {"own": np.concatenate(parts)}
        if name == "tiny":
            train, held = data.texts()
            texts["real"] = np.concatenate([_windows(data, train, 64), _windows(data, held, 24)])
        np.savez(folder / name / "texts.npz", **texts)


def _windows(data: Any, text: Any, count: int) -> np.ndarray[Any, Any]:
    return np.asarray(data.windows(text, 1024, count)[:, :1024])


_HELD = {"stories260k": 40, "tiny": 24}
_BATCH = {"stories260k": 8, "tiny": 2}


def measure(folder: Path, row: Row) -> dict[str, Any]:
    """Rewrite one decoder and judge it on held-out text; in a process of its own."""
    import torch

    torch.set_num_threads(1)
    import graphopt
    from graphopt.decoders.perplexity import cross_entropy
    from graphopt.decoders.sample import text_batches

    graph = graphopt.load(folder / row.model / "decoder_with_past.onnx")
    archive = np.load(folder / row.model / "texts.npz")
    texts, held = archive[row.text], archive["own" if row.model == "stories260k" else "real"][-_HELD[row.model] :]
    if row.text != "own" or row.model == "stories260k":
        texts = texts[: -_HELD[row.model]]
    order = np.random.default_rng(row.seed).permutation(len(texts))
    batches = text_batches(graph, texts[order], length=texts.shape[1], batch=_BATCH[row.model])
    teacher = cross_entropy(graph, held)
    start = time.perf_counter()
    result = graph.apply(f"linearize{{{row.options}}}", calibration=batches, seed=row.seed)
    seconds = time.perf_counter() - start
    score = cross_entropy(result.graph, held)
    found = {
        "nats": score.nats,
        "teacher_nats": teacher.nats,
        "ratio": math.exp(score.nats - teacher.nats),
        "seconds": seconds,
        "site_errors": [s.errors.get("after_finish", s.errors.get("after_fit")) for s in result.report.passes[0].sites],
    }
    if row.model == "stories260k" and row.name.startswith("lolcats"):
        found |= _deployed(result.graph, folder, held[:4])
    return found


def _deployed(graph: Any, folder: Path, texts: np.ndarray[Any, Any]) -> dict[str, Any]:
    """The file on onnxruntime: how far decoding is from prefill, and what greedy text begins with."""
    from graphopt.decoders import generate, logits

    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "m.onnx"
        graph.save(path, target="onnxruntime")
        apart = float(np.abs(logits(path, texts) - logits(path, texts, split=20)).max())
        written = generate(path, np.array([[1]]), new_tokens=48)
    text = tiny_decoder("tokenizer").Tokenizer(DATA / "stories260k" / "tok512.bin").decode(written[0].tolist())
    return {"decode_from_prefill": apart, "sentence": text.strip().startswith(SENTENCE), "written": text[:160]}


def run() -> None:
    """Measure what is missing, two processes side by side, and store after each row."""
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = Path(os.environ.get("GRAPHOPT_BENCHMARK_CACHE", Path(tempfile.gettempdir()) / "graphopt-linearize"))
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    path = RESULTS / "linearize_quality.json"
    kept: dict[str, Any] = json.loads(path.read_text())["rows"] if path.exists() else {}
    wanted = [row for row in rows() if (folder / row.model).exists()]
    missing = [row for row in wanted if row.key not in kept]
    with ProcessPoolExecutor(2) as pool:
        pending = [(row, pool.submit(measure, folder, row)) for row in missing]
        for row, future in pending:
            kept[row.key] = asdict(row) | future.result()
            print(f"{row.key}: x{kept[row.key]['ratio']:.4f} in {kept[row.key]['seconds']:.0f} s", flush=True)
            store("linearize_quality", {"rows": kept})
    found = [kept[row.key] for row in wanted]
    columns = ["model", "what", "seed", "text", "nats/token", "perplexity ratio", "seconds"]
    keys = ("model", "name", "seed", "text", "nats", "ratio", "seconds")
    show("Linearised decoders", columns, [[r[k] for k in keys] for r in found])
    store("linearize_quality", {"rows": {row.key: kept[row.key] for row in wanted}})
