"""Control flow: branches and loops over bodies, which are graphs of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphopt.errors import GraphOptError

from .registry import operator
from .strings import stacked

if TYPE_CHECKING:
    from graphopt.subgraphs import Body

__all__ = ["MADE_UP_TRIPS", "at_most", "start_run"]

MADE_UP_TRIPS = 2000
"""Trips that a run on made-up inputs may take: about a second."""


@dataclass
class _Budget:
    limit: int
    used: int = 0


_BUDGET: ContextVar[_Budget | None] = ContextVar("trips", default=None)


class TooManyTripsError(GraphOptError):
    """A loop ran for longer than its surroundings allow."""


@contextmanager
def at_most(trips: int) -> Iterator[None]:
    """Let all loops of one run of a model together take at most `trips` trips.

    For whoever runs a model on made-up inputs: then nobody has asked for the loops to end.
    """
    token = _BUDGET.set(_Budget(trips))
    try:
        yield
    finally:
        _BUDGET.reset(token)


def start_run() -> None:
    """Count the trips of a new run of a model."""
    budget = _BUDGET.get()
    if budget is not None:
        budget.used = 0


def _count_trip() -> None:
    budget = _BUDGET.get()
    if budget is None:
        return
    budget.used += 1
    if budget.used > budget.limit:
        raise TooManyTripsError(
            f"expected loops of at most {budget.limit} trips on made-up inputs, found more; give calibration data"
        )


@operator("If", values=(0,))
def If(cond: Tensor, *, then_branch: Body, else_branch: Body) -> Any:
    """Run one of two bodies and return its outputs."""
    return _results((then_branch if bool(cond.reshape(())) else else_branch)())


def _results(values: Sequence[Any]) -> Any:
    return values[0] if len(values) == 1 else tuple(values)


@operator("Loop", values=(0, 1))
def Loop(trips: Tensor | None, cond: Tensor | None, *states: Any, body: Body) -> Any:
    """Run the body until its condition is false or `trips` is reached.

    Args:
        trips: [] or [1], int64; None runs without a limit.
        cond: [] or [1], bool; None is true.
        states: what the body passes from trip to trip: tensors, sequences, or optionals.
        body: (trip, condition, *states) -> (condition, *states, *scanned).

    Returns:
        The last states, then each scanned output stacked along a new first axis, in one tuple.
    """
    most = None if trips is None else int(trips.reshape(()))
    going = True if cond is None else bool(cond.reshape(()))
    kept: list[Any] = list(states)
    scanned: list[list[Tensor]] = [[] for _ in range(len(body.outputs) - 1 - len(states))]
    trip = 0
    while going and (most is None or trip < most):
        _count_trip()
        keep_going, *values = body(torch.tensor(trip), torch.tensor(going), *kept)
        going = keep_going is None or bool(keep_going.reshape(()))
        kept = values[: len(kept)]
        for each, value in zip(scanned, values[len(kept) :], strict=True):
            each.append(value)
        trip += 1
    specs = body.outputs[1 + len(kept) :]
    rows = [_stack(each, spec) for each, spec in zip(scanned, specs, strict=True)]
    return _results((*kept, *rows))


def _stack(rows: Sequence[Any], spec: Any) -> Any:
    if rows:
        return stacked(rows, 0)
    # Without a trip only the declaration says what a row would have looked like.
    shape = [size if isinstance(size, int) else 0 for size in spec.shape or ()]
    dtype = spec.dtype if isinstance(spec.dtype, torch.dtype) else torch.float32
    return torch.empty(0, *shape, dtype=dtype)


@operator("Scan", since=8)
def scan_8(
    sequence_lens: Tensor | None,
    *values: Tensor,
    body: Body,
    num_scan_inputs: int,
    directions: Sequence[int] | None = None,
) -> Any:
    """Scan along axis 1 of every scan input, separately for each entry of the batch axis 0.

    Args:
        sequence_lens: [B], the number of trips of each entry; None takes the whole axis.
        values: the states [B, ...], then the scan inputs [B, T, ...].
        body: (*states, *slices) -> (*states, *scanned).
        num_scan_inputs: how many of `values` are scanned.
        directions: 1 for each scan input that is read from its end.
    """
    states = values[: len(values) - num_scan_inputs]
    scans = values[len(states) :]
    longest = scans[0].shape[1]
    columns: list[list[Tensor]] = [[] for _ in body.outputs]
    for entry in range(scans[0].shape[0]):
        length = longest if sequence_lens is None else int(sequence_lens[entry])
        rows = [x[entry, :length] for x in scans]
        results = _scan([x[entry] for x in states], rows, body, [0] * len(rows), directions or (), (), ())
        for column, value in zip(columns, results[: len(states)], strict=False):
            column.append(value)
        for column, value in zip(columns[len(states) :], results[len(states) :], strict=True):
            padding = value.new_zeros(longest - length, *value.shape[1:])
            column.append(torch.cat([value, padding]))
    return _results([torch.stack(column) for column in columns])


@operator("Scan", since=9)
def scan_9(
    *values: Tensor,
    body: Body,
    num_scan_inputs: int,
    scan_input_axes: Sequence[int] | None = None,
    scan_input_directions: Sequence[int] | None = None,
    scan_output_axes: Sequence[int] | None = None,
    scan_output_directions: Sequence[int] | None = None,
) -> Any:
    """Run the body on each slice of the scan inputs.

    Args:
        values: the states, then the scan inputs.
        body: (*states, *slices) -> (*states, *scanned).
        num_scan_inputs: how many of `values` are scanned.
        scan_input_axes: the axis of each scan input that is sliced; 0 where not given.
        scan_input_directions: 1 for each scan input that is read from its end.
        scan_output_axes: the axis along which each scanned output is stacked; 0 where not given.
        scan_output_directions: 1 for each scanned output that is filled from its end.

    Returns:
        The last states and the scanned outputs, in one tuple.
    """
    states = list(values[: len(values) - num_scan_inputs])
    scans = values[len(states) :]
    axes = scan_input_axes or [0] * len(scans)
    options = [given or () for given in (scan_input_directions, scan_output_axes, scan_output_directions)]
    return _results(_scan(states, scans, body, axes, *options))


def _slice(x: Any, axis: int, index: int) -> Any:
    return x.select(axis, index) if isinstance(x, Tensor) else x.take(index, axis)


def _scan(
    states: Sequence[Tensor],
    scans: Sequence[Tensor],
    body: Body,
    axes: Sequence[int],
    directions: Sequence[int],
    out_axes: Sequence[int],
    out_directions: Sequence[int],
) -> list[Tensor]:
    lengths = {x.shape[axis] for x, axis in zip(scans, axes, strict=True)}
    if len(lengths) > 1:
        raise GraphOptError(f"expected scan inputs of one length, found {sorted(lengths)}; check the fed shapes")
    kept = list(states)
    scanned: list[list[Tensor]] = [[] for _ in range(len(body.outputs) - len(kept))]
    length = lengths.pop() if lengths else 0
    backwards = [bool(i < len(directions) and directions[i]) for i in range(len(scans))]
    for trip in range(length):
        _count_trip()
        slices = [
            _slice(x, axis, length - 1 - trip if back else trip)
            for x, axis, back in zip(scans, axes, backwards, strict=True)
        ]
        values = body(*kept, *slices)
        kept = list(values[: len(kept)])
        for rows, value in zip(scanned, values[len(kept) :], strict=True):
            rows.append(value)
    results: list[Any] = []
    for i, (rows, spec) in enumerate(zip(scanned, body.outputs[len(kept) :], strict=True)):
        if i < len(out_directions) and out_directions[i]:
            rows.reverse()
        axis = out_axes[i] if i < len(out_axes) else 0
        results.append(stacked(rows, axis) if rows else _stack(rows, spec))
    return [*kept, *results]
