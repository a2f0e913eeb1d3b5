"""Putting the masks of a site together, on tensors and on fx proxies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graphopt.sites.attention.layout import Program

# Far below every score, and still finite in float16.
LOW = -1e4


@dataclass(frozen=True)
class MaskPart:
    """One mask of a site: which input it is, and what is done to it.

    Attributes:
        form: `add`, or `keep` / `hide` for a boolean that is true for visible / hidden keys.
        index: of the site's inputs.
        program: brings it to a shape that broadcasts to [B, H, T, S].
        factor: for `add`.
    """

    form: str
    index: int
    program: Program = field(default_factory=Program)
    factor: float = 1.0

    @property
    def plain(self) -> bool:
        """Whether the input itself is the mask."""
        return self.form != "hide" and self.factor == 1.0 and not self.program.steps


def combine(parts: Sequence[MaskPart], values: Sequence[Any], rules: Sequence[Any] = ()) -> Any:
    """One mask out of all of `parts`: added where one of them is, else true where a key is visible.

    Args:
        parts: the masks.
        values: of the site's inputs.
        rules: more booleans, true where a key is visible.
    """
    total, visible = None, None
    for part in parts:
        value = part.program(values[part.index])
        if part.form == "add":
            scaled = value if part.factor == 1.0 else torch.mul(value, part.factor)
            total = scaled if total is None else torch.add(total, scaled)
            continue
        keep = torch.logical_not(value) if part.form == "hide" else value
        visible = keep if visible is None else torch.logical_and(visible, keep)
    for rule in rules:
        visible = rule if visible is None else torch.logical_and(visible, rule)
    if total is None or visible is None:
        return visible if total is None else total
    return torch.where(visible, total, LOW)


def query_positions(q: Any) -> Any:
    """0, 1, ... along the queries, [1, 1, T, 1], without knowing T."""
    return torch.sub(torch.cumsum(torch.ones_like(_column(q)), 2), 1.0)


def key_positions(k: Any) -> Any:
    """0, 1, ... along the keys, [1, 1, 1, S], without knowing S."""
    return torch.transpose(torch.sub(torch.cumsum(torch.ones_like(_column(k)), 2), 1.0), 2, 3)


def _column(x: Any) -> Any:
    first = torch.narrow(torch.narrow(torch.narrow(x, 0, 0, 1), 1, 0, 1), 3, 0, 1)
    return first.to(torch.float32)  # counts beyond 2048, which float16 cannot


def causal_rule(q: Any, k: Any, aligned: str = "end") -> Any:
    """Which keys each query sees, [1, 1, T, S]: `end`: the last query sees all keys."""
    ahead = torch.sub(key_positions(k), query_positions(q))
    if aligned == "end":
        last_key = torch.amax(key_positions(k), 3, True)
        last_query = torch.amax(query_positions(q), 2, True)
        ahead = torch.sub(ahead, torch.sub(last_key, last_query))
    return torch.le(ahead, 0.0)
