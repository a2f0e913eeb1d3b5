"""What ONNX's fused operators do before they attend: project, unpack, join with a cache, read their masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from graphopt.sites.attention.layout import Program, Shape
from graphopt.sites.attention.masking import LOW, key_positions, query_positions
from graphopt.sites.base import AttentionValues


def packed_heads(heads: int) -> Program:
    """[B, T, H * D] to [B, H, T, D]."""
    return Program((("unflatten", 2, (heads, -1)), ("permute", (0, 2, 1, 3))))


@dataclass(frozen=True)
class Unpacked:
    """`split` of a fused operator; runs on tensors and on fx proxies.

    Attributes:
        q_heads: brings queries to [B, Hq, T, D].
        kv_heads: brings keys and values to [B, Hkv, S, D].
        names: the operator's names of its inputs, with their indices among the site's.
        bare: the causal rule is left to the kind of the mask.
        causal: no query sees a later key.
        left: how many keys back a query sees, -1 for all.
        right: how many keys ahead a query sees, -1 for all.
        boolean: the mask input is a boolean.
        missing: how many keys the mask input is too short; they are hidden.
        widths: of queries, keys and values in a packed input.
        mask_form: how a padding mask is to be read.
    """

    used: ClassVar[frozenset[str]] = frozenset()
    floats: ClassVar[frozenset[str]] = frozenset()

    q_heads: Program
    kv_heads: Program
    names: tuple[tuple[str, int], ...] = field(default=())
    bare: bool = False
    causal: bool = False
    left: int = -1
    right: int = -1
    boolean: bool = False
    missing: int = 0
    widths: tuple[int, ...] = ()
    mask_form: str = ""
    ranks: tuple[int, int, int] = (3, 3, 3)

    def __call__(self, *values: Any) -> AttentionValues:
        """The canonical operands from the values of the site's inputs."""
        given = {name: values[index] for name, index in self.names}
        q, new_k, new_v = self.operands(given)
        k, v = self.joined(given, new_k, new_v)
        return AttentionValues(q, k, v, self._mask(given, q, k, new_k))

    @property
    def computed(self) -> frozenset[int]:
        """The inputs that hold queries, keys and values."""
        return frozenset(index for name, index in self.names if name in self.floats)

    @property
    def has(self) -> frozenset[str]:
        """Names of the inputs that are given."""
        return frozenset(name for name, _ in self.names)

    @property
    def only_causal(self) -> bool:
        """Whether nothing but the causal rule hides keys."""
        return not self.has & {"attn_mask", "attention_bias", "mask", "nonpad", "lengths"} and self.left < 0

    @property
    def boolean_mask(self) -> bool:
        """Whether the whole mask is a boolean."""
        return not self.has & {"attention_bias"} and ("attn_mask" not in self.has or self.boolean)

    @property
    def whole_mask(self) -> str:
        """The one input that is the mask as it stands, if there is one."""
        masks = self.has & {"attn_mask", "attention_bias", "mask", "nonpad", "lengths"}
        ruled = self.causal or self.left >= 0 or self.right >= 0
        return "" if len(masks) != 1 or ruled or self.missing else next(iter(masks))

    def shapes(self, given: Sequence[Shape]) -> tuple[Shape, Shape, Shape]:
        """The shapes of q, k and v for inputs of the given shapes."""
        blank = [torch.zeros(s) for s in given]
        named = {name: blank[index] for name, index in self.names}
        q, k, v = self.operands(named)
        k, v = self.joined(named, k, v)
        return tuple(q.shape), tuple(k.shape), tuple(v.shape)

    def ends_aligned(self, q: Shape, k: Shape) -> bool:
        """Whether the causal rule lets the last query see exactly all keys."""
        return True

    def operands(self, given: dict[str, Any]) -> tuple[Any, Any, Any]:
        """Q, k and v as [B, H, T, D], without the cache."""
        return self.q_heads(given["q"]), self.kv_heads(given["k"]), self.kv_heads(given["v"])

    def joined(self, given: dict[str, Any], k: Any, v: Any) -> tuple[Any, Any]:
        """Keys and values behind those of the cache."""
        if "past_key" not in given:
            return k, v
        return torch.cat((given["past_key"], k), 2), torch.cat((given["past_value"], v), 2)

    def _mask(self, given: dict[str, Any], q: Any, k: Any, new_k: Any) -> Any:
        if self.bare:
            return None
        rules, bias = self.rules(given, q, k, new_k), self.bias(given)
        visible = None
        for rule in rules:
            visible = rule if visible is None else torch.logical_and(visible, rule)
        if bias is None or visible is None:
            return visible if bias is None else bias
        return torch.where(visible, bias, LOW)

    def bias(self, given: dict[str, Any]) -> Any:
        """What is added to the scores."""
        return given.get("attention_bias")

    def rules(self, given: dict[str, Any], q: Any, k: Any, new_k: Any) -> list[Any]:
        """Booleans [B, H, T, S], true where a key is visible."""
        rules: list[Any] = []
        if self.causal:
            ahead = torch.sub(key_positions(k), query_positions(q))
            rules.append(torch.le(ahead, torch.sub(_count(key_positions(k), 3), _count(query_positions(q), 2))))
        if self.mask_form:
            rules += self._padding(given["mask"], k)
        return rules

    def _padding(self, mask: Any, k: Any) -> list[Any]:
        if self.mask_form == "keys":
            return [torch.unsqueeze(torch.unsqueeze(torch.gt(mask, 0), 1), 1)]
        if self.mask_form == "queries":
            return [torch.unsqueeze(torch.gt(mask, 0), 1)]
        if self.mask_form == "ends":
            return [torch.lt(key_positions(k), _column(mask))]
        ends, starts = _items(torch.unflatten(mask, 0, (2, -1)), 0, 2)
        return [torch.lt(key_positions(k), _column(ends)), torch.ge(key_positions(k), _column(starts))]


def _column(x: Any) -> Any:
    """[B] to [B, 1, 1, 1]."""
    return torch.unsqueeze(torch.unsqueeze(torch.unsqueeze(x, 1), 1), 1)


def _count(positions: Any, axis: int) -> Any:
    """How many positions there are along an axis, [1, 1, 1, 1]."""
    return torch.add(torch.amax(positions, axis, True), 1.0)


@dataclass(frozen=True)
class OnnxAttention(Unpacked):
    """ai.onnx Attention: queries start at the end of the cache, or at the first key without one."""

    used = frozenset({"q", "k", "v", "attn_mask", "past_key", "past_value", "nonpad"})
    floats = frozenset({"q", "k", "v", "past_key", "past_value"})

    @property
    def only_causal(self) -> bool:
        """See `Unpacked`."""
        return super().only_causal and self.right < 0

    def ends_aligned(self, q: Shape, k: Shape) -> bool:
        """See `Unpacked`."""
        return "past_key" in self.has or q[2] == k[2]

    def bias(self, given: dict[str, Any]) -> Any:
        """See `Unpacked`."""
        return None if self.boolean else self._whole(given)

    def _whole(self, given: dict[str, Any]) -> Any:
        """The mask input, extended to all keys."""
        mask: Any = given.get("attn_mask")
        if not self.missing:
            return mask
        return torch.nn.functional.pad(mask, (0, self.missing), value=False if self.boolean else LOW)

    def rules(self, given: dict[str, Any], q: Any, k: Any, new_k: Any) -> list[Any]:
        """See `Unpacked`."""
        rules = [self._whole(given)] if self.boolean else []
        if "nonpad" in given:
            rules.append(torch.lt(key_positions(k), _column(given["nonpad"])))
        if not self.causal and self.left < 0 and self.right < 0:
            return rules
        behind = torch.sub(query_positions(q), key_positions(k))
        if "past_key" in given:
            behind = torch.add(behind, torch.sub(_count(key_positions(k), 3), _count(key_positions(new_k), 3)))
        elif "nonpad" in given:
            behind = torch.add(behind, torch.sub(_column(given["nonpad"]), _count(query_positions(q), 2)))
        if self.causal:
            rules.append(torch.ge(behind, 0.0))
        if self.left >= 0:
            rules.append(torch.le(behind, float(self.left)))
        if self.right >= 0:
            rules.append(torch.ge(behind, -float(self.right)))
        return rules


@dataclass(frozen=True)
class MicrosoftAttention(Unpacked):
    """com.microsoft Attention: one matrix makes queries, keys and values of the input."""

    used = frozenset({"x", "weights", "bias", "mask", "past", "attention_bias"})
    floats = frozenset({"x", "past"})

    def operands(self, given: dict[str, Any]) -> tuple[Any, Any, Any]:
        """See `Unpacked`."""
        product = torch.matmul(given["x"], given["weights"])
        product = torch.add(product, given["bias"]) if "bias" in given else product
        q, k, v = _cut(product, 2, self.widths)
        return self.q_heads(q), self.kv_heads(k), self.kv_heads(v)

    def joined(self, given: dict[str, Any], k: Any, v: Any) -> tuple[Any, Any]:
        """See `Unpacked`."""
        if "past" not in given:
            return k, v
        keys, values = _items(given["past"], 0, 2)
        return torch.cat((keys, k), 2), torch.cat((values, v), 2)


@dataclass(frozen=True)
class MultiHead(Unpacked):
    """com.microsoft MultiHeadAttention: packed, half packed, or separate operands, with a bias each."""

    used = frozenset({"q", "k", "v", "bias", "mask", "attention_bias", "past_key", "past_value"})
    floats = frozenset({"q", "k", "v", "past_key", "past_value"})

    def operands(self, given: dict[str, Any]) -> tuple[Any, Any, Any]:
        """See `Unpacked`."""
        q, k, v = self._separate(given)
        if "bias" in given:
            biases = _cut(given["bias"], 0, self.widths)
            # Keys and values with heads of their own come from a cache, with their bias already added.
            q, k, v = (
                x if rank == 4 else torch.add(x, b) for x, b, rank in zip((q, k, v), biases, self.ranks, strict=True)
            )
        q, k, v = (x if rank == 4 else self.q_heads(x) for x, rank in zip((q, k, v), self.ranks, strict=True))
        return q, k, v

    def _separate(self, given: dict[str, Any]) -> tuple[Any, Any, Any]:
        if "k" not in given:
            parts = _items(given["q"], 3, 3)
        elif "v" not in given:
            parts = _items(given["k"], 3, 2)
        else:
            return given["q"], given["k"], given["v"]
        flat = [torch.flatten(x, 2, 3) for x in parts]
        return (flat[0], flat[1], flat[2]) if len(flat) == 3 else (given["q"], flat[0], flat[1])


@dataclass(frozen=True)
class Grouped(Unpacked):
    """com.microsoft GroupQueryAttention without rotation, where each sample has a cache of its own length.

    The operator writes new keys behind the valid part of the cache. Here they follow the whole cache, and
    what lies between is hidden: attention does not mind the order of keys.
    """

    used = frozenset({"q", "k", "v", "past_key", "past_value", "lengths", "total", "attention_bias"})
    floats = frozenset({"q", "k", "v", "past_key", "past_value"})

    def operands(self, given: dict[str, Any]) -> tuple[Any, Any, Any]:
        """See `Unpacked`."""
        q, k, v = (given["q"], given["k"], given["v"]) if "k" in given else _cut(given["q"], 2, self.widths)
        return self.q_heads(q), self.kv_heads(k), self.kv_heads(v)

    def rules(self, given: dict[str, Any], q: Any, k: Any, new_k: Any) -> list[Any]:
        """See `Unpacked`."""
        steps, index = _count(query_positions(q), 2), key_positions(k)
        cached = torch.sub(_count(index, 3), steps)
        lengths = torch.unflatten(torch.flatten(given["lengths"]), 0, (-1, 1, 1, 1))
        start = torch.clamp(torch.sub(torch.add(lengths, 1), steps), min=0.0)
        fresh = torch.ge(index, cached)
        # A new key stands at `start` and behind it, wherever it is kept here.
        position = torch.where(fresh, torch.add(torch.sub(index, cached), start), index)
        behind = torch.sub(torch.add(query_positions(q), start), position)
        rules = [torch.ge(behind, 0.0), torch.logical_or(fresh, torch.lt(index, start))]
        if self.left >= 0:
            rules.append(torch.le(behind, float(self.left)))
        return rules

    def consistent(self, shapes: Sequence[Shape]) -> dict[int, torch.Tensor]:
        """Lengths that fit the shapes: the first sample has a full cache, the others have less."""
        index = dict(self.names)
        q, k, _ = self.shapes(shapes)
        batch, steps, total = q[0], q[2], k[2]
        spare = torch.arange(batch).clamp(max=total - steps)
        lengths = (total - 1 - spare).to(torch.int32).reshape(shapes[index["lengths"]] or (batch,))
        found = {index["lengths"]: lengths}
        if "total" in index:
            found[index["total"]] = torch.full(shapes[index["total"]], total, dtype=torch.int32)
        return found


def _items(x: Any, axis: int, count: int) -> list[Any]:
    """The values along an axis of known size; proxies cannot be iterated, so `unbind` does not do."""
    return [torch.squeeze(torch.narrow(x, axis, i, 1), axis) for i in range(count)]


def _cut(x: Any, axis: int, widths: Sequence[int]) -> tuple[Any, Any, Any]:
    starts = (0, widths[0], widths[0] + widths[1])
    q, k, v = (torch.narrow(x, axis, start, width) for start, width in zip(starts, widths, strict=True))
    return q, k, v
