"""How fast a softmax is beside the runtime's own: alternating runs on a recorded input, checked before they count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx.helper
import torch

from graphopt import registry
from graphopt.bench import Timing, bench_pair
from graphopt.errors import GraphOptError
from graphopt.frontends.onnx import load_onnx
from graphopt.onnxfile import OnnxFile
from graphopt.onnxfile.tensors import ONNX_DTYPES, from_numpy, to_numpy
from graphopt.rewrite.splice import splice
from graphopt.sites import SoftmaxSite
from graphopt.verification.numbers import difference

# Odd, so that a median is one of the runs.
_RUNS = 21
_IR_VERSION = 8
# Two libraries' exponentials: a few ulps of fp32, or one rounding to fp16 that falls on the other side.
_AGREEMENT = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 1e-3}


@dataclass(frozen=True)
class Speed:
    """What was measured.

    Attributes:
        own: name of the runtime's own softmax.
        timing: seconds of the own (a) and of ours (b).
        value: what it was measured on, such as `float32[2, 4, 12, 12]`.
        wrong: why ours is no softmax in that runtime; empty where it is.
    """

    own: str
    timing: Timing
    value: str
    wrong: str = ""

    @property
    def is_faster(self) -> bool:
        """Whether ours is faster beyond the noise."""
        ratio = self.timing.ratio
        return ratio is not None and ratio.lower > 1

    def describe(self) -> str:
        """Both median times in words."""
        own, ours = (_spell(_median(seconds)) for seconds in (self.timing.a, self.timing.b))
        times = f"{own} against {ours} on {self.value}"
        ratio = self.timing.ratio
        if self.is_faster:
            return f"faster than {self.own}, which takes {times}"
        if ratio is not None and ratio.upper < 1:
            return f"{self.own} is faster and stays: {times}"
        return f"{self.own} stays, as the difference is within the noise: {times}"


def in_torch(module: torch.nn.Module, axis: int, dtype: torch.dtype | None, x: torch.Tensor) -> Speed:
    """Measure `module` against torch.softmax.

    Args:
        module: from x to its softmax.
        axis: to normalise along.
        dtype: what torch.softmax converts x to first.
        x: a recorded input.
    """
    with torch.no_grad():
        timing = bench_pair(
            _Function(lambda v: torch.softmax(v, axis, dtype=dtype)), _Function(module), {"x": x}, _RUNS
        )
    return Speed("torch.softmax", timing, _value(x))


def in_onnxruntime(module: torch.nn.Module, axis: int, x: torch.Tensor, opset: int) -> Speed:
    """Measure the ONNX form of `module` against the operator Softmax, both on onnxruntime with torch's threads.

    Args:
        module: from x to its softmax.
        axis: to normalise along.
        x: a recorded input.
        opset: of the model that both are for.

    Raises:
        GraphOptError: onnxruntime is not installed, or cannot run one of the two on this type.
    """
    if x.dtype not in _AGREEMENT:
        raise GraphOptError(f"expected fp16, fp32 or fp64 to run Softmax of onnxruntime on, found {x.dtype}")
    graph = load_onnx(OnnxFile(_softmax(axis, x, opset)))
    changed = graph.copy()
    (node,) = [n for n in changed.nodes if n.op == "call_function"]
    splice(changed, SoftmaxSite("softmax", node, (node,), tuple(node.all_input_nodes)), module, "softmax", (x,))
    backend, threads = registry.backend("onnxruntime"), torch.get_num_threads()
    own, ours = (backend.session(each, threads=threads).raw for each in (graph, changed))
    feeds = {"x": to_numpy(x)}
    with torch.no_grad():
        error = difference(module(x), from_numpy(ours.run(None, feeds)[0])).rel_rms
    if not error <= _AGREEMENT[x.dtype]:  # also true of NaN
        return Speed("", Timing(()), _value(x), f"its ONNX form is off by a relative RMS of {error:.3g} in onnxruntime")
    return Speed("onnxruntime's Softmax", bench_pair(own, ours, feeds, _RUNS), _value(x))


def _softmax(axis: int, x: torch.Tensor, opset: int) -> onnx.ModelProto:
    """A model of one Softmax; before opset 13 all axes behind a site's have size 1, so it normalises one there too."""
    kind, dims = ONNX_DTYPES[x.dtype], [f"d{i}" for i in range(x.ndim)]
    x_info, y_info = (onnx.helper.make_tensor_value_info(name, kind, dims) for name in "xy")
    node = onnx.helper.make_node("Softmax", ["x"], ["y"], axis=axis % x.ndim)
    opsets = [onnx.helper.make_opsetid("", opset)]
    made = onnx.helper.make_graph([node], "softmax", [x_info], [y_info])
    return onnx.helper.make_model(made, opset_imports=opsets, ir_version=_IR_VERSION)


class _Function:
    """A function that runs like a session."""

    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        self._function = function

    def run(self, output_names: Sequence[str] | None, feeds: Mapping[str, Any], /) -> Sequence[Any]:
        return [self._function(feeds["x"])]


def _median(seconds: Sequence[float]) -> float:
    return sorted(seconds)[len(seconds) // 2]


def _spell(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} us" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def _value(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
