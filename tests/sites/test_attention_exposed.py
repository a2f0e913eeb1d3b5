"""Attention whose scores or weights are used elsewhere too: a rewrite of the result leaves them as they are."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
import torch
from onnx.backend.test.case.node import collect_testcases

import graphopt
from graphopt.backends.onnxruntime import Session
from graphopt.graph import Graph
from graphopt.passes.attention.linearize import Linearize
from graphopt.rewrite import Context, Equivalence, SitePass
from graphopt.sites import AttentionSite, find
from graphopt.sites.vocabulary import kind

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # other operators' cases overflow on purpose
    CASES = {case.name: case for case in collect_testcases("Attention")}

# Which scores are returned: those of the product, capped, masked, and the weights.
MODES = ["with_qk_matmul", "with_qk_matmul_softcap", "with_qk_matmul_bias", "with_qk_matmul_softmax"]
LAST = {"with_qk_matmul": "matmul", "with_qk_matmul_softcap": "mul", "with_qk_matmul_bias": "add"}


class Unnormalised(torch.nn.Module):
    """q k^T v: far from attention, so that a result that is still the original's shows."""

    def __init__(self, site: AttentionSite) -> None:
        super().__init__()
        self.site = site

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        x = self.site.split(*values)
        return self.site.merge(torch.matmul(torch.matmul(x.q, torch.transpose(x.k, -1, -2)), x.v))


@dataclass(frozen=True)
class WithoutSoftmax(SitePass):
    """softmax(s q k^T) v   ->   q k^T v"""

    name: ClassVar[str] = "without_softmax"
    kind: ClassVar[str] = "attention"
    equivalence: ClassVar[Equivalence] = Equivalence.ARCHITECTURE

    def build(self, site: AttentionSite, context: Context) -> torch.nn.Module:
        return Unnormalised(site)


def load(name: str, folder: Path) -> tuple[Graph, dict[str, np.ndarray]]:
    case = CASES[f"test_attention_4d_{name}"]
    path = folder / "model.onnx"
    onnx.save(case.model, path)
    return graphopt.load(path), dict(zip([i.name for i in case.model.graph.input], case.data_sets[0][0], strict=True))


@pytest.mark.parametrize("form", ["", "_expanded"])
@pytest.mark.parametrize("mode", MODES)
def test_replacing_the_result_keeps_the_scores(mode: str, form: str, tmp_path: Path) -> None:
    graph, feeds = load(mode + form, tmp_path)
    result: Any = graph.apply(WithoutSoftmax(), calibration=[feeds])
    assert [s.status for s in result.report.passes[0].sites] == ["rewritten"]
    before, after = graph.run(feeds), result.graph.run(feeds)
    np.testing.assert_array_equal(after["qk_matmul_output"], before["qk_matmul_output"])
    q, k, v = (feeds[n] for n in "QKV")
    np.testing.assert_allclose(after["Y"], q @ k.swapaxes(-1, -2) @ v, rtol=1e-4, atol=1e-5)
    assert np.abs(after["Y"] - before["Y"]).max() > 0.1
    # Nothing stays that only the original result needed.
    kinds = [kind(n) for n in result.graph.nodes]
    if form:
        assert ("softmax" in kinds) == (mode == "with_qk_matmul_softmax")
    else:
        assert kinds.count("onnx_attention") == 1
    result.graph.save(tmp_path / "saved.onnx")
    saved = Session(tmp_path / "saved.onnx").run(feeds)
    for name in ("Y", "qk_matmul_output"):
        np.testing.assert_allclose(saved[name], after[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_exposed(mode: str, tmp_path: Path) -> None:
    graph, _ = load(f"{mode}_expanded", tmp_path)
    (site,) = find(graph, "attention").sites
    (exposed,) = site.exposed
    assert exposed in site.nodes
    assert exposed is not site.output
    assert kind(exposed) == LAST.get(mode, "where")
    graph, _ = load(mode, tmp_path)
    (site,) = find(graph, "attention").sites
    assert [n.args for n in site.exposed] == [(site.anchor, 3)]
    assert site.nodes == (site.output,)


def test_caches_are_not_exposed_and_kept_as_well(tmp_path: Path) -> None:
    graph, feeds = load("with_past_and_present", tmp_path)
    assert [s.exposed for s in find(graph, "attention").sites] == [()]
    result: Any = graph.apply(WithoutSoftmax(), calibration=[feeds])
    result.graph.save(tmp_path / "saved.onnx")
    before, saved = graph.run(feeds), Session(tmp_path / "saved.onnx").run(feeds)
    for name in ("present_key", "present_value"):
        np.testing.assert_array_equal(saved[name], before[name])
    assert np.abs(saved["Y"] - before["Y"]).max() > 0.1


def test_scores_that_nothing_uses_are_not_exposed(tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(CASES["test_attention_4d_with_qk_matmul"].model)
    del model.graph.output[1]
    onnx.save(model, tmp_path / "model.onnx")
    assert [s.exposed for s in find(graphopt.load(tmp_path / "model.onnx"), "attention").sites] == [()]


@pytest.mark.parametrize(("form", "user"), [("", "an output of the model"), ("_expanded", "qk_matmul_output")])
def test_linearize_refuses(form: str, user: str, tmp_path: Path) -> None:
    graph, _ = load(f"with_qk_matmul{form}", tmp_path)
    (site,) = find(graph, "attention").sites
    reason = f"its scores or weights are used outside (by {user}), so replacing it would save nothing"
    assert Linearize().check(site) == reason
