import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("ffcv")

import cv2
from ffcv.fields import FloatField, IntField, RGBImageField
from ffcv.loader import Loader as FfcvsLoader
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.writer import DatasetWriter
from sklearn.datasets import load_sample_images

from elsewhere.data import ffcv, ffcv_writer
from elsewhere.data.augment import Augment, crop_box
from elsewhere.data.decode import luma
from elsewhere.data.ffcv import Beton, FfcvLoader, has_beton_val, names_beton, open_beton
from elsewhere.data.ffcv_writer import BetonOptions, write_beton
from elsewhere.data.images import DataError, Digits, ImageFolder
from elsewhere.data.loader import Loader
from elsewhere.data.order import Permutations, Plan, Requests
from elsewhere.data.random_masks import RandomMasks
from elsewhere.data.sources import Subset, open_source

N = 32
AUGMENT = Augment(size=(32, 40), views=2, crop_scale=(0.2, 1.0), on_device=True)
PLAN = Plan(seed=3, global_batch=12, micro_batch=6, stop_step=6, workers=2)
MASKS = RandomMasks((4, 5), 0.75, views=2)


_PHOTOS = load_sample_images().images


def photo(i):
    """A part of one of two photos, of a size that is no other's."""
    image = _PHOTOS[i % 2]
    return image[3 * i : 3 * i + 120 + 5 * i, 7 * i : 7 * i + 200 - 2 * i]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for i in range(N):
        path = root / "abc"[i % 3] / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(photo(i)).save(path)
    return str(root)


@pytest.fixture(scope="module")
def betons(folder, tmp_path_factory):
    """The photos as `jpg`, `raw` and, with every fourth JPEG overwritten, `bad`."""
    root = tmp_path_factory.mktemp("betons")
    paths = {name: str(root / f"{name}.beton") for name in ("jpg", "raw", "bad")}
    for mode in ("jpg", "raw"):
        write_beton(folder, paths[mode], mode=mode, max_side=1000, processes=1)
    for suffix in ("", ".json"):
        shutil.copy(paths["jpg"] + suffix, paths["bad"] + suffix)
    spoil(paths["bad"], range(0, N, 4))
    return paths


def spoil(path, images):
    beton = Beton(path)
    with open(path, "r+b") as file:
        for i in images:
            file.seek(int(beton._starts[i]))
            file.write(b"\0" * 400)


_loaders = {}


def ffcv_loader(path, augment=AUGMENT, masks=MASKS, indices=None, **changes):
    """A loader that shares what FFCV compiled for another one of the same file and crops."""
    plan, beton = replace(PLAN, **changes), Beton(path)
    key = path, augment.size, augment.views, plan.workers, plan.prefetch
    order = Permutations(len(beton) if indices is None else len(indices), plan.seed)
    if key not in _loaders:
        _loaders[key] = FfcvLoader(beton, indices, augment, masks, order, plan)
    loader = _loaders[key]
    loader.requests = Requests(order, plan)
    loader._augment, loader._masks, loader._plan = augment, masks, plan
    loader._source = beton if indices is None else Subset(beton, indices)
    loader._rows = np.arange(len(beton)) if indices is None else indices
    return loader


def ours(path, augment=AUGMENT, masks=MASKS, indices=None, **changes):
    beton, plan = Beton(path), replace(PLAN, **{"workers": 0, **changes})
    source = beton if indices is None else Subset(beton, indices)
    return Loader(source, augment, masks, Permutations(len(source), plan.seed), plan)


def assert_same_but_pixels(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        for field in fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            if field.name == "images":
                assert (x.shape, x.dtype, x.is_contiguous()) == (y.shape, y.dtype, True)
            else:
                assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, field.name


def assert_no_thread():
    assert not [thread for thread in threading.enumerate() if isinstance(thread, EpochIterator)]


class Listed:
    """Images of a list, with labels."""

    def __init__(self, images, labels, channels=3):
        self.images, self.labels, self.channels, self.classes = images, labels, channels, None

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], 0.5, self.labels[i]

    def read(self, i):
        return self.images[i]

    def label(self, i):
        return self.labels[i]

    def name(self, i):
        return f"listed[{i}]"


@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_images_and_labels_are_those_of_ffcvs_decoder(tmp_path, mode):
    path = str(tmp_path / "same.beton")
    source = Listed([photo(i)[:100, :130] for i in range(6)], [7, 1, 5, 1, 0, 3])
    write_beton(source, path, mode=mode, max_side=130)
    beton = Beton(path)
    images, labels = next(iter(FfcvsLoader(path, batch_size=6, num_workers=1)))
    assert labels.flatten().tolist() == [beton.label(i) for i in range(6)] == beton.labels.tolist()
    assert sorted(beton.labels.tolist()) == [0, 1, 1, 3, 5, 7]
    for i, image in enumerate(images.numpy()):
        difference = np.abs(beton.read(i).astype(int) - image)
        # FFCV decodes JPEG by a transform that is quick but not exact.
        assert difference.max() <= (0 if mode == "raw" else 6) and difference.mean() < 1.2


def test_a_file_that_ffcv_wrote_is_read_whatever_its_fields_are_called(tmp_path):
    path, source = str(tmp_path / "foreign.beton"), Listed([photo(i) for i in range(20)], list(range(20)))
    fields = {"picture": RGBImageField("raw"), "weight": FloatField(), "class": IntField()}
    DatasetWriter(path, fields, page_size=1 << 21, num_workers=1).from_indexed_dataset(source, chunksize=3)
    beton = Beton(path)
    assert len(beton) == 20 and beton.classes is None and beton.name(3) == f"{path}[3]"
    assert all(np.array_equal(beton.read(i), photo(i)) and beton.label(i) == i for i in range(20))


def test_without_labels_they_are_unknown(tmp_path):
    path = str(tmp_path / "unlabelled.beton")
    source = type("Alone", (), {"__len__": lambda self: 3, "__getitem__": lambda self, i: (photo(i),)})()
    DatasetWriter(path, {"image": RGBImageField("jpg")}, num_workers=1).from_indexed_dataset(source)
    assert Beton(path).labels.tolist() == [-1] * 3


def test_a_pickled_source_is_small_and_opens_without_ffcv(betons, tmp_path):
    beton = Beton(betons["jpg"])
    pickled = pickle.dumps(beton)
    assert len(pickled) < 1500
    (tmp_path / "pickled").write_bytes(pickled)
    code = (
        "import pickle, sys; beton = pickle.load(open(sys.argv[1], 'rb'));"
        "print(beton.read(3).sum(), beton.label(3), beton.classes, {'ffcv', 'numba', 'cv2'} & set(sys.modules))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "pickled")], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == f"{beton.read(3).sum()} {beton.label(3)} ['a', 'b', 'c'] set()"


def test_forked_workers_read_the_same(betons):
    one, other = list(ours(betons["jpg"])), list(ours(betons["jpg"], workers=2))
    assert_same_but_pixels(one, other)
    assert all(torch.equal(a.images, b.images) for a, b in zip(one, other, strict=True))


def test_grey_is_the_luma_of_what_is_stored(betons):
    assert np.array_equal(Beton(betons["raw"], 1).read(5), luma(Beton(betons["raw"]).read(5)))


def test_damaged_files_are_refused_in_a_sentence(betons, tmp_path):
    path = str(tmp_path / "x.beton")
    whole = Path(betons["jpg"]).read_bytes()
    beton = Beton(betons["jpg"])

    def refused(data, match):
        with open(path, "wb") as file:
            file.write(data)
        with pytest.raises(DataError, match=match):
            Beton(path)

    with pytest.raises(DataError, match="cannot be read"):
        Beton(path)
    refused(b"", "no FFCV file")
    refused(b"\xff\xd8\xff\xe0" + b"x" * 1000, "no FFCV file")
    for length in (10, 100, 3000, len(whole) // 2, len(whole) - 24 * N, len(whole) - 24, len(whole) - 5):
        refused(whole[:length], "cut short|no FFCV file|damaged")
    refused(whole[:16] + bytes(8) + whole[24:], "unfinished")
    refused(whole[:8] + bytes(8) + whole[16:], "empty")
    refused(whole[:8] + (2**40).to_bytes(8, "little") + whole[16:], "cut short")
    rows = bytearray(whole)
    at = beton.layout.rows_at + 3 * beton.layout.row.itemsize + beton.layout.row["f0"].fields["data_ptr"][1]
    rows[at : at + 8] = (2**50).to_bytes(8, "little")
    refused(bytes(rows), "damaged at image 3")


def test_a_file_without_an_image_is_refused(tmp_path):
    path = str(tmp_path / "x.beton")
    source = type("Numbers", (), {"__len__": lambda self: 3, "__getitem__": lambda self, i: (i,)})()
    DatasetWriter(path, {"label": IntField()}, num_workers=1).from_indexed_dataset(source)
    with pytest.raises(DataError, match="0 image fields"):
        Beton(path)


def test_a_file_that_changes_in_use_is_refused(betons, tmp_path):
    path = shutil.copy(betons["jpg"], tmp_path / "x.beton")
    pickled = pickle.dumps(Beton(path))
    os.truncate(path, os.path.getsize(path) - 1)
    with pytest.raises(DataError, match="changed"):
        pickle.loads(pickled)


def test_the_manifest_of_another_file_is_refused(betons, tmp_path):
    path = shutil.copy(betons["jpg"], tmp_path / "x.beton")
    for text, match in (
        ("{", "cannot be read"),
        (json.dumps({"format": ffcv.FORMAT, "version": 1, "samples": 3}), "another file"),
    ):
        (tmp_path / "x.beton.json").write_text(text)
        with pytest.raises(DataError, match=match):
            Beton(path)
    (tmp_path / "x.beton.json").write_text('{"somebody": "else"}')
    assert Beton(path).classes is None


def test_without_ffcv_the_commands_are_named(betons, monkeypatch):
    monkeypatch.setitem(sys.modules, "ffcv.fields", None)
    with pytest.raises(DataError, match=r"apt-get install .*libturbojpeg0-dev.*pip install") as caught:
        Beton(betons["jpg"])
    assert "\n" not in str(caught.value)


def test_a_folder_has_a_beton_for_each_split(betons, tmp_path):
    assert not names_beton(tmp_path) and not names_beton(["x.beton"])
    shutil.copy(betons["jpg"], tmp_path / "train.beton")
    assert names_beton(tmp_path) and names_beton(betons["jpg"]) and not has_beton_val(tmp_path)
    assert open_beton(tmp_path, "train").path == str(tmp_path / "train.beton")
    with pytest.raises(DataError, match="no val split"):
        open_beton(tmp_path, "val")
    shutil.copy(betons["raw"], tmp_path / "val.beton")
    assert has_beton_val(tmp_path) and open_beton(tmp_path, "val").path == str(tmp_path / "val.beton")
    os.unlink(tmp_path / "train.beton")
    with pytest.raises(DataError, match=r"no train\.beton"):
        open_beton(tmp_path)


@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_batches_are_those_of_the_other_loader(betons, mode):
    for changes in ({}, {"world": 2, "rank": 1}, {"start_step": 4, "stop_step": 8}):
        found = list(ffcv_loader(betons[mode], **changes))
        # Its workers are forked from a process that FFCV's threads run in.
        assert_same_but_pixels(found, ours(betons[mode], workers=2, **changes))
    assert {len(set(batch.epochs.tolist())) for batch in found} == {1, 2}, "no batch ends an epoch"
    assert_no_thread()


def test_a_subset_has_its_own_ids(betons):
    indices = np.array([28, 3, 9, 17, 22, 5, 1, 13, 0, 29, 14, 8])
    found = list(ffcv_loader(betons["raw"], indices=indices))
    assert_same_but_pixels(found, ours(betons["raw"], indices=indices))
    assert {i for batch in found for i in batch.sample_ids.tolist()} == set(range(12))
    beton = Beton(betons["raw"])
    assert found[0].labels.tolist() == [beton.label(int(indices[i])) for i in found[0].sample_ids]


@pytest.mark.parametrize(("mode", "indices"), [("jpg", None), ("raw", None), ("raw", np.array([28, 3, 9, 17, 22] * 3))])
def test_crops_are_the_boxes_of_every_reader_resized_by_opencv(betons, mode, indices):
    source = Beton(betons[mode]) if indices is None else Subset(Beton(betons[mode]), indices)
    worst, differences = 0, []
    for batch in ffcv_loader(betons[mode], indices=indices, stop_step=3):
        numbers = AUGMENT.numbers(PLAN.seed, batch.epochs.numpy(), batch.sample_ids.numpy())
        for views, i, us in zip(batch.images.numpy(), batch.sample_ids.tolist(), numbers, strict=True):
            image = source.read(i)
            for view, u in zip(views, us, strict=True):
                top, left, h, w = crop_box(*image.shape[:2], AUGMENT.crop_scale, AUGMENT.crop_aspect, u[:22])
                expected = cv2.resize(image[top : top + h, left : left + w], (40, 32), interpolation=cv2.INTER_AREA)
                differences.append(np.abs(view.transpose(1, 2, 0).astype(int) - expected))
                worst = max(worst, differences[-1].max())
    assert worst <= (1 if mode == "raw" else 5)
    assert np.mean(differences) < (0.01 if mode == "raw" else 1.2)


def test_grey_batches_are_the_luma_of_rgb_ones(betons, monkeypatch):
    loader = ffcv_loader(betons["raw"], stop_step=1)
    rgb = next(iter(loader)).images
    monkeypatch.setattr(loader, "_beton", Beton(betons["raw"], 1))
    grey = next(iter(loader)).images
    assert grey.shape == (6, 2, 1, 32, 40)
    assert np.array_equal(grey.numpy()[:, :, 0], luma(rgb.numpy().transpose(0, 1, 3, 4, 2))[..., 0])


@pytest.mark.parametrize("channels", [3, 1])
def test_an_unreadable_image_is_replaced_as_by_the_other_loader(betons, channels, monkeypatch):
    beton, spoilt = Beton(betons["bad"], channels), set(range(0, N, 4))
    loader = ffcv_loader(betons["bad"])
    monkeypatch.setattr(loader, "_beton", beton)
    monkeypatch.setattr(loader, "_source", beton)
    found = list(loader)
    expected = list(Loader(beton, AUGMENT, MASKS, Permutations(N, 3), replace(PLAN, workers=0)))
    assert_same_but_pixels(found, expected)
    skipped = [line for batch in found for line in batch.skipped]
    assert skipped and {line.split(": ")[0] for line in skipped} <= {beton.name(i) for i in spoilt}
    assert not spoilt & {i for batch in found for i in batch.sample_ids.tolist()}
    for a, b in zip(found, expected, strict=True):
        # Neither the resize nor the decoder is the same, but the picture is.
        assert (a.images.float() - b.images.float()).abs().mean() < 8


def test_on_error_stop_raises(betons):
    with pytest.raises(DataError, match=r"cannot be read .*bad\.beton\[\d+\].*data\.on_error=skip"):
        list(ffcv_loader(betons["bad"], on_error="stop"))
    assert_no_thread()


def test_an_early_end_leaves_no_thread(betons):
    for taken in (1, 4):
        batches = iter(ffcv_loader(betons["raw"], stop_step=1000))
        for _ in range(taken):
            next(batches)
        time.sleep(0.2)  # until the queue is full
        batches.close()
        assert_no_thread()


def test_the_last_batches_need_not_be_taken(betons):
    batches = iter(ffcv_loader(betons["raw"], world=2, stop_step=1 + PLAN.prefetch))
    next(batches)
    time.sleep(0.3)  # FFCV has made all that there are, and waits for room to say so
    batches.close()
    assert_no_thread()


def test_what_fails_in_ffcvs_thread_is_one_sentence(betons, monkeypatch, capfd):
    def fail(*_):
        raise RuntimeError("out of\nsome memory")

    monkeypatch.setattr(EpochIterator, "run_pipeline", fail)
    with pytest.raises(DataError, match=r"FFCV failed on .*raw\.beton \(RuntimeError: out of some memory\)"):
        list(ffcv_loader(betons["raw"]))
    assert "Traceback" not in capfd.readouterr().err
    assert_no_thread()


def test_no_batch_is_waited_for_without_end(betons, monkeypatch):
    loader = ffcv_loader(betons["raw"])
    pipeline = EpochIterator.run_pipeline
    monkeypatch.setattr(loader, "_limit", 0.5)
    monkeypatch.setattr(EpochIterator, "run_pipeline", lambda *a: (time.sleep(3), pipeline(*a))[1])
    with pytest.raises(DataError, match=r"no batch of .*raw\.beton in"):
        list(loader)
    assert_no_thread()


def test_spans_change_nothing(betons, monkeypatch):
    whole = list(ffcv_loader(betons["raw"]))
    monkeypatch.setattr(ffcv, "_SPAN", 20)
    parts = list(ffcv_loader(betons["raw"]))
    assert_same_but_pixels(parts, whole)
    assert all(torch.equal(a.images, b.images) for a, b in zip(parts, whole, strict=True))


def test_torch_keeps_its_threads_and_numpy_its_random_numbers(betons):
    before, state = torch.get_num_threads(), np.random.get_state()[1].copy()
    FfcvLoader(Beton(betons["raw"]), None, AUGMENT, None, Permutations(N, 0), PLAN)
    assert torch.get_num_threads() == before != PLAN.workers
    for _ in ffcv_loader(betons["raw"]):
        assert torch.get_num_threads() == before
    assert np.array_equal(np.random.get_state()[1], state)


def test_looks_are_left_to_the_device(betons):
    with pytest.raises(DataError, match="augment=device"):
        FfcvLoader(Beton(betons["raw"]), None, replace(AUGMENT, on_device=False), None, Permutations(N, 0), PLAN)


@pytest.mark.parametrize("options", [{"mode": "jpg", "quality": 80}, {"mode": "raw"}, {"mode": "jpg", "max_side": 111}])
def test_images_are_encoded_as_ffcv_does(options):
    stored = []

    def malloc(size):
        stored.append(np.empty(size, np.uint8))
        return 0, stored[-1]

    field = RGBImageField(options["mode"], options.get("max_side"), jpeg_quality=options.get("quality", 90))
    row = np.zeros(1, field.metadata_type)
    field.encode(row, photo(4), malloc)
    found = ffcv_writer._encode(photo(4), 0, BetonOptions(**options), "image")
    assert found.data == stored[0].tobytes()
    assert (found.mode, found.height, found.width) == (row["mode"][0], row["height"][0], row["width"][0])


def test_classes_and_labels_come_back_in_the_seeded_order(folder, betons):
    files, beton = ImageFolder(folder), Beton(betons["raw"])
    manifest = json.loads(Path(betons["raw"] + ".json").read_text())
    assert beton.classes == files.classes == manifest["classes"] == ["a", "b", "c"]
    assert (manifest["samples"], manifest["mode"], manifest["split"]) == (N, "raw", "train")
    order = ffcv_writer.generator(0, "shards", 0).permutation(N).tolist()
    assert all(
        np.array_equal(beton.read(k), files.read(i)) and beton.label(k) == files.label(i) for k, i in enumerate(order)
    )


def test_smart_stores_small_images_raw(folder, tmp_path):
    write_beton(folder, tmp_path / "x.beton", mode="smart", smart_threshold=90_000, max_side=1000)
    beton = Beton(tmp_path / "x.beton")
    assert np.array_equal(beton._raw, 3 * beton.heights * beton.widths <= 90_000)
    assert 0 < beton._raw.sum() < N


def test_grey_and_16_bits_become_rgb_and_other_channels_are_refused(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    grey = photo(0)[..., 0]
    Image.fromarray(grey).save(root / "0.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(root / "1.png")
    write_beton(str(root), tmp_path / "x.beton", mode="raw", max_side=1000)
    assert all(np.array_equal(Beton(tmp_path / "x.beton").read(i), np.dstack([grey] * 3)) for i in range(2))
    with pytest.raises(DataError, match="write shards"):
        write_beton(Listed([np.zeros((4, 4, 5), np.uint8)], [0], channels=5), tmp_path / "y.beton")


@pytest.mark.long
def test_processes_change_nothing_and_unreadable_images_are_listed(folder, tmp_path):
    root = tmp_path / "images"
    shutil.copytree(folder, root)
    (root / "b" / "zz.jpg").write_bytes(b"\xff\xd8\xff cut off")
    seen = []
    one = write_beton(str(root), tmp_path / "1.beton", processes=1, progress=lambda *state: seen.append(state))
    two = write_beton(str(root), tmp_path / "2.beton", processes=2)
    assert one == two and (tmp_path / "1.beton").read_bytes() == (tmp_path / "2.beton").read_bytes()
    assert [found["path"] for found in one["unreadable"]] == ["b/zz.jpg"] and one["unreadable"][0]["reason"]
    assert one["samples"] == len(Beton(tmp_path / "1.beton")) == N
    assert [done for done, _, _ in seen] == list(range(N + 2)) and {of for _, of, _ in seen} == {N + 1}
    assert seen[-1][2] == int(Beton(tmp_path / "1.beton")._sizes.sum())


def test_what_is_cut_off_leaves_nothing(folder, tmp_path, monkeypatch):
    def stop(done, of, size):
        assert os.listdir(tmp_path) == [".writing-x.beton"]
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_beton(folder, tmp_path / "x.beton", processes=1, progress=stop)
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(ffcv_writer.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(DataError, match="full"):
        write_beton(folder, tmp_path / "x.beton", processes=1)
    assert os.listdir(tmp_path) == []


def test_nothing_is_overwritten(folder, tmp_path):
    for taken in ("x.beton", "x.beton.json"):
        (tmp_path / taken).write_text("mine")
        with pytest.raises(DataError, match=f"{taken} exists"):
            write_beton(folder, tmp_path / "x.beton")
        assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
        (tmp_path / taken).unlink()
    with pytest.raises(DataError, match="does not end in"):
        write_beton(folder, tmp_path / "x.ffcv")


def test_two_writers_do_not_share_a_file(folder, tmp_path):
    def second(done, of, size):
        if done == 1:
            with pytest.raises(DataError, match="Another process"):
                write_beton(folder, tmp_path / "x.beton")

    write_beton(folder, tmp_path / "x.beton", processes=1, progress=second)
    assert len(Beton(tmp_path / "x.beton")) == N


def test_a_dead_process_is_told_of(folder, tmp_path):
    def kill():
        while not (children := multiprocessing.active_children()):
            time.sleep(0.01)
        os.kill(children[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(DataError, match="process died"):
        write_beton(folder, tmp_path / "x.beton", processes=2)
    killer.join()
    assert os.listdir(tmp_path) == []


def test_images_that_none_can_be_read_of_are_refused(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"None of the 1 images .* 0\.jpg"):
        write_beton(str(tmp_path / "images"), tmp_path / "x.beton")
    assert not (tmp_path / "x.beton").exists()


def test_a_written_split_is_known_as_one(tmp_path):
    for split in ("train", "val"):
        write_beton("digits", tmp_path / f"{split}.beton", split=split, mode="raw", max_side=8)
    assert has_beton_val(tmp_path) and has_beton_val(tmp_path / "val.beton")
    assert not has_beton_val(tmp_path / "train.beton")
    val = open_source(str(tmp_path), "val", 3)
    assert len(val) == len(Digits("val")) and val.classes == Digits().classes
    with pytest.raises(DataError, match="no val split"):
        open_beton(tmp_path / "train.beton", "val")


@pytest.mark.parametrize("options", [{"mode": "png"}, {"quality": 0}, {"max_side": 0}, {"seed": -1}])
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(DataError, match=r"unknown|out of range"):
        BetonOptions(**options)
