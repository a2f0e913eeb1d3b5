"""Running checks of `interpreted/` in a process of their own: Triton decides when it is imported what interprets."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent


@pytest.fixture
def run_checks() -> Callable[..., None]:
    """run_checks(*names, marked="not slow"): the checks of `interpreted/check_NAME.py` with these marks pass."""

    def run(*names: str, marked: str = "not slow") -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        # The parent's workers and options are not the child's.
        for name in [name for name in env if name.startswith("PYTEST_")]:
            del env[name]
        if not torch.cuda.is_available():
            env["TRITON_INTERPRET"] = "1"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "-m", marked]
        checks = [str(HERE / "interpreted" / f"check_{name}.py") for name in names]
        # Outside the checkout: `python -m` puts the working folder on sys.path.
        done = subprocess.run([*command, *checks], cwd=HERE, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

    return run
