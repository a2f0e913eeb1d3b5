"""The tools under test, each in a worker process that is started anew when it crashes or hangs."""

from __future__ import annotations

import os
import pickle
import select
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
# The slowest answer of a tool that is still at work takes a few seconds.
TIMEOUT = 60.0
# A peer may need an environment of its own (onnx2torch wants torchvision, which PyPI has for CUDA only): this variable
# names its interpreter.
INTERPRETERS = {"onnx2torch": "GRAPHOPT_ONNX2TORCH_PYTHON"}
MODULES = {"onnxscript.optimizer": "onnxscript", "OnnxSlim": "onnxslim"}


def interpreter(tool: str) -> str:
    """The interpreter that the tool runs in."""
    return os.environ.get(INTERPRETERS.get(tool, ""), sys.executable)


def version(tool: str) -> str | None:
    """The installed version; None where the tool cannot be imported."""
    module = MODULES.get(tool, tool)
    program = f"import importlib.metadata, {module}; print(importlib.metadata.version({module!r}))"
    done = subprocess.run([interpreter(tool), "-c", program], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


class Worker:
    """Answers requests in a process of its own."""

    def __init__(self, action: str, tool: str) -> None:
        """Args: action: `rewrite` or `evaluate`. tool: its name in worker.py."""
        self._command = [interpreter(tool), str(WORKER), action, tool]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def ask(self, data: bytes, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """The worker's answer; of kind `crash` or `timeout` where there is none."""
        if self._process is None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump((data, dict(feeds)), process.stdin)
            process.stdin.flush()
            if not select.select([process.stdout], [], [], TIMEOUT)[0]:
                self._stop()
                return {"kind": "timeout", "error": f"no answer in {TIMEOUT:.0f} s", "seconds": TIMEOUT}
            answer: dict[str, Any] = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError):
            self._stop()
            return {"kind": "crash", "error": f"exit code {process.returncode}", "seconds": 0.0}
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        # Tools warn and log in quantities; what matters is in the answers.
        return subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
