import io
import os
import pickle
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from elsewhere.data.decode import UnreadableImage, decode, read_image
from elsewhere.data.images import DataError, Digits, ImageFolder, TorchDataset, to_image
from elsewhere.data.sources import held_out, open_source


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def save(path, seed=0, shape=(6, 5, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(*shape, seed=seed)).save(path)


def names(source):
    return [source.name(i) for i in range(len(source))]


def test_importing_the_room_does_not_import_torchvision():
    code = "import sys, elsewhere.data.loader; print({'torchvision', 'sklearn'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_digits_are_split_once_by_class():
    train, val = Digits("train"), Digits("val")
    assert len(train) + len(val) == 1797
    assert not set(names(train)) & set(names(val))
    for digit in range(10):
        counts = [sum(source.label(i) == digit for i in range(len(source))) for source in (train, val)]
        assert abs(counts[1] / sum(counts) - 0.2) < 0.01
    assert names(Digits("val")) == names(val)


def test_digits_are_scaled_to_eight_bits():
    from sklearn.datasets import load_digits

    source = Digits("val")
    index = int(source.name(7)[len("digits[") : -1])
    assert source.read(7).shape == (8, 8, 1)
    assert source.read(7).dtype == np.uint8
    assert np.array_equal(source.read(7)[..., 0], np.rint(load_digits().images[index] * 255 / 16))
    assert source.label(7) == load_digits().target[index]


def test_digits_as_rgb_repeat_the_grey():
    grey, rgb = open_source("digits", "train", 1), open_source("digits", "train", 3)
    assert rgb.channels == 3
    assert np.array_equal(rgb.read(3), np.repeat(grey.read(3), 3, axis=2))


def test_images_without_labels_are_all_trained_on(tmp_path):
    """What is held out serves the probe, and without labels there is none."""
    for i in range(20):
        Image.fromarray(np.full((4, 4, 3), i, dtype=np.uint8)).save(tmp_path / f"{i:02}.png")
    assert len(open_source(str(tmp_path), "train", 3)) == 20
    with pytest.raises(DataError, match=r"no val split, and data\.holdout=0 or no labels"):
        open_source(str(tmp_path), "val", 3)


def test_digits_refuse_four_channels():
    with pytest.raises(DataError, match=r"set model\.channels=1"):
        open_source("digits", "train", 4)


def test_a_folder_lists_as_torchvisions_image_folder(tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    for i, name in enumerate(
        ["b/2.png", "b/10.png", "a/x/1.png", "a/x-y/1.png", "a/0.JPG", "a/x/deep/2.bmp", "c/1.webp"]
    ):
        save(tmp_path / name, seed=i)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    ours, theirs = ImageFolder(str(tmp_path)), datasets.ImageFolder(str(tmp_path))
    assert [(ours.name(i), ours.label(i)) for i in range(len(ours))] == theirs.samples
    assert ours.classes == theirs.classes
    for i in range(len(ours)):
        assert np.array_equal(ours.read(i), np.asarray(theirs[i][0]))


def test_hidden_files_are_left_out(tmp_path):
    save(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "._1.png").write_bytes(b"resource fork")
    (tmp_path / ".cache").mkdir()
    assert names(ImageFolder(str(tmp_path))) == [str(tmp_path / "a" / "1.png")]
    assert ImageFolder(str(tmp_path)).classes == ["a"]


def test_train_and_val_folders_share_the_classes_of_train(tmp_path):
    for name in [
        "train/ant/1.png",
        "train/bee/1.png",
        "train/cat/1.png",
        "validation/cat/1.png",
        "validation/bee/1.png",
    ]:
        save(tmp_path / name)
    train, val = open_source(str(tmp_path), "train", 3), open_source(str(tmp_path), "val", 3)
    assert (len(train), len(val)) == (3, 2)
    assert [val.label(i) for i in range(2)] == [1, 2]
    save(tmp_path / "validation/dog/1.png")
    with pytest.raises(DataError, match="first dog"):
        open_source(str(tmp_path), "val", 3)


def test_a_train_folder_without_val_is_held_out(tmp_path):
    for i in range(20):
        save(tmp_path / f"train/a/{i}.png")
    train, val = open_source(str(tmp_path), "train", 3), open_source(str(tmp_path), "val", 3)
    assert (len(train), len(val)) == (18, 2)
    assert len(set(names(train)) | set(names(val))) == 20
    assert len(open_source(str(tmp_path), "train", 3, holdout=0)) == 20
    with pytest.raises(DataError, match="holdout=0"):
        open_source(str(tmp_path), "val", 3, holdout=0)


def test_a_flat_folder_has_no_labels(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", seed=i)
    save(tmp_path / "more" / "3.png")
    source = ImageFolder(str(tmp_path))
    assert len(source) == 4
    assert source.classes is None
    assert source.label(0) == -1


def test_links_are_followed_and_circles_end(tmp_path):
    save(tmp_path / "elsewhere" / "1.png")
    save(tmp_path / "root" / "a" / "0.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "root" / "b")
    os.symlink(tmp_path / "root", tmp_path / "root" / "a" / "circle")
    assert len(ImageFolder(str(tmp_path / "root"))) == 2


@pytest.mark.parametrize("what", ["missing", "empty", "file"])
def test_a_folder_without_images_says_what_to_do(tmp_path, what):
    path = tmp_path / what
    if what == "empty":
        (path / "a").mkdir(parents=True)
    if what == "file":
        path.write_text("")
    with pytest.raises(DataError, match={"missing": "does not exist", "empty": "no images", "file": "is a file"}[what]):
        open_source(str(path), "train", 3)


def test_a_folder_pickles_small_and_whole(tmp_path):
    for i in range(4):
        save(tmp_path / "ä" / f"{i}.png", seed=i)
    source = ImageFolder(str(tmp_path))
    copy = pickle.loads(pickle.dumps(source))
    assert names(copy) == names(source)
    assert np.array_equal(copy.read(3), source.read(3))


def test_a_torchvision_set_opens_both_splits(tmp_path):
    pytest.importorskip("torchvision")
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    (tmp_path / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    rows = {}
    for i, file in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        rows[file] = noise(4, 3072, seed=i)
        (base / file).write_bytes(pickle.dumps({"data": rows[file], "labels": [i, 1, 2, 3]}))
    from torchvision.datasets import CIFAR10

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CIFAR10, "_check_integrity", lambda self: True)
        patch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
        train, val = (open_source(f"cifar10:{tmp_path}", split, 3) for split in ("train", "val"))
    assert (len(train), len(val)) == (20, 4)
    assert val.label(0) == 5
    assert val.name(0) == "cifar10[0]"
    assert train.classes == list("abcdefghij")
    assert np.array_equal(val.read(1), rows["test_batch"][1].reshape(3, 32, 32).transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("cifar10:/nowhere", r"/nowhere does not hold CIFAR10 \(val\).*download=True"),
        ("svhn:/nowhere", "hold SVHN"),
        ("stl10:/nowhere", "hold STL10"),
        ("fashionmnist:/nowhere", "hold FashionMNIST"),
        ("cifra10:/nowhere", "did you mean cifar10:/nowhere"),
    ],
)
def test_a_torchvision_set_that_is_not_there_says_how_to_get_it(path, sentence):
    pytest.importorskip("torchvision")
    with pytest.raises(DataError, match=sentence):
        open_source(path, "val", 3)


class Items(torch.utils.data.Dataset):
    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def test_torch_data_sets_give_images_in_many_shapes():
    image = noise(4, 6, 3)
    chw = torch.from_numpy(image.transpose(2, 0, 1).copy())
    forms = [image, Image.fromarray(image), chw, chw.float() / 255, image.astype(np.float64) / 255]
    items = [
        *forms,
        (image, 7),
        (image, torch.tensor(8), "more"),
        {"image": image, "label": np.int64(9)},
        {"image": chw},
    ]
    source = TorchDataset(Items(*items))
    assert source.channels == 3
    for i in range(len(source)):
        assert np.array_equal(source.read(i), image), i
    assert [source.label(i) for i in range(len(source))] == [-1] * 5 + [7, 8, 9, -1]


def test_torch_data_sets_of_grey_images_have_one_channel():
    grey = noise(4, 6)
    assert np.array_equal(TorchDataset(Items(torch.from_numpy(grey))).read(0), grey[..., None])
    assert np.array_equal(TorchDataset(Items(grey), channels=3).read(0), np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize(
    ("item", "sentence"),
    [("text", "is a str"), ({"picture": 1}, "keys picture"), (torch.randn(3, 4, 4) * 9, "floats must be in 0…1")],
)
def test_a_torch_data_set_without_images_says_so(item, sentence):
    with pytest.raises(DataError, match=sentence):
        TorchDataset(Items(item))


def test_an_iterable_data_set_is_refused():
    with pytest.raises(DataError, match="map-style"):
        TorchDataset(iter([1, 2]))


def test_an_exception_in_a_torch_data_set_is_an_unreadable_image():
    with pytest.raises(UnreadableImage, match=r"Items\[5\]: IndexError"):
        TorchDataset(Items(noise(4, 4, 3))).read(5)


def test_held_out_images_are_a_fixed_share_and_capped():
    assert len(held_out(1000, 0.1)) == 100
    assert len(held_out(1_300_000, 0.1)) == 10_000
    assert np.array_equal(held_out(1000, 0.1), held_out(1000, 0.1))
    assert not np.array_equal(held_out(1000, 0.1), np.arange(100))
    assert len(held_out(3, 0.01)) == 1
    with pytest.raises(DataError, match="cannot be split"):
        held_out(1, 0.1)


def test_grey_and_rgb_convert_as_pillow_does():
    rgb = noise(500, 400, 3)
    assert np.array_equal(decode(encoded(rgb), 1)[..., 0], np.asarray(Image.fromarray(rgb).convert("L")))
    assert np.array_equal(to_image(rgb, 1)[..., 0], np.asarray(Image.fromarray(rgb).convert("L")))
    assert np.array_equal(decode(encoded(rgb[..., 0]), 3), np.repeat(rgb[..., :1], 3, axis=2))


@pytest.mark.parametrize("mode", ["RGBA", "P", "1", "CMYK", "LA"])
def test_every_mode_becomes_rgb_as_in_image_folder(mode):
    image = Image.fromarray(noise(9, 7, 3)).convert(mode)
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    assert np.array_equal(decode(data, 3), np.asarray(image.convert("RGB")))


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(noise(4, 9, 3), "JPEG", exif=exif), 3).shape == (4, 9, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(channels):
    eight = noise(6, 5)
    wide = Image.fromarray(eight.astype(np.uint16) * 257)
    assert np.array_equal(decode(encoded(wide), channels)[..., 0], eight)


def test_sixteen_bit_rgb_is_scaled():
    eight = noise(2, 3, 3)
    rows = b"".join(b"\0" + (eight[y].astype(">u2") * 257).tobytes() for y in range(2))

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.array_equal(decode(data, 3), eight)


def test_other_channel_counts_are_kept_and_checked(tmp_path):
    assert np.array_equal(decode(encoded(noise(4, 5, 4)), 4), noise(4, 5, 4))
    assert np.array_equal(decode(encoded(noise(4, 5, 4), "TIFF"), 4), noise(4, 5, 4))
    (tmp_path / "a").mkdir()
    np.save(tmp_path / "a" / "1.npy", noise(4, 5, 5))
    assert np.array_equal(open_source(str(tmp_path), "train", 5, holdout=0).read(0), noise(4, 5, 5))
    with pytest.raises(UnreadableImage, match=r"1.npy: has 5 channels, but the recipe expects 2"):
        read_image(str(tmp_path / "a" / "1.npy"), 2)
    with pytest.raises(UnreadableImage, match="has 3 channels, but the recipe expects 4"):
        decode(encoded(noise(4, 5, 3)), 4)


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_a_tiff_of_five_channels_is_read_by_tifffile(planar):
    tifffile = pytest.importorskip("tifffile")
    image, buffer = noise(20, 30, 5), io.BytesIO()
    stored = image if planar == "contig" else image.transpose(2, 0, 1)
    tifffile.imwrite(buffer, stored, photometric="minisblack", planarconfig=planar)
    assert np.array_equal(decode(buffer.getvalue(), 5), image)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_truncated_images_are_unreadable(kind, tmp_path):
    path = tmp_path / "cut.img"
    path.write_bytes(encoded(noise(64, 64, 3), kind)[:2000])
    with pytest.raises(UnreadableImage) as caught:
        read_image(str(path), 3)
    assert caught.value.path == str(path)
    assert caught.value.reason
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("data", "reason"), [(b"", "empty"), (b"<html>", "not an image"), (None, "No such file")])
def test_files_that_are_no_images_are_unreadable(data, reason, tmp_path):
    path = tmp_path / "1.jpg"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UnreadableImage, match=reason):
        read_image(str(path), 3)


def test_an_unreadable_image_survives_pickling():
    error = pickle.loads(pickle.dumps(UnreadableImage("a.jpg", "cut")))
    assert (error.path, error.reason) == ("a.jpg", "cut")
