"""An onnxruntime session with a chosen execution provider; IO binding on CUDA."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from graphopt.errors import GraphOptError
from graphopt.onnxfile import write

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Session:
    """A loaded model; runs on arrays by name."""

    def __init__(self, path: Path, *, providers: Sequence[str] = ("cpu",), threads: int | None = None) -> None:
        """Load a model file.

        Args:
            path: the model.
            providers: `cpu`, `cuda`, in order of preference; the first must be there.
            threads: threads within an operator; None leaves it to onnxruntime.

        Raises:
            GraphOptError: onnxruntime is missing, lacks the provider, or cannot load the model.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise GraphOptError("this needs onnxruntime, which is not installed; install graphopt[cpu]") from error
        wanted = [_provider(name) for name in providers]
        available = onnxruntime.get_available_providers()
        if wanted[0] not in available:
            raise GraphOptError(f"expected onnxruntime with {wanted[0]}, this one has {', '.join(available)}")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self.raw = onnxruntime.InferenceSession(str(path), options, providers=wanted)
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise GraphOptError(f"onnxruntime cannot load {path.name}: {error}") from error
        self._bound = wanted[0] != PROVIDERS["cpu"]

    @classmethod
    def of(cls, proto: onnx.ModelProto, *, folder: Path | None = None, **options: Any) -> Session:
        """A session of a model in memory; `folder` holds its external data."""
        with tempfile.TemporaryDirectory(prefix="graphopt-session-") as temporary:
            path = Path(temporary) / "model.onnx"
            write(proto, path, folder=folder)
            return cls(path, **options)

    def run(self, feeds: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
        """All outputs by name."""
        names = [o.name for o in self.raw.get_outputs()]
        if not self._bound:
            return dict(zip(names, self.raw.run(None, dict(feeds)), strict=True))
        # Binding keeps values on the device between operators and copies each output once.
        binding = self.raw.io_binding()
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        for name in names:
            binding.bind_output(name)
        self.raw.run_with_iobinding(binding)
        return dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))


def _provider(name: str) -> str:
    if name not in PROVIDERS:
        raise GraphOptError(f"no execution provider is called {name!r}; there are {', '.join(PROVIDERS)}")
    return PROVIDERS[name]
