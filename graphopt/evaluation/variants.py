"""Which variants of a pass an ablation compares; found by the options that the pass has, whatever it is called."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from graphopt.errors import GraphOptError
from graphopt.rewrite.base import Pass
from graphopt.rewrite.options import parse_all

_STAGES = ("none", "transfer", "full")
_SINKS = 4


@dataclass(frozen=True)
class Variant:
    """One row of an ablation.

    Attributes:
        key: names the row in files.
        label: names it for people.
        passes: the pipeline.
        like: key of the row that has to give other numbers, or the option that tells them apart does nothing here.
    """

    key: str
    label: str
    passes: tuple[Pass, ...]
    like: str = ""


@dataclass(frozen=True)
class LeftOut:
    """A row that is not there, and why; `failed` where it was tried."""

    key: str
    label: str
    reason: str
    failed: bool = False


@dataclass(frozen=True)
class _Template:
    key: str
    label: str
    options: Mapping[str, Any]
    like: str = ""


# In the order in which they run: what needs no training first.
_TEMPLATES = (
    _Template("swap", "after swap", {"train": "none"}),
    _Template("window", "window only", {"train": "none", "branches": "window"}, like="swap"),
    _Template(
        "window_sinks",
        f"window + {_SINKS} sinks",
        {"train": "none", "branches": "window", "sinks": _SINKS},
        like="window",
    ),
    _Template("linear", "linear only", {"train": "none", "branches": "linear"}, like="swap"),
    _Template("transfer", "after transfer", {"train": "transfer"}),
    _Template("full", "after LoRA", {"train": "full"}),
    _Template("window_trained", "window only, trained", {"train": "", "branches": "window"}, like="window"),
    _Template("linear_trained", "linear only, trained", {"train": "", "branches": "linear"}, like="linear"),
)
ORIGINAL = Variant("original", "original", ())
# The pass as it was asked for, stage by stage: without one of these an ablation has failed.
MAIN = ("swap", "transfer", "full")
# How the rows are shown.
ORDER = (
    "original", "swap", "transfer", "full", "window", "window_sinks", "linear", "window_trained", "linear_trained",
)  # fmt: skip


def variants(
    spelling: str | Pass | Sequence[str | Pass], rows: Collection[str] | None = None
) -> tuple[list[Variant], list[LeftOut]]:
    """The rows that a pipeline allows, in the order in which to run them, and those that it has no options for.

    The trained rows go as far as the pass's own option `train` says. No row reverts sites for their errors: all rows
    have the same ones.

    Args:
        spelling: a pipeline in which one pass has the option `train`.
        rows: keys of the rows wanted; None for all. The original is always there.

    Raises:
        GraphOptError: no pass or several have that option, it has `branches` that leave something away already, or a
            row is unknown.
    """
    items = parse_all(spelling)
    for key in rows or ():
        if key not in ORDER:
            raise GraphOptError(f"expected rows among {', '.join(ORDER)}, got {key!r}")
    at = _ablated(items)
    item = items[at]
    if "both" in _choices(item, "branches") and getattr(item, "branches") != "both":  # noqa: B009 # any pass
        raise GraphOptError(
            f"expected branches=both, since the ablation leaves each branch away itself, got {item.branches}"  # type: ignore[attr-defined]
        )
    found, missing = [ORIGINAL], []
    for template in _TEMPLATES:
        if rows is not None and template.key not in rows:
            continue
        reason = _lacks(item, template)
        if reason:
            missing.append(LeftOut(template.key, template.label, reason))
            continue
        passes = (*items[:at], _changed(item, template), *items[at + 1 :])
        found.append(Variant(template.key, template.label, passes, template.like))
    return found, missing


def _ablated(items: Sequence[Pass]) -> int:
    """Which pass of the pipeline is taken apart."""
    found = [i for i, item in enumerate(items) if set(_STAGES) <= set(_choices(item, "train"))]
    if len(found) != 1:
        names = ", ".join(item.name for item in items) or "none"
        raise GraphOptError(
            f"expected one pass with an option train={'|'.join(_STAGES)} to take apart, as linearize has, "
            f"found {len(found)} among: {names}"
        )
    return found[0]


def _choices(item: Pass, option: str) -> tuple[Any, ...]:
    """The values that an option of a pass is declared to have; empty where it has no such option."""
    if option not in {field.name for field in dataclasses.fields(item)}:
        return ()
    hint = get_type_hints(type(item))[option]
    return get_args(hint) if get_origin(hint) is Literal else (hint,)


def _lacks(item: Pass, template: _Template) -> str:
    """Why a pass cannot make a row; empty where it can."""
    most = getattr(item, "train")  # noqa: B009 # any pass that has the option
    for option, value in template.options.items():
        choices = _choices(item, option)
        if not choices:
            return f"{item.name} has no option {option}"
        if option == "sinks" and getattr(item, option) >= value:
            return f"every row has {getattr(item, option)} sinks already"
        if option == "branches" and value not in choices:
            return f"{item.name} has no {option}={value}"
        if option == "branches" and value == "window" and getattr(item, "window", None) == 0:
            return f"{item.name} is to have no window"
        if option == "train" and value and _STAGES.index(value) > _STAGES.index(most):
            return f"{item.name} is to train no further than train={most}"
        if option == "train" and not value and most == "none":
            return f"{item.name} is to train nothing"
    return ""


def _changed(item: Pass, template: _Template) -> Pass:
    options = {name: value or getattr(item, name) for name, value in template.options.items()}
    if float in _choices(item, "max_error"):
        options["max_error"] = math.inf
    try:
        return dataclasses.replace(item, **options)
    except ValueError as error:
        raise GraphOptError(f"pass {item.name}: {error}") from error


def largest_error(spelling: str | Pass | Sequence[str | Pass]) -> float | None:
    """The largest error of a site that the pass itself would keep; None where it has no such option."""
    items = parse_all(spelling)
    item = items[_ablated(items)]
    return getattr(item, "max_error", None)
