"""ONNX names as Python identifiers and as names of module attributes."""

from __future__ import annotations

import keyword
import re
import unicodedata
from collections import Counter

import torch

# Attributes that every module has; a weight of such a name would hide one.
_RESERVED = frozenset(dir(torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())))
# fx writes a weight's name into Python source, between quotes where it is no identifier.
_PLAIN = re.compile(r"[\w:/ \-\[\]();,=+@#$%&~]+")
_UNFIT = re.compile(r"[^0-9A-Za-z]")
# A name may be as long as a file; what is made from it need not be.
_LONGEST = 200


def identifier(name: str) -> str:
    """A readable Python identifier for an ONNX name; fx makes it unique."""
    text = _UNFIT.sub("_", name[:_LONGEST]).strip("_") or "value"
    if text == "self":
        return "self_"  # the module, in the source that fx writes
    return f"v{text}" if text[0].isdigit() else text


class InputNames:
    """Hands out parameter names: an input's name goes into Python source as it is."""

    def __init__(self) -> None:
        self._taken = {"self"}
        self._counts: Counter[str] = Counter()

    def claim(self, name: str) -> str:
        """A free identifier, as near to `name` as can be."""
        stem = identifier(name)
        stem = f"{stem}_" if keyword.iskeyword(stem) else stem
        found = stem
        while found in self._taken:
            self._counts[stem] += 1
            found = f"{stem}_{self._counts[stem]}"
        self._taken.add(found)
        return found


class AttributeNames:
    """Hands out the dotted names under which a module stores its weights."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._prefixes: set[str] = set()
        self._counts: Counter[str] = Counter()

    def claim(self, name: str) -> str:
        """The weight's own dotted name where torch can hold it, else a flat one."""
        # A name may be a million dots long.
        parts = name[: _LONGEST + 1].split(".")
        prefixes = {".".join(parts[:i]) for i in range(1, len(parts))}
        held = len(name) <= _LONGEST and all(_plain(p) for p in parts)
        clash = prefixes & self._taken or name in self._prefixes
        target = name if held and not clash else f"weight_{identifier(name)}"
        stem = target
        while target in self._taken or target in self._prefixes:
            self._counts[stem] += 1
            target = f"{stem}_{self._counts[stem]}"
        self._taken.add(target)
        self._prefixes |= prefixes if target == name else set()
        return target


def _plain(part: str) -> bool:
    # Python reads identifiers in a normal form: `µ` (the unit) in source is the letter `μ`.
    return (
        unicodedata.normalize("NFKC", part) == part
        and bool(_PLAIN.fullmatch(part))
        and part not in _RESERVED
        and not keyword.iskeyword(part)
    )
