"""The `online` pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.passes.attention.softmax_pass import SoftmaxPass
from graphopt.rewrite import Equivalence


@dataclass(frozen=True)
class Online(SoftmaxPass):
    """m, s in one pass over the row: m' = max(m, x_j), s' = s e^(m - m') + e^(x_j - m')   ->   e^(x_i - m) / s

    Maximum and sum are found together: two passes over the row in place of three.

    Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
    """

    name: ClassVar[str] = "online"
    operator: ClassVar[str] = "online_softmax"
    equivalence: ClassVar[Equivalence] = Equivalence.REASSOCIATED
