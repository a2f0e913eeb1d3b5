"""How much of the attention in real models is recognised, and why the rest is not.

Runs over the node tests of the onnx package, the models of a data folder, and exports of small random-weight
models of the transformers package.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from graphopt.errors import GraphOptError
from graphopt.execute import execute
from graphopt.frontends.onnx import load_onnx
from graphopt.graph import Graph
from graphopt.onnxfile.tensors import from_numpy
from graphopt.sites.attention import compare, find
from graphopt.sites.samples import sample_inputs, size_choices

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass
class Row:
    """One model: how many candidates, how many recognised, and the reasons for the others."""

    suite: str
    model: str
    recognised: int = 0
    candidates: int = 0
    kinds: list[str] = field(default_factory=list)
    error: float = 0.0
    """Largest difference of a site from what the model computes, relative to the largest value; differences in
    half precision are divided by how much wider its tolerance is than that of float32."""
    refusals: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0


def node_cases(expanded: bool) -> Iterator[tuple[str, onnx.ModelProto, list[Any]]]:
    """The onnx package's own tests of Attention: name, model, published inputs."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other operators' cases overflow on purpose
        cases = collect_testcases("Attention")
    for case in cases:
        if case.name.startswith("test_attention_") and case.name.endswith("_expanded") == expanded:
            yield case.name, case.model, [from_numpy(np.asarray(x)) for x in case.data_sets[0][0]]


def exports(folder: Path, dynamo: bool) -> Iterator[tuple[str, Callable[[], Path]]]:
    """Small random-weight models of the transformers package; calling the second item exports one."""
    for name, make in MODELS.items():
        yield name, lambda name=name, make=make: export(folder / f"{name}-{dynamo}.onnx", make, dynamo)


def _bert() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37)
    config._attn_implementation = "eager"
    return BertModel(config), _tokens(50)


def _gpt2() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, use_cache=False)
    config._attn_implementation = "eager"
    return GPT2LMHeadModel(config), _tokens(50)


def _llama() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=37, use_cache=False,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config), _tokens(50)


def _vit() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=37,
        image_size=16,
        patch_size=4,
    )
    return ViTModel(config), {"pixel_values": torch.randn(2, 3, 16, 16)}


def _tokens(vocabulary: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, vocabulary, (2, 7))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


MODELS: dict[str, Callable[[], tuple[torch.nn.Module, dict[str, torch.Tensor]]]] = {
    "bert": _bert,
    "gpt2": _gpt2,
    "llama": _llama,
    "vit": _vit,
}


class First(torch.nn.Module):
    """A model with the first of its outputs as its only one."""

    def __init__(self, model: torch.nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        """Args: values: of the inputs, in the order of `names`."""
        result: torch.Tensor = self.model(**dict(zip(self.names, values, strict=True)))[0]
        return result


def export(path: Path, make: Callable[[], tuple[torch.nn.Module, dict[str, torch.Tensor]]], dynamo: bool) -> Path:
    """Write one model as .onnx, with symbolic batch and length."""
    torch.manual_seed(0)
    model, inputs = make()
    names, values = list(inputs), tuple(inputs.values())
    wrapped = First(model.eval(), names)
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        if dynamo:
            dims = tuple(_dynamic(v) for v in values)
            torch.onnx.export(wrapped, values, path, dynamo=True, input_names=names, dynamic_shapes=(dims,))
        else:
            axes = {n: {0: "batch", 1: "length"} if v.dim() == 2 else {0: "batch"} for n, v in inputs.items()}
            torch.onnx.export(wrapped, values, path, dynamo=False, input_names=names, dynamic_axes=axes)
    logging.disable(logging.NOTSET)
    return path


def _dynamic(value: torch.Tensor) -> dict[int, Any]:
    auto = torch.export.Dim.DYNAMIC
    return {0: auto, 1: auto} if value.dim() == 2 else {0: auto}


def largest_error(graph: Graph, sites: Any, values: list[Any] | None = None) -> float:
    """How far the meaning of the sites is from what the model computes; see `Row.error`."""
    seen: dict[Any, Any] = {}
    wanted = {n for s in sites for n in (*s.inputs, s.output)}

    def observe(node: Any, value: Any) -> None:
        if node in wanted:
            seen[node] = value

    with torch.no_grad():
        _run(graph, values, observe)
    worst = 0.0
    for site in sites:
        error = compare(site, [seen[n] for n in site.inputs], seen[site.output])
        half = max(TOLERANCE.get(v.dtype, 1e-3) for v in (seen[n] for n in (*site.inputs, site.output)))
        worst = max(worst, error / half * 1e-3)
    return worst


def _run(graph: Graph, values: list[Any] | None, observe: Any) -> None:
    if values is not None:
        execute(graph, values, observe)
        return
    problem: Exception | None = None
    for sizes in size_choices(graph):
        for pattern in ("right", "ones", "zeros"):
            try:
                execute(graph, sample_inputs(graph, 0, sizes, pattern), observe)
            except Exception as error:  # the sizes of this choice do not fit this model: the next may
                problem = error
            else:
                return
    raise GraphOptError(f"no sample inputs run: {problem}")


def examine(suite: str, name: str, graph: Graph, values: list[Any] | None = None) -> Row:
    """Find the attention of one model and check every site numerically."""
    started = time.perf_counter()
    found = find(graph)
    row = Row(suite, name, len(found.sites), len(found.sites) + len(found.refusals))
    row.seconds = round(time.perf_counter() - started, 3)
    row.kinds = sorted({s.mask.kind.value for s in found.sites})
    row.refusals = [{"node": r.node, "reason": r.reason} for r in found.refusals]
    if found.sites:
        row.error = largest_error(graph, found.sites, values)
    return row


def rows(data: Path | None) -> Iterator[Row]:
    """All models of all suites."""
    for suite, expanded in (("onnx Attention, expanded", True), ("onnx Attention", False)):
        for name, model, values in node_cases(expanded):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.onnx"
                onnx.save(model, path)
                yield examine(suite, name, load_onnx(path), values)
    for suite in ("zoo", "zoo_extra") if data is not None else ():
        assert data is not None
        for path in sorted((data / suite).rglob("*.onnx")):
            row = examine(suite, path.stem, load_onnx(path))
            if row.candidates:
                yield row
    for dynamo in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            for name, make in exports(Path(folder), dynamo):
                exporter = "torch.export" if dynamo else "TorchScript"
                yield examine(f"transformers, {exporter}", name, load_onnx(make()))


def suites(found: list[Row]) -> list[dict[str, Any]]:
    """Recognised of candidates per suite, and the largest error of its sites."""
    result = []
    for suite in dict.fromkeys(r.suite for r in found):
        own = [r for r in found if r.suite == suite]
        result.append(
            {
                "suite": suite,
                "recognised": sum(r.recognised for r in own),
                "candidates": sum(r.candidates for r in own),
                "models": len(own),
                "error": max(r.error for r in own),
            }
        )
    return result


def run() -> None:
    """Examine every model; those of the data folder are left out where there is none."""
    # Tests load this file by its path, where the package that it belongs to cannot be imported.
    from benchmarks.common import DATA, show, store

    data = Path(os.environ.get("GRAPHOPT_TEST_DATA", DATA))
    found = list(rows(data if data.is_dir() else None))
    summary = suites(found)
    show("Attention recognised", list(summary[0]), [list(s.values()) for s in summary])
    refused = [[r.model, x["node"], x["reason"]] for r in found for x in r.refusals]
    show("Refused", ["model", "node", "reason"], refused)
    store("attention_recognition", {"suites": summary, "rows": [asdict(r) for r in found]})
