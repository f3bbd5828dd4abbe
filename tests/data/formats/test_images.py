"""Every colour mode becomes RGB."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from vrm.data.formats import images

GREY = np.array([[0, 100], [200, 255]], dtype=np.uint8)
RGB = np.stack([GREY, GREY[::-1], GREY.T], axis=2)


def palette_with_transparency():
    image = Image.fromarray(RGB).quantize(4)
    image.info["transparency"] = bytes([0, 128, 255, 7])
    return image


MODES = {
    "L": (Image.fromarray(GREY), np.stack([GREY] * 3, 2)),
    "LA": (Image.fromarray(np.stack([GREY, 255 - GREY], 2), "LA"), np.stack([GREY] * 3, 2)),
    "RGBA": (Image.fromarray(np.dstack([RGB, GREY])), RGB),
    "1": (Image.fromarray(GREY > 150), np.stack([np.where(GREY > 150, 255, 0)] * 3, 2)),
    "P": (Image.fromarray(RGB).quantize(4), RGB),
    "P with transparency": (palette_with_transparency(), RGB),
    "CMYK": (Image.fromarray(np.dstack([255 - RGB, np.zeros_like(GREY)]), "CMYK"), RGB),
    "I;16": (
        Image.fromarray(GREY.astype(np.uint16) * 257 - 100 * (GREY > 0).astype(np.uint16)),
        np.stack([GREY] * 3, 2),
    ),
    "I": (
        Image.fromarray((GREY * 257.0).astype(np.int32) - 100 * (GREY > 0).astype(np.int32)),
        np.stack([GREY] * 3, 2),
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_colour_mode_becomes_rgb(mode):
    image, expected = MODES[mode]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(images.to_rgb(image), expected)
        stream = io.BytesIO()
        kind = "TIFF" if mode in ("CMYK", "I") else "PNG"
        image.save(stream, kind)
        assert np.array_equal(images.decode(stream.getvalue(), "x", size=None), expected.transpose(2, 0, 1))


def test_levels_beyond_16_bits_are_refused():
    stream = io.BytesIO()
    Image.fromarray(GREY.astype(np.int32) * 258).save(stream, "TIFF")
    with pytest.raises(ValueError, match=r"here: no readable image \(ValueError: levels of 0 to 65790"):
        images.decode(stream.getvalue(), "here", size=None)
