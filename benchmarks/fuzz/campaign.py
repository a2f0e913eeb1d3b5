"""Many executions by several processes: started, watched, replaced when they die, and counted across restarts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.fuzz import escapes
from benchmarks.fuzz.seeds import regressions, seeds

# Cleaning up runs each model several times, and takes five times as long as loading it.
SHARES = {"load": 0.9, "clean": 0.1}
_COVERAGE = re.compile(rb"cov: (\d+) ft: (\d+) corp: (\d+)/")
_WAIT = 0.5


@dataclass
class Totals:
    """What has been done so far; kept in the state folder."""

    executions: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SHARES, 0))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SHARES, 0.0))
    edges: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SHARES, 0))
    deaths: int = 0

    @classmethod
    def read(cls, state: Path) -> Totals:
        """The totals of an earlier run, or zeros."""
        path = state / "totals.json"
        return cls(**json.loads(path.read_text())) if path.exists() else cls()

    def write(self, state: Path) -> None:
        """Keep the totals."""
        (state / "totals.json").write_text(json.dumps(self.__dict__))


@dataclass
class _Process:
    target: str
    number: int
    runs: int
    process: subprocess.Popen[bytes]
    log: Path
    started: float

    def done(self, state: Path) -> int:
        path = state / f"progress-{self.number}"
        text = path.read_text() if path.exists() else ""
        return int(text) if text.isdigit() else 0


class Campaign:
    """One campaign, which may have begun in an earlier process."""

    def __init__(self, state: Path, executions: int, workers: int, seed: int) -> None:
        """Args: state: a folder of its own. executions: in all. workers: processes at a time. seed: of all chance."""
        self.state = state
        self.wanted = {target: int(executions * share) for target, share in SHARES.items()}
        self.totals = Totals()
        self._workers = workers
        self._seed = seed
        self._starts = 0
        for folder in ("seeds", "artifacts", "escapes"):
            (state / folder).mkdir(parents=True, exist_ok=True)
        for name, data in {**seeds(), **regressions()}.items():
            (state / "seeds" / name).write_bytes(data)
        for path in (state / "escapes").glob("*.onnx"):
            (state / "seeds" / f"escape-{path.stem}").write_bytes(path.read_bytes())
        self.totals = Totals.read(state)

    def run(self, report: Callable[[int], None]) -> None:
        """Work until all executions are done; `report` is told how many there are from time to time."""
        running: dict[int, _Process] = {}
        try:
            while True:
                for number in range(self._workers):
                    if number not in running and (started := self._start(number, running)) is not None:
                        running[number] = started
                if not running:
                    return
                time.sleep(_WAIT)
                report(sum(self.totals.executions.values()) + sum(p.done(self.state) for p in running.values()))
                for number, each in list(running.items()):
                    if each.process.poll() is not None:
                        self._finish(each)
                        del running[number]
        finally:
            for each in running.values():
                each.process.terminate()
                each.process.wait()
                self._finish(each)

    def _start(self, number: int, running: dict[int, _Process]) -> _Process | None:
        for target, wanted in self.wanted.items():
            left = wanted - self.totals.executions[target]
            left -= sum(p.runs for p in running.values() if p.target == target)
            if left <= 0:
                continue
            runs = min(left, max(1000, -(-wanted // self._workers)))
            self._starts += 1
            (self.state / f"progress-{number}").unlink(missing_ok=True)
            log = self.state / f"log-{target}-{number}"
            seed = str(self._seed * 1000 + int(self.totals.deaths) + self._starts)
            command = [sys.executable, "-m", "benchmarks.fuzz.worker", target, str(self.state), str(number), str(runs)]
            with log.open("ab") as stream:
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                process = subprocess.Popen([*command, seed], stdout=stream, stderr=stream, env=environment)
            return _Process(target, number, runs, process, log, time.monotonic())
        return None

    def _finish(self, each: _Process) -> None:
        """Count what a process did, and look at what it left."""
        totals, target = self.totals, each.target
        done = each.done(self.state)
        if not done and each.process.returncode > 0:
            raise RuntimeError(f"a fuzzing process did not start; see {each.log}")
        totals.executions[target] += done
        totals.seconds[target] += time.monotonic() - each.started
        found = _COVERAGE.findall(each.log.read_bytes())
        totals.edges[target] = max([totals.edges[target], *(int(edges) for edges, _, _ in found)])
        for path in (self.state / "artifacts").glob(f"{target}-*"):
            kind = {"timeout": "hang", "oom": "oom"}.get(path.name.split("-")[1], "crash")
            if kind != "crash" or each.process.returncode:
                totals.deaths += 1
                escapes.record_death(self.state / "escapes", target, path.read_bytes(), kind)
            path.unlink()
        totals.write(self.state)

    def result(self) -> dict[str, Any]:
        """What the campaign found, as plain data."""
        totals = self.totals
        found = escapes.all_of(self.state / "escapes")
        rows = {
            target: {
                "executions": totals.executions[target],
                "executions_per_second_and_process": round(
                    totals.executions[target] / max(totals.seconds[target], 1e-9), 1
                ),
                "edges": totals.edges[target],
                "escapes": sum(facts["count"] for facts in found if facts["target"] == target),
                "kinds": sum(facts["target"] == target for facts in found),
            }
            for target in SHARES
        }
        return {
            "executions": sum(totals.executions.values()),
            "processes": self._workers,
            "targets": rows,
            "escapes": found,
        }
