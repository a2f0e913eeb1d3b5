"""The code in the documentation runs as it stands."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", ["docs/python.md", "docs/index.md", "docs/onnx.md", "docs/evaluation.md"])
def test_pages(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in BLOCK.findall((ROOT / page).read_text()):
        exec(compile(code, page, "exec"), names)
    if page.endswith("python.md"):
        assert "did you mean 'linearize'" in capsys.readouterr().out


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
