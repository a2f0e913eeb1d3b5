"""A model file on onnxruntime, as the verbs that run files need it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.errors import GraphOptError, NoRuntime

if TYPE_CHECKING:
    from graphopt.rewrite.report import OutputDifference

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# 4 is "fatal": errors come back as exceptions, and what lies below is for onnxruntime's developers.
_SILENT = 4


def installed() -> bool:
    """Whether onnxruntime can be imported."""
    return importlib.util.find_spec("onnxruntime") is not None


class Runtime:
    """One .onnx file in an onnxruntime session.

    Args:
        path: the file.
        threads: for one operator; 0 leaves the choice to onnxruntime.
        provider: `CPU` or `CUDA`.

    Raises:
        GraphOptError: onnxruntime is missing, lacks the provider, or cannot load the file.
    """

    def __init__(self, path: Path, *, threads: int = 0, provider: str = CPU) -> None:
        if not installed():
            raise NoRuntime("expected onnxruntime to run the model, but it is not installed; install graphopt[cpu]")
        import onnxruntime

        available = onnxruntime.get_available_providers()
        if provider not in available:
            raise GraphOptError(
                f"expected onnxruntime with {provider}, but it has {', '.join(available)}; install graphopt[cuda]"
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _SILENT
        options.intra_op_num_threads = threads
        chosen = [provider] if provider == CPU else [provider, CPU]
        try:
            self.session: Any = onnxruntime.InferenceSession(str(path), options, providers=chosen)
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise NoRuntime(f"expected onnxruntime to load {path}, but it cannot: {error}") from error
        self.path = path
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def run(self, output_names: Sequence[str] | None, feeds: Mapping[str, Any]) -> Sequence[Any]:
        """The outputs in order.

        Raises:
            GraphOptError: onnxruntime fails on these inputs.
        """
        try:
            results: Sequence[Any] = self.session.run(output_names, dict(feeds))
        except Exception as error:  # see above
            raise GraphOptError(f"expected onnxruntime to run {self.path}, but it fails: {error}") from error
        return results


def feeds_of(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """A calibration batch as arrays by input name."""
    from graphopt.onnxfile.tensors import to_numpy

    return {name: _contiguous(to_numpy(value)) for name, value in zip(names, values, strict=True)}


def _contiguous(value: Any) -> Any:
    return np.ascontiguousarray(value).reshape(value.shape) if isinstance(value, np.ndarray) else value


def differences(
    names: Sequence[str], expected: Sequence[Sequence[Any]], found: Sequence[Sequence[Any]]
) -> list[OutputDifference]:
    """Each output's difference over all batches, as `graphopt.verification.compare` states it.

    Args:
        names: of the outputs.
        expected: per batch, the reference's outputs in the order of `names`.
        found: the same of the model in question.
    """
    from graphopt.rewrite.report import OutputDifference
    from graphopt.verification.numbers import difference

    table = []
    for i, name in enumerate(names):
        rows = [difference(a[i], b[i]) for a, b in zip(expected, found, strict=True)]
        table.append(
            OutputDifference(
                name,
                max(r.max_abs for r in rows),
                max(r.rel_rms for r in rows),
                sum(r.cosine for r in rows) / len(rows),
                all(r.bitwise for r in rows),
            )
        )
    return table
