"""What a pass is given beside the graph: data, a seed, progress, and the record of each site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from graphopt.calibration import Calibration
    from graphopt.fit.capture import Record
    from graphopt.sites import Site

_Item = TypeVar("_Item")
# One batch in ten is kept from training.
_EVERY = 10
Track = Callable[[Iterable[Any], int | None, str], Iterator[Any]]


def _silent(items: Iterable[_Item], total: int | None, text: str) -> Iterator[_Item]:
    yield from items


@dataclass
class Context:
    """The surroundings of one run."""

    calibration: Calibration
    seed: int = 0
    fit_steps: int | None = None
    """Overrides every pass's own number of training steps; 0 skips training."""
    only: Sequence[str] = ()
    """Names of the sites to rewrite; empty means all."""
    track: Track = _silent
    """Wraps a loop in a progress bar: (items, total, text)."""
    notes: list[str] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)
    """Loops and branches that no calibration batch ran."""

    def held_out(self) -> list[int]:
        """Calibration batches that no training sees, to judge by; all of them where there are too few to spare."""
        count = len(self.calibration)
        return list(range(_EVERY // 2, count, _EVERY)) if self.spares_batches else list(range(count))

    @property
    def spares_batches(self) -> bool:
        """Whether there are enough batches to keep some from training."""
        return len(self.calibration) >= _EVERY

    def training(self) -> list[int]:
        """Calibration batches to train on."""
        count = len(self.calibration)
        held = set(self.held_out()) if self.spares_batches else set()
        return [i for i in range(count) if i not in held]

    def generator(self) -> torch.Generator:
        """A fresh seeded generator."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(eq=False)
class Replacement:
    """A site, the module that takes its place, and what calibration recorded there."""

    site: Site
    module: torch.nn.Module
    record: Record
    errors: dict[str, float] = field(default_factory=dict)
