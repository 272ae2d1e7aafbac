"""Shards written and read: the same pixels, the same bytes however they were made, and a way on after a kill."""

import errno
import io
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import psutil
import pytest
import torch
import webdataset
from PIL import Image

from elsewhere.data.decode import UnreadableImage
from elsewhere.data.images import DataError, Digits, ImageFolder
from elsewhere.data.shard_writer import WriteOptions, write_shards
from elsewhere.data.shards import ShardIndex, Shards, has_val, index_path, names_shards
from elsewhere.data.streams import generator


def noise(*shape, seed=0, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """20 JPEGs and PNGs of two classes."""
    root = tmp_path / "images"
    for i in range(20):
        save(root / "ab"[i % 2] / f"{i:02}.{'jpg' if i % 3 else 'png'}", noise(9 + i, 12, 3, seed=i))
    return root


def contents(path):
    return {name.name: name.read_bytes() for name in path.iterdir()}


def members(tar):
    with tarfile.open(tar) as file:
        return file.getmembers()


def by_path(dest):
    """Member bytes of every sample by the path of its source image, read by `tarfile`."""
    found = {}
    for tar in sorted(dest.glob("*.tar")):
        with tarfile.open(tar) as file:
            members = {m.name: file.extractfile(m).read() for m in file.getmembers()}
        for name, data in members.items():
            if name.endswith(".json"):
                key = name.removesuffix(".json")
                about = json.loads(data)
                own = {n.split(".", 1)[1]: d for n, d in members.items() if n.startswith(key + ".")}
                found[about["path"]] = {**own, "json": about, "key": key}
    return found


def order(n, seed=0):
    return generator(seed, "shards", 0).permutation(n).tolist()


def test_digits_come_back_in_the_seeded_order(tmp_path):
    written = write_shards("digits", tmp_path / "out", options=WriteOptions(samples_per_shard=500, seed=3))
    source, shards = Digits("train"), Shards(tmp_path / "out")
    assert [shard["samples"] for shard in written.manifest["shards"]] == [500, 500, 438]
    assert (len(shards), shards.channels, shards.classes) == (len(source), 1, source.classes)
    for i, j in enumerate(order(len(source), seed=3)):
        assert np.array_equal(shards.read(i), source.read(j)) and shards.label(i) == source.label(j)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_many_kinds_gives_the_pixels_that_the_folder_gives(tmp_path, channels):
    root = tmp_path / "images"
    save(root / "a" / "rgb.jpg", noise(20, 30, 3))
    save(root / "a" / "grey.jpg", noise(20, 30))
    save(root / "a" / "cmyk.jpg", Image.fromarray(noise(20, 30, 3)).convert("CMYK"))
    save(root / "a" / "rgb.png", noise(20, 30, 3, seed=1))
    save(root / "a" / "palette.png", Image.fromarray(noise(20, 30, 3, seed=2)).convert("P"))
    save(root / "a" / "alpha.png", noise(20, 30, 4))
    save(root / "b" / "sixteen.png", noise(20, 30, dtype=np.uint16))
    save(root / "b" / "sixteen.npy", noise(20, 30, 1, dtype=np.uint16))
    save(root / "b" / "alpha.webp", noise(20, 30, 4, seed=5))
    save(root / "b" / "rgb.bmp", noise(20, 30, 3, seed=6))
    written = write_shards(str(root), tmp_path / "out")
    assert written.manifest["unreadable"] == []
    source, shards = ImageFolder(str(root), channels=channels), Shards(tmp_path / "out", channels=channels)
    assert len(shards) == 10
    for i, j in enumerate(order(10)):
        assert np.array_equal(shards.read(i), source.read(j)), source.name(j)
        assert shards.label(i) == source.label(j)


def test_images_of_four_channels_keep_them(tmp_path):
    for i, name in enumerate(("a/1.png", "a/2.npy", "a/3.tif")):
        save(tmp_path / "images" / name, noise(8, 9, 4, seed=i))
    write_shards(str(tmp_path / "images"), tmp_path / "out")
    shards = Shards(tmp_path / "out")
    assert shards.channels == 4
    for i, j in enumerate(order(3)):
        assert np.array_equal(shards.read(i), noise(8, 9, 4, seed=j))


def test_sixteen_bits_are_kept_as_npy(tmp_path):
    image = noise(8, 9, dtype=np.uint16)
    save(tmp_path / "images" / "a" / "1.png", image)
    write_shards(str(tmp_path / "images"), tmp_path / "out")
    stored = np.load(io.BytesIO(by_path(tmp_path / "out")["a/1.png"]["npy"]))
    assert stored.dtype == np.uint16 and np.array_equal(stored[..., 0], image)


def test_files_are_copied_byte_for_byte_and_described(folder, tmp_path):
    write_shards(str(folder), tmp_path / "out")
    samples = by_path(tmp_path / "out")
    assert len(samples) == 20
    for path, sample in samples.items():
        file = folder / path
        assert sample[file.suffix[1:]] == file.read_bytes()
        width, height = Image.open(file).size
        expected = {"path": path, "class": path[0], "bytes": file.stat().st_size, "height": height, "width": width}
        assert sample["json"] == expected
        assert sample["cls"] == str("ab".index(path[0])).encode()


def test_the_longer_side_is_limited_and_the_rest_left_alone(folder, tmp_path):
    write_shards(str(folder), tmp_path / "out", options=WriteOptions(max_side=20))
    for path, sample in by_path(tmp_path / "out").items():
        height = sample["json"]["height"]
        data = sample[path[-3:]]
        assert max(Image.open(io.BytesIO(data)).size) == min(20, max(12, height))
        assert (data == (folder / path).read_bytes()) == (height <= 20)
        assert sample["json"].get("stored_height", height) == min(20, height)


def test_sixteen_bits_survive_shrinking(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[:, None, None] * np.ones((1, 64, 5), dtype=np.uint16)
    save(tmp_path / "images" / "a" / "1.npy", ramp)
    write_shards(str(tmp_path / "images"), tmp_path / "out", options=WriteOptions(max_side=32))
    stored = np.load(io.BytesIO(by_path(tmp_path / "out")["a/1.npy"]["npy"]))
    assert stored.shape == (32, 32, 5) and stored.dtype == np.uint16
    assert np.abs(stored.astype(int) - ramp.reshape(32, 2, 32, 2, 5).mean((1, 3))).max() < 1500


def test_a_quality_makes_every_image_a_jpeg(folder, tmp_path):
    write_shards(str(folder), tmp_path / "out", options=WriteOptions(quality=40))
    for path, sample in by_path(tmp_path / "out").items():
        buffer = io.BytesIO()
        Image.open(folder / path).convert("RGB").save(buffer, "JPEG", quality=40)
        assert sample["jpg"] == buffer.getvalue()


def test_webdataset_reads_every_sample_with_its_label(folder, tmp_path):
    write_shards(str(folder), tmp_path / "out", options=WriteOptions(samples_per_shard=8))
    read = webdataset.WebDataset(f"{tmp_path}/out/shard-{{000000..000002}}.tar", shardshuffle=False).decode("rgb8")
    found = {s["json"]["path"]: (s.get("jpg", s.get("png")), s["cls"]) for s in read}
    source = ImageFolder(str(folder))
    assert len(found) == 20
    for i in range(20):
        pixels, label = found[os.path.relpath(source.name(i), folder)]
        assert np.array_equal(pixels, source.read(i)) and label == source.label(i)


def test_a_shard_ends_before_it_would_be_too_large(folder, tmp_path):
    manifest = write_shards(str(folder), tmp_path / "out", options=WriteOptions(shard_bytes=20_000)).manifest
    assert len(manifest["shards"]) > 2
    for shard, after in zip(manifest["shards"], manifest["shards"][1:], strict=False):
        first = members(tmp_path / "out" / after["name"])[3].offset
        assert shard["bytes"] <= 20_000 < shard["bytes"] + first
        assert (tmp_path / "out" / shard["name"]).stat().st_size == shard["bytes"]


def test_writer_processes_do_without_torch():
    code = "import sys, elsewhere.data.shard_samples; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_two_processes_write_the_same_bytes_as_one(folder, tmp_path):
    (folder / "a" / "broken.jpg").write_bytes(b"no image")
    options = WriteOptions(samples_per_shard=7, max_side=16)
    for name, processes in (("one", 1), ("two", 2)):
        write_shards(str(folder), tmp_path / name, options=options, processes=processes)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 7


KILLED = """
import sys, time
from elsewhere.data.shard_writer import WriteOptions, write_shards
write_shards(sys.argv[1], sys.argv[2], options=WriteOptions(samples_per_shard=4), processes=2,
             progress=lambda done, of, size: time.sleep(0.1))
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_changes_nothing_in_the_end(folder, tmp_path):
    """Nor does it leave writer processes behind."""
    (folder / "a" / "broken.jpg").write_bytes(b"no image")
    killed = subprocess.Popen([sys.executable, "-c", KILLED, str(folder), str(tmp_path / "killed")])
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "killed" / "shard-000001.tar").exists() or not list(tmp_path.glob("killed/.writing-s*")):
            assert killed.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        workers = psutil.Process(killed.pid).children(recursive=True)
        assert len(workers) >= 2
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    assert psutil.wait_procs(workers, timeout=10)[1] == []
    with pytest.raises(DataError, match="not finished: run the same"):
        Shards(tmp_path / "killed")
    options = WriteOptions(samples_per_shard=4)
    assert write_shards(str(folder), tmp_path / "killed", options=options).kept >= 2
    write_shards(str(folder), tmp_path / "whole", options=options)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


class Stopped(Exception):
    pass


def stopping_at(image):
    def progress(done, total, size):
        if done == image:
            raise Stopped

    return progress


def test_going_on_does_not_touch_finished_shards(folder, tmp_path):
    options = WriteOptions(samples_per_shard=4)
    with pytest.raises(Stopped):
        write_shards(str(folder), tmp_path / "out", options=options, progress=stopping_at(10))
    assert {p.name for p in tmp_path.glob("out/*.tar")} == {"shard-000000.tar", "shard-000001.tar"}
    assert not list(tmp_path.glob("out/.writing*"))
    before = os.stat(tmp_path / "out" / "shard-000001.tar").st_ino
    assert write_shards(str(folder), tmp_path / "out", options=options).kept == 2
    assert os.stat(tmp_path / "out" / "shard-000001.tar").st_ino == before


def test_what_a_killed_writer_left_unfinished_is_removed(folder, tmp_path):
    with pytest.raises(Stopped):
        write_shards(str(folder), tmp_path / "out", progress=stopping_at(10))
    (tmp_path / "out" / ".writing-shard-000009.tar").write_text("half")
    write_shards(str(folder), tmp_path / "out")
    assert {path.name for path in tmp_path.glob("out/*")} == {"manifest.json", "shard-000000.tar", "shard-000000.idx"}
    assert not list(tmp_path.glob("out/.*"))


def test_a_missing_shard_is_written_again(folder, tmp_path):
    options = WriteOptions(samples_per_shard=4)
    write_shards(str(folder), tmp_path / "out", options=options)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "shard-000003.tar").unlink()
    write_shards(str(folder), tmp_path / "out", options=options)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"options": WriteOptions(samples_per_shard=4, seed=1)}, "seed: 0 -> 1"),
        ({"options": WriteOptions(samples_per_shard=4, max_side=8)}, "max_side: None -> 8"),
        ({"options": WriteOptions(samples_per_shard=4), "split": "val"}, "split: train -> val"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused(folder, tmp_path, change, words, finished):
    stop = {} if finished else {"progress": stopping_at(10)}
    try:
        write_shards(str(folder), tmp_path / "out", options=WriteOptions(samples_per_shard=4), **stop)
    except Stopped:
        assert not finished
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match=f"was written with other settings .*{words}"):
        write_shards(str(folder), tmp_path / "out", **change)
    assert contents(tmp_path / "out") == before


def test_another_image_in_the_place_of_one_is_refused(folder, tmp_path):
    write_shards(str(folder), tmp_path / "out")
    (folder / "a" / "00.png").rename(folder / "a" / "00b.png")
    with pytest.raises(DataError, match="other names or labels of images"):
        write_shards(str(folder), tmp_path / "out")


def test_a_finished_shard_that_changed_is_refused(folder, tmp_path):
    write_shards(str(folder), tmp_path / "out")
    with open(tmp_path / "out" / "shard-000000.tar", "ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match="has changed since it was written: move it away"):
        write_shards(str(folder), tmp_path / "out")


def test_a_folder_that_holds_something_else_is_left_alone(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds something else \(thesis.txt\): choose an empty or a new folder"):
        write_shards(str(folder), tmp_path / "out")
    assert contents(tmp_path / "out") == {"thesis.txt": b"mine"}


def test_a_folder_that_cannot_be_made_is_a_sentence(folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match=r"cannot be written to \(Not a directory\)"):
        write_shards(str(folder), tmp_path / "file" / "out")


def test_shards_are_not_written_among_their_images(folder):
    with pytest.raises(DataError, match="lies inside the images' folder"):
        write_shards(str(folder), folder / "shards")
    assert not (folder / "shards").exists()


def test_two_writers_at_once_are_refused(folder, tmp_path):
    def second():
        with pytest.raises(DataError, match="Another process writes to"):
            write_shards(str(folder), tmp_path / "out")

    def start_second(done, total, size):
        process = multiprocessing.get_context("fork").Process(target=second)
        process.start()
        process.join()
        assert process.exitcode == 0
        raise Stopped

    with pytest.raises(Stopped):
        write_shards(str(folder), tmp_path / "out", progress=start_second)


def test_a_full_disk_is_a_sentence_and_keeps_finished_shards(folder, tmp_path, monkeypatch):
    options = WriteOptions(samples_per_shard=4)
    from elsewhere.data.shard_writer import ShardFile

    write = ShardFile._write

    def full(self, data):
        if self.name == "shard-000002.tar":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    with monkeypatch.context() as patch, pytest.raises(DataError, match=r"is full: make room .* 2 finished shard\(s\)"):
        patch.setattr(ShardFile, "_write", full)
        write_shards(str(folder), tmp_path / "out", options=options)
    assert not list(tmp_path.glob("out/.writing*"))
    assert write_shards(str(folder), tmp_path / "out", options=options).kept == 2


def test_unreadable_images_are_left_out_and_listed(folder, tmp_path):
    whole = (folder / "b" / "05.jpg").read_bytes()
    (folder / "b" / "05.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "a" / "empty.png").write_bytes(b"")
    manifest = write_shards(str(folder), tmp_path / "out").manifest
    reasons = {one["path"]: one["reason"] for one in manifest["unreadable"]}
    assert set(reasons) == {"b/05.jpg", "a/empty.png"} and reasons["a/empty.png"] == "the file is empty"
    assert manifest["samples"] == len(Shards(tmp_path / "out")) == 19


def test_a_source_without_a_readable_image_is_refused(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "1.png").write_bytes(b"no")
    with pytest.raises(DataError, match=r"None of the 1 images can be read, the first is a/1.png: not an image"):
        write_shards(str(tmp_path / "images"), tmp_path / "out")


def test_splits_of_one_folder_are_disjoint_and_everything_is_written_without_one(folder, tmp_path):
    for split, dest in (("train", "out/train"), ("val", "out/val"), (None, "all")):
        write_shards(str(folder), tmp_path / dest, split=split, holdout=0.2)
    parts = [set(by_path(tmp_path / dest)) for dest in ("out/train", "out/val", "all")]
    assert [len(part) for part in parts] == [16, 4, 20] and parts[0] | parts[1] == parts[2]
    assert [len(Shards(tmp_path / "out", split)) for split in ("train", "val", None)] == [16, 4, 16]
    assert len(Shards(tmp_path / "out" / "val", "val")) == 4
    assert [has_val(tmp_path / path) for path in ("out", "out/val", "out/train", "all")] == [True, True, False, False]


def test_shards_are_written_to_shards_of_another_size(folder, tmp_path):
    write_shards(str(folder), tmp_path / "out")
    write_shards(str(tmp_path / "out"), tmp_path / "small", options=WriteOptions(samples_per_shard=6))
    first, second = Shards(tmp_path / "out"), Shards(tmp_path / "small")
    assert second.classes == ["a", "b"]
    assert [second.read_bytes(i) for i in range(20)] == [first.read_bytes(i) for i in order(20)]


@pytest.fixture
def shards(folder, tmp_path):
    """The folder in five shards of four."""
    write_shards(str(folder), tmp_path / "out", options=WriteOptions(samples_per_shard=4))
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{}", range(20)),
        ("{}/shard-{{000001..000003}}.tar", range(4, 16)),
        ("{}/shard-00000{{4,0}}.tar", [*range(16, 20), *range(4)]),
        ("{}/shard-*[02].tar", [*range(4), *range(8, 12)]),
        ("{}/shard-000002.tar", range(8, 12)),
        (["{}/shard-000001.tar", "{}/shard-00000{{3..4}}.tar"], [*range(4, 8), *range(12, 20)]),
    ],
    ids=str,
)
def test_shards_are_named_in_many_ways(shards, pattern, expected):
    whole = Shards(shards)
    path = [p.format(shards) for p in pattern] if isinstance(pattern, list) else pattern.format(shards)
    assert names_shards(path)
    some = Shards(path)
    assert [some.read_bytes(i) for i in range(len(some))] == [whole.read_bytes(i) for i in expected]
    assert some.labels.tolist() == [whole.label(i) for i in expected]
    assert some.classes == ["a", "b"] and some.channels == 3


def test_a_folder_of_images_is_not_taken_for_shards(folder):
    assert not names_shards(folder) and not names_shards("digits") and not names_shards("cifar10:/x")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "shard-000001.idx").unlink(), r"it is missing; `elsewhere shards repair \S+out` makes it anew"),
        (lambda d: (d / "shard-000001.idx").write_bytes(b"elsewidx"), "it is no index"),
        (lambda d: flip(d / "shard-000001.idx", -1), "its checksum is wrong"),
        (lambda d: (d / "shard-000001.tar").unlink(), r"shard-000001.tar cannot be read \(No such file"),
        (lambda d: os.truncate(d / "shard-000001.tar", 3000), "cut short or replaced"),
        (lambda d: (d / "shard-000001.idx").write_bytes((d / "shard-000002.idx").read_bytes()), "another tar"),
        (lambda d: (d / "manifest.json").write_text("{"), r"manifest.json cannot be used .*shards repair"),
        (lambda d: edit(d / "manifest.json", version=9), "has format 9, but this version reads format 1"),
    ],
)
def test_shards_that_do_not_fit_together_do_not_open(shards, damage, words):
    damage(shards)
    with pytest.raises(DataError, match=words):
        Shards(shards)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("{}/shard-{{000004..000005}}.tar", "shard-000005.tar does not exist"),
        ("{}/nowhere-*.tar", "does not exist"),
        ("{}/..", "holds no shards"),
    ],
)
def test_a_path_without_shards_is_a_sentence(shards, path, words):
    with pytest.raises(DataError, match=words):
        Shards(path.format(shards))


def test_shards_of_train_alone_have_no_val(shards):
    with pytest.raises(DataError, match="has no val split: write one"):
        Shards(shards, "val")


def test_an_unreadable_image_names_shard_key_and_offset(shards):
    member = members(shards / "shard-000002.tar")[3]
    flip(shards / "shard-000002.tar", member.offset_data + 5)
    with pytest.raises(UnreadableImage) as caught:
        Shards(shards).read(9)
    expected = f"{shards}/shard-000002.tar, {member.name} at byte {member.offset_data}: its bytes changed"
    assert str(caught.value).startswith(expected)


def test_a_shard_that_comes_back_is_waited_for(shards, monkeypatch):
    source, tar = Shards(shards), shards / "shard-000002.tar"
    expected = source.read(8)
    source = pickle.loads(pickle.dumps(source))
    tar.rename(shards / "away")
    monkeypatch.setattr(time, "sleep", lambda seconds: seconds > 0.3 and (shards / "away").rename(tar))
    assert np.array_equal(source.read(8), expected)


def test_a_shard_that_stays_away_is_given_up_once_and_named(shards, monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    source = Shards(shards)
    (shards / "shard-000002.tar").unlink()
    for i in (8, 9, 10):
        with pytest.raises(UnreadableImage, match=r"shard-000002.tar, sample \d at byte \d+: .*No such file"):
            source.read(i)
    assert 0 < sum(pauses) < 5
    assert np.array_equal(source.read(4), Shards(f"{shards}/shard-000001.tar").read(0))


def test_few_files_are_open_at_once(shards, monkeypatch):
    monkeypatch.setattr("elsewhere.data.shards._MOST_OPEN", 2)
    source = Shards(shards)
    before = len(os.listdir("/proc/self/fd"))
    for i in range(20):
        source.read_bytes(i)
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    del source
    assert len(os.listdir("/proc/self/fd")) == before


class Labels(torch.utils.data.Dataset):
    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        return i, self.source.label(i), self.source.read_bytes(i)


def test_forked_workers_read_what_the_parent_reads(shards):
    source = Shards(shards)
    expected = [[i, source.label(i), source.read_bytes(i)] for i in range(20)]  # and so the parent's files are open
    context = multiprocessing.get_context("fork")
    loader = torch.utils.data.DataLoader(Labels(source), None, num_workers=2, multiprocessing_context=context)
    assert list(loader) == expected
    assert [[i, source.label(i), source.read_bytes(i)] for i in range(20)] == expected


@pytest.mark.slow
def test_spawned_workers_read_what_the_parent_reads(shards):
    source = Shards(shards)
    expected = [source.read_bytes(i) for i in range(20)]
    assert len(pickle.dumps(source)) < 4000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(source.read_bytes, range(20), chunksize=20) == expected


def test_an_index_past_the_end_is_an_index_error(shards):
    with pytest.raises(IndexError):
        Shards(shards).read(20)


@pytest.mark.slow
def test_the_index_of_an_imagenet_opens_fast_and_small(tmp_path):
    """1.28 million samples in 64 shards, of which there are indexes alone."""
    n = 20_018
    for shard in range(64):
        path = str(tmp_path / f"shard-{shard:06d}.tar")
        blocks = np.arange(1, n + 1, dtype=np.uint32) * 230
        columns = blocks, np.full(n, 110_000, np.uint32), blocks, (blocks % 1000).astype(np.int32), blocks.astype("u1")
        ShardIndex(n * 120_000, shard, *columns).save(index_path(path))
        with open(path, "wb") as file:
            file.truncate(n * 120_000)  # takes no room
    code = """if True:
        import sys, time
        from elsewhere.data.shards import Shards
        def private():
            lines = dict(line.split(":", 1) for line in open("/proc/self/smaps_rollup") if ":" in line)
            return int(lines["Private_Dirty"].split()[0]) / 1000
        before, start = private(), time.perf_counter()
        shards = Shards(sys.argv[1], channels=3)
        print(len(shards), time.perf_counter() - start, private() - before)
    """
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    count, seconds, megabytes = map(float, done.stdout.split())
    assert count == 64 * n and seconds < 2 and megabytes < 100
