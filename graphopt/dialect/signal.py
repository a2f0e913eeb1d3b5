"""Spectra, their windows, and overlapping blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dtypes import compute_type, dtype_of, integers, scalar
from .registry import operator


def _window(size: Tensor, periodic: int, datatype: int, weights: tuple[float, ...]) -> Tensor:
    """Return the cosine series sum (-1)^k w_k cos(2 pi k n / N), with N - 1 for a symmetric window."""
    count = scalar(size)
    period = count if periodic else max(count - 1, 1)
    angle = torch.arange(count, dtype=torch.float64) * (2 * math.pi / period)
    series = sum((-1) ** k * weight * torch.cos(k * angle) for k, weight in enumerate(weights))
    return torch.as_tensor(series).to(dtype_of(datatype))


@operator("HannWindow", since=17, values=(0,))
def hann_window_17(size: Tensor, *, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    """Return the Hann window."""
    return _window(size, periodic, output_datatype, (0.5, 0.5))


@operator("HammingWindow", since=17, values=(0,))
def hamming_window_17(size: Tensor, *, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    """Return the Hamming window."""
    # The standard rounds 25 / 46 to five digits.
    return _window(size, periodic, output_datatype, (0.54347, 0.45653))


@operator("BlackmanWindow", since=17, values=(0,))
def blackman_window_17(size: Tensor, *, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    """Return the Blackman window."""
    return _window(size, periodic, output_datatype, (0.42, 0.5, 0.08))


@operator("DFT", since=17, values=(1,))
def dft_17(
    x: Tensor, dft_length: Tensor | None = None, *, axis: int = 1, inverse: int = 0, onesided: int = 0
) -> Tensor:
    """Return the Fourier transform along the attribute's axis; the last axis holds (real, imaginary)."""
    return _dft(x, None if dft_length is None else scalar(dft_length), axis, bool(inverse), bool(onesided))


@operator("DFT", since=20, values=(1, 2))
def dft_20(
    x: Tensor,
    dft_length: Tensor | None = None,
    axis: Tensor | None = None,
    *,
    inverse: int = 0,
    onesided: int = 0,
) -> Tensor:
    """Return the Fourier transform along the input's axis; the last axis holds (real, imaginary)."""
    length = None if dft_length is None else scalar(dft_length)
    return _dft(x, length, -2 if axis is None else scalar(axis), bool(inverse), bool(onesided))


def _dft(x: Tensor, length: int | None, axis: int, inverse: bool, onesided: bool) -> Tensor:
    kept, x, dim = x.dtype, x.to(compute_type(x.dtype)), axis % x.dim()
    if inverse and onesided:
        # Only half of the spectrum is given, the other half is its conjugate; the signal is real.
        signal: Tensor = torch.fft.irfft(torch.view_as_complex(x.contiguous()), length, dim)
        return signal.unsqueeze(-1).to(kept)
    if x.shape[-1] == 1:
        real = x.squeeze(-1)
        spectrum = torch.fft.rfft(real, length, dim) if onesided else _full(real, length, dim, inverse)
    else:
        spectrum = _full(torch.view_as_complex(x.contiguous()), length, dim, inverse)
        if onesided:
            spectrum = spectrum.narrow(dim, 0, spectrum.shape[dim] // 2 + 1)
    return torch.view_as_real(spectrum).to(kept)


def _full(x: Tensor, length: int | None, dim: int, inverse: bool) -> Tensor:
    spectrum: Tensor = torch.fft.ifft(x, length, dim) if inverse else torch.fft.fft(x, length, dim)
    return spectrum


@operator("STFT", since=17, values=(1, 3))
def stft_17(
    signal: Tensor,
    frame_step: Tensor,
    window: Tensor | None = None,
    frame_length: Tensor | None = None,
    *,
    onesided: int = 1,
) -> Tensor:
    """Return the spectra of overlapping frames, `[B, frames, bins, 2]`."""
    if frame_length is not None:
        length = scalar(frame_length)
    else:
        length = signal.shape[1] if window is None else window.shape[0]
    frames = signal.unfold(1, length, scalar(frame_step)).transpose(2, 3)
    if window is not None:
        frames = frames * window.unsqueeze(-1)
    return _dft(frames, None, 2, False, bool(onesided))


@operator("MelWeightMatrix", since=17, values=(0, 1, 2, 3, 4))
def mel_weight_matrix_17(
    num_mel_bins: Tensor,
    dft_length: Tensor,
    sample_rate: Tensor,
    lower_edge_hertz: Tensor,
    upper_edge_hertz: Tensor,
    *,
    output_datatype: int = 1,
) -> Tensor:
    """Return triangles of height 1 over the bins of a onesided DFT, `[dft_length // 2 + 1, num_mel_bins]`.

    Their corners lie at equal distances on the scale 2595 log10(1 + f / 700); a corner between two bins of the DFT
    moves to the lower one.
    """
    count, length = scalar(num_mel_bins), scalar(dft_length)
    low, high = (2595 * math.log10(1 + float(edge) / 700) for edge in (lower_edge_hertz, upper_edge_hertz))
    # Each triangle ends where the next but one begins; the standard's own outputs divide by one corner too many.
    mel = low + torch.arange(count + 2, dtype=torch.float64) * ((high - low) / (count + 2))
    hertz = 700 * (10 ** (mel / 2595) - 1)
    corners = torch.floor((length + 1) * hertz / scalar(sample_rate))
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    at = torch.arange(length // 2 + 1, dtype=torch.float64).unsqueeze(1)
    rising, falling = (at - left) / (centre - left).clamp(min=1), (right - at) / (right - centre).clamp(min=1)
    triangles = torch.where(at < centre, rising, falling).clamp(min=0)
    return torch.where(at == centre, torch.ones_like(triangles), triangles).to(dtype_of(output_datatype))


@operator("Col2Im", since=18, values=(1, 2))
def col2_im_18(
    x: Tensor,
    image_shape: Tensor,
    block_shape: Tensor,
    *,
    dilations: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Add up overlapping blocks `[N, C * taps, positions]` into images `[N, C, *image_shape]`."""
    image, block = image_shape.tolist(), block_shape.tolist()
    rank = len(image)
    strides, dilations, pads = strides or [1] * rank, dilations or [1] * rank, pads or [0] * 2 * rank
    padded = [size + pads[axis] + pads[axis + rank] for axis, size in enumerate(image)]
    # Where each element goes: a row-major index, its axes the taps first and then the positions.
    target = torch.zeros((1,) * 2 * rank, dtype=torch.int64, device=x.device)
    for axis, size in enumerate(padded):
        count = (size - (block[axis] - 1) * dilations[axis] - 1) // strides[axis] + 1
        tap = torch.arange(block[axis], device=x.device) * dilations[axis]
        start = torch.arange(count, device=x.device) * strides[axis]
        tap, start = _along(tap, axis, 2 * rank), _along(start, axis + rank, 2 * rank)
        target = target * size + tap + start
    flat = x.reshape(x.shape[0], x.shape[1] // math.prod(block), -1)
    place = target.reshape(-1)
    y = integers(lambda data: data.new_zeros((*data.shape[:2], math.prod(padded))).index_add(2, place, data), flat)
    y = y.reshape((*flat.shape[:2], *padded))
    for axis, size in enumerate(image):
        y = y.narrow(axis + 2, pads[axis], size)
    return y


def _along(x: Tensor, axis: int, rank: int) -> Tensor:
    shape = [1] * rank
    shape[axis] = x.shape[0]
    return x.reshape(shape)
