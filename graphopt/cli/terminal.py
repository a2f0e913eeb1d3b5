"""Where a command writes: tables to stdout, progress to stderr, JSON to a file or alone to stdout."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from graphopt.errors import GraphOptError

STDOUT = Path("-")
# Without a terminal there is nothing to fit into: a pipe should get whole lines.
_WIDTH = 240
_STYLES = {"rewritten": "green", "accepted": "green", "refused": "yellow", "reverted": "bold red"}


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def visible(text: str) -> str:
    """Text in which nothing is a command to the terminal: a file may call its nodes what it likes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class Terminal:
    """The output of one command.

    Args:
        json_path: where the JSON goes, `-` for stdout.
        quiet: print nothing but errors.

    Raises:
        GraphOptError: the place for the JSON cannot be written.
    """

    def __init__(self, json_path: Path | None = None, quiet: bool = False) -> None:
        self._json = json_path
        self._quiet = quiet
        if json_path is not None and not _stream(json_path):
            from graphopt.onnxfile.write import check_output

            check_output(json_path)
        # Markup and emoji codes are off: names and equations are full of brackets and colons.
        plain: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
        width = None if sys.stdout.isatty() else _WIDTH
        self._out = _Console(quiet=quiet or json_path == STDOUT, width=width, **plain)
        self._err = _Console(stderr=True, quiet=quiet, **plain)

    def reserve(self, *models: Path) -> None:
        """Check that the JSON takes no model's place.

        Raises:
            GraphOptError: it would.
        """
        # Unlike Path.resolve, realpath takes a circle of links as it is: the reader will complain about it.
        if self._json is not None and os.path.realpath(self._json) in {os.path.realpath(path) for path in models}:
            raise GraphOptError(f"expected a file of its own for the JSON, but {self._json} is a model; name another")

    def print(self, text: str = "", style: str | None = None) -> None:
        """One line for people."""
        self._out.print(visible(text), style=style)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """A table for people; columns whose name ends in `>` are numbers. Nothing where there are no rows."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for column in columns:
            right = column.endswith(">")
            table.add_column(column.rstrip(">"), justify="right" if right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(visible(str(cell)), style=_STYLES.get(str(cell), "")) for cell in row))
        if not table.row_count:
            return
        if title:
            self.print(title, style="bold")
        self._out.print(table)
        self._out.print()

    def json(self, data: Any) -> None:
        """Write the JSON result, if it was asked for."""
        if self._json is None:
            return
        text = json.dumps(finite(data), indent=2, default=str, ensure_ascii=False, allow_nan=False) + "\n"
        if self._json == STDOUT:
            sys.stdout.write(text)
            return
        if _stream(self._json):
            self._json.write_text(text, encoding="utf-8")
            return
        from graphopt.onnxfile.write import replacing

        with replacing(self._json) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @contextlib.contextmanager
    def progress(self) -> Iterator[Bars]:
        """Progress bars with remaining time on stderr; silent where that is no terminal."""
        if self._quiet or not self._err.is_terminal:
            yield Bars(None)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            _Count(),
            TimeElapsedColumn(),
            _Left(),
        )
        with Progress(*columns, console=self._err, transient=True) as bars:
            yield Bars(bars)


class _Count(MofNCompleteColumn):
    """`3/20`, and nothing for a step of unknown length."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total is not None else Text()


class _Left(TimeRemainingColumn):
    """The remaining time, where it is known."""

    def render(self, task: Task) -> Text:
        return super().render(task).append(" left") if task.total is not None else Text()


class Bars:
    """Wraps loops and single steps in progress bars."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress

    def track(self, items: Iterable[Any], total: int | None, text: str) -> Iterator[Any]:
        """`items`, with a bar; the `track` of `graphopt.rewrite.context.Context`."""
        if self._progress is None:
            yield from items
            return
        task = self._progress.add_task(text, total=total)
        try:
            for item in items:
                yield item
                self._progress.advance(task)
        finally:
            self._progress.remove_task(task)

    def stop(self) -> None:
        """Take the bars away, so that tables can be printed."""
        if self._progress is not None:
            self._progress.stop()

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        """One piece of work of unknown length."""
        if self._progress is None:
            yield
            return
        task = self._progress.add_task(text, total=None)
        try:
            yield
        finally:
            self._progress.remove_task(task)


def _stream(path: Path) -> bool:
    """Whether this is standard output, a pipe or a device, which nothing may be moved over."""
    return path == STDOUT or (path.exists() and not path.is_file() and not path.is_dir())


def finite(data: Any) -> Any:
    """`data` for strict JSON: NaN and infinities become null."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {str(key): finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return data


def number(value: float) -> str:
    """A measured figure, short."""
    return f"{value:.3g}"


def size(count: float) -> str:
    """Bytes in the unit that fits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
