"""Linearising a Llama of the 1B shape whose weights are mapped from a file: how much memory beyond the file it takes.

The architecture is HuggingFace's, the weights are random, so only memory and time mean anything here. Mapped pages can
be dropped by the system at any time; what counts is anonymous memory (Linux's RssAnon), sampled while the pass runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import show, store

# meta-llama/Llama-3.2-1B: 1.24 billion parameters.
SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "use_cache": False,
}
TOKENS = 96
PASSES = {
    "lolcats, no training": "linearize{window=32,train=none,max_error=99}",
    "lolcats, 2 steps of attention transfer": "linearize{window=32,train=transfer,fit_steps=2,max_error=99}",
}

PROGRAM = """
import json, math, sys, threading, time
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

shape, path, spelling, tokens = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])

def memory(key):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) / 1e3

config = LlamaConfig(**shape)
with torch.device("meta"):
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
total = sum(p.numel() for p in model.parameters())
if path == "count":
    print(total)
    sys.exit()
stored = torch.from_file(path, shared=False, size=total, dtype=torch.bfloat16)
start = 0
for name, parameter in list(model.named_parameters()):
    owner = model.get_submodule(name.rpartition(".")[0])
    value = stored[start : start + parameter.numel()].view(parameter.shape)
    setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(value, requires_grad=False))
    start += parameter.numel()
model.tie_weights()
model.model.rotary_emb = LlamaRotaryEmbedding(config)

import graphopt

class Scores(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits

peak, done = [0.0], threading.Event()

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], memory("RssAnon"))
        time.sleep(0.02)

before = memory("RssAnon")
threading.Thread(target=watch, daemon=True).start()
ids = torch.randint(0, config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
length = torch.export.Dim("length", min=2, max=4096)
clock = time.perf_counter()
graph = graphopt.load(Scores(), example_inputs=(ids,), dynamic_shapes=({1: length},))
load = time.perf_counter() - clock
clock = time.perf_counter()
result = graph.apply(spelling, calibration=[(ids,)])
apply = time.perf_counter() - clock
done.set()
print(json.dumps({
    "weights_mb": total * 2 / 1e6, "before_mb": before, "peak_mb": peak[0], "load_s": load, "apply_s": apply,
    "rewritten": result.report.rewritten, "layers": config.num_hidden_layers,
}))
"""


def write_weights(path: Path, count: int) -> None:
    """Random bf16 numbers of standard deviation about 0.02, a block at a time."""
    import torch

    generator = torch.Generator().manual_seed(0)
    block = 1 << 24
    with path.open("wb") as stream:
        for start in range(0, count, block):
            size = min(block, count - start)
            values = 0.02 * torch.randn(size, generator=generator)
            stream.write(values.to(torch.bfloat16).view(torch.int16).numpy().tobytes())


def measure(path: str, spelling: str) -> Any:
    """One process: its figures."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(SHAPE), path, spelling, str(TOKENS)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def run() -> None:
    """Measure each pass, and store the figures."""
    with tempfile.TemporaryDirectory(prefix="graphopt-llama-") as folder:
        path = Path(folder) / "weights.bf16"
        write_weights(path, measure("count", ""))
        result = {name: measure(str(path), spelling) for name, spelling in PASSES.items()}
    rows = []
    for name, found in result.items():
        extra = found["peak_mb"] - found["before_mb"]
        found["ratio"] = extra / found["weights_mb"]
        rows.append([name, found["weights_mb"], extra, found["ratio"], found["load_s"], found["apply_s"]])
    columns = ["pass", "weights MB (mapped)", "memory beyond MB", "of the weights", "load s", "apply s"]
    show("Llama 1B shape, bf16", columns, rows)
    store("llama_memory", {"shape": SHAPE, "tokens": TOKENS, "passes": result})
