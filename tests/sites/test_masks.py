"""What a mask means, decided from its values."""

import pytest
import torch
from torch import Tensor

from graphopt.sites.base import MaskKind
from graphopt.sites.masks import Observation, classify

T = 6
LOW = {"inf": float("-inf"), "finfo": torch.finfo(torch.float32).min, "-1e9": -1e9, "-1e4": -1e4}


def seen(*values: Tensor, queries: int = T, keys: int = T) -> list[Observation]:
    return [Observation(v, queries, keys) for v in values]


def added(visible: Tensor, low: float) -> Tensor:
    return torch.zeros(visible.shape).masked_fill(~visible, low)


def behind(queries: int = T, keys: int = T) -> Tensor:
    return torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)


def padding(*kept: int) -> Tensor:
    """[B, 1, 1, T]: the first of them are kept, or with a negative number the last."""
    column = torch.arange(T)
    rows = [column < k if k > 0 else column >= T + k for k in kept]
    return torch.stack(rows)[:, None, None, :]


CAUSAL = behind() >= 0
SHAPES = {
    "everything": (torch.ones(T, T, dtype=torch.bool), MaskKind.NONE),
    "right padding": (padding(3, 5), MaskKind.PADDING),
    "left padding": (padding(-3, -5), MaskKind.PADDING),
    "causal": (CAUSAL, MaskKind.CAUSAL),
    "causal, right padding": (CAUSAL & padding(3, 5), MaskKind.CAUSAL_PADDING),
    "causal, left padding": (CAUSAL & padding(-3, -5), MaskKind.CAUSAL_PADDING),
    "window": (CAUSAL & (behind() < 3), MaskKind.SLIDING),
    "window, padding": (CAUSAL & (behind() < 3) & padding(-4, -5), MaskKind.SLIDING),
    "window both ways": (behind().abs() < 2, MaskKind.ARBITRARY),
    "not oneself": (~torch.eye(T, dtype=torch.bool), MaskKind.ARBITRARY),
    "prefix": (CAUSAL | (torch.arange(T) < 3), MaskKind.ARBITRARY),
}


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("name", SHAPES)
def test_added_masks(name: str, low: str) -> None:
    visible, kind = SHAPES[name]
    assert classify(seen(added(visible, LOW[low]))).kind is kind


@pytest.mark.parametrize("name", SHAPES)
def test_boolean_masks(name: str) -> None:
    visible, kind = SHAPES[name]
    verdict = classify(seen(visible))
    assert verdict.kind is kind
    assert verdict.reason
    assert (verdict.window == 3) == (kind is MaskKind.SLIDING)


def test_samples_are_judged_together() -> None:
    everything = torch.ones(1, 1, 1, T, dtype=torch.bool)
    assert classify(seen(everything, padding(2))).kind is MaskKind.PADDING
    assert classify(seen(CAUSAL, CAUSAL & padding(2))).kind is MaskKind.CAUSAL_PADDING


def test_the_last_query_sees_all_keys_of_a_cache() -> None:
    keys = 9
    assert classify(seen(behind(T, keys) >= 0, keys=keys)).kind is MaskKind.CAUSAL
    from_start = torch.arange(T)[:, None] >= torch.arange(keys)
    verdict = classify(seen(from_start, keys=keys))
    assert verdict.kind is MaskKind.ARBITRARY
    assert "from the first key on" in verdict.reason


@pytest.mark.parametrize("value", [float("-inf"), -1e4, 0.0])
def test_rows_that_see_nothing_do_not_confuse(value: float) -> None:
    """With left padding the first queries see nothing; some exporters then show them everything."""
    mask = added(CAUSAL & padding(-3), -1e4)
    mask[..., :3, :] = value
    assert classify(seen(mask)).kind is MaskKind.CAUSAL_PADDING


def test_hidden_is_relative_to_the_visible_level() -> None:
    assert classify(seen(added(CAUSAL, -1e9) + 100.0)).kind is MaskKind.CAUSAL


def test_finite_biases() -> None:
    distance = behind().abs().float()
    assert classify(seen(-0.5 * distance)).kind is MaskKind.BIAS
    assert classify(seen(torch.arange(T).float().expand(T, T))).kind is MaskKind.PADDING
    verdict = classify(seen(added(CAUSAL, float("-inf")) - 0.5 * distance))
    assert verdict.kind is MaskKind.ARBITRARY
    assert "causal, with finite biases" in verdict.reason


def test_a_small_bias_is_a_bias() -> None:
    assert classify(seen(-1e-3 * behind().abs().float())).kind is MaskKind.BIAS


def test_what_all_keys_of_a_query_share_is_nothing() -> None:
    assert classify(seen(torch.arange(T).float()[:, None].expand(T, T))).kind is MaskKind.NONE


def test_one_head_that_differs_is_noticed() -> None:
    heads = torch.stack([CAUSAL, CAUSAL, torch.ones(T, T, dtype=torch.bool)])
    assert classify(seen(heads)).kind is MaskKind.ARBITRARY
