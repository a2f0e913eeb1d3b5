"""The `two_pass` pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.passes.attention.softmax_pass import SoftmaxPass
from graphopt.rewrite import Equivalence


@dataclass(frozen=True)
class TwoPass(SoftmaxPass):
    """e^(x_i) / sum_j e^(x_j)   ->   m_i (1 / m) 2^(n_i - n), e^(x_i) = m_i 2^(n_i), sum_j m_j 2^(n_j) = m 2^n

    The sum is kept as mantissa and exponent, so that nothing overflows and no maximum is looked for first: two passes
    over the row in place of three. It pays where rows do not fit the cache, such as a vocabulary's.

    Dukhan and Ablavatski, "Two-Pass Softmax Algorithm" (2020).
    """

    name: ClassVar[str] = "two_pass"
    operator: ClassVar[str] = "two_pass_softmax"
    equivalence: ClassVar[Equivalence] = Equivalence.REASSOCIATED
