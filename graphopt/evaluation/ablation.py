"""The ablation of a pass on a language model: what each of its parts and each stage of its training is worth."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.calibration import Calibration, calibration_for
from graphopt.decoders.driver import check_complete
from graphopt.decoders.interface import Interface
from graphopt.errors import CheckFailed, GraphOptError, NothingToRewrite
from graphopt.evaluation.measure import Probe, measure
from graphopt.evaluation.result import Ablation, Row
from graphopt.evaluation.store import Store, fingerprint, graph_digest, values_digest
from graphopt.evaluation.text import Text, held_out_text
from graphopt.evaluation.variants import ORDER, LeftOut, Variant, largest_error, variants
from graphopt.graph import Graph
from graphopt.rewrite.base import Pass, SitePass
from graphopt.rewrite.context import Track, _silent
from graphopt.rewrite.manager import apply
from graphopt.rewrite.options import parse_all, spell
from graphopt.rewrite.report import PassReport, environment

# Fewer have no standard error to speak of.
_FEW = 8


def ablate(
    graph: Graph,
    spelling: str | Pass | Sequence[str | Pass],
    *,
    calibration: Any = None,
    held_out: Any = None,
    seed: int = 0,
    fit_steps: int | None = None,
    rows: Collection[str] | None = None,
    distances: Sequence[int] | None = None,
    texts: int = 16,
    folder: str | Path | None = None,
    track: Track = _silent,
) -> Ablation:
    """Take a pass on a language model apart, and measure every part on text that no training saw.

    Each row runs the pipeline from the beginning with the same seed: what two rows train alike comes out alike.

    Args:
        graph: a language model; left as it is.
        spelling: a pipeline in which one pass has the option `train`, such as `linearize{window=16}`.
        calibration: see `graphopt.calibration.calibration_for`.
        held_out: text to judge by; see `graphopt.evaluation.text.held_out_text`.
        seed: for everything random.
        fit_steps: overrides the passes' own numbers of training steps.
        rows: keys of the rows wanted besides the original, see `graphopt.evaluation.variants.ORDER`; None for all.
        distances: between the copies of the recall probe; None for growing ones while two copies fit into a text.
        texts: of the recall probe.
        folder: keeps each finished row, which a run with the same inputs takes from there.
        track: wraps long loops, for progress bars.

    Raises:
        GraphOptError: the model is no language model, or the pipeline, the data or an option does not fit it.
        NothingToRewrite: the pass finds nothing to rewrite.
        CheckFailed: no row but the original could be computed.
    """
    wanted, left_out = variants(spelling, rows)
    check_model(graph, spelling)
    data = (
        calibration
        if isinstance(calibration, Calibration)
        else calibration_for(graph, calibration, seed=seed, fitting=True, track=track)
    )
    text = held_out_text(graph, held_out, data)
    run = _Run(graph, data, text, Probe.fitting(text, distances=distances, texts=texts), seed, fit_steps, track)
    run.limit = largest_error(spelling)
    store = Store(None if folder is None else Path(folder))
    common = run.facts()
    done: dict[str, Row] = {}
    for variant in track(wanted, len(wanted), "Ablation"):
        try:
            done[variant.key] = _finished(run, variant, done, left_out, store, common)
        except _Left as reason:
            left_out.append(LeftOut(variant.key, variant.label, str(reason), reason.failed))
    if len(done) < 2:
        reasons = "; ".join(f"{item.label}: {item.reason}" for item in left_out)
        raise CheckFailed(f"expected at least one row beside the original, but none could be computed ({reasons})")
    left_out.sort(key=lambda item: ORDER.index(item.key))
    return Ablation(
        tuple(spell(item) for item in parse_all(spelling)),
        tuple(done[key] for key in ORDER if key in done),
        tuple(left_out),
        data.description,
        text,
        run.probe,
        seed,
        fit_steps,
        tuple(_notes(data, done)),
    )


def check_model(graph: Graph, spelling: str | Pass | Sequence[str | Pass]) -> None:
    """Check that there is something to rewrite and that the model can be judged by text, before any long work.

    Raises:
        GraphOptError: the spelling is wrong, or the model is no language model.
        NothingToRewrite: there is no site.
    """
    item, *others = parse_all(spelling)
    # An earlier pass may bring the sites of a later one to light.
    if not others and isinstance(item, SitePass) and not graph.sites(item.kind):
        found = [(refusal.node, refusal.reason) for refusal in graph.refusals(item.kind)]
        raise NothingToRewrite(_spell_nothing(item.name, found))
    check_complete(Interface.of(graph))


class _Left(Exception):
    """A row is left out."""

    def __init__(self, reason: str, *, failed: bool) -> None:
        super().__init__(reason)
        self.failed = failed


@dataclass
class _Run:
    """What all rows have in common."""

    graph: Graph
    data: Calibration
    text: Text
    probe: Probe
    seed: int
    fit_steps: int | None
    track: Track
    limit: float | None = None

    def facts(self) -> dict[str, Any]:
        """All that the numbers of a row depend on, besides its pipeline."""
        return {
            "model": graph_digest(self.graph),
            "calibration": values_digest(self.data),
            "held_out": self.text.digest,
            "probe": dataclasses.asdict(self.probe),
            "seed": self.seed,
            "fit_steps": self.fit_steps,
            "limit": self.limit,
            "environment": environment(),
        }

    def row(self, variant: Variant) -> Row:
        """Rewrite, train and measure.

        Raises:
            NothingToRewrite: the pass found no site.
            _Left: it cannot be computed.
        """
        started = time.perf_counter()
        rewritten, report = self.graph, []
        if variant.passes:
            result = apply(
                self.graph,
                list(variant.passes),
                calibration=self.data,
                seed=self.seed,
                fit_steps=self.fit_steps,
                track=self.track,
            )
            rewritten, report = result.graph, result.report.passes
        seconds = round(time.perf_counter() - started, 3) if variant.passes else 0.0
        sites, notes = self._sites(report), tuple(note for each in report for note in each.notes)
        if variant.passes and not sites["rewritten"]:
            raise _none_rewritten(report)
        measured = measure(rewritten, self.text, self.probe, seed=self.seed, track=self.track)
        if not math.isfinite(measured.nats):
            raise _Left("its cross-entropy is NaN or infinite", failed=True)
        pipeline = tuple(spell(item) for item in variant.passes)
        return Row(variant.key, variant.label, pipeline, measured, seconds, sites, notes)

    def _sites(self, report: Sequence[PassReport]) -> dict[str, int]:
        all_sites = [site for each in report for site in each.sites]
        found = {status: sum(s.status == status for s in all_sites) for status in ("rewritten", "refused", "reverted")}
        if self.limit is not None:
            errors = [site.errors.get("after_fit", 0.0) for site in all_sites if site.status == "rewritten"]
            found["above_max_error"] = sum(not error <= self.limit for error in errors)
        return found


def _finished(
    run: _Run, variant: Variant, done: dict[str, Row], left_out: Sequence[LeftOut], store: Store, common: dict[str, Any]
) -> Row:
    """A row from the store, or a new one that goes there.

    Raises:
        _Left: there is none to be had.
    """
    if any(item.key == variant.like and not item.failed for item in left_out):
        raise _Left("the options that it differs in do nothing", failed=False)
    mark = fingerprint({**common, "pipeline": [spell(item) for item in variant.passes]})
    try:
        row = Row.from_dict(store.load(variant.key, mark))
    except ValueError:
        row = _computed(run, variant)
        store.save(variant.key, mark, row.to_dict())
    twin = done.get(variant.like)
    if twin is not None and twin.measured == row.measured:
        raise _Left(f"it gives the very same numbers as the row {twin.label!r}: its options do nothing", failed=False)
    return row


def _computed(run: _Run, variant: Variant) -> Row:
    try:
        return run.row(variant)
    except (NothingToRewrite, _Left):
        raise
    except Exception as error:  # a pass may come from anyone, and one row must not cost the others
        if not variant.passes:
            raise
        reason = str(error) or "no reason given"
        text = reason if isinstance(error, GraphOptError) else f"{type(error).__name__}: {reason}"
        raise _Left(text, failed=True) from error


def _none_rewritten(report: Sequence[PassReport]) -> GraphOptError:
    """The error for a pipeline that left everything as it was."""
    sites = [site for each in report for site in each.sites]
    reverted = [site for site in sites if site.status == "reverted"]
    names = " and ".join(dict.fromkeys(each.name for each in report))
    if reverted:
        first = reverted[0]
        return CheckFailed(
            f"{names} rewrote nothing that passed verification: all {len(reverted)} candidates were reverted "
            f"(first {first.name}: {first.reason})"
        )
    return NothingToRewrite(_spell_nothing(names, [(site.name, site.reason) for site in sites]))


def _spell_nothing(names: str, refused: Sequence[tuple[str, str]]) -> str:
    if not refused:
        return f"{names} found nothing to rewrite: there is no candidate"
    name, reason = refused[0]
    return f"{names} found nothing to rewrite: all {len(refused)} candidates were refused (first {name}: {reason})"


def _notes(data: Calibration, rows: dict[str, Row]) -> Iterator[str]:
    if data.synthetic:
        yield (
            f"fitted on random inputs ({data.description}): the numbers say nothing about quality; give text, or "
            "`self` for what the model writes itself"
        )
    if len(rows["original"].measured.per_text) < _FEW:
        yield f"judged by fewer than {_FEW} texts: standard errors are rough; give more text with --eval (held_out)"
    for row in rows.values():
        if row.sites.get("above_max_error"):
            yield (
                f"{row.label}: {row.sites['above_max_error']} of {row.sites['rewritten']} sites are above the pass's "
                "max_error, which would revert them; here they are kept, so that all rows have the same sites"
            )
        if row.sites.get("reverted"):
            yield f"{row.label}: {row.sites['reverted']} sites were reverted, so it has fewer than other rows"
    if {"transfer", "full"} <= rows.keys():
        yield "the rows after transfer and after LoRA were trained one by one; with one seed their transfer is the same"
