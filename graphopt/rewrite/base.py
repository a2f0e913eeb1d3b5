"""What a pass is: a frozen dataclass whose fields are its options."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

if TYPE_CHECKING:
    from graphopt.graph import Graph
    from graphopt.rewrite.context import Context, Replacement
    from graphopt.rewrite.report import SiteReport, Status
    from graphopt.sites import Findings, Site


class Equivalence(enum.Enum):
    """What a pass promises about the numbers; the manager checks it."""

    EXACT = "exact"
    """Bitwise the same values."""
    REASSOCIATED = "reassociated"
    """The same values up to floating-point order."""
    CALIBRATED = "calibrated"
    """Holds on the range that calibration saw, guarded outside of it."""
    APPROXIMATE = "approximate"
    """Close, without training."""
    TRAINED = "trained"
    """Close after a fit on calibration data."""
    ARCHITECTURE = "architecture"
    """A different function on purpose."""


@dataclass(frozen=True)
class Tolerance:
    """How far a rewritten value may be from the original one.

    Attributes:
        rel_rms: RMS of the difference over RMS of the original; 0 asks for bitwise equality.
        why: where the figure comes from, for the report.
    """

    rel_rms: float
    why: str


# fp32 keeps 24 bits; sums over a few thousand terms in another order lose up to about 7 of them.
_REASSOCIATED = {
    torch.float64: 1e-13,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}


@dataclass(frozen=True)
class Pass:
    """A rewrite of whole graphs. Subclasses are frozen dataclasses; each field is an option with a docstring."""

    name: ClassVar[str]
    """As typed on the command line; the file and the class are called the same."""
    equivalence: ClassVar[Equivalence]
    needs_calibration: ClassVar[bool] = False
    is_proven: ClassVar[bool] = False
    """Each rewrite holds for all inputs by a rule: the pass works also where nothing can run the model to check it."""

    def run(self, graph: Graph, context: Context) -> tuple[Graph, Sequence[SiteReport]]:
        """Rewrite `graph` into a new one and say what happened at each site; `graph` itself is left as it is."""
        raise NotImplementedError

    def tolerance(self, dtype: torch.dtype) -> Tolerance:
        """How far a site's output of `dtype` may be from the original's."""
        if self.equivalence is Equivalence.EXACT:
            return Tolerance(0.0, "exact")
        if self.equivalence is Equivalence.REASSOCIATED:
            return Tolerance(_REASSOCIATED.get(dtype, 0.0), f"floating-point order in {dtype}")
        raise NotImplementedError(f"{type(self).__name__} is {self.equivalence.value} and must state its tolerance")


@dataclass(frozen=True)
class SitePass(Pass):
    """A rewrite of one kind of site; `run` is written once for all of them, in `graphopt.rewrite.siterun`."""

    kind: ClassVar[str]

    def find(self, graph: Graph) -> Findings:
        """The candidates, and what was refused with which reason."""
        from graphopt.sites import find

        return find(graph, self.kind)

    def check(self, site: Any) -> str | None:
        """Why this pass cannot rewrite `site`, in one sentence; None where it can."""
        return None

    def build(self, site: Any, context: Context) -> torch.nn.Module:
        """The replacement: a module from the values of `site.inputs` to the value of `site.output`.

        It is traced with torch.fx, so its forward has no data-dependent control flow; it consists of
        `torch.ops.graphopt` operators and of the torch functions that `graphopt.backends.onnx` can lower.
        """
        raise NotImplementedError

    def fit(self, replacements: Sequence[Replacement], context: Context) -> None:
        """Train the replacements, one by one, on what calibration recorded at their sites."""

    def expected(self, replacement: Replacement, index: int) -> Any:
        """What a replacement is held against on one calibration batch: by default what the original gave."""
        return replacement.record.output(index)

    def review(self, graph: Graph, replacement: Replacement, context: Context) -> tuple[Status, str]:
        """What becomes of a replacement that keeps its promise, and what the report says of it.

        A pass may still leave the original, with the reason: it may be faster. Figures of its own go into
        `replacement.errors`.
        """
        return "rewritten", ""

    def finish(self, teacher: Graph, student: Graph, replacements: Sequence[Replacement], context: Context) -> Graph:
        """Train the spliced graph as a whole against the original one; the graph that is handed on."""
        return student

    def run(self, graph: Graph, context: Context) -> tuple[Graph, Sequence[SiteReport]]:
        """See `Pass.run`."""
        from graphopt.rewrite.siterun import run

        return run(self, graph, context)


def site_name(site: Site) -> str:
    """A site's name as a Python identifier, for the weights that a pass adds."""
    return "".join(c if c.isalnum() and c.isascii() else "_" for c in site.name).strip("_") or "site"
