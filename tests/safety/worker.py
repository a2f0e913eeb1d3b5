"""Runs attacks in a process of its own, with little memory: one line of JSON before and after each stage.

python -m safety.worker FOLDER NAME...      (with the folder above `safety` in the path)
"""

import contextlib
import functools
import io
import json
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 10
"""Of processor time, so that a busy machine fails no test."""
MEMORY = 1 << 30
"""What loading a small file may take beyond the libraries."""


class OutOfTimeError(BaseException):
    """Not an Exception: nothing on the way may take it for a failure of its own."""


def _stop(number: int, frame: Any) -> None:
    raise OutOfTimeError


def limit_memory() -> None:
    """Let this process have `MEMORY` more than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def outcome(stage: Callable[[], Any]) -> dict[str, Any]:
    """How a stage ends: `ok`, `refused` with its sentence, or `escape` with what came out instead."""
    from graphopt import GraphOptError

    started = time.monotonic()
    result: dict[str, Any] = {"outcome": "ok", "detail": ""}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stage()
    except GraphOptError as error:
        result = {"outcome": "refused", "detail": str(error)}
    except OutOfTimeError as error:
        result = {"outcome": "escape", "detail": f"took longer than {SECONDS} s, in {_place(error)}"}
    except BaseException as error:
        result = {"outcome": "escape", "detail": f"{type(error).__name__}: {error}"[:500] + f" in {_place(error)}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return {**result, "seconds": round(time.monotonic() - started, 3)}


def _place(error: BaseException) -> str:
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if "/graphopt/" in f.filename or "/main/" in f.filename
    ]
    frame = (frames or traceback.extract_tb(error.__traceback__))[-1]
    return f"{Path(frame.filename).parent.name}/{Path(frame.filename).name}:{frame.lineno}"


class Stages:
    """What is done with one hostile file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.out = path.parent / "out"
        self.graph: Any = None

    def load(self) -> None:
        import graphopt

        self.graph = graphopt.load(self.path)

    def save(self) -> None:
        """What nothing changed comes back as it was, and can be read again."""
        from graphopt.onnxfile import read

        self.graph.save(self.out / "saved.onnx")
        original, saved = read(self.path).proto, read(self.out / "saved.onnx").proto
        for model in (original, saved):  # in another folder, external data may have another name
            for tensor in model.graph.initializer:
                del tensor.external_data[:]
        assert saved == original, "the saved model is another one"

    def cleanup(self) -> None:
        self.graph.apply("cleanup").graph.save(self.out / "clean.onnx")

    def inspect(self) -> None:
        """The command line says the same as an exception: exit code 2 and one sentence."""
        from graphopt import GraphOptError

        stdout, stderr = io.StringIO(), io.StringIO()
        code: Any = 0
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            try:
                _command().main(["inspect", str(self.path), "--json", str(self.out / "inspect.json")])
            except SystemExit as error:
                code = error.code
        # A name may hold what a terminal takes for a command.
        controls = {c for c in stdout.getvalue() + stderr.getvalue() if not c.isprintable()} - {"\n"}
        assert not controls, f"the terminal is given {sorted(map(ascii, controls))}"
        said = stderr.getvalue()
        if code == 2 and said.startswith("error: ") and said.count("\n") == 1:
            raise GraphOptError(said.removeprefix("error: ").strip())
        if code or said:
            raise RuntimeError(f"exit code {code}, and on stderr: {said}")


@functools.cache
def _command() -> Any:
    """The command line; typer takes longer to put it together than many a model takes."""
    import typer

    from graphopt.cli import app

    return typer.main.get_command(app)


def run(name: str, folder: Path) -> None:
    """All stages of one attack; a file that is refused goes no further than the command line."""
    from .attack_files import SECRET
    from .attacks import ATTACKS

    own, outside = folder / name / "model", folder / name / "outside"
    (own / "out").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret").write_bytes(SECRET)
    _say({"attack": name, "stage": "make"})
    stages = Stages(ATTACKS[name].make(own))
    before = _files(folder / name)
    for stage in ("load", "save", "cleanup", "inspect"):
        if (stages.graph is None and stage in ("save", "cleanup")) or stage not in ATTACKS[name].stages:
            continue
        _say({"attack": name, "stage": stage})
        _say({"attack": name, "stage": stage, **outcome(getattr(stages, stage))})
    if _files(folder / name) != before:
        _say({"attack": name, "stage": "files", "outcome": "escape", "detail": "files outside of the output changed"})


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file of an attack that is no output."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name != "out" and path.parent.name != "out":
            status = path.lstat()
            found[str(path)] = (status.st_size, 0 if path.is_dir() else status.st_mtime_ns)
    return found


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), file=sys.__stdout__, flush=True)


def main() -> None:
    """See the module."""
    import graphopt.cli
    import graphopt.passes.cleanup
    import graphopt.sites  # noqa: F401  # loaded before memory is limited

    signal.signal(signal.SIGPROF, _stop)
    limit_memory()
    folder = Path(sys.argv[1])
    for name in sys.argv[2:]:
        run(name, folder)
    left = sorted(path.name for path in folder.rglob("*-was-run"))
    _say({"attack": "", "stage": "end", "outcome": "escape" if left else "ok", "detail": ", ".join(left)})


if __name__ == "__main__":
    main()
