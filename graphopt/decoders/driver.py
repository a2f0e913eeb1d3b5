"""Running a language model step by step, whatever it remembers: nothing, a growing cache, a window, a state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from graphopt.decoders.interface import Interface
from graphopt.errors import GraphOptError
from graphopt.graph import Graph, ValueSpec
from graphopt.onnxfile.tensors import TORCH_DTYPES, element_type, to_numpy

_Array = np.ndarray[Any, Any]
_Run = Callable[[Mapping[str, Any]], Mapping[str, Any]]
# As onnxruntime spells element types.
_SPELLED = {"float": torch.float32, "double": torch.float64} | {
    str(dtype).removeprefix("torch."): dtype for dtype in TORCH_DTYPES.values()
}


class Session(Protocol):
    """A session of the onnxruntime backend."""

    raw: Any

    def run(self, feeds: Mapping[str, _Array]) -> dict[str, Any]:
        """All outputs by name."""


@dataclass(frozen=True)
class _Declared:
    inputs: Sequence[ValueSpec]
    outputs: Sequence[ValueSpec]


Model = str | Path | Graph | Session | Callable[[torch.Tensor], torch.Tensor]
"""A path to an .onnx file (run by onnxruntime), a graph (run by torch), a session, or a callable tokens -> logits."""


class Driver:
    """A language model and what it remembers of the text so far.

    A model without memory is given the whole text at each step. One with caches or states is given the new tokens and
    what it returned at the step before: states begin at zero, caches at length 0, and both are fed back as they are,
    so a model that cuts its cache to a window keeps only that; the mask is that of as many last tokens as the longest
    cache holds, and of the new ones. Positions are counted here, from each text's first token that is no padding.
    """

    def __init__(self, model: Model) -> None:
        """Args: model: see `Model`.

        Raises:
            GraphOptError: it has no tokens, no logits, or inputs that no text gives a value for.
        """
        self.interface, self._run = _opened(model)
        check_complete(self.interface)
        self._text = np.zeros((0, 0), np.int64)
        self._mask = np.zeros((0, 0), np.int64)
        self._memory: dict[str, Any] = {}

    def restart(self) -> None:
        """Forget the text."""
        self._text, self._mask, self._memory = np.zeros((0, 0), np.int64), np.zeros((0, 0), np.int64), {}

    def feed(self, tokens: Any, mask: Any = None) -> _Array:
        """Append tokens to the text.

        Args:
            tokens: `[B, T]`.
            mask: `[B, T]`, 0 for padding, which is on the left; None for no padding.

        Returns:
            The logits `[B, T, V]`, in fp32 or in the model's own fp64.

        Raises:
            GraphOptError: the tokens do not fit the model or what was fed before, or it cannot run on them.
        """
        ids = token_array(tokens, self.interface.vocabulary)
        batch, length = ids.shape
        seen = np.ones_like(ids) if mask is None else mask_array(mask, ids.shape)
        if not seen.all() and self.interface.attention_mask is None:
            raise GraphOptError("expected texts of one length, as the model has no attention mask to mark padding with")
        if self._text.size and len(self._text) != batch:
            raise GraphOptError(f"expected {len(self._text)} sequences as at the step before, got {batch}")
        self._text = np.concatenate([self._text.reshape(batch, -1), ids], 1)
        self._mask = np.concatenate([self._mask.reshape(batch, -1), seen], 1)
        if (np.diff(self._mask, axis=1) < 0).any():
            raise GraphOptError(
                "expected padding only in front of a text, found some within or behind; pad on the left"
            )
        logits = self._remembering(ids) if self.interface.memories else self._whole()
        if logits.ndim != 3 or len(logits) != batch or logits.shape[1] < length:
            raise GraphOptError(
                f"expected logits of {batch} x {length} tokens, the model gives shape {list(logits.shape)}"
            )
        return logits[:, -length:]

    def _whole(self) -> _Array:
        text, mask = self._text, self._mask
        length, fixed = text.shape[1], self.interface.length
        if fixed is not None and length > fixed:
            raise GraphOptError(f"expected at most {fixed} tokens, which is the model's only length, got {length}")
        if fixed is not None:
            # No token sees a later one, so what stands behind the text does not matter.
            text, mask = (np.pad(a, ((0, 0), (0, fixed - length))) for a in (text, mask))
        return self._logits(filled(self.interface, text, mask))[:, :length]

    def _remembering(self, ids: _Array) -> _Array:
        memory = self._memory or {m.past.name: m.empty(len(ids)) for m in self.interface.memories}
        axes = {m.past.name: m.axis for m in self.interface.caches}
        # Not the length of the text: a model with a window hands back less than it was given.
        cached = max((memory[name].shape[axis] for name, axis in axes.items() if axis is not None), default=0)
        length = ids.shape[1]
        feeds = filled(self.interface, ids, self._mask[:, self._mask.shape[1] - cached - length :])
        if self.interface.position_ids is not None:
            positions = positions_of(self._mask)[:, -length:]
            feeds[self.interface.position_ids.name] = cast(self.interface.position_ids, positions)
        outputs = self._call(feeds | memory)
        self._memory = {m.past.name: outputs[m.present.name] for m in self.interface.memories}
        return _wide(outputs[self.interface.logits.name])

    def _logits(self, feeds: Mapping[str, Any]) -> _Array:
        return _wide(self._call(feeds)[self.interface.logits.name])

    def _call(self, feeds: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            return self._run(feeds)
        except GraphOptError:
            raise
        except Exception as error:  # neither a module nor a session has an exception of its own
            shape = list(feeds[self.interface.tokens.name].shape)
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            raise GraphOptError(f"the model cannot run on tokens of shape {shape}: {reason}") from error


def _wide(logits: Any) -> _Array:
    array = np.asarray(logits)
    return array if array.dtype == np.float64 else array.astype(np.float32)


def _opened(model: Model) -> tuple[Interface, _Run]:
    if isinstance(model, (str, Path)):
        from graphopt.frontends.onnx import load_onnx
        from graphopt.registry import backend

        graph = load_onnx(model)
        return Interface.of(graph), backend("onnxruntime").session(graph).run
    if isinstance(model, Graph):
        return Interface.of(model), model.run
    if hasattr(model, "raw") and hasattr(model, "run"):
        return Interface.of(_declared(model.raw)), model.run
    if callable(model):
        return _ANY, _called(model)
    raise GraphOptError(
        f"expected a path, a Graph, a session or a callable from tokens to logits, got {type(model).__name__}"
    )


_ANY = Interface(ValueSpec("tokens", torch.int64, (None, None)), ValueSpec("logits", torch.float32, (None, None, None)))


def _called(function: Callable[[torch.Tensor], torch.Tensor]) -> _Run:
    def run(feeds: Mapping[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            logits = function(torch.from_numpy(feeds["tokens"]))
        if not isinstance(logits, torch.Tensor):
            raise GraphOptError(f"expected a callable that returns the logits, it returns {type(logits).__name__}")
        return {"logits": to_numpy(logits if logits.dtype == torch.float64 else logits.float())}

    return run


def _declared(raw: Any) -> _Declared:
    def specs(values: Any) -> list[ValueSpec]:
        return [ValueSpec(v.name, _SPELLED.get(v.type[len("tensor(") : -1]), tuple(v.shape)) for v in values]

    return _Declared(specs(raw.get_inputs()), specs(raw.get_outputs()))


def check_complete(interface: Interface) -> None:
    """Check that a text gives a value for every input.

    Raises:
        GraphOptError: it does not.
    """
    if interface.others:
        listed = ", ".join(map(str, interface.others))
        raise GraphOptError(
            f"expected tokens, an attention mask, positions, caches and states as the only inputs, found also {listed}"
        )


def token_array(tokens: Any, vocabulary: int | None) -> _Array:
    """Tokens as int64 `[B, T]`; a single text `[T]` becomes a batch of one.

    Raises:
        GraphOptError: they are no integers, there are none, or they lie outside of the vocabulary.
    """
    array = np.asarray(to_numpy(tokens))
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or array.dtype.kind not in "iu" or not array.size:
        raise GraphOptError(
            f"expected integer tokens [batch, length] with at least one each, got {array.dtype} {list(array.shape)}"
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise GraphOptError(f"expected tokens in [0, {vocabulary or 'V'}), got values from {low} to {high}")
    return array.astype(np.int64)


def mask_array(mask: Any, shape: tuple[int, ...]) -> _Array:
    """A mask as int64 `[B, T]`, 0 for padding.

    Raises:
        GraphOptError: it has another shape than the tokens, or other values than 0 and 1.
    """
    array = np.asarray(to_numpy(mask))
    array = array[None] if array.ndim == 1 else array
    if array.shape != shape:
        raise GraphOptError(f"expected a mask of the tokens' shape {list(shape)}, got {list(array.shape)}")
    if not np.isin(array, (0, 1)).all():
        raise GraphOptError("expected a mask of zeros for padding and ones for tokens, found other values")
    return array.astype(np.int64)


def positions_of(mask: _Array) -> _Array:
    """Each token's place in its text, `[B, T]`; padding is at 0."""
    positions: _Array = np.maximum(mask.cumsum(1) - 1, 0)
    return positions


def filled(interface: Interface, tokens: _Array, mask: _Array | None = None) -> dict[str, Any]:
    """All inputs but caches and states: `tokens` `[B, T]` with a mask `[B, P + T]`, positions counted from its start.

    Without a mask, everything is visible.
    """
    seen = np.ones_like(tokens) if mask is None else mask
    feeds = {interface.tokens.name: cast(interface.tokens, tokens)}
    if interface.attention_mask is not None:
        feeds[interface.attention_mask.name] = cast(interface.attention_mask, seen)
    if interface.position_ids is not None:
        positions = positions_of(seen)[:, -tokens.shape[1] :]
        feeds[interface.position_ids.name] = cast(interface.position_ids, positions)
    return feeds


def cast(spec: ValueSpec, array: _Array) -> _Array:
    """An array of integers in the type that an input declares."""
    assert element_type(spec.dtype)
    assert isinstance(spec.dtype, torch.dtype)
    return np.asarray(to_numpy(torch.from_numpy(np.ascontiguousarray(array)).to(spec.dtype)))
