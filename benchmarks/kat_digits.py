"""Digits and a tiny vision transformer: an MLP network, and KAT made of it, trained on for equal steps.

The 1,797 images of handwritten digits [8, 8] that come with scikit-learn (Alpaydin & Kaynak, 1998), a third for
training. Each network is trained with GELU first; then it and the KATs that `kat` makes of it are trained on, with the
same batches, rates and steps, weights and rational functions together.
"""

from __future__ import annotations

import copy
import math
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import graphopt
from benchmarks.common import show, store

SEEDS = range(5)
TRAINING = 600
BATCH = 64
STEPS = {"digits MLP": (1500, 1500), "tiny ViT": (800, 800)}
"""Before, and after the transfer."""
RATES = (2e-3, 2e-3)
OPTIONS = {"KAT": "kat", "KAT, degrees 7 and 6": "kat{m=7,n=6}", "KAT, split": "kat{form=split,m=4,n=6}"}


class Mlp(nn.Module):
    """64 -> 128 -> 10."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(64, 128), nn.Linear(128, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits [B, 10] of images [B, 8, 8]."""
        return self.fc2(F.gelu(self.fc1(image.flatten(1))))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, dim] -> [B, T, dim]."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))  # type: ignore[no-any-return]


class Vit(nn.Module):
    """16 patches of [2, 2] pixels, three blocks of 48 channels and 4 heads, the mean of all tokens."""

    def __init__(self, dim: int = 48) -> None:
        super().__init__()
        self.patch = nn.Linear(4, dim)
        self.position = nn.Parameter(0.02 * torch.randn(16, dim))
        self.blocks = nn.Sequential(*(Block(dim, 4) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits [B, 10] of images [B, 8, 8]."""
        patches = image.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).flatten(1, 2)
        return self.head(self.norm(self.blocks(self.patch(patches) + self.position)).mean(1))  # type: ignore[no-any-return]


NETWORKS: dict[str, Callable[[], nn.Module]] = {"digits MLP": Mlp, "tiny ViT": Vit}


def split(seed: int) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Images in [0, 1] and labels for training, and the others for judging."""
    found = load_digits()
    images, labels = torch.tensor(found.images).float() / 16, torch.tensor(found.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    a, b = order[:TRAINING], order[TRAINING:]
    return (images[a], labels[a]), (images[b], labels[b])


def shifted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image moved by up to one pixel in both directions."""
    padded = F.pad(images, (1, 1, 1, 1))
    rows, columns = torch.randint(3, (2, len(images), 1, 1), generator=generator)
    across = torch.arange(8)
    return padded[torch.arange(len(images))[:, None, None], rows + across[:, None], columns + across]


def train(module: nn.Module, data: tuple[torch.Tensor, torch.Tensor], steps: int, rate: float, seed: int) -> None:
    """AdamW with 5 % warm-up and a cosine to zero."""
    images, labels = data
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / (0.05 * steps), 0.5 * (1 + math.cos(math.pi * i / steps)))
    )
    generator = torch.Generator().manual_seed(seed)
    module.train()
    for _ in range(steps):
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        loss = F.cross_entropy(module(shifted(images[chosen], generator)), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    module.eval()


@torch.no_grad()
def accuracy(module: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Per cent that are right."""
    images, labels = data
    return 100 * float((module(images).argmax(-1) == labels).float().mean())


def transfer(module: nn.Module, spelling: str, images: torch.Tensor) -> nn.Module:
    """The KAT of a network.

    Raises:
        AssertionError: a site was left out, or the start is not the original.
    """
    batches = [(part,) for part in images.split(BATCH)]
    dims = ({0: torch.export.Dim("batch")},)
    # A copy: what comes out shares its weights with what goes in, and each is trained for itself.
    result = graphopt.load(copy.deepcopy(module).eval(), batches[0], dims).apply(spelling, calibration=batches)
    sites = result.report.passes[0].sites
    assert sites
    assert all(site.status == "rewritten" for site in sites), sites
    return result.graph.to_module()


def one(name: str, seed: int) -> dict[str, float]:
    """Accuracies on held-out images of one network, before and after."""
    torch.manual_seed(seed)
    before, after = STEPS[name]
    training, held_out = split(seed)
    module = NETWORKS[name]()
    train(module, training, before, RATES[0], seed)
    found = {"MLP, before": accuracy(module, held_out)}
    candidates = {"MLP": copy.deepcopy(module)}
    for label, spelling in OPTIONS.items():
        candidates[label] = transfer(module, spelling, training[0])
        found[f"{label}, start"] = accuracy(candidates[label], held_out)
    for label, candidate in candidates.items():
        train(candidate, training, after, RATES[1], seed + 100)
        found[label] = accuracy(candidate, held_out)
    return found


def run() -> None:
    """Both networks, all seeds."""
    results, rows = [], []
    for name in NETWORKS:
        found = []
        for seed in SEEDS:
            found.append(one(name, seed))
            print(name, seed, found[-1], file=sys.stderr)
        summary: dict[str, Any] = {"network": name, "seeds": found, "mean": {}, "deviation": {}, "over_mlp": {}}
        for label in found[0]:
            values = [f[label] for f in found]
            summary["mean"][label], summary["deviation"][label] = statistics.mean(values), statistics.stdev(values)
        for label in OPTIONS:
            apart = [f[label] - f["MLP"] for f in found]
            summary["over_mlp"][label] = [statistics.mean(apart), statistics.stdev(apart) / math.sqrt(len(apart))]
        results.append(summary)
        rows += [
            [
                name,
                label,
                summary["mean"][label],
                summary["deviation"][label],
                *summary["over_mlp"].get(label, ("", "")),
            ]
            for label in found[0]
        ]
    columns = ["network", "", "accuracy, %", "deviation", "over the MLP", "its standard error"]
    show(f"KAT from trained networks, equal steps, {len(SEEDS)} seeds", columns, rows)
    store("kat_digits", {"training_images": TRAINING, "steps": STEPS, "rates": RATES, "networks": results})
