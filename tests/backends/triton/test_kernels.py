"""Runs the checks of `interpreted/` in a process of their own: Triton decides when it is imported what interprets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

HERE = Path(__file__).resolve().parent
CHECKS = sorted((HERE / "interpreted").glob("check_*.py"))


def run(marked: str) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    # The parent's workers and options are not the child's.
    for name in [name for name in env if name.startswith("PYTEST_")]:
        del env[name]
    if not torch.cuda.is_available():
        env["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "-m", marked]
    # Outside the checkout: `python -m` puts the working folder on sys.path.
    done = subprocess.run([*command, *map(str, CHECKS)], cwd=HERE, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_kernels() -> None:
    run("not slow")


@pytest.mark.slow
def test_kernels_in_the_other_combinations() -> None:
    run("slow")


def test_importing_the_target_does_not_import_triton() -> None:
    code = "import sys, graphopt, graphopt.backends.triton, graphopt.ops.kernels; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
