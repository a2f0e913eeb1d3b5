"""Every kernel compiles for NVIDIA and AMD GPUs on a machine without any; in a process where nothing interprets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = {
    "forward_kernel",
    "output_kernel",
    "recurrent_kernel",
    "reverse_kernel",
    "gradient_kernel",
    "pairs_kernel",
    "pairs_backward_kernel",
    "solve_kernel",
    "hybrid_kernel",
    "hybrid_query_kernel",
    "hybrid_key_kernel",
    "softmax_rows_kernel",
    "softmax_rows_gradient_kernel",
    "softmax_parts_kernel",
    "softmax_write_kernel",
    "softmax_parts_gradient_kernel",
    "softmax_write_gradient_kernel",
    "unified_attention_kernel",
    "softplus_attention_kernel",
    "softplus_query_kernel",
    "softplus_key_kernel",
    "group_rational_kernel",
    "group_rational_gradient_kernel",
    "linear_rational_kernel",
}
# What the file of each target begins with, and the shared memory that a block may have there.
LIMITS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}


def compiled(folder: Path, *arguments: str) -> list[dict[str, object]]:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # An empty cache: what an earlier run compiled proves nothing.
    env |= {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "graphopt.backends.triton.aot", "--out", str(folder / "out"), *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    kernels: list[dict[str, object]] = json.loads((folder / "out" / "manifest.json").read_text())["kernels"]
    return kernels


def check(folder: Path, kernels: list[dict[str, object]]) -> None:
    for entry in kernels:
        target = str(entry["target"])
        code = (folder / "out" / target / str(entry["file"])).read_bytes()
        assert code.startswith(b"\x7fELF")
        assert str(entry["symbol"]).encode() in code
        assert int(str(entry["shared_memory"])) <= LIMITS[target], entry


# Each takes about twenty seconds.
@pytest.mark.parametrize("target", ["sm_90", *(pytest.param(x, marks=pytest.mark.slow) for x in ("sm_80", "gfx942"))])
def test_every_kernel_compiles(target: str, tmp_path: Path) -> None:
    kernels = compiled(tmp_path, "--target", target)
    assert {entry["kernel"] for entry in kernels} == KERNELS
    check(tmp_path, kernels)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", sorted(LIMITS))
def test_every_rule_form_and_block_size_compiles(target: str, tmp_path: Path) -> None:
    kernels = compiled(tmp_path, "--target", target, "--every")
    assert {entry["kernel"] for entry in kernels} == KERNELS
    check(tmp_path, [entry for entry in kernels if target != "gfx942"])
