"""The training text: the sources of Python's standard library, which lie on every machine."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "__pycache__"}
HELD_OUT = 20
START = b"\0"
"""Stands before every file: text generated from it begins as a file does."""


def sources() -> list[Path]:
    """The .py files of the running Python's standard library, sorted by path, without tests and idlelib."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [path for path in root.rglob("*.py") if not SKIPPED.intersection(path.relative_to(root).parts)]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def texts() -> tuple[Tensor, Tensor]:
    """Bytes [N] to train on and bytes [M] to validate on: every 20th file is held out."""
    files = sources()
    held_out = files[HELD_OUT - 1 :: HELD_OUT]
    return _bytes([path for path in files if path not in set(held_out)]), _bytes(held_out)


def windows(text: Tensor, length: int, count: int) -> Tensor:
    """Windows [count, length + 1] at even distances: the tokens and, one further, what each should predict."""
    starts = torch.linspace(0, len(text) - length - 1, count, dtype=torch.float64).long()
    return text[starts[:, None] + torch.arange(length + 1)].long()


def batch(text: Tensor, length: int, size: int, seed: int, step: int) -> Tensor:
    """Windows [size, length + 1] at random places, the same for the same seed and step."""
    starts = np.random.default_rng((seed, step)).integers(0, len(text) - length, size)
    return text[torch.from_numpy(starts)[:, None] + torch.arange(length + 1)].long()


def _bytes(files: list[Path]) -> Tensor:
    joined = b"".join(START + path.read_bytes() for path in files)
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8)
