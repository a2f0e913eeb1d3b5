"""Attention in exports of transformers models, by both exporters, with random weights."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("transformers")

from graphopt.frontends.onnx import load_onnx
from graphopt.sites import MaskKind, find

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "attention_recognition.py"


def _benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("attention_recognition", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


recognition = _benchmark()
CAUSAL = {MaskKind.CAUSAL, MaskKind.CAUSAL_PADDING}
KINDS = {"bert": {MaskKind.PADDING}, "gpt2": CAUSAL, "llama": CAUSAL, "vit": {MaskKind.NONE}}
# Without a compiled graph to build, TorchScript is quick enough for the fast suite.
EXPORTERS = [pytest.param(False, id="TorchScript"), pytest.param(True, id="dynamo", marks=pytest.mark.slow)]


@pytest.mark.parametrize("dynamo", EXPORTERS)
@pytest.mark.parametrize("name", KINDS)
def test_exports(name: str, dynamo: bool, tmp_path: Path) -> None:
    path = recognition.export(tmp_path / "model.onnx", recognition.MODELS[name], dynamo)
    graph = load_onnx(path)
    findings = find(graph, "attention")
    assert not findings.refusals
    assert len(findings.sites) == 2
    for site in findings.sites:
        assert site.mask.kind in KINDS[name], site.mask.reason
        assert (site.query_heads, site.kv_heads) == (4, 2 if name == "llama" else 4)
        assert site.head_dim == site.value_dim == 8
        assert site.scale == pytest.approx(8**-0.5)
        assert site.rope == (name == "llama")
    assert recognition.largest_error(graph, findings.sites) < 1e-3
