"""Every attack ends in a refusal of one sentence or in a graph; never in a crash, a hang, or a full memory."""

import json
import os
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest

from .attacks import ATTACKS
from .registry import EITHER, LOADS
from .worker import SECONDS

# Python may be inside a C function when its alarm rings, and it shares the machine: the wait for a line is longer.
_PATIENCE = 6 * SECONDS


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """What came of each attack: attack -> stage -> result. A worker that dies is replaced by another."""
    folder = tmp_path_factory.mktemp("attacks")
    found = {name: {} for name in ATTACKS}
    pending = list(ATTACKS)
    while pending:
        last = _work(folder, pending, found)
        if last is None:
            break
        pending = pending[pending.index(last) + 1 :]
    return found


def _work(folder, names, found):
    """Run a worker until it ends; the attack that ended it before its time, if one did."""
    command = [sys.executable, "-m", "safety.worker", str(folder), *names]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=folder, env=environment) as process:
        begun = None
        for line in _lines(process):
            if line is None:
                process.kill()
                found[begun["attack"]][begun["stage"]] = {"outcome": "escape", "detail": "hangs and ignores the alarm"}
                return begun["attack"]
            if line["stage"] == "end":
                assert line["outcome"] == "ok", f"code in a model was run: {line['detail']}"
                return None
            begun = line
            if "outcome" in line:
                found[line["attack"]][line["stage"]] = line
    assert begun is not None, "the worker did not start"
    crash = {"outcome": "escape", "detail": f"the process died with {process.returncode}"}
    found[begun["attack"]][begun["stage"]] = crash
    return begun["attack"]


def _lines(process):
    """The worker's lines; None where it is silent for too long."""
    while True:
        ready, _, _ = select.select([process.stdout], [], [], _PATIENCE)
        if not ready:
            yield None
            return
        line = process.stdout.readline()
        if not line:
            return
        yield json.loads(line)


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name, results):
    found = results[name]
    escapes = [f"{stage}: {r['detail']}" for stage, r in found.items() if r["outcome"] == "escape"]
    assert not escapes, "; ".join(escapes)
    for result in found.values():
        assert "\n" not in result["detail"], result["detail"]
        assert len(result["detail"]) < 2000, f"a sentence that nobody reads: {result['detail'][:2000]}"
    expect, load = ATTACKS[name].expect, found["load"]
    if expect == LOADS:
        assert (load["outcome"], load["detail"]) == ("ok", "")
        assert "save" not in found or found["save"]["outcome"] == "ok", found["save"]["detail"]
    elif expect != EITHER:
        assert load["outcome"] == "refused", "it was loaded"
        assert re.search(expect, load["detail"]), load["detail"]
    if "inspect" in found:
        assert found["inspect"]["outcome"] == load["outcome"], "the command line and Python disagree"
