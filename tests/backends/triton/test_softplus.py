"""The kernels of softplus attention in Triton's interpreter."""

from collections.abc import Callable

import pytest

pytest.importorskip("triton")


def test_softplus_attention(run_checks: Callable[..., None]) -> None:
    run_checks("softplus_attention")


@pytest.mark.slow
def test_softplus_attention_in_the_other_combinations(run_checks: Callable[..., None]) -> None:
    run_checks("softplus_attention", marked="slow")
