"""Damage made by hand: each kind is named by shard, key and byte offset, and what is readable is recovered."""

import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from elsewhere.data.images import DataError, Digits
from elsewhere.data.shard_check import verify
from elsewhere.data.shard_repair import repair
from elsewhere.data.shard_stats import contact_sheet, measure
from elsewhere.data.shard_writer import WriteOptions, write_shards
from elsewhere.data.shards import Shards

TAR, IDX = "shard-000001.tar", "shard-000001.idx"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """30 noisy PNGs of three classes in three shards of ten; the order is that of the seed."""
    root = tmp_path_factory.mktemp("images")
    for i in range(30):
        path = root / "abc"[i % 3] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (80, 96, 3), dtype=np.uint8)).save(path)
    dest = tmp_path_factory.mktemp("shards") / "out"
    write_shards(str(root), dest, options=WriteOptions(samples_per_shard=10))
    return dest


@pytest.fixture
def out(written, tmp_path):
    shutil.copytree(written, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def whole(written):
    """The shards without damage."""
    return written


def members(tar):
    """The members of a whole tar in order: image, label and json of each sample."""
    with tarfile.open(tar) as file:
        return file.getmembers()


def key(member):
    return member.name.split(".")[0]


def patch(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def found(path, **options):
    return [(f.kind, f.shard, f.key, f.offset) for f in verify(path, **options).findings]


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def images(path, **options):
    shards = Shards(path, **options)
    return [(shards.read_bytes(i), shards.label(i)) for i in range(len(shards))]


def test_nothing_is_found_where_nothing_is_wrong(out):
    report = verify(out, deep=True, threads=2)
    assert (report.findings, report.severity) == ([], 0)
    assert (report.shards, report.samples) == (3, 30)
    assert report.bytes == sum(tar.stat().st_size for tar in out.glob("*.tar"))


def test_a_tar_cut_within_an_image_names_it(out):
    image = members(out / TAR)[12]
    os.truncate(out / TAR, image.offset_data + 100)
    assert found(out) == [
        ("truncated", TAR, key(image), image.offset),
        ("missing image", TAR, None, image.offset_data),  # this and all after it, as the index knows
    ]


def test_a_tar_cut_between_two_samples_is_noticed(out):
    image = members(out / TAR)[12]
    os.truncate(out / TAR, image.offset)
    assert found(out) == [
        ("truncated", TAR, None, image.offset),
        ("missing image", TAR, None, image.offset_data),
    ]


@pytest.mark.parametrize("member", [0, 1, 2, 12, 13, 14])
@pytest.mark.parametrize("junk", [b"\xa5" * 512, bytes(512)], ids=["junk", "zeros"])
def test_an_overwritten_header_names_the_sample(out, member, junk):
    damaged, image = members(out / TAR)[member], members(out / TAR)[member // 3 * 3]
    patch(out / TAR, damaged.offset, junk)
    expected = [("bad header", TAR, key(damaged), damaged.offset)]
    if member % 3 == 1:
        expected.insert(0, ("missing label", TAR, key(damaged), image.offset_data))
    assert found(out) == expected


def test_a_changed_image_is_named(out):
    image = members(out / TAR)[6]
    patch(out / TAR, image.offset_data + 200, b"\0\1\2")
    assert found(out) == [("wrong checksum", TAR, key(image), image.offset_data)]


def test_a_changed_image_that_cannot_be_decoded_is_named_once(out):
    image = members(out / TAR)[6]
    patch(out / TAR, image.offset_data + 60, b"\0\1\2")
    (finding,) = verify(out, deep=True).findings
    place = (finding.shard, finding.key, finding.offset)
    assert finding.kind == "undecodable image" and place == (TAR, key(image), image.offset_data)
    assert "its checksum is not the index's either" in finding.detail
    assert found(out) == [("wrong checksum", *place)]


def test_a_changed_image_that_can_be_decoded_is_named_once_by_a_deep_look(tmp_path):
    write_shards("digits", tmp_path / "out")
    tar = tmp_path / "out" / "shard-000000.tar"
    image = members(tar)[0]
    data = bytearray(tar.read_bytes()[image.offset_data : image.offset_data + image.size])
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(buffer := io.BytesIO(), "PNG")
    assert len(buffer.getvalue()) <= len(data)
    patch(tar, image.offset_data, buffer.getvalue())
    assert found(tmp_path / "out", deep=True) == [("wrong checksum", tar.name, key(image), image.offset_data)]


def test_a_changed_label_is_named(out):
    label = members(out / TAR)[7]
    patch(out / TAR, label.offset_data, b"7")
    assert found(out) == [("wrong checksum", TAR, key(label), label.offset_data)]


def test_a_change_elsewhere_in_the_tar_is_noticed(out):
    patch(out / TAR, members(out / TAR)[8].offset_data + 1, b"X")
    assert found(out) == [("wrong checksum", TAR, None, 0)]


def test_a_changed_image_is_named_without_a_manifest(out):
    image = members(out / TAR)[6]
    patch(out / TAR, image.offset_data + 200, b"\0\1\2")
    (out / "manifest.json").unlink()
    assert ("wrong checksum", TAR, key(image), image.offset_data) in found(out)


def test_a_missing_index_is_a_warning(out):
    (out / IDX).unlink()
    report = verify(out)
    assert [(f.kind, f.shard) for f in report.findings] == [("missing index", TAR)] and report.severity == 1


def test_a_damaged_index_is_a_warning(out):
    patch(out / IDX, 60, b"\xff")
    report = verify(out)
    assert [(f.kind, f.shard) for f in report.findings] == [("damaged index", TAR)] and report.severity == 1


def test_a_stale_index_is_a_warning(out):
    """The tar was replaced by another whole one, of which the manifest knows."""
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["shards"][1] = {**manifest["shards"][2], "name": TAR}
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "shard-000002.tar").replace(out / TAR)
    report = verify(f"{out}/{TAR}")
    assert [(f.kind, f.shard) for f in report.findings] == [("stale index", TAR)] and report.severity == 1


def test_a_stale_index_is_noticed_without_a_manifest(out):
    (out / "manifest.json").unlink()
    shutil.copy(out / "shard-000002.tar", out / TAR)
    assert [f.kind for f in verify(f"{out}/{TAR}").findings] == ["stale index"]


def test_a_missing_shard_is_damage(out):
    (out / TAR).unlink()
    report = verify(out)
    assert [(f.kind, f.shard) for f in report.findings] == [("missing shard", TAR)] and report.severity == 2


def test_a_shard_that_the_manifest_does_not_list_is_a_warning(out):
    shutil.copy(out / TAR, out / "shard-000009.tar")
    shutil.copy(out / IDX, out / "shard-000009.idx")
    kinds = [(f.kind, f.shard) for f in verify(out).findings]
    assert kinds[0] == ("manifest", "shard-000009.tar")
    assert set(kinds[1:]) == {("duplicate key", "shard-000009.tar")} and len(kinds) == 11


@pytest.mark.parametrize("fact", ["samples", "bytes"])
def test_a_manifest_with_wrong_counts_is_a_warning(out, fact):
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["shards"][1][fact] += 1
    (out / "manifest.json").write_text(json.dumps(manifest))
    report = verify(out)
    assert [(f.kind, f.shard) for f in report.findings] == [("manifest", TAR)] and report.severity == 1


def test_a_manifest_of_another_tar_is_a_warning(out):
    """Tar and index were replaced together."""
    for end in ("tar", "idx"):
        (out / f"shard-000002.{end}").replace(out / f"shard-000001.{end}")
    assert ("manifest", TAR) in [(f.kind, f.shard) for f in verify(out).findings]


def test_an_unreadable_manifest_is_a_warning(out):
    (out / "manifest.json").write_text("{")
    report = verify(out)
    assert [f.kind for f in report.findings] == ["manifest"] and report.severity == 1


def png(seed=0):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def foreign(path, *files):
    """A tar as others write it, with PAX headers; returns the offset of each member's data."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5
            tar.addfile(info, io.BytesIO(data))
    return [member.offset_data for member in members(path)]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([("a.png", png()), ("a.cls", b"1"), ("b.png", b""), ("b.cls", b"0")], [("empty image", "b", 2)]),
        ([("a.png", png()), ("a.cls", b"1"), ("b.png", b"no"), ("b.cls", b"0")], [("undecodable image", "b", 2)]),
        ([("a.png", png()), ("a.cls", b"1"), ("b.png", png())], [("missing label", "b", 2)]),
        ([("a.png", png()), ("a.cls", b"1"), ("b.png", png()), ("b.cls", b"cat")], [("missing label", "b", 2)]),
        ([("a.png", png()), ("b.png", png(1)), ("a.png", png(2))], [("duplicate key", "a", 2)]),
        ([("a.png", png()), ("a.png", png(2))], [("duplicate key", "a", 1)]),
        ([("a.png", png()), ("b.cls", b"1"), ("c.png", png(1))], [("missing image", "b", None)]),
        ([("a.png", png()), ("b/c.d/e.x.png", png(1)), ("README", b"hello")], [("missing image", "b/c.d/e", None)]),
        ([("a.PNG", png()), ("deep/" * 30 + "b.png", png(1)), ("__x__/y.txt", b"")], []),
        ([("a.png", png()), ("deep/" * 70 + "b.png", b"")], [("empty image", "deep/" * 70 + "b", 1)]),
    ],
    ids=str,
)
def test_what_is_wrong_with_samples_is_named(tmp_path, files, expected):
    offsets = foreign(tmp_path / "out" / "any.tar", *files)
    got = [(f.kind, f.key, f.offset) for f in verify(tmp_path / "out", deep=True).findings if f.kind != "missing index"]
    assert [(kind, key) for kind, key, _ in got] == [(kind, key) for kind, key, _ in expected]
    for (_, _, offset), (_, _, place) in zip(got, expected, strict=True):
        assert place is None or offset == offsets[place]


def test_only_a_deep_look_decodes(tmp_path):
    foreign(tmp_path / "out" / "any.tar", ("a.png", b"no"))
    kinds = [[f.kind for f in verify(tmp_path / "out", deep=deep).findings] for deep in (False, True)]
    assert [("undecodable image" in some) for some in kinds] == [False, True]


def test_a_key_that_stands_in_two_shards_is_named(tmp_path):
    foreign(tmp_path / "out" / "0.tar", ("a.png", png()), ("b.png", png(1)))
    offsets = foreign(tmp_path / "out" / "1.tar", ("c.png", png()), ("b.png", png(2)))
    assert ("duplicate key", "1.tar", "b", offsets[1]) in found(tmp_path / "out")


def test_an_unfinished_set_is_a_warning(out):
    (out / "manifest.json").rename(out / "manifest.unfinished.json")
    assert [f.kind for f in verify(out).findings] == ["unfinished"]


def test_train_and_val_are_both_looked_at(out, tmp_path):
    shutil.copytree(out, tmp_path / "both" / "train")
    shutil.copytree(out, tmp_path / "both" / "val")
    (tmp_path / "both" / "val" / IDX).unlink()
    report = verify(tmp_path / "both")
    assert report.shards == 6 and [f.kind for f in report.findings] == ["missing index"]


def test_findings_name_the_folder_of_train_and_val(out, tmp_path):
    both = tmp_path / "both"
    shutil.copytree(out, both / "train")
    image, label = members(out / TAR)[6], members(out / TAR)[7]
    patch(out / TAR, image.offset_data + 200, b"\0\1\2")
    shutil.copytree(out, both / "val")
    patch(both / "train" / TAR, label.offset_data, b"7")
    for name in ("shard-000000.tar", "shard-000000.idx"):
        shutil.copy(out / name, both / "val" / name.replace("0000.", "0009."))
    kinds = {(f.kind, f.shard) for f in verify(both).findings}
    extra = "val/shard-000009.tar"
    assert kinds == {
        ("wrong checksum", f"train/{TAR}"), ("wrong checksum", f"val/{TAR}"),
        ("manifest", extra), ("duplicate key", extra),
    }  # fmt: skip
    assert {f.shard for f in verify(both / "val").findings} == {TAR, "shard-000009.tar"}
    assert [f.shard for f in verify([f"{both}/train/*.tar", f"{both}/val/{TAR}"]).findings] == [
        f"{both}/train/{TAR}", f"{both}/val/{TAR}"
    ]  # fmt: skip


@pytest.mark.parametrize("fact", ["samples", "bytes", None])
def test_findings_of_a_manifest_name_the_folder_of_train_and_val(out, tmp_path, fact):
    for split in ("train", "val"):
        shutil.copytree(out, tmp_path / "both" / split)
    manifest = json.loads((out / "manifest.json").read_text())
    if fact:
        manifest["shards"][1][fact] += 1
    (tmp_path / "both" / "val" / "manifest.json").write_text(json.dumps(manifest) if fact else "{")
    expected = f"val/{TAR}" if fact else "val"
    assert [(f.kind, f.shard) for f in verify(tmp_path / "both").findings] == [("manifest", expected)]


def test_what_is_left_damaged_names_the_folder_of_train_and_val(out, tmp_path):
    for split in ("train", "val"):
        shutil.copytree(out, tmp_path / "both" / split)
        damaged_in_the_middle(tmp_path / "both" / split)
    assert [f.shard for f in repair(tmp_path / "both").left] == [f"train/{TAR}", f"val/{TAR}"]


def test_a_folder_without_shards_is_a_sentence(tmp_path):
    with pytest.raises(DataError, match="holds no shards"):
        verify(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda out: (out / IDX).unlink(),
        lambda out: patch(out / IDX, 60, b"\xff"),
        lambda out: shutil.copy(out / "shard-000002.idx", out / IDX),
        lambda out: os.truncate(out / IDX, 100),
    ],
)
def test_indexes_are_made_anew_in_place(out, whole, damage):
    damage(out)
    done = repair(out)
    assert done.indexes == [str(out / IDX)] and not done.lost and not done.left
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("text", [None, "{"])
def test_a_manifest_is_made_anew_in_place(out, whole, text):
    (out / "manifest.json").unlink()
    if text:
        (out / "manifest.json").write_text(text)
    assert repair(out).manifests == [str(out / "manifest.json")]
    assert verify(out).severity == 0
    assert images(out) == images(whole) and Shards(out).classes == ["a", "b", "c"]


def test_the_manifest_before_a_repair_is_kept(out):
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["shards"][1]["samples"] = 9
    (out / "manifest.json").write_text(json.dumps(manifest))
    repair(out)
    assert json.loads((out / "manifest.before-repair.json").read_text()) == manifest
    assert verify(out).severity == 0


def damaged_in_the_middle(out):
    image = members(out / TAR)[12]
    patch(out / TAR, image.offset, b"\xa5" * 512)
    return image


def test_damage_without_out_is_left_and_nothing_changed(out):
    damaged_in_the_middle(out)
    before = contents(out)
    done = repair(out)
    assert [f.kind for f in done.left] == ["bad header"] and not done.copies
    assert contents(out) == before


@pytest.mark.parametrize("member", [0, 1, 2, 12, 13, 14, 27, 28, 29])
def test_a_header_in_the_middle_loses_no_image_while_there_is_an_index(out, whole, member, tmp_path):
    patch(out / TAR, members(out / TAR)[member].offset, b"\xa5" * 512)
    before = contents(out)
    done = repair(out, tmp_path / "fixed")
    assert done.lost == [] and contents(out) == before
    assert images(tmp_path / "fixed") == images(whole)
    assert verify(tmp_path / "fixed", deep=True).severity == 0
    same = member % 3 < 2  # the lost .json is not to be had again
    assert ((tmp_path / "fixed" / TAR).read_bytes() == (whole / TAR).read_bytes()) == same


def test_a_header_in_the_middle_loses_one_image_without_an_index(out, whole, tmp_path):
    image = damaged_in_the_middle(out)
    (out / IDX).unlink()
    done = repair(out, tmp_path / "fixed")
    assert [(f.key, f.offset) for f in done.lost] == [(key(image), image.offset)]
    expected = images(whole)
    assert images(tmp_path / "fixed") == expected[:14] + expected[15:]


@pytest.mark.parametrize("index", [True, False])
def test_all_before_a_cut_is_recovered_and_the_rest_listed(out, whole, index, tmp_path):
    image = members(out / TAR)[12]
    os.truncate(out / TAR, image.offset_data + 100)
    if not index:
        (out / IDX).unlink()
    done = repair(out, tmp_path / "fixed")
    expected = images(whole)
    assert images(tmp_path / "fixed") == expected[:14] + expected[20:]
    assert done.lost[0].key == key(image) and len(done.lost) == (6 if index else 1)
    assert verify(tmp_path / "fixed", deep=True).severity == 0


@pytest.mark.parametrize("missing", [137, 20_000])
@pytest.mark.parametrize("index", [True, False])
def test_bytes_that_went_missing_cost_one_image(out, whole, index, missing, tmp_path):
    """What follows is no longer aligned to blocks, and what was the image's reaches over the samples after it."""
    image = members(out / TAR)[12]
    data = (out / TAR).read_bytes()
    (out / TAR).write_bytes(data[: image.offset_data + 300] + data[image.offset_data + 300 + missing :])
    if not index:
        (out / IDX).unlink()
    done = repair(out, tmp_path / "fixed")
    expected = images(whole)
    assert images(tmp_path / "fixed") == expected[:14] + expected[15:]
    assert {f.key for f in done.lost} == {key(image)}


def test_an_image_that_only_the_index_knows_is_checked(out, tmp_path):
    image = damaged_in_the_middle(out)
    patch(out / TAR, image.offset_data + 200, b"\0\1\2")
    done = repair(out, tmp_path / "fixed")
    assert [(f.key, f.offset, f.detail) for f in done.lost] == [(key(image), image.offset_data, "wrong checksum")]


def test_a_changed_image_is_left_out_of_the_copy(out, whole, tmp_path):
    image = members(out / TAR)[6]
    patch(out / TAR, image.offset_data + 200, b"\0\1\2")
    done = repair(out, tmp_path / "fixed")
    assert [(f.shard, f.key, f.offset, f.detail) for f in done.lost] == [
        (TAR, key(image), image.offset_data, "wrong checksum")
    ]
    expected = images(whole)
    assert images(tmp_path / "fixed") == expected[:12] + expected[13:]


def test_a_changed_label_is_restored_from_the_index(out, whole, tmp_path):
    patch(out / TAR, members(out / TAR)[7].offset_data, b"7")
    assert repair(out, tmp_path / "fixed").lost == []
    assert (tmp_path / "fixed" / TAR).read_bytes() == (whole / TAR).read_bytes()


def test_a_copy_goes_on_without_a_missing_shard(out, whole, tmp_path):
    (out / TAR).unlink()
    done = repair(out, tmp_path / "fixed")
    assert [(f.kind, f.shard) for f in done.lost] == [("missing shard", TAR)]
    expected = images(whole)
    assert images(tmp_path / "fixed") == expected[:10] + expected[20:]


def test_three_damaged_shards_are_mended_at_once(out, whole, tmp_path):
    lost = members(out / "shard-000002.tar")[27]
    os.truncate(out / "shard-000002.tar", lost.offset_data + 10)
    damaged_in_the_middle(out)
    image = members(out / "shard-000000.tar")[0]
    patch(out / "shard-000000.tar", image.offset_data + 50, b"\0\1\2")
    done = repair(out, tmp_path / "fixed")
    assert [(f.shard, f.key) for f in done.lost] == [
        ("shard-000000.tar", key(image)), ("shard-000002.tar", key(lost))
    ]  # fmt: skip
    assert images(tmp_path / "fixed") == images(whole)[1:29]


def test_a_copy_never_overwrites(out, tmp_path):
    (tmp_path / "fixed").mkdir()
    (tmp_path / "fixed" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="holds something already: give --out a new or an empty folder"):
        repair(out, tmp_path / "fixed")
    assert contents(tmp_path / "fixed") == {"thesis.txt": b"mine"}


def test_a_copy_that_fails_leaves_nothing_behind(out, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("elsewhere.data.shard_repair.save_manifest", full)
    with pytest.raises(DataError, match="No space left on device"):
        repair(out, tmp_path / "fixed")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_copy_of_a_repaired_set_is_not_written_on(out, tmp_path):
    repair(out, tmp_path / "fixed")
    with pytest.raises(DataError, match="was written with other settings"):
        write_shards("digits", tmp_path / "fixed")


def test_train_and_val_are_both_mended(out, tmp_path):
    for split in ("train", "val"):
        shutil.copytree(out, tmp_path / "both" / split)
        damaged_in_the_middle(tmp_path / "both" / split)
    repair(tmp_path / "both", tmp_path / "fixed")
    assert [len(Shards(tmp_path / "fixed", split)) for split in ("train", "val")] == [30, 30]


def test_shards_of_webdataset_get_indexes_and_are_read(tmp_path):
    (tmp_path / "theirs").mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / "theirs" / f"set-{shard}.tar")) as writer:
            for i in range(5):
                writer.write({"__key__": f"n{shard}/{i}", "jpg": np.full((8, 9, 3), 20 * i, np.uint8), "cls": i % 2})
    assert {f.kind for f in verify(tmp_path / "theirs", deep=True).findings} == {"missing index"}
    repair(tmp_path / "theirs")
    shards = Shards(tmp_path / "theirs")
    assert (len(shards), shards.channels, shards.labels.tolist()) == (10, 3, [0, 1, 0, 1, 0] * 2)
    assert all(np.abs(shards.read(i).astype(int) - 20 * (i % 5)).max() <= 2 for i in range(10))
    assert verify(tmp_path / "theirs").severity == 0


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    dest = tmp_path_factory.mktemp("digits") / "out"
    write_shards("digits", dest)
    return dest


def test_mean_and_std_are_those_of_all_pixels(digits):
    stats, source = measure(digits, sample=None, threads=2), Digits("train")
    pixels = np.stack([source.read(i) for i in range(len(source))]) / 255
    assert stats.measured == len(source)
    assert stats.mean == pytest.approx([pixels.mean()]) and stats.std == pytest.approx([pixels.std()])


def test_counts_sizes_and_classes_are_those_of_the_source(digits):
    stats, source = measure(digits, sample=10), Digits("train")
    labels = [source.label(i) for i in range(len(source))]
    assert stats.labels == {str(digit): labels.count(digit) for digit in range(10)}
    assert (stats.samples, stats.measured, stats.channels) == (len(source), 10, 1)
    assert stats.bytes == sum(tar.stat().st_size for tar in digits.glob("*.tar"))
    assert stats.sides == {"height": (8, 8, 8), "width": (8, 8, 8)}


def test_unreadable_images_are_counted_and_red(out):
    for member in members(out / TAR)[::3]:
        patch(out / TAR, member.offset_data + 60, b"\0\1\2")
    stats = measure(out)
    assert len(stats.unreadable) == 10 and stats.measured == 20
    sheet = np.asarray(contact_sheet(out, columns=10, rows=3))
    tiles = [sheet[52 + 100 * row, 52 + 100 * column] for row in range(3) for column in range(10)]
    assert [tuple(tile) == (255, 0, 0) for tile in tiles] == [False] * 10 + [True] * 10 + [False] * 10


def test_a_sheet_shows_the_images_in_their_order(out):
    sheet, shards = np.asarray(contact_sheet(out, columns=6, rows=5)), Shards(out)
    assert sheet.shape == (5 * 100 + 4, 6 * 100 + 4, 3)
    for i in range(30):
        top, left = 4 + 100 * (i // 6) + 8, 4 + 100 * (i % 6)  # 80 x 96 pixels, in the middle of a tile of 96
        assert np.array_equal(sheet[top : top + 80, left : left + 96], shards.read(i))
