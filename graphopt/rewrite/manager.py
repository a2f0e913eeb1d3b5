"""Running a pipeline: each pass on the previous one's graph, each result linted, the whole compared at the end."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from graphopt.calibration import Calibration, calibration_for
from graphopt.dialect.control import MADE_UP_TRIPS, at_most
from graphopt.errors import CheckFailed, GraphOptError, NoRuntime
from graphopt.graph import Graph
from graphopt.rewrite.base import Equivalence, Pass
from graphopt.rewrite.bodies import check_names, run_everywhere
from graphopt.rewrite.context import Context, Track, _silent
from graphopt.rewrite.options import parse_all, spell
from graphopt.rewrite.report import PassReport, Report, Result
from graphopt.verification.compare import measure

# Comparing whole models on every batch would double the run time; a few batches show the size of the change.
_COMPARED = 4
_LISTED = 3
# Differences of reassociated sites add up over the depth of a model: ten times one site's tolerance. In half precision
# the rounding of each layer's output is most of it: twice.
_ADDED_UP = 1e-4
_IN_HALF: Mapping[torch.dtype | str | None, float] = {torch.float16: 1e-2, torch.bfloat16: 8e-2}


def apply(
    graph: Graph,
    passes: str | Pass | Sequence[str | Pass],
    *,
    calibration: Any = None,
    seed: int = 0,
    fit_steps: int | None = None,
    only: Sequence[str] = (),
    min_cosine: float | None = None,
    sizes: Mapping[str, int] | None = None,
    track: Track = _silent,
) -> Result:
    """Run `passes` in order and verify what they did.

    Args:
        graph: left as it is.
        passes: spellings or objects.
        calibration: see `graphopt.calibration.calibration_for`.
        seed: for everything random.
        fit_steps: overrides the passes' own numbers of training steps.
        only: names of the sites to rewrite.
        min_cosine: smallest mean cosine similarity of every float output that passes.
        sizes: sizes of symbolic dims for random inputs.
        track: wraps long loops, for progress bars.

    Returns:
        The new graph and the report.

    Raises:
        GraphOptError: a pass, an option, or the calibration data is wrong.
        CheckFailed: the rewritten model misses what its passes promise.
    """
    items = parse_all(passes)
    data = (
        calibration
        if isinstance(calibration, Calibration)
        else calibration_for(
            graph,
            calibration,
            seed=seed,
            sizes=sizes,
            fitting=any(item.needs_calibration for item in items),
            track=track,
        )
    )
    with at_most(MADE_UP_TRIPS) if data.synthetic else nullcontext():
        return _run(graph, items, data, seed, fit_steps, only, min_cosine, track)


def _run(
    graph: Graph,
    items: Sequence[Pass],
    data: Calibration,
    seed: int,
    fit_steps: int | None,
    only: Sequence[str],
    min_cosine: float | None,
    track: Track,
) -> Result:
    report = Report([spell(item) for item in items], calibration=data.description)
    current = graph
    for item in items:
        context = Context(data, seed, fit_steps, only, track)
        started = time.perf_counter()
        check_names(item, current, only)
        current, sites = run_everywhere(item, current, context)
        current.lint()
        if context.idle:
            context.notes.append(_spell_idle(context.idle))
        report.passes.append(
            PassReport(
                item.name,
                dataclasses.asdict(item),
                item.equivalence.value,
                round(time.perf_counter() - started, 3),
                list(sites),
                context.notes,
            )
        )
        if data.synthetic and item.needs_calibration and report.passes[-1].count("rewritten"):
            report.notes.append(
                f"{item.name} was fitted on random inputs ({data.description}): the shapes and speed of the result "
                "are real, its quality is not; give calibration data from your task"
            )
    report.states = [dataclasses.asdict(state) for state in current.states]
    compared = data.batches[:: max(1, len(data) // _COMPARED)][:_COMPARED]
    try:
        report.outputs, report.samples = measure(graph, current, compared), len(compared)
    except NoRuntime as error:
        _leave_unverified(items, report, min_cosine, error)
    types = {spec.name: spec.dtype for spec in graph.outputs}
    try:
        _check(items, report, types, min_cosine)
    except CheckFailed as failure:
        try:
            _check(items, report, types, min_cosine, _unstable(graph, report, compared, failure))
        except CheckFailed as error:
            error.report = report
            raise
    return Result(current, report)


def _spell_idle(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"stayed as they were, since the calibration data never ran them: {', '.join(names[:_LISTED])}{more}"


def _leave_unverified(items: Sequence[Pass], report: Report, min_cosine: float | None, error: NoRuntime) -> None:
    """Note that the result was not compared with the original.

    Raises:
        GraphOptError: what was done, or asked for, needs the comparison.
    """
    judged = [
        i.name for i, done in zip(items, report.passes, strict=True) if done.count("rewritten") and not i.is_proven
    ]
    if judged or min_cosine is not None:
        what = f"to check what {judged[0]} did" if judged else "to compare the outputs for min_cosine"
        raise GraphOptError(f"expected to run the model {what}, but {error}") from error
    report.unverified = f"the result could not be verified by running it, because {error}; it rests on rules alone"
    report.notes.append(report.unverified)


def _unstable(
    graph: Graph, report: Report, batches: Sequence[tuple[Any, ...]], failure: CheckFailed
) -> Collection[str]:
    """Names of outputs that the original does not repeat either, as it draws random numbers; noted in the report.

    Raises:
        CheckFailed: there are none.
    """
    again = {o.name for o in measure(graph, graph, batches) if not o.bitwise}
    if not again:
        raise failure
    report.notes += [
        f"output {name!r} could not be compared: the original itself gives other values each time"
        for name in sorted(again)
    ]
    return again


def _check(
    items: Sequence[Pass],
    report: Report,
    types: Mapping[str, torch.dtype | str | None],
    min_cosine: float | None,
    unstable: Collection[str] = (),
) -> None:
    exact = all(item.equivalence is Equivalence.EXACT for item in items)
    reassociated = all(item.equivalence in (Equivalence.EXACT, Equivalence.REASSOCIATED) for item in items)
    for output in (output for output in report.outputs if output.name not in unstable):
        measured = f"output {output.name!r}: largest difference {output.max_abs:.3g}, relative RMS {output.rel_rms:.3g}"
        if output.rel_rms == float("inf"):
            raise CheckFailed(f"{measured}: NaN, infinity or another shape where the original has none")
        if exact and not output.bitwise:
            raise CheckFailed(f"expected the same bits from exact passes, but {measured}")
        limit = _IN_HALF.get(types.get(output.name), _ADDED_UP)
        if reassociated and output.rel_rms > limit:
            raise CheckFailed(f"expected floating-point order to change at most {limit:g}, but {measured}")
        if min_cosine is not None and output.cosine < min_cosine:
            raise CheckFailed(
                f"expected a mean cosine of at least {min_cosine} at every output, "
                f"but {output.name!r} has {output.cosine:.4f}"
            )
