"""One fuzzing process: libFuzzer, guided by the coverage of graphopt's Python code, with mutations of models.

python -m benchmarks.fuzz.worker TARGET STATE NUMBER RUNS SEED
"""

from __future__ import annotations

import atexit
import sys
import warnings
from pathlib import Path
from random import Random

import atheris
import onnx
import torch  # noqa: F401  # before the instrumentation, which is for graphopt alone
from google.protobuf.message import DecodeError

from benchmarks.fuzz.mutate import LARGEST, broken, mutated

with atheris.instrument_imports(include=["graphopt"]):
    import graphopt.passes.cleanup
    import graphopt.rewrite.manager
    import graphopt.shapes  # noqa: F401  # so that its coverage guides too
    from benchmarks.fuzz import escapes, targets

SECONDS = 10
_REPORT_EVERY = 50
# One mutation in so many is of bytes, the others are of the model.
_BYTES = 10


class Worker:
    """The state of one process: what it counts, and where it writes what escapes."""

    def __init__(self, target: str, state: Path, number: int, donors: list[onnx.ModelProto]) -> None:
        self._target = target
        self._escapes = state / "escapes"
        self._progress = state / f"progress-{number}"
        self._donors = donors
        self._done = 0

    def run(self, data: bytes) -> None:
        """One execution."""
        self._done += 1
        if self._done % _REPORT_EVERY == 0:
            self._progress.write_text(str(self._done))
        escaped = targets.verdict(self._target, data)
        if escaped is not None:
            escapes.record(self._escapes, self._target, data, escaped)

    def mutate(self, data: bytes, largest: int, seed: int) -> bytes:
        """The next input from one that told something new."""
        random = Random(seed)
        if random.randrange(_BYTES) == 0:
            return broken(data, random)[:largest]
        try:
            model = onnx.ModelProto.FromString(data)
            made: bytes = mutated(model, random, self._donors).SerializeToString()
        except (DecodeError, TypeError, ValueError):  # no protobuf, or names that are no text: only bytes can change
            return broken(data, random)[:largest]
        return made if len(made) <= largest else data

    def finish(self) -> None:
        """Write the last count."""
        self._progress.write_text(str(self._done))


def main() -> None:
    """See the module."""
    target, state, number, runs, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
    warnings.simplefilter("ignore")
    own = state / f"corpus-{target}-{number}"
    own.mkdir(exist_ok=True)
    folders = [str(own), str(state / "seeds"), *(str(f) for f in state.glob(f"corpus-{target}-*") if f != own)]
    donors = [onnx.ModelProto.FromString(path.read_bytes()) for path in sorted((state / "seeds").iterdir())]
    worker = Worker(target, state, number, donors)
    targets.limit_memory()
    # libFuzzer ends the process itself, but runs what atexit knows.
    atexit.register(worker.finish)
    options = [f"-runs={runs}", f"-seed={seed}", f"-timeout={SECONDS}", f"-max_len={LARGEST}", "-rss_limit_mb=0"]
    options += [f"-artifact_prefix={state}/artifacts/{target}-", "-len_control=0", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, *folders], worker.run, custom_mutator=worker.mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
