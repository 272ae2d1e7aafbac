"""Crops of real photos, from the bytes of a JPEG to the size of a view, against torchvision's on Pillow images."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from elsewhere.data.augment import Augment, crop_box
from elsewhere.data.decode import decode

PHOTOS = load_sample_images().images  # 427 × 640
SCALES = (0.4, 1.0, 1.6)  # smaller and larger photos: crops that grow, shrink a little, and shrink threefold
BOXES = 12  # of each photo at each scale
PLAIN = {"flip": 0.0, "blur": 0.0, "grayscale": 0.0}


def jpeg(photo, scale, **options):
    image = Image.fromarray(photo)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("crop_scale", [(0.3, 1.0), (0.08, 0.3)], ids=["large crops", "small crops"])
@pytest.mark.parametrize("size", [224, 112, (96, 160)], ids=str)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_crop_of_a_photo_is_torchvisions(interpolation, size, crop_scale):
    transforms = pytest.importorskip("torchvision.transforms.functional")
    mode = getattr(transforms.InterpolationMode, interpolation.upper())
    height_width = [size, size] if isinstance(size, int) else list(size)
    augment = Augment(size=size, interpolation=interpolation, crop_scale=crop_scale, **PLAIN)
    rng = np.random.default_rng(0)
    for photo in PHOTOS:
        for scale in SCALES:
            data = jpeg(photo, scale, quality=90)
            ours, pillows = decode(data, 3), Image.open(io.BytesIO(data)).convert("RGB")
            for u in rng.random((BOXES, 1, 35)):
                box = crop_box(pillows.height, pillows.width, crop_scale, augment.crop_aspect, u[0, :22])
                expected = np.asarray(transforms.resized_crop(pillows, *box, height_width, mode))
                view = augment(ours, u).numpy().transpose(1, 2, 0)
                assert view.shape == expected.shape
                difference = np.abs(view.astype(int) - expected.astype(int)).max(axis=2)
                assert (difference <= 2).mean() >= 0.99, (scale, box, np.bincount(difference.ravel()))
