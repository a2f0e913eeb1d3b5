"""The code in the documentation runs as it stands."""

import dataclasses
import importlib
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


PAGES = ["docs/python.md", "docs/index.md", "docs/onnx.md", "docs/evaluation.md", "docs/kernels.md"]


@pytest.mark.parametrize("page", PAGES)
def test_pages(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in BLOCK.findall((ROOT / page).read_text()):
        exec(compile(code, page, "exec"), names)
    if page.endswith("python.md"):
        assert "did you mean 'linearize'" in capsys.readouterr().out


def test_decoders(tmp_path, monkeypatch):
    """On the first layer of the tiny decoder: exporting takes seconds for each."""
    monkeypatch.syspath_prepend(ROOT / "samples")
    model, export = (importlib.import_module(f"tiny_decoder.{name}") for name in ("model", "export"))
    tiny = importlib.import_module("tiny_decoder.checkpoint").load_tiny()
    decoder = model.Decoder(dataclasses.replace(tiny.config, layers=1))
    decoder.load_state_dict({k: v for k, v in tiny.state_dict().items() if k in decoder.state_dict()})
    export.export(decoder, tmp_path / "decoder")
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in BLOCK.findall((ROOT / "docs/decoders.md").read_text()):
        exec(compile(code, "docs/decoders.md", "exec"), names)
    assert len(names["written"]) == 40


def test_readme(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("attention_models", ROOT / "tests/passes/attention_models.py")
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    monkeypatch.chdir(tmp_path)
    models.export(models.Block(), "model.onnx")
    x, mask = models.example()
    names = {"x": x.numpy(), "mask": mask.numpy()}
    (code,) = BLOCK.findall((ROOT / "README.md").read_text())
    exec(compile(code, "README.md", "exec"), names)
    assert np.isfinite(names["outputs"]["y"]).all()
    assert "matmul-softmax-matmul 4 8 padding" in capsys.readouterr().out


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
