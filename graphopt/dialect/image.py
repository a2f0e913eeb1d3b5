"""Decoding of images; needs Pillow when it runs, not when it is imported."""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor

from graphopt.errors import GraphOptError

from .registry import operator

_MODES = {"RGB": "RGB", "BGR": "RGB", "Grayscale": "L"}


@operator("ImageDecoder", since=20, values=(0,))
def image_decoder_20(encoded: Tensor, *, pixel_format: str = "RGB") -> Tensor:
    """Decode the bytes of an image file to `[height, width, channels]`, `[0, 0, channels]` where they are none.

    Raises:
        GraphOptError: Pillow is not installed, or the pixel format is unknown.
    """
    if pixel_format not in _MODES:
        raise GraphOptError(f"expected pixel_format RGB, BGR or Grayscale, found {pixel_format!r}; correct the model")
    try:
        from PIL import Image
    except ImportError as error:
        raise GraphOptError(
            "operator ImageDecoder reads images with Pillow, which is not installed; install graphopt[image]"
        ) from error
    channels = 1 if pixel_format == "Grayscale" else 3
    try:
        with Image.open(io.BytesIO(encoded.cpu().numpy().tobytes())) as image:
            pixels = np.array(image.convert(_MODES[pixel_format]))
    except Exception:  # Pillow's decoders share no base class of errors; the standard wants no pixels, whatever failed
        return torch.zeros((0, 0, channels), dtype=torch.uint8, device=encoded.device)
    pixels = pixels.reshape(*pixels.shape[:2], channels)
    ordered = pixels[:, :, ::-1] if pixel_format == "BGR" else pixels
    return torch.from_numpy(ordered.copy()).to(encoded.device)
