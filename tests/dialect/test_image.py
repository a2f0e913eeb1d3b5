"""Decoding of images: the files that the onnx package has stored, and what is no image."""

import io
import sys

import numpy as np
import pytest
import torch
from onnx.backend.test.case.node import _image_decoder_data
from torch import Tensor

from graphopt.dialect import lookup
from graphopt.errors import GraphOptError

decode = lookup("", "ImageDecoder", 20).function
# Not the suite's models: where Pillow is installed, those expect what Pillow itself gives.
STORED = {name: value for name, value in vars(_image_decoder_data).items() if name.startswith("image_decoder_")}
FORMATS = {"bgr": "BGR", "grayscale": "Grayscale", "rgb": "RGB"}


def encoded(array: np.ndarray, palette: bool = False) -> Tensor:
    image = pytest.importorskip("PIL.Image").fromarray(array)
    file = io.BytesIO()
    (image.convert("P") if palette else image).save(file, "PNG")
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


@pytest.mark.parametrize("name", sorted(STORED))
def test_stored_outputs(name: str) -> None:
    pytest.importorskip("PIL")
    data, wanted = STORED[name]
    found = decode(torch.from_numpy(data.copy()), pixel_format=FORMATS[name.rpartition("_")[2]])
    np.testing.assert_array_equal(found.numpy(), wanted)
    assert found.dtype == torch.uint8


def test_all_stored_outputs_were_found() -> None:
    assert len(STORED) == 9


@pytest.mark.parametrize("size", [(1, 1), (3, 7)])
def test_sizes_and_channels(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = encoded(pixels)
    np.testing.assert_array_equal(decode(file).numpy(), pixels)
    np.testing.assert_array_equal(decode(file, pixel_format="BGR").numpy(), pixels[:, :, ::-1])
    grey = decode(encoded(pixels[:, :, 0]), pixel_format="Grayscale")
    np.testing.assert_array_equal(grey.numpy(), pixels[:, :, :1])


def test_images_that_are_not_stored_as_rgb() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(decode(encoded(grey)).numpy(), np.repeat(grey[:, :, None], 3, 2))
    # Black and white are in every palette.
    checks = (np.indices((4, 6)).sum(0) % 2 * 255).astype(np.uint8)
    np.testing.assert_array_equal(decode(encoded(checks, palette=True)).numpy(), np.repeat(checks[:, :, None], 3, 2))


@pytest.mark.parametrize(("pixel_format", "channels"), [("RGB", 3), ("BGR", 3), ("Grayscale", 1)])
def test_what_is_no_image_has_no_pixels(pixel_format: str, channels: int) -> None:
    file = encoded(np.zeros((9, 9, 3), np.uint8))
    for bad in (file[:0], file[:40], torch.arange(99, dtype=torch.uint8)):
        found = decode(bad, pixel_format=pixel_format)
        assert (found.dtype, found.shape) == (torch.uint8, (0, 0, channels))


def test_without_pillow_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(GraphOptError, match="Pillow, which is not installed"):
        decode(torch.zeros(3, dtype=torch.uint8))


def test_an_unknown_pixel_format_is_refused() -> None:
    with pytest.raises(GraphOptError, match="expected pixel_format RGB, BGR or Grayscale, found 'CMYK'"):
        decode(torch.zeros(3, dtype=torch.uint8), pixel_format="CMYK")
