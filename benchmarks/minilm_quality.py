"""How well linear attention keeps a pretrained sentence encoder's embeddings: no fit, the demo's, and a longer one.

Judged on sentences and documents that no fit saw: of CPython's documentation, and, where the file is there, of
TinyStories, a kind of text that no fit saw either.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import graphopt
from benchmarks.attention_latency import sample
from benchmarks.common import DATA, show, store

FITS = {
    "no fit": ("linearize{fit_steps=0,max_error=10}", 64, ()),
    "demo": ("linearize{fit_steps=300,distill_steps=60}", 768, ((4, 128), (12, 64))),
    "longer": ("linearize{fit_steps=800}", 1536, ((4, 192), (12, 96))),
    "longer, end to end": ("linearize{fit_steps=800,distill_steps=100}", 1536, ((4, 192), (12, 96))),
}


def stories(count: int) -> list[str]:
    """Sentences of TinyStories, or none where the text is absent."""
    path = DATA / "text" / "tinystories_sample.txt"
    if not path.exists():
        return []
    text = " ".join(path.read_text(errors="ignore").split())
    found = [s.strip() + "." for s in text.split(".") if 5 <= len(s.split()) <= 60]
    return found[:count]


def run() -> None:
    """Fit each variant, save it, and compare the embeddings on onnxruntime."""
    helper = sample()
    rows, results = [], []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        original, linear = root / "a.onnx", root / "b.onnx"
        helper.export_encoder(original)
        texts = helper.sentences()
        judges, teachers = texts[-512:], texts[:-512]
        sets = {
            "sentences": judges[:256],
            "documents of 4": helper.documents(judges, 4, 64),
            "documents of 12": helper.documents(judges, 12, 32),
            "stories": stories(256),
        }
        sets = {name: chosen for name, chosen in sets.items() if chosen}
        for name, chosen in sets.items():
            helper.write_batches(chosen, root / name)
        graph = graphopt.load(original)
        for fit, (spelling, count, longer) in FITS.items():
            calibration = root / f"calibration {fit}"
            documents = [d for size, number in longer for d in helper.documents(teachers, size, number)]
            helper.write_batches(teachers[:count] + documents, calibration)
            started = time.perf_counter()
            result = graph.apply(spelling, calibration=str(calibration))
            seconds = time.perf_counter() - started
            result.graph.save(linear)
            cosines = {name: helper.mean_cosine(original, linear, root / name) for name in sets}
            errors = {s.name: s.errors for s in result.report.passes[0].sites}
            results.append({"fit": fit, "pass": spelling, "seconds": seconds, "cosine": cosines, "sites": errors})
            rows.append([fit, round(seconds), *cosines.values()])
            print(rows[-1], flush=True)
    show("Mean cosine of MiniLM embeddings, original against linear attention", ["fit", "seconds", *sets], rows)
    store("minilm_quality", {"rows": results})
