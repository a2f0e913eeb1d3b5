"""Which input and output of a language model plays which role, by type, shape and use; names break ties only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import fx

from graphopt.errors import GraphOptError
from graphopt.graph import Graph, ValueSpec
from graphopt.onnxfile.tensors import to_numpy
from graphopt.synthetic import _table_rows

_Array = np.ndarray[Any, Any]
_INTEGERS = (torch.int32, torch.int64)
_TOKEN_NAMES = ("input_ids", "token_ids", "tokens", "ids")
# What leaves the values of the tokens alone between the input and the table that they index.
_REARRANGING = ("cast", "identity", "to.dtype", "_to_copy", "reshape", "view", "squeeze", "flatten")


class Specs(Protocol):
    """What has inputs and outputs of stated names, types and shapes: a `Graph`, or what a session declares."""

    @property
    def inputs(self) -> Sequence[ValueSpec]:
        """The inputs, in order."""

    @property
    def outputs(self) -> Sequence[ValueSpec]:
        """The outputs, in order."""


@dataclass(frozen=True)
class Memory:
    """An input that carries the past, and the output that takes its place at the next step.

    Attributes:
        past: the input.
        present: the output.
        axis: the axis of a cache along which tokens lie; None for a state, whose size does not change.
    """

    past: ValueSpec
    present: ValueSpec
    axis: int | None

    def empty(self, batch: int) -> _Array:
        """The memory before the first token: a cache of length 0, a state of zeros.

        Raises:
            GraphOptError: the model leaves a size of it open.
        """
        shape: list[int] = []
        for i, dim in enumerate(self.past.shape or ()):
            if i == 0:
                shape.append(dim if isinstance(dim, int) else batch)
            elif i == self.axis:
                shape.append(0)
            elif isinstance(dim, int):
                shape.append(dim)
            else:
                raise GraphOptError(f"expected stated numbers of heads and features, found input {self.past}")
        assert isinstance(self.past.dtype, torch.dtype)
        return np.asarray(to_numpy(torch.zeros(shape, dtype=self.past.dtype)))


@dataclass(frozen=True)
class Interface:
    """The roles of a decoder's inputs and outputs.

    Attributes:
        tokens: the integers `[B, T]` that index the embedding table.
        logits: the scores `[B, T, V]` of the next token at each position.
        rows: rows of the embedding table; None where it is unknown.
        attention_mask: `[B, P + T]`, 1 for a token and 0 for padding, P tokens of which lie in the cache.
        position_ids: `[B, T]`, each token's place in the text.
        caches: what grows with the text, or is cut to a window by the model.
        states: what keeps its size.
        others: inputs without a role here.
    """

    tokens: ValueSpec
    logits: ValueSpec
    rows: int | None = None
    attention_mask: ValueSpec | None = None
    position_ids: ValueSpec | None = None
    caches: tuple[Memory, ...] = ()
    states: tuple[Memory, ...] = ()
    others: tuple[ValueSpec, ...] = ()

    @classmethod
    def of(cls, model: Specs) -> Interface:
        """Find the roles.

        Args:
            model: a graph, or the declared inputs and outputs of another model.

        Raises:
            GraphOptError: the model has no tokens or no logits.
        """
        tables = _tables(model) if isinstance(model, Graph) else {}
        tokens = _tokens(model, tables)
        logits = _logits(model.outputs, tables.get(tokens.name))
        memories = _memories(model)
        known = {tokens.name, *(m.past.name for m in memories)}
        rest = [spec for spec in model.inputs if spec.name not in known and _rank(spec) == 2]
        positions = next((s for s in rest if _is_positions(s, tokens, tables)), None)
        mask = next((s for s in rest if s is not positions and _is_mask(s, tokens)), None)
        known |= {s.name for s in (positions, mask) if s is not None}
        return cls(
            tokens,
            logits,
            tables.get(tokens.name),
            mask,
            positions,
            tuple(m for m in memories if m.axis is not None),
            tuple(m for m in memories if m.axis is None),
            tuple(spec for spec in model.inputs if spec.name not in known),
        )

    @property
    def writes_text(self) -> bool:
        """Whether there are as many logits as rows in the table that the tokens index: scores of the next token."""
        return self.rows is not None and self.rows == self.vocabulary

    @property
    def memories(self) -> tuple[Memory, ...]:
        """Caches and states."""
        return self.caches + self.states

    @property
    def vocabulary(self) -> int | None:
        """How many tokens there are; None where the model leaves it open."""
        width = self.logits.shape[-1] if self.logits.shape else None
        return width if isinstance(width, int) else self.rows

    @property
    def batch(self) -> int | None:
        """The only number of sequences that the model takes; None where any will do."""
        return _fixed(self.tokens, 0)

    @property
    def length(self) -> int | None:
        """The only number of tokens that the model takes at once; None where any will do."""
        return _fixed(self.tokens, 1)


def _fixed(spec: ValueSpec, axis: int) -> int | None:
    dim = spec.shape[axis] if spec.shape else None
    return dim if isinstance(dim, int) else None


def _rank(spec: ValueSpec) -> int | None:
    return None if spec.shape is None else len(spec.shape)


def _is_float(spec: ValueSpec) -> bool:
    return isinstance(spec.dtype, torch.dtype) and spec.dtype.is_floating_point


def _tables(graph: Graph) -> dict[str, int]:
    """For each integer input `[B, T]`: rows of the constant table that it indexes."""
    found = {}
    for spec, node in zip(graph.inputs, graph.placeholders, strict=True):
        if spec.dtype not in _INTEGERS or _rank(spec) != 2:
            continue
        rows = [r for user in _through(node) if (r := _table_rows(graph, user)) is not None]
        if rows:
            found[spec.name] = min(rows)
    return found


def _through(node: fx.Node) -> list[fx.Node]:
    """Users of a value, also behind nodes that only rearrange it."""
    found: list[fx.Node] = []
    for user in node.users:
        found.append(user)
        if any(word in str(user.target).lower() for word in _REARRANGING) and user.args and user.args[0] is node:
            found += _through(user)
    return found


def _tokens(model: Specs, tables: dict[str, int]) -> ValueSpec:
    candidates = [spec for spec in model.inputs if spec.dtype in _INTEGERS and _rank(spec) == 2]
    widths = {s.shape[-1] for s in model.outputs if s.shape is not None and len(s.shape) == 3 and _is_float(s)}
    # Positions index a table too: that of the tokens has as many rows as there are logits.
    for chosen in (
        [s for s in candidates if tables.get(s.name) in widths and s.name in tables],
        [s for s in candidates if s.name in _TOKEN_NAMES],
        [s for s in candidates if s.name in tables],
        candidates,
    ):
        if len(chosen) == 1:
            return chosen[0]
    found = ", ".join(map(str, model.inputs)) or "none"
    raise GraphOptError(f"expected a language model with one integer input [batch, length] of tokens, found {found}")


def _logits(outputs: Sequence[ValueSpec], rows: int | None) -> ValueSpec:
    candidates = [spec for spec in outputs if _is_float(spec) and _rank(spec) == 3]
    named = [s for s in candidates if s.name.rpartition(".")[2] == "logits"]
    static = [s for s in candidates if s.shape is not None and isinstance(s.shape[-1], int)]
    matching = [s for s in static if s.shape is not None and s.shape[-1] == rows]
    # Where the table is known, an output of another width is a hidden state, unless it is called otherwise.
    for chosen in (matching, [s for s in matching if s in named], named, static if rows is None else []):
        if len(chosen) == 1:
            return chosen[0]
    found = ", ".join(map(str, outputs)) or "none"
    wanted = "as wide as the vocabulary" if rows is None else f"of the {rows} tokens that the embedding has"
    raise GraphOptError(f"expected a language model with logits [batch, length, V] {wanted}, found outputs {found}")


def _memories(model: Specs) -> list[Memory]:
    """Pairs of inputs and outputs of rank 4: by name, else in order among those of the same heads and features."""
    free = [spec for spec in model.outputs if _is_float(spec) and _rank(spec) == 4]
    found: dict[str, Memory] = {}
    pasts = [spec for spec in model.inputs if _is_float(spec) and _rank(spec) == 4]
    for by_name in (True, False):
        for past in pasts:
            axis = _length_axis(past)
            # A state of fixed shape looks like any image, so it takes a name to be one.
            if past.name in found or (axis is None and not by_name):
                continue
            present = next((s for s in free if _pairs(past, s, axis) and (not by_name or _named(past, s))), None)
            if present is not None:
                free.remove(present)
                found[past.name] = Memory(past, present, axis)
    return [found[spec.name] for spec in pasts if spec.name in found]


def _length_axis(spec: ValueSpec) -> int | None:
    assert spec.shape is not None
    # [B, H, P, D] nearly always; some store keys as [B, H, D, P] or [B, P, H, D].
    return next((i for i in (2, 3, 1) if not isinstance(spec.shape[i], int)), None)


def _pairs(past: ValueSpec, present: ValueSpec, axis: int | None) -> bool:
    assert past.shape is not None
    assert present.shape is not None
    sizes = zip(past.shape[1:], present.shape[1:], strict=True)
    return past.dtype == present.dtype and all(
        i == axis or a == b or not (isinstance(a, int) and isinstance(b, int)) for i, (a, b) in enumerate(sizes, 1)
    )


def _named(past: ValueSpec, present: ValueSpec) -> bool:
    return present.name in {past.name.replace(old, "present") for old in ("past_key_values", "past")} - {past.name}


def _is_positions(spec: ValueSpec, tokens: ValueSpec, tables: dict[str, int]) -> bool:
    if spec.dtype not in _INTEGERS or "type" in spec.name:
        return False
    if spec.name in tables:
        return True
    return "position" in spec.name and _same_length(spec, tokens)


def _is_mask(spec: ValueSpec, tokens: ValueSpec) -> bool:
    if "mask" in spec.name:
        return True
    if _fixed(spec, 1) is not None:
        return False
    # Of integers, only a mask is longer than the tokens are: it covers the cache as well.
    return not _same_length(spec, tokens) if spec.dtype in _INTEGERS else spec.dtype == torch.bool or _is_float(spec)


def _same_length(spec: ValueSpec, tokens: ValueSpec) -> bool:
    assert spec.shape is not None
    assert tokens.shape is not None
    return spec.shape[1] == tokens.shape[1]
