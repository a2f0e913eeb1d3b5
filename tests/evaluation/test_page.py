"""Pages, plots and tables: complete, self-contained, and with every name escaped."""

import html.parser
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from graphopt import GraphOptError
from graphopt.evaluation import ablate
from graphopt.evaluation.page import ablation_page, read_report, transform_page
from graphopt.evaluation.plots import draw, spread
from graphopt.evaluation.table import markdown
from graphopt.graph import Graph

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}${7}$\u202e\x1b[31m'


class Reader(html.parser.HTMLParser):
    """What a page holds: tags, addresses, and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def evil_report() -> dict[str, Any]:
    """A report of `transform` in which every name is an attack."""
    site = {
        "name": EVIL,
        "kind": EVIL,
        "status": "rewritten",
        "reason": EVIL,
        "errors": {"after_fit": 0.125, EVIL: 1.0},
    }
    quantity = {"expression": EVIL, "dims": [], "value": 12}
    model = {"path": EVIL, "sha256": EVIL, "bytes": 1234, "opset": 17}
    return {
        "version": 1,
        "pipeline": [EVIL],
        "input": model,
        "output": {},
        "calibration": EVIL,
        "passes": [
            {"name": EVIL, "options": {}, "equivalence": EVIL, "seconds": 1.5, "sites": [site], "notes": [EVIL]}
        ],
        "cost": {"before": {EVIL: quantity, "sizes": {EVIL: 3}}, "after": {EVIL: {**quantity, "value": 6}}},
        "verification": {
            "samples": 4,
            "outputs": [{"name": EVIL, "max_abs": 0.5, "rel_rms": None, "cosine": 0.25, "bitwise": False}],
            "unverified": EVIL,
        },
        "notes": [EVIL],
        "environment": {EVIL: EVIL},
    }


def evil_ablation() -> dict[str, Any]:
    row = {
        "key": EVIL,
        "label": EVIL,
        "pipeline": [EVIL],
        "nats": 1.5,
        "error": None,
        "perplexity": None,
        "ratio": 2.0,
        "difference": 0.5,
        "difference_error": None,
        "tokens": 10,
        "buckets": [{"first": 1, "last": 1, "nats": 1.5, "tokens": 10}],
        "recall": [{"distance": 0, "gain": 0.5, "error": 0.1, "first": 1.0, "second": 1.0, "unseen": 1.5}],
        "seconds": 1.0,
        "sites": {"rewritten": 1, "refused": 0, "reverted": 0},
        "notes": [EVIL],
    }
    return {
        "schema": "graphopt.ablation/1",
        "pipeline": [EVIL],
        "input": {"path": EVIL},
        "calibration": EVIL,
        "held_out": {"description": EVIL, "texts": 2, "length": 8, "sha256": ""},
        "seed": 0,
        "fit_steps": None,
        "recall": {"segment": 2, "texts": 2, "distances": [0]},
        "rows": [{**row, "key": "original"}, row],
        "left_out": [{"key": EVIL, "label": EVIL, "reason": EVIL, "failed": True}],
        "notes": [EVIL],
        "environment": {EVIL: EVIL},
    }


def check_harmless(page: str) -> None:
    found = Reader(page)
    assert "script" not in found.tags
    assert not found.handlers
    assert all(address.startswith("data:image/svg+xml;base64,") for address in found.addresses)
    assert "<script>alert(1)</script>" in found.text  # it is there as text
    assert "{{ 7 * 7 }}" in found.text
    assert not {"\u202e", "\x1b"} & set(page)
    assert "default-src 'none'" in page


def test_a_transform_report_full_of_attacks() -> None:
    page = transform_page([(EVIL, evil_report())])
    check_harmless(page)
    for figure in ("0.125", "1,234", "0.250000", "0.5"):
        assert figure in page


def test_an_ablation_full_of_attacks(tmp_path: Path) -> None:
    data = evil_ablation()
    plots = draw(data, tmp_path)
    for path in plots.values():
        root = ElementTree.fromstring(path.read_text())  # also: the label broke no tag open
        assert not [e for e in root.iter() if e.tag.endswith("script")]
    check_harmless(ablation_page(data, plots))
    text = markdown(data)
    assert "<" not in text
    assert "\\[" in text  # no link, either
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 4
    bars = {line.replace("\\|", "").count("|") for line in table}
    assert len(bars) == 1


def test_a_real_ablation(module_graph: Graph, tmp_path: Path) -> None:
    held_out = np.random.default_rng(1).integers(0, 13, (8, 24))
    spelling = "linearize{window=4,fit_steps=2,lora_steps=0}"
    rows = ["swap", "window", "transfer"]
    found = ablate(module_graph, spelling, calibration="self:20x24", held_out=held_out, rows=rows, texts=2)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    plots = draw(data, tmp_path)
    assert set(plots) == {"cross_entropy", "recall", "perplexity"}
    for path in plots.values():
        words = " ".join(ElementTree.fromstring(path.read_text()).itertext())
        for label in ("original", "after swap", "window only", "after transfer"):
            assert label in words, path.name
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    page = Reader(ablation_page(data, plots))
    assert page.tags.count("img") == 3
    for text in (f"{found.row('swap').measured.nats:.3f}", "train=transfer", "8 held-out texts of at most 24 tokens"):
        assert text in page.text
    first = (tmp_path / "recall.svg").read_bytes()
    draw(data, tmp_path)
    assert (tmp_path / "recall.svg").read_bytes() == first
    lines = markdown(data).splitlines()
    assert sum(line.startswith("| ") for line in lines) == 6


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", "null", "1", "{}", '{"version": 2, "pipeline": [], "passes": []}', "[" * 100_000, "\x00\xff"],
)
def test_files_that_are_no_report(content: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(GraphOptError, match="expected a"):
        read_report(path)


@pytest.mark.parametrize("field", ["pipeline", "passes", "verification", "cost", "environment", "input", "notes"])
def test_incomplete_reports(field: str) -> None:
    whole = evil_report()
    for data in ({key: value for key, value in whole.items() if key != field}, {**whole, field: 1}):
        with pytest.raises(GraphOptError, match="expected a complete report"):
            transform_page([("name", data)])


@pytest.mark.parametrize("field", ["rows", "recall", "held_out", "pipeline", "left_out", "environment"])
def test_incomplete_ablations(field: str) -> None:
    data = evil_ablation()
    del data[field]
    with pytest.raises(GraphOptError, match="expected a complete report"):
        ablation_page(data, {})


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(GraphOptError, match=r'pip install "graphopt\[report\]"'):
        transform_page([("name", evil_report())])


def test_labels_keep_apart_and_in_order() -> None:
    values = [1.0, 1.0, 1.01, 5.0, 0.99]
    places = spread(values, 0.5)
    assert places[3] == 5.0
    order = sorted(range(5), key=lambda i: values[i])
    gaps = np.diff([places[i] for i in order])
    assert (gaps > 0.5 - 1e-9).all()
    # As near to where they belong as that allows: the four share their mean.
    assert np.mean([places[i] for i in (0, 1, 2, 4)]) == pytest.approx(1.0)
    assert spread([], 1.0) == []
