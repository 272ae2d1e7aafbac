"""`elsewhere shards`: what it prints, its exit status, and one sentence for everything to mend."""

import argparse
import json
import os
import re
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from elsewhere.launch.errors import UserError
from elsewhere.launch.shards import add_shards_command, run_shards


@pytest.fixture
def shards(capsys):
    """Run `elsewhere shards …` as the command does; returns exit status, stdout and stderr."""

    def run(*arguments):
        parser = argparse.ArgumentParser(prog="elsewhere")
        add_shards_command(parser.add_subparsers(dest="command", required=True))
        try:
            status = run_shards(parser.parse_args(["shards", *map(str, arguments)]))
        except UserError as error:
            return 2, capsys.readouterr().out, str(error)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def images(tmp_path):
    """40 PNGs of two classes."""
    for i in range(40):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


@pytest.fixture
def out(shards, images, tmp_path):
    """The images in four shards of ten."""
    assert shards("write", images, tmp_path / "out", "--samples-per-shard", 10)[0] == 0
    return tmp_path / "out"


def test_writing_says_what_there_is(shards, images, tmp_path):
    status, printed, err = shards("write", images, tmp_path / "out", "--shard-size", "20kB", "--seed", 3)
    assert (status, err) == (0, "")
    assert re.fullmatch(r"\S+/out: 40 images in (\d) shards, \d+\.\d kB\.\n", printed)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["options"]["seed"], manifest["options"]["shard_bytes"]) == (3, 20_000)


def test_writing_again_says_that_it_is_there(shards, images, out):
    status, printed, _ = shards("write", images, out, "--samples-per-shard", 10)
    assert status == 0 and "4 of them written before" in printed


@pytest.mark.parametrize(("flags", "status"), [([], 1), (["--skip-unreadable"], 0)])
def test_unreadable_images_are_listed_and_make_the_status(shards, images, tmp_path, flags, status):
    (images / "a" / "00.png").write_bytes(b"no image")
    found, printed, _ = shards("write", images, tmp_path / "out", *flags)
    assert found == status
    assert "Left out 1 that cannot be read" in printed and "a/00.png: not an image in a known format" in printed


def test_train_and_val_are_two_commands(shards, images, tmp_path):
    for split in ("train", "val"):
        assert shards("write", images, tmp_path / "out" / split, "--split", split, "--holdout", 0.25)[0] == 0
    status, printed, _ = shards("verify", tmp_path / "out")
    assert status == 0 and printed.startswith("2 shards, 40 images")


@pytest.mark.parametrize("size", ["500MB", "1.5 GB", "200MiB", "3k", "1000"])
def test_sizes_are_read_as_they_are_written(shards, images, tmp_path, size):
    assert shards("write", images, tmp_path / "out", "--shard-size", size)[0] == 0
    number = json.loads((tmp_path / "out" / "manifest.json").read_text())["options"]["shard_bytes"]
    expected = {"500MB": 5e8, "1.5 GB": 1.5e9, "200MiB": 200 * 2**20, "3k": 3000, "1000": 1000}
    assert number == expected[size]


@pytest.mark.parametrize(
    "flags",
    [["--shard-size", "0"], ["--shard-size", "many"], ["--samples-per-shard", "0"], ["--format", "zip"]],
    ids=str,
)
def test_a_wrong_argument_ends_with_the_usage(shards, images, tmp_path, flags, capsys):
    with pytest.raises(SystemExit):
        shards("write", images, tmp_path / "out", *flags)
    assert "usage: elsewhere shards write" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["write", "/nowhere", "{out}2"], "/nowhere does not exist: give a folder of images"),
        (["write", "cifar10:/nowhere", "{out}2"], "/nowhere does not hold CIFAR10"),
        (["write", "{images}/../empty", "{out}2"], "below: check SOURCE."),
        (["write", "{images}", "{images}/../file"], "cannot be written to"),
        (["write", "{images}", "{images}"], "lies inside the images' folder"),
        (["write", "{images}", "{images}/.."], "holds something else"),
        (["write", "{images}", "{out}", "--seed", "1"], "was written with other settings"),
        (["write", "{images}", "{out}2", "--quality", "101"], "--quality 101 is out of range: choose 1 … 100"),
        (["write", "{images}", "{out}2", "--max-side", "0"], "--max-side 0 is out of range"),
        (["write", "{images}", "{out}2", "--seed", "-1"], "--seed -1 is out of range"),
        (["write", "{images}", "{out}2", "--split", "val", "--holdout", "2"], "--holdout 2.0 is a share"),
        (["verify", "{images}"], "holds no shards"),
        (["verify", "{out}/nothing-{{0..3}}.tar"], "does not exist"),
        (["verify", "{out}", "--json", "/nowhere/x"], "--json /nowhere/x cannot be written (No such file"),
        (["repair", "{out}", "--out", "{images}"], "holds something already"),
        (["stats", "{out}", "--split", "val"], "has no val split"),
        (["stats", "{out}", "--sheet", "/nowhere/x.png"], "--sheet /nowhere/x.png cannot be written"),
    ],
    ids=str,
)
def test_what_is_to_mend_is_one_sentence(shards, images, out, arguments, words, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    status, _, err = shards(*(argument.format(images=images, out=out) for argument in arguments))
    assert status == 2 and words in err
    assert err.count("\n") == 0 and err.endswith((".", ")", ')"')) and "data." not in err, err


def damage(out):
    """A changed image in the second shard and no index beside the third; the place of the image."""
    with tarfile.open(out / "shard-000001.tar") as tar:
        member = tar.getmembers()[6]
    with open(out / "shard-000001.tar", "r+b") as file:
        file.seek(member.offset_data + 60)
        file.write(b"\0\1\2")
    (out / "shard-000002.idx").unlink()
    return member


def test_verify_names_damage_and_ends_with_its_severity(shards, out, tmp_path):
    assert shards("verify", out)[:2] == (0, f"4 shards, 40 images, {size(out)}: 0 damaged place(s), 0 warning(s).\n")
    member = damage(out)
    status, printed, _ = shards("verify", out, "--json", tmp_path / "report.json")
    lines = printed.splitlines()
    place = f"shard-000001.tar, {member.name[:9]} at byte {member.offset_data}: wrong checksum"
    assert status == 2 and lines[0].strip().startswith(f"damage   {place}")
    assert "warning  shard-000002.tar: missing index" in lines[1]
    assert lines[2].endswith(": 1 damaged place(s), 1 warning(s).")
    assert lines[3:] == [f"A copy of what is readable: elsewhere shards repair {out} --out DIR"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["severity"] == 2 and report["shards"] == 4
    first = report["findings"][0]
    expected = {"shard": "shard-000001.tar", "key": member.name[:9], "offset": member.offset_data, "severity": 2}
    assert {name: first[name] for name in expected} == expected and first["kind"] == "wrong checksum"


def size(out):
    return f"{sum(tar.stat().st_size for tar in out.glob('*.tar')) / 1000:.1f} kB"


@pytest.mark.parametrize("name", ["shard-000002.idx", "manifest.json"])
def test_what_is_mended_in_place_is_status_one_and_verify_tells_how(shards, out, name):
    (out / name).write_text("{")
    status, printed, _ = shards("verify", out)
    assert status == 1
    assert printed.splitlines()[-1] == f"To make indexes and manifest anew: elsewhere shards repair {out}"
    assert shards("repair", out)[0] == 0 and shards("verify", out)[0] == 0


def test_a_warning_that_no_repair_mends_ends_with_the_counts(shards, out):
    (out / "manifest.json").rename(out / "manifest.unfinished.json")
    status, printed, _ = shards("verify", out)
    assert status == 1 and printed.splitlines()[-1].endswith("1 warning(s).")


def test_a_manifest_is_not_said_to_be_mended_from_a_part_of_its_folder(shards, out):
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["shards"][0]["samples"] = 9
    (out / "manifest.json").write_text(json.dumps(manifest))
    status, printed, _ = shards("verify", out / "shard-000000.tar")
    assert status == 1 and printed.splitlines()[-1].endswith("1 warning(s).")
    assert shards("repair", out / "shard-000000.tar")[1] == "Nothing to mend.\n"


def test_a_deep_look_tells_of_a_deep_repair_of_all_that_was_given(shards, out, tmp_path):
    damage(out)
    (out.parent / "my shards").mkdir()
    moved = out.rename(out.parent / "my shards" / "out")
    _, printed, _ = shards("verify", f"{moved}/shard-000001.tar", f"{moved}/shard-000003.tar", "--deep")
    given = f"'{moved}/shard-000001.tar' '{moved}/shard-000003.tar'"
    assert printed.splitlines()[-1].endswith(f": elsewhere shards repair {given} --deep --out DIR")


def test_repair_tells_what_it_did_and_what_is_left(shards, out, tmp_path):
    member = damage(out)
    status, printed, _ = shards("repair", out)
    assert status == 2
    assert f"Made anew (1):\n  {out}/shard-000002.idx" in printed and "Still damaged (1):" in printed
    assert f"elsewhere shards repair {out} --out DIR" in printed
    status, printed, _ = shards("repair", out, "--out", tmp_path / "fixed")
    assert status == 1
    assert f"Lost (1):\n  shard-000001.tar, {member.name[:9]} at byte {member.offset_data}" in printed
    assert shards("verify", tmp_path / "fixed", "--deep")[0] == 0
    assert shards("repair", tmp_path / "fixed")[:2] == (0, "Nothing to mend.\n")


def test_a_list_of_patterns_is_verified(shards, out):
    status, printed, _ = shards("verify", f"{out}/shard-00000{{0,1}}.tar", f"{out}/shard-000003.tar")
    assert status == 0 and printed.startswith("3 shards, 30 images")


def test_stats_prints_numbers_and_saves_a_sheet(shards, out, tmp_path):
    sheet, numbers = tmp_path / "sheet.png", tmp_path / "stats.json"
    status, printed, _ = shards("stats", out, "--sheet", sheet, "--json", numbers, "--sample", "all")
    assert status == 0
    stats = json.loads(numbers.read_text())
    assert stats["labels"] == {"a": 20, "b": 20} and stats["measured"] == 40
    assert f"mean      {', '.join(f'{value:.4f}' for value in stats['mean'])}" in printed
    assert Image.open(sheet).size == (12 * 100 + 4, 4 * 100 + 4)


@pytest.fixture
def both(shards, images, tmp_path):
    """28 images of train and 12 of val."""
    for split in ("train", "val"):
        flags = "--split", split, "--holdout", 0.3, "--samples-per-shard", 10
        assert shards("write", images, tmp_path / "both" / split, *flags)[0] == 0
    return tmp_path / "both"


def test_stats_of_train_and_val_are_one_after_the_other(shards, both, tmp_path):
    sheet, numbers = tmp_path / "sheet.png", tmp_path / "stats.json"
    status, printed, _ = shards("stats", both, "--sheet", sheet, "--json", numbers)
    lines = printed.splitlines()
    assert status == 0 and lines[0] == "train:" and lines[1].startswith("shards    3,")
    val = lines.index("val:")
    assert lines[val + 1].startswith("shards    2,") and lines[val + 2].startswith("images    12 ")
    stats = json.loads(numbers.read_text())
    assert {split: one["samples"] for split, one in stats.items()} == {"train": 28, "val": 12}
    assert Image.open(sheet).size == (12 * 100 + 4, 3 * 100 + 4)  # train's 28


@pytest.mark.parametrize(("split", "count", "rows"), [("train", 28, 3), ("val", 12, 1)])
def test_stats_of_one_split_are_its_own(shards, both, tmp_path, split, count, rows):
    sheet, numbers = tmp_path / "sheet.png", tmp_path / "stats.json"
    _, printed, _ = shards("stats", both, "--split", split, "--sheet", sheet, "--json", numbers)
    assert printed.startswith("shards ") and json.loads(numbers.read_text())["samples"] == count
    assert Image.open(sheet).size == (12 * 100 + 4, rows * 100 + 4)


def test_stats_of_a_folder_with_val_alone_are_of_val(shards, both):
    shutil.rmtree(both / "train")
    status, printed, _ = shards("stats", both)
    assert status == 0 and printed.splitlines()[1].startswith("images    12 ")


def test_stats_measure_a_sample(shards, out):
    status, printed, _ = shards("stats", out, "--sample", 7)
    assert status == 0 and "of 7 images" in printed


def test_the_command_does_not_load_torch_to_show_its_help():
    import subprocess
    import sys

    code = (
        "import sys, argparse; from elsewhere.launch import shards\n"
        "shards.add_shards_command(argparse.ArgumentParser().add_subparsers()); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=os.sep)
    assert done.stdout == "False\n"
