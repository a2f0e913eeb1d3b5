"""What an ablation found: its rows, and all of it as plain data."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graphopt.decoders.recall import Recall
from graphopt.evaluation.measure import Bucket, Measured, Probe, standard_error
from graphopt.evaluation.text import Text
from graphopt.evaluation.variants import MAIN, LeftOut
from graphopt.rewrite.report import environment

SCHEMA = "graphopt.ablation/1"


@dataclass(frozen=True)
class Row:
    """One variant and what was measured of it.

    Attributes:
        key: as in `graphopt.evaluation.variants`.
        label: names it for people.
        pipeline: the passes as text.
        measured: its cross-entropy and recall.
        seconds: for rewriting and training, without measuring.
        sites: how many were `rewritten`, `refused`, `reverted`, and `above_max_error`: rewritten here, and reverted by
            the pass itself.
        notes: what the passes said.
    """

    key: str
    label: str
    pipeline: tuple[str, ...]
    measured: Measured
    seconds: float
    sites: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def difference(self, original: Row) -> tuple[float, float]:
        """How much more a token costs than with the original, and its standard error over the texts, pair by pair."""
        pairs = np.array(self.measured.per_text) - np.array(original.measured.per_text)
        return self.measured.nats - original.measured.nats, standard_error(pairs)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**dataclasses.asdict(self), "measured": _plain(dataclasses.asdict(self.measured))}

    @classmethod
    def from_dict(cls, data: Any) -> Row:
        """The inverse of `to_dict`.

        Raises:
            ValueError: it is something else.
        """
        try:
            measured = data["measured"]
            buckets = tuple(Bucket(**item) for item in measured["buckets"])
            recall = tuple(Recall(**item) for item in measured["recall"])
            found = Measured(tuple(measured["per_text"]), measured["nats"], measured["tokens"], buckets, recall)
            rest = {"pipeline": tuple(data["pipeline"]), "notes": tuple(data["notes"])}
            return cls(**{**data, **rest, "measured": found})
        except (KeyError, TypeError) as error:
            raise ValueError(f"expected a row of an ablation: {error}") from error


@dataclass(frozen=True)
class Ablation:
    """All rows, in the order in which they are shown; the first is the original."""

    pipeline: tuple[str, ...]
    rows: tuple[Row, ...]
    left_out: tuple[LeftOut, ...]
    calibration: str
    text: Text
    probe: Probe
    seed: int
    fit_steps: int | None
    notes: tuple[str, ...] = ()

    @property
    def original(self) -> Row:
        """What all others are compared with."""
        return self.rows[0]

    def row(self, key: str) -> Row:
        """The row of that key.

        Raises:
            KeyError: there is none.
        """
        return {row.key: row for row in self.rows}[key]

    @property
    def failed(self) -> tuple[LeftOut, ...]:
        """Rows of the pass itself, as it was asked for, that were tried in vain."""
        return tuple(item for item in self.left_out if item.failed and item.key in MAIN)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `docs/evaluation.md` has the fields."""
        return {
            "schema": SCHEMA,
            "pipeline": list(self.pipeline),
            "input": {},
            "calibration": self.calibration,
            "held_out": {
                "description": self.text.description,
                "texts": self.text.count,
                "length": self.text.length,
                "sha256": self.text.digest,
            },
            "seed": self.seed,
            "fit_steps": self.fit_steps,
            "recall": dataclasses.asdict(self.probe),
            "rows": [self._row(row) for row in self.rows],
            "left_out": [dataclasses.asdict(item) for item in self.left_out],
            "notes": list(self.notes),
            "environment": environment(),
        }

    def _row(self, row: Row) -> dict[str, Any]:
        found, (difference, error) = row.measured, row.difference(self.original)
        data = {
            "key": row.key,
            "label": row.label,
            "pipeline": list(row.pipeline),
            "nats": found.nats,
            "error": found.error,
            "perplexity": found.perplexity,
            "ratio": found.perplexity / self.original.measured.perplexity,
            "difference": difference,
            "difference_error": error,
            "tokens": found.tokens,
            "buckets": [dataclasses.asdict(bucket) for bucket in found.buckets],
            "recall": [dataclasses.asdict(item) for item in found.recall],
            "seconds": row.seconds,
            "sites": row.sites,
            "notes": list(row.notes),
        }
        plain: dict[str, Any] = _plain(data)
        return plain


def _plain(data: Any) -> Any:
    """For strict JSON: NaN and infinities become null, tuples lists."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    return [_plain(value) for value in data] if isinstance(data, (list, tuple)) else data
