"""Full matches of regular expressions in RE2 syntax, in time linear in the text.

Python's `re` backtracks, for an exponential time at worst, and gives some of the syntax another meaning.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from .regex_syntax import WORD, Chars, Tree, parse

__all__ = ["Matcher", "matcher"]

# Repetitions written out.
_MOST_PARTS = 10_000


@dataclass
class Matcher:
    """A pattern as an automaton, of which a text can be in several states at once."""

    # Of each state: what it reads (None, characters, or the name of an assertion), and where it leads to.
    _states: list[tuple[Chars | str | None, list[int]]] = field(default_factory=lambda: [(None, [])])
    _start: int = 0
    _parts: int = 0

    def __call__(self, text: str) -> bool:
        """Whether the pattern matches the whole text."""
        known: dict[tuple[frozenset[int], str, str], frozenset[int]] = {}
        states = frozenset([self._start])
        before = ""
        for char in text:
            key = (states, before, char)
            if key not in known:
                known[key] = self._step(*key)
            states, before = known[key], char
        return 0 in self._reachable(states, before, "")

    def _step(self, states: frozenset[int], before: str, char: str) -> frozenset[int]:
        reached = [self._states[state] for state in self._reachable(states, before, char)]
        return frozenset(leads[0] for reads, leads in reached if isinstance(reads, Chars) and char in reads)

    def _reachable(self, states: frozenset[int], before: str, after: str) -> set[int]:
        """The states, and those that follow without reading."""
        found, open_states = set(states), list(states)
        while open_states:
            reads, leads = self._states[open_states.pop()]
            if reads is None or (isinstance(reads, str) and _holds(reads, before, after)):
                new = [state for state in leads if state not in found]
                found.update(new)
                open_states += new
        return found

    def add(self, reads: Chars | str | None, leads: list[int]) -> int:
        """Add a state; its number."""
        self._states.append((reads, leads))
        return len(self._states) - 1

    def append(self, tree: Tree, then: int) -> int:
        """Add the states of a tree that lead to the state `then`; the first one's number."""
        self._parts += 1
        if self._parts > _MOST_PARTS:
            raise NotImplementedError(f"RegexFullMatch covers patterns of up to {_MOST_PARTS} parts only")
        if isinstance(tree, Chars):
            return self.add(tree, [then])
        kind, part, *bounds = tree
        if kind == "assert":
            return self.add(part, [then])
        if kind == "either":
            return self.add(None, [self.append(each, then) for each in part])
        if kind == "join":
            for each in reversed(part):
                then = self.append(each, then)
            return then
        least, most = bounds
        if most is None:
            again: list[int] = [then]
            then = self.add(None, again)
            again.append(self.append(part, then))
        else:
            end = then
            for _ in range(most - least):
                then = self.add(None, [self.append(part, then), end])
        for _ in range(least):
            then = self.append(part, then)
        return then

    def begin(self, tree: Tree) -> None:
        """Set up the automaton of a tree."""
        self._start = self.append(tree, 0)


def _holds(kind: str, before: str, after: str) -> bool:
    if kind == "start":
        return not before
    if kind == "end":
        return not after
    if kind == "line start":
        return before in ("", "\n")
    if kind == "line end":
        return after in ("", "\n")
    word = Chars(WORD)
    boundary = (before != "" and before in word) != (after != "" and after in word)
    return boundary == (kind == "boundary")


@functools.lru_cache(maxsize=64)
def matcher(pattern: str) -> Matcher:
    """Return what matches whole texts against a pattern.

    Raises:
        NotImplementedError: the pattern is not valid RE2, has classes of Unicode properties, or is very large.
    """
    made = Matcher()
    made.begin(parse(pattern))
    return made
