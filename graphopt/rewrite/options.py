"""A pass as text and back: `linearize{method=hedgehog,window=64}` is the dataclass spelled out."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import re
import tomllib
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from graphopt import registry
from graphopt.errors import GraphOptError
from graphopt.rewrite.base import Pass

_SPELLING = re.compile(r"\s*([\w.-]+)\s*(?:\{(.*)\})?\s*", re.DOTALL)
_SPLIT = re.compile(r",(?![^\[]*\])")


def parse(text: str) -> Pass:
    """Make a pass from `name` or `name{option=value,...}`.

    Raises:
        GraphOptError: the spelling, the pass, an option, or a value is wrong.
    """
    match = _SPELLING.fullmatch(text)
    if match is None:
        raise GraphOptError(f"expected a pass such as linearize{{method=hedgehog}}, got {text!r}")
    cls = registry.pass_class(match[1])
    values: dict[str, Any] = {}
    for item in filter(None, map(str.strip, _SPLIT.split(match[2] or ""))):
        key, equals, value = item.partition("=")
        if not equals:
            raise GraphOptError(f"expected option=value in {text!r}, got {item!r}")
        key = key.strip().replace("-", "_")
        if key in values:
            raise GraphOptError(f"option {key!r} is given twice in {text!r}")
        values[key] = _convert(cls, key, value.strip())
    return build(cls, values)


def build(cls: type[Pass], values: dict[str, Any]) -> Pass:
    """Construct the dataclass; a ValueError of its own checks becomes a usage error."""
    try:
        return cls(**values)
    except ValueError as error:
        raise GraphOptError(f"pass {cls.name}: {error}") from error


def parse_all(passes: str | Pass | Sequence[str | Pass]) -> list[Pass]:
    """Passes from one or several spellings or objects, in order."""
    items = [passes] if isinstance(passes, (str, Pass)) else list(passes)
    return [item if isinstance(item, Pass) else parse(item) for item in items]


def read_pipeline(path: Path) -> list[str]:
    """The `passes = [...]` list of a TOML file.

    Raises:
        GraphOptError: the file is missing, is no TOML, or has no such list.
    """
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise GraphOptError(f"expected a readable TOML pipeline, but {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise GraphOptError(f"expected a TOML pipeline, but {path} does not parse: {error}") from error
    passes = content.get("passes")
    if not isinstance(passes, list) or not all(isinstance(p, str) for p in passes) or not passes:
        raise GraphOptError(f'expected passes = ["cleanup", ...] in {path}, found {passes!r}')
    return passes


def spell(item: Pass) -> str:
    """The shortest text that makes the same pass: options at their defaults are left out."""
    changed = [
        f"{f.name}={_text(getattr(item, f.name))}"
        for f in dataclasses.fields(item)
        if getattr(item, f.name) != f.default
    ]
    return f"{item.name}{{{','.join(changed)}}}" if changed else item.name


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a pass, for `graphopt passes`."""

    name: str
    type: str
    default: str
    help: str


def describe(cls: type[Pass]) -> list[Option]:
    """The options of a pass with type, default, and the string below each field."""
    hints = get_type_hints(cls)
    texts = _field_docs(cls)
    return [
        Option(f.name, _type_name(hints[f.name]), _text(f.default), texts.get(f.name, ""))
        for f in dataclasses.fields(cls)
    ]


def _field_docs(cls: type) -> dict[str, str]:
    docs: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        body = ast.parse(inspect.cleandoc(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
                docs[field.target.id] = inspect.cleandoc(str(text.value.value))  # type: ignore[attr-defined]  # is_text
    return docs


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ",".join(map(_text, value)) + "]"
    return str(value)


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return "|".join(_type_name(a) for a in get_args(hint))
    if get_origin(hint) is tuple:
        return f"[{_type_name(get_args(hint)[0])},...]"
    return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _convert(cls: type[Pass], key: str, text: str) -> Any:
    hints = {f.name: get_type_hints(cls)[f.name] for f in dataclasses.fields(cls)}
    if key not in hints:
        near = difflib.get_close_matches(key, hints, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(hints) or 'none'}"
        raise GraphOptError(f"pass {cls.name} has no option {key!r}; {hint}")
    for candidate in _alternatives(hints[key]):
        try:
            return _one(candidate, text)
        except ValueError:
            continue
    raise GraphOptError(f"pass {cls.name}: expected {key} to be {_type_name(hints[key])}, got {text!r}")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _one(hint: Any, text: str) -> Any:
    """`text` as a value of one plain type; ValueError where it is none."""
    if get_origin(hint) is Literal:
        found = [value for value in get_args(hint) if str(value) == text]
        return found[0] if found else _fail()
    if get_origin(hint) is tuple:
        inner = text.removeprefix("[").removesuffix("]")
        return tuple(_one(get_args(hint)[0], part.strip()) for part in inner.split(",") if part.strip())
    if hint is bool:
        return _BOOLEANS[text.lower()] if text.lower() in _BOOLEANS else _fail()
    if hint is type(None):
        return None if text.lower() == "none" else _fail()
    return hint(text)


def _fail() -> Any:
    raise ValueError
