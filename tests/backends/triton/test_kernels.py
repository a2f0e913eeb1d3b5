"""The kernels of linear attention in Triton's interpreter."""

import subprocess
import sys
from collections.abc import Callable

import pytest

pytest.importorskip("triton")

CHECKS = ("dispatch", "linear", "windowed")


def test_kernels(run_checks: Callable[..., None]) -> None:
    run_checks(*CHECKS)


@pytest.mark.slow
def test_kernels_in_the_other_combinations(run_checks: Callable[..., None]) -> None:
    run_checks(*CHECKS, marked="slow")


def test_importing_the_target_does_not_import_triton() -> None:
    code = "import sys, graphopt, graphopt.backends.triton, graphopt.ops.kernels; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
