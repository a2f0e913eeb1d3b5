"""The softmax kernels, and attention with a constant in place of the maximum, in Triton's interpreter."""

from collections.abc import Callable

import pytest

pytest.importorskip("triton")


def test_softmax(run_checks: Callable[..., None]) -> None:
    run_checks("softmax")


def test_unified_attention(run_checks: Callable[..., None]) -> None:
    run_checks("unified_attention")
