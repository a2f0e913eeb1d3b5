"""Gaussian attention through landmarks: against the dense kernel and an exact inverse, in fp64, with all gradients."""

import numpy as np
import pytest
import torch

from graphopt.ops.landmark_attention import landmark_attention, segment_means

SHIFT = 0.01


def operands(T, S, Hq=4, Hkv=2, D=6, V=5, dtype=torch.float64, spread=1.0):
    generator = torch.Generator().manual_seed(T * 1000 + S)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731  # short
    return spread * make(2, Hq, T, D), spread * make(2, Hkv, S, D), make(2, Hkv, S, V)


def gaussian(a, b):
    return np.exp(-np.square(a[:, None] - b[None]).sum(-1) / 2)


def naive(q, k, v, centres):
    """Head by head, with distances taken from differences and the system solved by LAPACK."""
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    groups = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys, values, c = (x[b, h // groups].numpy() for x in (k, v, centres))
            system = gaussian(c, c) + SHIFT * np.eye(len(c))
            out[b, h] = gaussian(q[b, h].numpy(), c) @ np.linalg.solve(system, gaussian(c, keys) @ values)
    return torch.from_numpy(out)


@pytest.mark.parametrize("sizes", [(1, 1), (7, 7), (33, 20)], ids=str)
def test_as_many_landmarks_as_keys(sizes):
    q, k, v = operands(*sizes)
    found = landmark_attention(q, k, v, None, sizes[1])
    # fp64 through a system of condition 5,000 at most.
    torch.testing.assert_close(found, naive(q, k, v, k), rtol=1e-10, atol=1e-10)


def test_landmarks_are_means_of_neighbours():
    q, k, v = operands(9, 12)
    thirds = k.unflatten(2, (4, 3)).mean(3)
    torch.testing.assert_close(segment_means(k, torch.ones(1, 1, 12, 1).double(), 4), thirds, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(landmark_attention(q, k, v, None, 4), naive(q, k, v, thirds), rtol=1e-10, atol=1e-10)


def test_segments_share_rows_on_their_borders():
    x = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64).view(1, 1, 3, 1)
    ones = torch.ones(1, 1, 3, 1, dtype=torch.float64)
    # Half of the middle row belongs to each of two segments of 1.5 rows.
    expected = torch.tensor([(1 + 0.5 * 2) / 1.5, (0.5 * 2 + 4) / 1.5], dtype=torch.float64)
    torch.testing.assert_close(segment_means(x, ones, 2).flatten(), expected, rtol=1e-14, atol=0)
    # More segments than rows: each row twice.
    torch.testing.assert_close(segment_means(x, ones, 6).flatten(), x.flatten().repeat_interleave(2))


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("landmarks", [49, 196])
def test_near_singular_kernels_in_fp32(spread, landmarks):
    """Landmarks on one spot, or more of them than keys: the published start of the iteration returns zeros here."""
    q, k, v = operands(40, 30, spread=spread)
    q = q + 0.1
    centres = segment_means(k, torch.ones(1, 1, 30, 1).double(), landmarks)
    found = landmark_attention(q.float(), k.float(), v.float(), None, landmarks)
    # fp32 with one step of refinement: a few ulp of values of about 10.
    torch.testing.assert_close(found.double(), naive(q, k, v, centres), rtol=1e-5, atol=3e-5)


def test_gradients():
    q, k, v = operands(4, 6, Hq=2, Hkv=1, D=3, V=2)
    weight = torch.rand(2, 1, 6, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    values = [x[:1].clone().requires_grad_(True) for x in (q, k, v, weight)]
    assert torch.autograd.gradcheck(lambda *x: landmark_attention(*x, 3), values)
    # More landmarks than keys; their weights are all 1, where a border between segments has a kink.
    assert torch.autograd.gradcheck(lambda *x: landmark_attention(*x, None, 9), values[:3])


def test_padding_moves_no_landmark():
    q, k, v = operands(20, 20)
    for first, last in ((0, 13), (5, 20)):
        weight = torch.zeros(1, 1, 20, 1, dtype=torch.float64)
        weight[:, :, first:last] = 1
        found = landmark_attention(q, k, v, weight, 4)
        expected = landmark_attention(q, k[:, :, first:last], v[:, :, first:last], None, 4)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert (landmark_attention(q, k, v, torch.zeros_like(weight), 4) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_computes_in_fp32(dtype):
    q, k, v = operands(50, 300, dtype=dtype, spread=0.5)
    found = landmark_attention(q, k, v / 300, None, 16)
    expected = landmark_attention(q.double(), k.double(), (v / 300).double(), None, 16)
    assert found.dtype == dtype
    # Only the result is rounded: half an ulp, and the fp32 error of the sums.
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)
