"""Starting kernels: tuned on a GPU, one plain configuration in Triton's interpreter, recorded for compilation ahead.

A host function calls `launch` and knows nothing of these three ways.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl

# Set while Triton's interpreter runs the kernels (TRITON_INTERPRET=1).
INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)

# Tokens per chunk: quadratic inside, a state between chunks.
CHUNK = 64
# Rows of the blocks inside a chunk that the forms with sub-blocks work on: the smallest that tl.dot takes.
BLOCK = 16
# Rows of the largest tile of queries or keys.
_LARGEST_TILE = 128


@triton.jit
def dot(a, b):
    """The product in fp32; fp32 operands keep all their bits, since TF32 would round them to ten."""
    if _INTERPRETED:  # numpy has no product of bf16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """`x` in another type, rounded to the nearest; the interpreter alone would cut off what bf16 does not hold."""
    if _INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.float32).to(tl.int32, bitcast=True)
            x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def load_rows(pointer, stride, rows, columns, T, WIDTH: tl.constexpr):
    """[rows, columns] of a matrix with T rows and WIDTH columns, zeros outside."""
    inside = ((rows >= 0) & (rows < T))[:, None] & (columns < WIDTH)[None, :]
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(pointer, stride, rows, columns, T, WIDTH: tl.constexpr, value):
    """Write what `load_rows` would read."""
    inside = ((rows >= 0) & (rows < T))[:, None] & (columns < WIDTH)[None, :]
    tl.store(pointer + rows[:, None] * stride + columns[None, :], narrow(value, pointer.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Config:
    """Block sizes, warps and pipeline stages to try."""

    blocks: Mapping[str, int] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Launch:
    """One recorded start: everything that compiling the kernel needs."""

    name: str
    function: Any
    arguments: Mapping[str, Any]
    config: Config


class Kernel:
    """A kernel with the configurations to choose from.

    Args:
        function: what `triton.jit` made.
        configs: what to try, the largest blocks last: the interpreter takes those, since it pays by the operation.
        limits: block size -> the argument that it need not exceed, once rounded up to a power of two.
        key: arguments on which the choice depends.
    """

    def __init__(
        self,
        function: Any,
        configs: Sequence[Config] = (Config(),),
        limits: Mapping[str, str] | None = None,
        key: Sequence[str] = (),
    ) -> None:
        self.function = function
        self.configs = tuple(configs)
        self.limits = dict(limits or {})
        self._tuned = None
        if not INTERPRETED and len(self.configs) > 1:
            self._tuned = triton.autotune(
                configs=[triton.Config(dict(c.blocks), num_warps=c.warps, num_stages=c.stages) for c in self.configs],
                key=list(key),
                prune_configs_by={"early_config_prune": self._fitting},
            )(function)

    @property
    def name(self) -> str:
        """Its function's name."""
        return str(self.function.__name__)

    def fits(self, blocks: Mapping[str, int], arguments: Mapping[str, Any]) -> bool:
        """Whether no block is larger than what it covers."""
        return all(blocks[block] <= max(BLOCK, padded(arguments[size])) for block, size in self.limits.items())

    def _fitting(self, configs: list[Any], named: Mapping[str, Any], **others: Any) -> list[Any]:
        return [c for c in configs if self.fits(c.kwargs, {**named, **others})] or configs[:1]

    def __call__(self, grid: Callable[[Mapping[str, Any]], tuple[int, ...]], **arguments: Any) -> None:
        """Start it; `grid` gets all arguments and block sizes by name."""
        if _RECORDER is not None:
            for config in self.configs:
                if self.fits(config.blocks, arguments):
                    _RECORDER.append(Launch(self.name, self.function, {**arguments, **config.blocks}, config))
            return
        # Triton launches on the current device, which need not be the tensors'.
        device = next(x.device for x in arguments.values() if isinstance(x, torch.Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self._start(grid, arguments)

    def _start(self, grid: Callable[[Mapping[str, Any]], tuple[int, ...]], arguments: dict[str, Any]) -> None:
        if self._tuned is not None:
            self._tuned[lambda meta: grid({**arguments, **meta})](**arguments)
            return
        config = [self.configs[0], *(c for c in self.configs if self.fits(c.blocks, arguments))][-1]
        arguments = {**arguments, **config.blocks}
        self.function[grid(arguments)](**arguments, num_warps=config.warps, num_stages=config.stages)


_RECORDER: list[Launch] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside, kernels are noted down instead of started: host functions then take tensors on the `meta` device."""
    global _RECORDER
    before, _RECORDER = _RECORDER, []
    try:
        yield _RECORDER
    finally:
        _RECORDER = before


def padded(size: int) -> int:
    """The power of two, at least 16, that a tile of `size` elements takes."""
    return int(max(BLOCK, triton.next_power_of_2(size)))


def tile(rows: int) -> int:
    """What a kernel that tiles rows is tuned for: from one tile on the choice is the same for every number of rows."""
    return min(padded(rows), _LARGEST_TILE)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """`x` with its last dimension dense; the others may have any stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(name: str, x: torch.Tensor) -> dict[str, int]:
    """The strides of [B, H, T, .] as arguments of a kernel; a dimension of 1 is repeated."""
    sizes = [0 if size == 1 else stride for size, stride in zip(x.shape[:2], x.stride(), strict=False)]
    return {f"{name}_b": sizes[0], f"{name}_h": sizes[1], f"{name}_t": x.stride(2)}
