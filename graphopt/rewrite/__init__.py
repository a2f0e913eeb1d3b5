"""The pass contract and the machinery around it: options, splicing, verification, reports."""

from graphopt.rewrite.base import Equivalence, Pass, SitePass, Tolerance
from graphopt.rewrite.context import Context, Replacement
from graphopt.rewrite.options import describe, parse
from graphopt.rewrite.report import PassReport, Result, SiteReport

__all__ = [
    "Context",
    "Equivalence",
    "Pass",
    "PassReport",
    "Replacement",
    "Result",
    "SitePass",
    "SiteReport",
    "Tolerance",
    "describe",
    "parse",
]
