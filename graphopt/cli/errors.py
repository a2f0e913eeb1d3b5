"""What the user sees when something goes wrong: one sentence on stderr, an exit code, and no traceback."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Any

import typer
from typer.core import TyperGroup

from graphopt.errors import GraphOptError

USAGE, INTERRUPTED, TERMINATED, BROKEN_PIPE = 2, 130, 143, 141
# Messages of other libraries can run to pages; a sentence on a terminal cannot.
_LONGEST = 1500


class _CarriedError(Exception):
    """An exception on its way through Typer, which would answer Ctrl-C, EOF and a closed pipe itself."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class OneSentence(TyperGroup):
    """The command group: turns every exception into one line on stderr and an exit code."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Run a command line; see `typer.core.TyperGroup.main`."""
        given = list(sys.argv[1:] if args is None else args)
        # Looked up by hand: parsing the options may itself be what fails.
        debug = "--debug" in given
        extra["standalone_mode"] = False
        with warnings.catch_warnings():
            if not debug:  # warnings of torch and onnx speak to developers, and would stand beside our sentence
                warnings.simplefilter("ignore")
            sys.exit(self._code(given, debug, rest, extra))

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen verb; see `typer.core.TyperGroup.invoke`."""
        try:
            return super().invoke(ctx)
        except typer.Exit:
            raise
        except BaseException as error:
            raise _CarriedError(error) from error

    def _code(self, args: list[str], debug: bool, rest: tuple[Any, ...], extra: dict[str, Any]) -> int:
        try:
            code = super().main(args, *rest, **extra)
            sys.stdout.flush()
        except BaseException as caught:
            error = caught.error if isinstance(caught, _CarriedError) else caught
            if debug and not isinstance(error, SystemExit):
                traceback.print_exception(error)
            return _explain(error)
        # Typer returns the code of `typer.Exit` instead of raising it.
        return code if isinstance(code, int) else 0


def _explain(error: BaseException) -> int:
    """Print the sentence for `error` and return the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else USAGE
    if isinstance(error, BrokenPipeError):
        _silence_stdout()
        return BROKEN_PIPE
    if isinstance(error, Terminated):
        return say("terminated", TERMINATED)
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return say("interrupted", INTERRUPTED)
    if isinstance(error, GraphOptError):
        return say(f"error: {error}", error.exit_code)
    if hasattr(error, "format_message"):  # Typer's usage errors; their class moved between its releases
        return say(f"error: {_usage(error)}", USAGE)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return say(f"error: cannot use {error.filename}: {error.strerror}; run with --debug for the traceback", USAGE)
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return say(f"unexpected error: {text}; run with --debug for the traceback", USAGE)


def _usage(error: Any) -> str:
    message = " ".join(str(error.format_message()).split()).rstrip(".")
    context = getattr(error, "ctx", None)
    return f"{message}; see {context.command_path} --help" if context is not None else message


def say(text: str, code: int) -> int:
    """Print one line on stderr and return `code`."""
    from graphopt.cli.terminal import visible

    line = visible(" ".join(text.split()))
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    # A closed stderr is no reason to lose the exit code.
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
    return code


def _silence_stdout() -> None:
    """Keep the interpreter from flushing into the closed pipe once more when it exits."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Terminated(KeyboardInterrupt):
    """SIGTERM: unwinds like Ctrl-C, so that temporary files are removed."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def run(app: typer.Typer) -> None:
    """Run `app` as a process of its own."""
    with contextlib.suppress(ValueError):  # signals belong to the main thread
        signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # equations hold letters that an ASCII terminal lacks
            stream.reconfigure(errors="replace")
    typer.main.get_command(app).main(prog_name="graphopt")
