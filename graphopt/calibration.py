"""Calibration data: whatever the user has, checked against the model's inputs before any work starts."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graphopt.decoders import sample
from graphopt.errors import GraphOptError
from graphopt.graph import Graph, ValueSpec, check_value
from graphopt.onnxfile.tensors import from_numpy
from graphopt.rewrite.context import Track, _silent
from graphopt.synthetic import Synthetic, describe_ranges

BATCH = 16
DEFAULT_RANDOM = 8


@dataclass(frozen=True)
class Calibration:
    """Batches of flat input values, in the order of the graph's inputs; iterated as often as needed."""

    batches: Sequence[tuple[Any, ...]]
    description: str
    synthetic: bool = False

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def calibration_for(
    graph: Graph,
    source: Any,
    *,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    fitting: bool = False,
    track: Track = _silent,
) -> Calibration:
    """Make calibration batches from what the user gave.

    Of a language model with a cache or a state, the tokens alone suffice: everything is then visible, positions are
    counted, caches are empty and states zero.

    Args:
        graph: the model that the data is for.
        source: a path to an .npz file or a folder of them, an iterable of input dicts, a DataLoader, a number of
            random batches, `"random"`, `"self"` or `"self:32x256"` for texts (here 32 of 256 tokens) that a language
            model writes itself, or None for a few random batches.
        seed: for random inputs, and for the texts that the model writes.
        sizes: sizes of symbolic dims for random inputs.
        fitting: something is fitted on the data, so None means `"self"` where the model can write text.
        track: wraps the writing of text, for progress bars.

    Raises:
        GraphOptError: names, shapes or types do not fit the model, or there is no data in it.
    """
    if sample.is_self(source):
        return sample.own_text(graph, source, seed=seed, sizes=sizes, track=track)
    if source is None and fitting:
        own = sample.own_text_by_default(graph, seed=seed, sizes=sizes, track=track)
        if own is not None:
            return own
    if source is None or isinstance(source, int) or source == "random":
        count = source if isinstance(source, int) else DEFAULT_RANDOM
        if count < 1:
            raise GraphOptError(f"expected at least 1 random calibration batch, got {count}")
        synthetic = Synthetic(graph, sizes)
        batches = [synthetic.batch(seed + i) for i in range(count)]
        return Calibration(batches, f"{count} random batches: {describe_ranges(graph)}", synthetic=True)
    if isinstance(source, (str, Path)):
        return _from_path(graph, Path(source))
    if not isinstance(source, Iterable):
        raise GraphOptError(
            f"expected calibration data as a path, an iterable or a number, got {type(source).__name__}"
        )
    batches = [_flat(graph, item, f"calibration item {i}") for i, item in enumerate(source)]
    if not batches:
        raise GraphOptError("expected calibration data, but the iterable is empty")
    return Calibration(batches, f"{len(batches)} batches")


def _from_path(graph: Graph, path: Path) -> Calibration:
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files:
        raise GraphOptError(f"expected .npz files in the calibration folder {path}, found none")
    batches = [batch for file in files for batch in _from_npz(graph, file)]
    return Calibration(batches, f"{len(batches)} batches from {path.name}")


def _from_npz(graph: Graph, path: Path) -> list[tuple[Any, ...]]:
    if not path.exists():
        raise GraphOptError(f"expected calibration data, but {path} does not exist; check the path")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, AttributeError) as error:
        raise GraphOptError(f"expected an .npz file of arrays, but {path} cannot be read as one: {error}") from error
    if not any(a.size for a in arrays.values()):
        raise GraphOptError(f"expected arrays with values in {path}, but all are empty or there is none")
    return [_flat(graph, feeds, str(path)) for feeds in _split(graph, arrays, path)]


def _split(graph: Graph, arrays: dict[str, np.ndarray[Any, Any]], path: Path) -> Iterator[dict[str, Any]]:
    """Batches out of long arrays: along a leading axis that the model lacks, or along its dynamic first axis."""
    specs = {spec.name: spec for spec in graph.inputs}
    extra = {name for name, a in arrays.items() if name in specs and _rank(specs[name]) == a.ndim - 1}
    if extra and extra == set(arrays):
        lengths = {len(a) for a in arrays.values()}
        if len(lengths) > 1:
            raise GraphOptError(f"expected as many batches of every input in {path}, found {sorted(lengths)}")
        for i in range(lengths.pop()):
            yield {name: a[i] for name, a in arrays.items()}
        return
    dynamic = all(spec.shape and not isinstance(spec.shape[0], int) for spec in graph.inputs)
    lengths = {len(a) if a.ndim else 0 for a in arrays.values()}
    if not dynamic or len(lengths) != 1:
        yield dict(arrays)
        return
    for start in range(0, lengths.pop(), BATCH):
        yield {name: a[start : start + BATCH] for name, a in arrays.items()}


def _rank(spec: ValueSpec) -> int | None:
    return None if spec.shape is None else len(spec.shape)


def _flat(graph: Graph, item: Any, where: str) -> tuple[Any, ...]:
    """One batch in input order; tensors and arrays, by name or in order."""
    if isinstance(item, torch.Tensor):
        item = (item,)
    if isinstance(item, Mapping):
        feeds: Mapping[str, Any] = sample.completed(graph, item)
    elif isinstance(item, (tuple, list)) and len(item) == len(graph.inputs):
        feeds = {spec.name: value for spec, value in zip(graph.inputs, item, strict=True)}
    else:
        raise GraphOptError(
            f"{where}: expected a dict of inputs or {len(graph.inputs)} values, got {type(item).__name__}"
        )
    try:
        values = [from_numpy(v) if isinstance(v, np.ndarray) else v for v in graph.ordered(feeds)]
    except GraphOptError as error:
        raise GraphOptError(f"{where}: {error}") from error
    # One may be empty, as a cache is before the first token.
    if not any(getattr(value, "numel", lambda: 1)() for value in values):
        raise GraphOptError(f"{where}: expected values, but every input is empty")
    for spec, value in zip(graph.inputs, values, strict=True):
        _check_content(spec, value, where)
    return tuple(values)


def _check_content(spec: ValueSpec, value: Any, where: str) -> None:
    check_value(spec, value)
    if not isinstance(value, torch.Tensor):
        return
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise GraphOptError(f"{where}: input {spec} holds NaN or infinite values; remove those samples")
