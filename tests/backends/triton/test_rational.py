"""The rational kernels in Triton's interpreter, and compiled for more sizes than the list for compiling ahead has."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Groups that are no multiple of a tile, a matrix stored the other way round, no bias, the lowest and highest degrees.
COMPILE = """
import torch
from graphopt.backends.triton import aot, group_rational, linear_rational
from graphopt.backends.triton.launch import recording

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

a, b = empty(5, 8, dtype=torch.float32), empty(5, 7, dtype=torch.float32)
x, wide, single = empty(40, 300), empty(394, 70), empty(40, 300, dtype=torch.float32)
calls = (
    lambda: group_rational.forward(single, a, b, "sum_abs"),
    lambda: group_rational.backward(x, x, a, b, "sum_abs"),
    lambda: group_rational.backward(single, single, a[:1], b, "abs_sum", True),
    lambda: linear_rational.forward(wide, empty(70, 300).t(), None, a, b),
    lambda: linear_rational.forward(wide, empty(300, 70), empty(300), empty(1, 1), empty(1, 0)),
)
for call in calls:
    with recording() as notes:
        call()
    aot.compile_launch(notes[-1], "sm_90")
"""


def test_rational(run_checks: Callable[..., None]) -> None:
    run_checks("rational")


@pytest.mark.slow
def test_rational_in_the_other_combinations(run_checks: Callable[..., None]) -> None:
    run_checks("rational", marked="slow")


@pytest.mark.slow
def test_odd_sizes_compile(tmp_path: Path) -> None:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
