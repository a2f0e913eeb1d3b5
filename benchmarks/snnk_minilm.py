"""One MLP of all-MiniLM-L6-v2 as random features and one layer, against truncated SVDs with as many parameters."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel

from benchmarks.attention_latency import sample
from benchmarks.common import show, store
from graphopt.passes.mlp.snnk import RandomFeatures

LAYER = 3
"""The one that the method fits worst."""
FEATURES = (48, 96, 192, 384, 768, 1152)
_RIDGE = 1e-4


def run() -> None:
    """Record the MLP on sentences, fit on some, judge on others."""
    fitted, judged, mlp = recorded()
    w1, b1, w2, b2 = (p.detach() for p in mlp)
    hidden, inputs = w1.shape
    full = w1.numel() + w2.numel()
    rows = []
    for features in FEATURES:
        module = RandomFeatures(inputs, w2.shape[0], features, True, torch.Generator().manual_seed(0))
        module.standardise([fitted[0]])
        module.solve([fitted], _RIDGE)
        stored = sum(x.numel() for x in (*module.parameters(), *module.buffers()))
        rank = stored // (2 * (inputs + hidden))
        with torch.no_grad():
            found = {
                "snnk": _error(judged[1], module(judged[0])),
                "svd": _error(judged[1], _truncated(judged[0], w1, b1, w2, b2, rank)),
                "svd, refitted": _error(judged[1], _refitted(fitted, judged[0], w1, b1, rank)),
            }
        trained = stored - module.directions.numel() - module.offsets.numel()
        rows.append({"features": features, "parameters": stored, "without_directions": trained, "rank": rank} | found)
    columns = ["features", "parameters", "of the MLP", "rank", "snnk", "svd", "svd, second layer refitted"]
    shown = [
        [r["features"], r["parameters"], r["parameters"] / full, r["rank"], r["snnk"], r["svd"], r["svd, refitted"]]
        for r in rows
    ]
    show(f"Relative RMS error of MLP {LAYER} on held-out sentences", columns, shown)
    store("snnk_minilm", {"layer": LAYER, "parameters": full, "tokens": len(fitted[0]), "rows": rows})


def recorded() -> tuple[Any, Any, Any]:
    """Inputs and outputs [N, d] of the MLP to fit on and to judge by, and its weights."""
    helper = sample()
    model = AutoModel.from_pretrained(helper.model_folder()).eval()
    layer = model.encoder.layer[LAYER]
    kept: dict[str, list[torch.Tensor]] = {"x": [], "y": []}
    mask: list[torch.Tensor] = []

    def keep(name: str, value: torch.Tensor) -> None:
        kept[name].append(value[mask[-1]])

    layer.intermediate.register_forward_hook(lambda module, args, out: keep("x", args[0]))
    layer.output.dense.register_forward_hook(lambda module, args, out: keep("y", out))
    texts = helper.sentences()
    parts = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for name, chosen in (("fit", texts[:768]), ("judge", texts[-256:])):
            helper.write_batches(chosen, Path(folder) / name)
            for path in sorted((Path(folder) / name).glob("*.npz")):
                feeds = {key: torch.from_numpy(value) for key, value in np.load(path).items()}
                mask.append(feeds["attention_mask"].bool())
                model(**feeds)
            parts.append((torch.cat(kept["x"]), torch.cat(kept["y"])))
            kept = {"x": [], "y": []}
    first, second = layer.intermediate.dense, layer.output.dense
    return parts[0], parts[1], (first.weight, first.bias, second.weight, second.bias)


def _low_rank(w: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def _truncated(x: Any, w1: Any, b1: Any, w2: Any, b2: Any, rank: int) -> Any:
    return torch.nn.functional.gelu(x @ _low_rank(w1, rank).T + b1) @ _low_rank(w2, rank).T + b2


def _refitted(fitted: Any, x: Any, w1: Any, b1: Any, rank: int) -> Any:
    """The second layer by reduced-rank ridge regression behind the truncated first one: the data that snnk has too."""

    def features(value: Any) -> Any:
        h = torch.nn.functional.gelu(value @ _low_rank(w1, rank).T + b1)
        return torch.cat([h, torch.ones(len(h), 1)], dim=1).double()

    design = features(fitted[0])
    gram = design.T @ design
    gram.diagonal()[:-1].add_(_RIDGE * gram.diagonal().mean())
    weights = torch.linalg.solve(gram, design.T @ fitted[1].double())
    predicted = design @ weights
    _, _, v = torch.linalg.svd(predicted - predicted.mean(0), full_matrices=False)
    mean, basis = predicted.mean(0), v[:rank].T
    return (mean + (features(x) @ weights - mean) @ basis @ basis.T).float()


def _error(expected: Any, found: Any) -> float:
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
