"""The syntax of RE2, read into trees."""

from __future__ import annotations

import functools
import string
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = ["WORD", "Chars", "Tree", "parse"]

_Ranges = tuple[tuple[int, int], ...]
_LAST = 0x10FFFF
_DEEPEST = 100
_MOST_REPEATS = 1000
_DIGIT: _Ranges = ((48, 57),)
WORD: _Ranges = ((48, 57), (65, 90), (95, 95), (97, 122))
_PERL: dict[str, _Ranges] = {"d": _DIGIT, "s": ((9, 10), (12, 13), (32, 32)), "w": WORD}
_POSIX: dict[str, _Ranges] = {
    "alnum": ((48, 57), (65, 90), (97, 122)),
    "alpha": ((65, 90), (97, 122)),
    "ascii": ((0, 127),),
    "blank": ((9, 9), (32, 32)),
    "cntrl": ((0, 31), (127, 127)),
    "digit": _DIGIT,
    "graph": ((33, 126),),
    "lower": ((97, 122),),
    "print": ((32, 126),),
    "punct": ((33, 47), (58, 64), (91, 96), (123, 126)),
    "space": ((9, 13), (32, 32)),
    "upper": ((65, 90),),
    "word": WORD,
    "xdigit": ((48, 57), (65, 70), (97, 102)),
}
_CONTROL = {"a": 7, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11}


def _outside(ranges: _Ranges) -> _Ranges:
    starts = [0, *(last + 1 for _, last in sorted(ranges))]
    ends = [*(first - 1 for first, _ in sorted(ranges)), _LAST]
    return tuple((first, last) for first, last in zip(starts, ends, strict=True) if first <= last)


@functools.cache
def _fold(char: str) -> str:
    """The one character that stands for all cases of a character."""
    folded = char.casefold()
    return folded if len(folded) == 1 else char.lower() if len(char.lower()) == 1 else char


@dataclass(frozen=True)
class Chars:
    """Matches one character."""

    ranges: _Ranges
    negated: bool = False
    ignore_case: bool = False

    def __contains__(self, char: str) -> bool:
        cases = {char}
        if self.ignore_case:
            folded = _fold(char)
            cases |= {case for case in (folded, folded.upper()) if len(case) == 1 and _fold(case) == folded}
        hit = any(first <= ord(case) <= last for case in cases for first, last in self.ranges)
        return hit != self.negated


# A pattern is a tree of Chars and of tuples ("join", parts), ("either", parts), ("repeat", part, least, most),
# ("assert", kind).
Tree: TypeAlias = "Chars | tuple[Any, ...]"


@dataclass
class _Parser:
    """Reads a pattern; NotImplementedError wherever it is not valid RE2, or RE2 that is not covered."""

    pattern: str
    at: int = 0
    flags: frozenset[str] = frozenset()
    depth: int = 0

    def refuse(self) -> NotImplementedError:
        return NotImplementedError(f"RegexFullMatch does not cover the pattern {self.pattern[:60]!r}")

    def take(self, text: str) -> bool:
        """Whether the text comes next; if so, go behind it."""
        found = self.pattern.startswith(text, self.at)
        self.at += len(text) if found else 0
        return found

    def char(self) -> str:
        if self.at == len(self.pattern):
            raise self.refuse()
        self.at += 1
        return self.pattern[self.at - 1]

    def run(self, among: str, least: int, most: int) -> str:
        """Take up to `most` characters of a set."""
        start = self.at
        while self.at < min(len(self.pattern), start + most) and self.pattern[self.at] in among:
            self.at += 1
        if self.at - start < least:
            raise self.refuse()
        return self.pattern[start : self.at]

    def whole(self) -> Tree:
        tree = self.either()
        if self.at != len(self.pattern):
            raise self.refuse()
        return tree

    def either(self) -> Tree:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise self.refuse()
        flags = self.flags
        parts: list[list[Tree]] = [[]]
        while self.at < len(self.pattern) and self.pattern[self.at] != ")":
            if self.take("|"):
                parts.append([])
            elif self.take(r"\Q"):
                end = self.pattern.find(r"\E", self.at)
                quoted = self.pattern[self.at : len(self.pattern) if end < 0 else end]
                self.at += len(quoted) + (2 if end >= 0 else 0)
                parts[-1] += [self.literal(ord(char)) for char in quoted[:-1]]
                parts[-1] += [self.repeated(self.literal(ord(char))) for char in quoted[-1:]]
            else:
                atom = self.atom()
                # Flags alone are no atom: they hold until the group ends.
                parts[-1] += [] if atom is None else [self.repeated(atom)]
        self.flags = flags
        self.depth -= 1
        joins = [("join", tuple(part)) for part in parts]
        return joins[0] if len(joins) == 1 else ("either", tuple(joins))

    def literal(self, code: int) -> Chars:
        folded = ord(_fold(chr(code))) if "i" in self.flags else code
        return Chars(((code, code), (folded, folded)), ignore_case="i" in self.flags)

    def repeated(self, atom: Tree) -> Tree:
        bounds = self.bounds()
        if bounds is None:
            return atom
        self.take("?")  # which of several matches is found makes no difference to whether there is one
        if self.bounds() is not None:
            raise self.refuse()
        return ("repeat", atom, *bounds)

    def bounds(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self.take(sign):
                return bounds
        start = self.at
        if not self.take("{"):
            return None
        least = self.run(string.digits, 0, 9)
        most: str | None = least
        if self.take(","):
            most = self.run(string.digits, 0, 9) or None
        if not least or any(len(n) > 1 and n[0] == "0" for n in (least, most or "")) or not self.take("}"):
            self.at = start  # no repetition: the brace stands for itself
            return None
        low, high = int(least), None if most is None else int(most)
        if max(low, high or 0) > _MOST_REPEATS or (high is not None and low > high):
            raise self.refuse()
        return low, high

    def atom(self) -> Tree | None:
        if self.bounds() is not None:
            raise self.refuse()
        char = self.char()
        if char == "(":
            return self.group()
        if char == "[":
            return self.chars()
        if char == "\\":
            return self.escape()
        if char == ".":
            return Chars(() if "s" in self.flags else ((10, 10),), negated=True)
        if char == "^":
            return ("assert", "line start" if "m" in self.flags else "start")
        if char == "$":
            return ("assert", "line end" if "m" in self.flags else "end")
        return self.literal(ord(char))

    def group(self) -> Tree | None:
        outer = self.flags
        if self.take("?P<") or self.take("?<"):
            self.run(string.ascii_letters + string.digits + "_", 1, len(self.pattern))
            if not self.take(">"):
                raise self.refuse()
        elif self.take("?"):
            on, off = self.run("imsU", 0, 9), ""
            if self.take("-"):
                off = self.run("imsU", 1, 9)
            self.flags = (self.flags | set(on)) - set(off)
            if self.take(")"):
                return None
            if not self.take(":"):
                raise self.refuse()
        tree = self.either()
        if not self.take(")"):
            raise self.refuse()
        self.flags = outer
        return tree

    def escape(self) -> Tree:
        char = self.char()
        kinds = {"A": "start", "z": "end", "b": "boundary", "B": "no boundary"}
        if char in kinds:
            return ("assert", kinds[char])
        if char.lower() in _PERL:
            return Chars(_PERL[char.lower()], negated=char.isupper(), ignore_case="i" in self.flags)
        return self.literal(self.code(char))

    def code(self, char: str) -> int:
        """The character that an escape stands for; `char` is the one behind the backslash."""
        if char in _CONTROL:
            return _CONTROL[char]
        if char == "x":
            text = self.run(string.hexdigits, 1, 8) if self.take("{") else self.run(string.hexdigits, 2, 2) + "}"
            if not text.endswith("}") and not self.take("}"):
                raise self.refuse()
            code = int(text.rstrip("}"), 16)
        elif char == "0":
            code = int("0" + self.run(string.octdigits, 0, 2), 8)
        elif char in "1234567":
            code = int(char + self.run(string.octdigits, 1, 2), 8)
        elif char.isascii() and not char.isalnum():
            code = ord(char)
        else:
            raise self.refuse()
        if code > _LAST:
            raise self.refuse()
        return code

    def chars(self) -> Chars:
        """A class in brackets."""
        negated = self.take("^")
        ranges: list[tuple[int, int]] = []
        first = True
        while first or not self.take("]"):
            first = False
            found = self.named()
            if found is not None:
                ranges += found
                continue
            low = high = self.member()
            if self.pattern.startswith("-", self.at) and not self.pattern.startswith("-]", self.at):
                self.at += 1
                high = self.member()
            if low > high:
                raise self.refuse()
            ranges.append((low, high))
        if "i" in self.flags and any(last > 127 for _, last in ranges):
            raise self.refuse()  # the other cases of such ranges would need a table
        return Chars(tuple(ranges), negated, "i" in self.flags)

    def named(self) -> _Ranges | None:
        """A class within a class: one of Perl or one of POSIX."""
        if self.take("[:"):
            negated = self.take("^")
            name = self.run(string.ascii_lowercase, 1, 9)
            if name not in _POSIX or not self.take(":]"):
                raise self.refuse()
            return _outside(_POSIX[name]) if negated else _POSIX[name]
        kind = self.pattern[self.at + 1 : self.at + 2]
        if not self.pattern.startswith("\\", self.at) or kind.lower() not in _PERL:
            return None
        self.at += 2
        return _PERL[kind] if kind.islower() else _outside(_PERL[kind.lower()])

    def member(self) -> int:
        char = self.char()
        return self.code(self.char()) if char == "\\" else ord(char)


def parse(pattern: str) -> Tree:
    """Read a pattern.

    Raises:
        NotImplementedError: it is not valid RE2, or has what is not covered: classes of Unicode properties.
    """
    return _Parser(pattern).whole()
