"""JPEG files decoded by libjpeg-turbo directly, against Pillow's pixels."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from elsewhere.data.decode import decode, from_pil

PHOTOS = load_sample_images().images  # two real photos, 427 × 640


def jpeg(photo: np.ndarray, mode: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(photo).convert(mode).save(buffer, "jpeg", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("channels", [None, 1, 3])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 30}], ids=str
)
def test_pixels_are_pillows(mode, options, channels):
    for photo in PHOTOS:
        data = jpeg(photo, mode, **options)
        if mode == "CMYK" and channels is None:
            assert decode(data, None).shape[2] == 4
            continue
        assert np.array_equal(decode(data, channels), from_pil(Image.open(io.BytesIO(data)), channels))


def test_a_photo_does_not_go_through_pillow(monkeypatch):
    data = jpeg(PHOTOS[0], "RGB")
    monkeypatch.setattr(Image, "open", None)
    assert decode(data, 3).shape == PHOTOS[0].shape
