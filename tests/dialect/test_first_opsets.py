"""Operators of the first opset, which onnxruntime no longer runs: against numpy and the standard's own example."""

import numpy as np
import pytest
import torch

from graphopt.dialect import lookup


def test_upsample_of_the_standards_example() -> None:
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    y = lookup("", "Upsample", 6).function(x, height_scale=2.0, width_scale=2.0, mode="nearest")
    wanted = [[1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0], [3.0, 3.0, 4.0, 4.0], [3.0, 3.0, 4.0, 4.0]]
    assert y[0, 0].tolist() == wanted


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_upsample_has_the_meaning_of_the_later_opset(mode: str) -> None:
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    found = lookup("", "Upsample", 1).function(x, height_scale=1.5, width_scale=3.0, mode=mode)
    later = "linear" if mode == "bilinear" else mode
    assert found.shape == (2, 3, 6, 15)
    assert torch.equal(found, lookup("", "Upsample", 7).function(x, scales=[1.0, 1.0, 1.5, 3.0], mode=later))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("tiles", [0, 1, 3])
def test_tile_repeats_along_one_axis(tiles: int, axis: int) -> None:
    x = torch.arange(6).reshape(1, 2, 3)
    found = lookup("", "Tile", 5).function(x, torch.tensor([tiles]), torch.tensor([axis]))
    repeats = [tiles if i == axis else 1 for i in range(3)]
    np.testing.assert_array_equal(found.numpy(), np.tile(x.numpy(), repeats))
