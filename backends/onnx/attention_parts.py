"""What the ONNX forms of our attention operators share: operands, types, heads, blocks of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphopt.backends.onnx.builder import Builder, need
from graphopt.backends.onnx.table import Call, meta_of, shape_of

BLOCK = 64
"""Queries that are computed together: enough for a matrix product, few enough that its triangle is cheap."""


@dataclass(frozen=True)
class Operands:
    """The tensors that a call of an attention operator gives.

    Attributes:
        names: what they are called in the operator's schema.
        values: what they are called in the graph.
        shapes: their shapes as observed, of which the heads and widths are static.
        dtype: of the output.
        types: element types.
    """

    names: tuple[str, ...]
    values: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    types: tuple[torch.dtype, ...]
    dtype: torch.dtype

    @property
    def wide(self) -> torch.dtype:
        """The type to compute in: fp32 or better."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def suffix(self) -> str:
        """What the function's name has to say of them."""
        optional = "".join(f"_{n}" for n in self.names[3:])
        types = [suffix(t) for t in self.types]
        return f"{optional}_{types[0] if len(set(types)) == 1 else '_'.join(types)}"

    def widened(self, b: Builder, inputs: Sequence[str]) -> dict[str, str]:
        """The function's inputs by name, in the type to compute in."""
        return {
            name: value if kind == self.wide else b.cast(value, self.wide)
            for name, value, kind in zip(self.names, inputs, self.types, strict=True)
        }


def operands(call: Call, names: Sequence[str]) -> Operands:
    """What a call gives for the tensors of its schema, which are its first arguments."""
    given = [(i, name, node) for i, name in enumerate(names) if (node := call.operand(i, name)) is not None]
    return Operands(
        tuple(name for _, name, _ in given),
        tuple(str(call.get(i, name)) for i, name, _ in given),
        {name: shape_of(node) for _, name, node in given},
        tuple(meta_of(node)[0] for _, _, node in given),
        meta_of(call.operand(2, "v"))[0],
    )


def suffix(dtype: torch.dtype) -> str:
    """An element type as part of a function's name."""
    return str(dtype).removeprefix("torch.")


def repeat_heads(b: Builder, value: str, groups: int) -> str:
    """[B, Hkv, S, K] -> [B, Hkv * groups, S, K], each head beside its copies."""
    if groups == 1:
        return value
    wide = b.op("Expand", b.unsqueeze(value, 2), b.ints(1, 1, groups, 1, 1))
    shape = b.op("Shape", value)
    full = b.op("Concat", b.slice(shape, 0, 0, 1), b.ints(-1), b.slice(shape, 0, 2, 4), axis=0)
    return str(b.op("Reshape", wide, full))


def number_of(b: Builder, value: str, axis: int) -> str:
    """One size of a value, as a scalar."""
    return str(b.op("Gather", b.op("Shape", value), b.number(axis)))


def counted(b: Builder, count: str, start: str | None = None) -> str:
    """`start` (0), and the numbers after it, below `count`."""
    return str(b.op("Range", start or b.number(0), count, b.number(1)))


def part(b: Builder, value: str, axis: int, start: str | int, end: str | int) -> str:
    """value[start:end] along an axis; each bound a number or the name of a vector of one element."""
    need(b.opset >= 10, "slices with computed bounds below opset 10")
    bounds = [b.ints(x) if isinstance(x, int) else x for x in (start, end)]
    return str(b.op("Slice", value, *bounds, b.ints(axis)))


def blocks_of(b: Builder, value: str, places: str, heads: Sequence[int]) -> str:
    """[B, Hkv G, S, K] -> [B, Hkv, G, N, C, K]: rows at `places` [N, C], heads that share a key beside each other."""
    taken = b.op("Gather", value, places, axis=2)
    if heads[1] == 1:
        return b.unsqueeze(str(taken), 2)
    shape = b.op("Concat", b.ints(0, *heads), b.slice(str(b.op("Shape", taken)), 0, 2, 5), axis=0)
    return str(b.op("Reshape", taken, shape))


def with_ones(b: Builder, v: str, wide: torch.dtype) -> str:
    """[.., V] -> [.., V + 1]: a column of ones makes one product compute numerator and denominator."""
    first = b.op("Shape", part(b, v, 3, 0, 1))
    return str(b.op("Concat", v, b.op("Expand", b.number(1, wide), first), axis=3))


def running_sum(b: Builder, added: str, first: str | None) -> tuple[str, str]:
    """The sum over all earlier blocks of `added` [B, Hkv, G, N, F, V], and that behind the last one [B, Hkv, G, F, V].

    Args:
        b: where the nodes go.
        added: what each block adds.
        first: the sum before the first block [B, Hkv, G, 1, F, V]; None is zero.
    """
    before = b.op("CumSum", added, b.number(3), exclusive=1)
    if first is not None:
        before = b.op("Add", before, first)
    last = b.op("Add", *(b.op("Gather", x, b.number(-1), axis=3) for x in (before, added)))
    return str(before), str(last)


def turned(b: Builder, value: str, rank: int) -> str:
    """The last two axes exchanged; runtimes join this with the product that it is for."""
    return str(b.op("Transpose", value, perm=[*range(rank - 2), rank - 1, rank - 2]))


def as_number(b: Builder, condition: str, wide: torch.dtype) -> str:
    """1 where a condition holds, else 0."""
    return b.cast(condition, wide)
