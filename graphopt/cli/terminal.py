"""Where a command writes: tables to stdout, progress to stderr, JSON to a file or alone to stdout."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
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


class Terminal:
    """The output of one command.

    Args:
        json_path: where the JSON goes, `-` for stdout.
        quiet: print nothing but errors.
        taken: files that the JSON must not overwrite.
    """

    def __init__(self, json_path: Path | None = None, quiet: bool = False, taken: Iterable[Path] = ()) -> None:
        self._json = json_path
        self._quiet = quiet
        if json_path is not None and json_path != STDOUT:
            _check_json(json_path, taken)
        # Markup and emoji codes are off: names and equations are full of brackets and colons.
        plain: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
        width = None if sys.stdout.isatty() else _WIDTH
        self._out = _Console(quiet=quiet or json_path == STDOUT, width=width, **plain)
        self._err = _Console(stderr=True, quiet=quiet, **plain)

    def print(self, text: str = "", style: str | None = None) -> None:
        """One line for people."""
        self._out.print(text, style=style)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """A table for people; columns whose name ends in `>` are numbers. Nothing where there are no rows."""
        table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for column in columns:
            right = column.endswith(">")
            table.add_column(column.rstrip(">"), justify="right" if right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(str(cell), style=_STYLES.get(str(cell), "")) for cell in row))
        if table.row_count:
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
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._err, transient=True) as bars:
            yield Bars(bars)


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


def _check_json(path: Path, taken: Iterable[Path]) -> None:
    from graphopt.onnxfile.write import check_output

    check_output(path)
    for other in taken:
        if path.resolve() == other.resolve():
            raise GraphOptError(f"expected a file of its own for the JSON, but {path} is a model; name another")


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
