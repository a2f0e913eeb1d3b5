"""What happened, as data: the JSON report of DESIGN section 7, version 1."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from graphopt.graph import Graph

VERSION = 1
Status = Literal["rewritten", "refused", "reverted"]


@dataclass
class SiteReport:
    """One candidate: what became of it, why, and its errors (`before_fit`, `after_fit`, `after_finish`, `worst`)."""

    name: str
    kind: str
    status: Status
    reason: str = ""
    errors: dict[str, float] = field(default_factory=dict)


@dataclass
class PassReport:
    """One pass of the pipeline."""

    name: str
    options: dict[str, Any]
    equivalence: str
    seconds: float
    sites: list[SiteReport]
    notes: list[str] = field(default_factory=list)

    def count(self, status: Status) -> int:
        """How many candidates ended like that."""
        return sum(site.status == status for site in self.sites)


@dataclass
class OutputDifference:
    """How far one output is from the original's: over all compared inputs."""

    name: str
    max_abs: float
    rel_rms: float
    cosine: float
    """Mean cosine similarity along the last axis."""
    bitwise: bool = False


@dataclass
class Report:
    """The whole run."""

    pipeline: list[str]
    passes: list[PassReport] = field(default_factory=list)
    outputs: list[OutputDifference] = field(default_factory=list)
    samples: int = 0
    """How many input sets the outputs were compared on."""
    unverified: str = ""
    """Why the outputs could not be compared, in one sentence; empty where they were."""
    calibration: str = ""
    states: list[dict[str, str]] = field(default_factory=list)
    """What a decoder carries from call to call in place of its caches: `past`, `present`, `kind`."""
    cost: dict[str, Any] = field(default_factory=dict)
    input: dict[str, Any] = field(default_factory=dict)
    output: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def rewritten(self) -> int:
        """Sites rewritten by all passes."""
        return sum(p.count("rewritten") for p in self.passes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "version": VERSION,
            "pipeline": self.pipeline,
            "input": self.input,
            "output": self.output,
            "calibration": self.calibration,
            "passes": [asdict(p) for p in self.passes],
            "states": self.states,
            "cost": self.cost,
            "verification": {
                "samples": self.samples,
                "outputs": [asdict(o) for o in self.outputs],
                "unverified": self.unverified or None,
            },
            "notes": self.notes,
            "environment": environment(),
        }


@dataclass
class Result:
    """A rewritten graph and the report of how it came about."""

    graph: Graph
    report: Report


def environment(
    packages: Sequence[str] = ("graphopt", "torch", "onnx", "onnx-ir", "onnxruntime"),
) -> dict[str, str]:
    """Versions that a figure depends on."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
