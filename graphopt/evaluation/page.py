"""Reports as one HTML page that needs nothing beside it; names in them are untrusted, and escaped."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from graphopt.errors import GraphOptError
from graphopt.evaluation import table
from graphopt.evaluation.extra import optional
from graphopt.evaluation.result import SCHEMA
from graphopt.evaluation.templates import TEMPLATES
from graphopt.rewrite.report import VERSION

Data = Mapping[str, Any]
_STATUSES = ("rewritten", "refused", "reverted")
_CAPTIONS = {
    "cross_entropy": "Cross-entropy in nats per token over the position in held-out texts, one line per row",
    "recall": "Recall gain in nats per token over the distance between two copies, one line per row",
    "perplexity": "Bar chart of each row's perplexity divided by the original's",
}


def read_report(path: Path) -> Data:
    """Read a JSON report of `graphopt transform` or of an ablation.

    Raises:
        GraphOptError: the file is missing, is no JSON, or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise GraphOptError(f"expected a JSON report, but {path} cannot be read: {reason}; check the path") from error
    except (ValueError, RecursionError) as error:
        raise GraphOptError(f"expected a JSON report, but {path} is no JSON: {error}") from error
    is_transform = isinstance(data, dict) and data.get("version") == VERSION and {"pipeline", "passes"} <= data.keys()
    if is_ablation(data) or is_transform:
        found: Data = data
        return found
    raise GraphOptError(
        f"expected a report of `graphopt transform --json` (version {VERSION}) or of an ablation ({SCHEMA}), "
        f"but {path} holds something else"
    )


def is_ablation(data: Any) -> bool:
    """Whether this is what `Ablation.to_dict` gives."""
    return isinstance(data, dict) and data.get("schema") == SCHEMA


def transform_page(reports: Sequence[tuple[str, Data]]) -> str:
    """One page of reports of `graphopt transform`, each with the name that it goes by.

    Raises:
        GraphOptError: jinja2 is missing, or a report lacks what its version has.
    """
    helpers = {
        "counts": _counts,
        "error_keys": _error_keys,
        "files": _files,
        "outputs": _outputs,
        "costs": lambda report: list(_costs(report)),
        "sizes": _sizes,
    }
    return _rendered("transform", heading="graphopt report", reports=reports, **helpers)


def ablation_page(data: Data, plots: Mapping[str, Path]) -> str:
    """The page of an ablation.

    Args:
        data: `Ablation.to_dict()`.
        plots: SVG files by name, as `graphopt.evaluation.plots.draw` makes them; they go into the page.

    Raises:
        GraphOptError: jinja2 is missing, or the data lacks what its schema has.
    """
    try:
        cells = [table.cells(row, data) for row in data["rows"]]
        heads, title = table.columns(data), table.title(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _incomplete(error) from error
    images = [(_CAPTIONS.get(name, name), _embedded(path)) for name, path in plots.items()]
    return _rendered(
        "ablation", heading="graphopt ablation", data=data, columns=heads, rows=cells, title=title, plots=images
    )


def _embedded(path: Path) -> str:
    """As an image a file cannot run anything, whatever stands in it."""
    return f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _rendered(template: str, **values: Any) -> str:
    jinja2 = optional("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.DictLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    try:
        page: str = environment.get_template(template).render(short=_short, **values)
    except (jinja2.TemplateError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise _incomplete(error) from error
    return page


def _incomplete(error: Exception) -> GraphOptError:
    return GraphOptError(
        f"expected a complete report, but a field is missing or of another kind ({error}); write it anew"
    )


def _printable(value: Any) -> Any:
    """What was escaped already stays as it is."""
    return table.printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _short(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}"


def _counts(each: Data) -> str:
    statuses = [site["status"] for site in each["sites"]]
    found = [f"{statuses.count(status)} {status}" for status in _STATUSES if status in statuses]
    return ", ".join(found) or "no candidate"


def _error_keys(each: Data) -> list[str]:
    return list(dict.fromkeys(key for site in each["sites"] for key in site["errors"]))


def _files(report: Data) -> list[list[Any]]:
    found = [(which, report[which]) for which in ("input", "output") if report[which]]
    return [[which, f["path"], _short(f["bytes"]), f.get("opset") or "", f["sha256"]] for which, f in found]


def _outputs(report: Data) -> list[list[str]]:
    return [
        [o["name"], _short(o["max_abs"]), _short(o["rel_rms"]), f"{o['cosine']:.6f}", "yes" if o["bitwise"] else "no"]
        for o in report["verification"]["outputs"]
    ]


def _costs(report: Data) -> Iterator[list[str]]:
    """Quantities that both models have; empty where nothing was counted."""
    before, after = (report["cost"].get(which, {}) for which in ("before", "after"))
    for name, old in before.items():
        new = after.get(name)
        if not (isinstance(old, dict) and isinstance(new, dict) and "expression" in old and "expression" in new):
            continue
        ratio = f"{new['value'] / old['value']:.3g}" if old["value"] and new["value"] is not None else ""
        label = name.replace("_", " ")
        yield [label, _short(old["value"]), _short(new["value"]), ratio, old["expression"], new["expression"]]


def _sizes(report: Data) -> str:
    sizes = report["cost"].get("before", {}).get("sizes", {})
    return f" at {', '.join(f'{name}={number}' for name, number in sizes.items())}" if sizes else ""
