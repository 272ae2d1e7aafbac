"""Shards read as a stream: the same samples in every step whatever reads them, and every fault named and counted."""

import functools
import http.server
import itertools
import json
import os
import pickle
import shutil
import signal
import tarfile
import threading
import time
from collections import Counter
from dataclasses import fields

import numpy as np
import psutil
import pytest
import torch
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from elsewhere.data import stream_shards
from elsewhere.data.augment import Augment
from elsewhere.data.images import DataError, ImageFolder
from elsewhere.data.masks import block_masks
from elsewhere.data.order import Plan, permutation
from elsewhere.data.shard_writer import WriteOptions, write_shards
from elsewhere.data.shards import Shards
from elsewhere.data.stream_order import StreamOrder
from elsewhere.data.streams import words
from elsewhere.data.webdataset import Stream, StreamLoader, is_remote

AUGMENT = Augment(size=(8, 8), colour_jitter=0.5)
SEED = 3


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(stream_shards, "PAUSES", (0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """46 PNGs of their own noise, in two classes."""
    root = tmp_path_factory.mktemp("images")
    for i in range(46):
        path = root / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return root


@pytest.fixture(scope="module")
def written(images, tmp_path_factory):
    """Five shards of 10, 10, 10, 10 and 6 images."""
    dest = tmp_path_factory.mktemp("shards") / "train"
    write_shards(ImageFolder(str(images)), dest, options=WriteOptions(samples_per_shard=10), processes=1)
    return dest


@pytest.fixture
def folder(written, tmp_path):
    """A copy of the shards that a test may damage."""
    return shutil.copytree(written, tmp_path / "copy")


def stream(path, **changes):
    options = {"streams": 4, "global_batch": 8, "seed": SEED, "shuffle_buffer": 4, **changes}
    return Stream(path if isinstance(path, list) else str(path), 3, **options)


def loader(path, masks=None, augment=AUGMENT, stream_options=None, **changes):
    shards = path if isinstance(path, Stream) else stream(path, **(stream_options or {}))
    batch = shards.global_batch
    plan = {"micro_batch": batch // changes.get("world", 1), "stop_step": 12, **changes}
    return StreamLoader(shards, augment, masks, Plan(seed=SEED, global_batch=batch, **plan))


def rows(batch):
    """What a batch holds, without its order."""
    numbers = zip(batch.epochs.tolist(), batch.sample_ids.tolist(), batch.labels.tolist(), strict=True)
    return Counter((*own, image.numpy().tobytes()) for own, image in zip(numbers, batch.images, strict=True))


def steps(*ranks):
    found = {}
    for batch in itertools.chain(*ranks):
        found.setdefault(batch.step, Counter()).update(rows(batch))
    return found


def seen(batches):
    return [pair for b in batches for pair in zip(b.epochs.tolist(), b.sample_ids.tolist(), strict=True)]


def assert_equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for field in fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, field.name


def walk(counts, streams, seed, passed):
    """`StreamOrder.places`, one slot after another."""
    parts = -(-streams // len(counts))
    shards = [len(range(part, count, parts)) for count in counts for part in range(parts)]
    places = []
    for first in range(streams):
        left = passed
        for slot in itertools.count(first, streams):
            epoch, place = divmod(slot, len(shards))
            count = shards[permutation(seed, epoch, len(shards), "shards")[place]]
            if left < count:
                places.append((slot, left))
                break
            left -= count
    return places


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), st.integers(1, 7), st.integers(0, 60))
def test_the_place_of_a_resumed_stream_is_where_walking_leads(counts, streams, passed):
    assert StreamOrder(np.array(counts), streams, SEED).places(passed) == walk(counts, streams, SEED, passed)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(1, 9))
def test_the_slots_of_an_epoch_count_every_sample_once(counts, streams):
    order = StreamOrder(np.array(counts), streams, SEED)
    slots = [order.slot(number) for number in range(2 * len(counts) * order.parts)]
    for epoch in (0, 1):
        found = Counter()
        for slot in slots:
            places = range(slot.part, counts[slot.shard], order.parts)
            assert slot.samples == len(places)
            found.update((slot.shard, place) for place in places if slot.epoch == epoch)
        assert found == Counter((shard, place) for shard, count in enumerate(counts) for place in range(count))


@pytest.fixture(scope="module")
def straight(written):
    """The samples of twelve steps of one process."""
    return steps(loader(written))


@pytest.mark.parametrize(
    ("world", "workers", "start"), [(1, 1, 0), (1, 2, 3), (2, 0, 0), (2, 1, 7), (2, 2, 5), (4, 0, 2), (4, 1, 11)]
)
def test_a_step_holds_the_same_samples_whatever_reads_it(written, straight, world, workers, start):
    ranks = [loader(written, rank=rank, world=world, workers=workers, start_step=start) for rank in range(world)]
    assert steps(*ranks) == {step: found for step, found in straight.items() if step >= start}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_batches_of_a_rank_are_the_same_with_any_number_of_workers(written, workers):
    one, other = (loader(written, world=2, rank=1, micro_batch=2, workers=n) for n in (0, workers))
    assert_equal(list(one), list(other))


def test_every_sample_comes_once_an_epoch(written):
    found = seen(loader(written, stop_step=40))
    for epoch in range(4):  # of 46 each, of which 320 are more than four
        assert Counter(i for e, i in found if e == epoch) == dict.fromkeys(
            (shard << 24 | place for shard, count in enumerate([10, 10, 10, 10, 6]) for place in range(count)), 1
        )


def test_ids_and_labels_are_those_of_the_index(written):
    shards = Shards(written)
    labels = {
        i: label for b in loader(written) for i, label in zip(b.sample_ids.tolist(), b.labels.tolist(), strict=True)
    }
    assert labels == {i: shards.label((i >> 24) * 10 + (i & 0xFFFFFF)) for i in labels}


@pytest.mark.parametrize("number", [0, 3, 8])
def test_a_slot_is_shuffled_as_webdataset_shuffles_its_tar(written, number):
    shards = stream(written, streams=1, global_batch=2)
    slot = shards.order.slot(number)
    assert slot.shard == permutation(SEED, number // 5, 5, "shards")[number % 5]
    high, low = words(SEED, "slot shuffle", 0, np.array([number]), 2)[0].tolist()
    shuffle = wds.detshuffle(4, seed=high << 32 | low)
    pipeline = wds.DataPipeline(wds.SimpleShardList([shards.urls[slot.shard]]), wds.tarfile_to_samples(), shuffle)
    with tarfile.open(shards.urls[slot.shard]) as tar:
        keys = [name.removesuffix(".png") for name in tar.getnames() if name.endswith(".png")]
    expected = [keys.index(sample["__key__"]) for sample in pipeline]
    assert sorted(expected) == list(range(slot.samples))
    assert expected != sorted(expected)
    before = sum(shards.order.slot(earlier).samples for earlier in range(number))
    found = seen(loader(shards, start_step=before // 2, stop_step=(before + slot.samples) // 2))
    assert found == [(slot.epoch, slot.shard << 24 | place) for place in expected]


def test_another_seed_gives_another_order(written):
    one, other = (
        seen(
            StreamLoader(
                stream(written, seed=s), AUGMENT, None, Plan(seed=SEED, global_batch=8, micro_batch=8, stop_step=3)
            )
        )
        for s in (3, 4)
    )
    assert one != other


@pytest.mark.parametrize("setting", ["published", "recommended"])
def test_masks_are_those_of_the_micro_batch(written, setting):
    masks = block_masks(setting, grid=(6, 6), min_keep=2, target_scale=(0.15, 0.3))
    batches = list(loader(written, masks, micro_batch=4, workers=2, stop_step=3))
    for batch in batches:
        made = masks(SEED, batch.epochs.numpy(), batch.step, batch.sample_ids.numpy())
        assert np.array_equal(batch.context.numpy(), made.context)
        assert np.array_equal(batch.targets.numpy(), made.targets)
    assert [(batch.step, len(batch)) for batch in batches] == [(0, 4), (0, 4), (1, 4), (1, 4), (2, 4), (2, 4)]


def test_images_are_the_crops_of_their_numbers(written):
    shards, batch = Shards(written), next(iter(loader(written, start_step=9)))
    numbers = AUGMENT.numbers(SEED, batch.epochs.numpy(), batch.sample_ids.numpy())
    for i, own, image in zip(batch.sample_ids.tolist(), numbers, batch.images, strict=True):
        assert torch.equal(image, AUGMENT(shards.read((i >> 24) * 10 + (i & 0xFFFFFF)), own))


def test_looks_that_are_left_for_the_device_come_with_the_batch(written):
    augment = Augment(size=(8, 8), views=2, on_device=True)
    for batch in loader(written, augment=augment, micro_batch=4, workers=2, stop_step=2):
        numbers = augment.numbers(SEED, batch.epochs.numpy(), batch.sample_ids.numpy())
        assert torch.equal(batch.look, augment.left_for_device(numbers))
        assert batch.images.shape == (4, 2, 3, 8, 8)


def damage(folder):
    """Truncate one shard in its fifth image and break an image of another; returns the two keys."""
    cut, broken = folder / "shard-000001.tar", folder / "shard-000003.tar"
    with tarfile.open(cut) as tar:
        fifth = [member for member in tar.getmembers() if member.name.endswith(".png")][4]
    os.truncate(cut, fifth.offset_data + 20)
    return broken, break_image(broken, 2)


def break_image(path, place):
    """Overwrite the head of an image; its key."""
    with tarfile.open(path) as tar:
        member = [member for member in tar.getmembers() if member.name.endswith(".png")][place]
    with open(path, "r+b") as file:
        file.seek(member.offset_data)
        file.write(bytes(60))
    return member.name.removesuffix(".png")


@pytest.mark.parametrize("start", range(1, 12))
def test_a_resumed_run_repeats_the_rest_bit_for_bit_past_faults(folder, start):
    damage(folder)
    whole = list(loader(folder))
    assert {line.split(": ")[0].split("/")[-1][:12] for b in whole for line in b.skipped} == {
        "shard-000001",
        "shard-000003",
    }
    assert_equal([batch for batch in whole if batch.step >= start], list(loader(folder, start_step=start)))


def test_faults_are_the_same_for_ranks_and_workers(folder):
    damage(folder)
    one, ranks = loader(folder), [list(loader(folder, rank=r, world=2, workers=2)) for r in range(2)]
    assert steps(one) == steps(*ranks)
    lines = [sorted(line for b in run for line in b.skipped) for run in (list(one), itertools.chain(*ranks))]
    assert lines[0] == lines[1]


def test_a_fault_is_named_once_in_the_first_micro_batch_of_its_step(folder):
    damage(folder)
    one, halves = (list(loader(folder, micro_batch=micro)) for micro in (8, 4))
    assert [b.skipped for b in halves[::2]] == [b.skipped for b in one]
    assert not any(b.skipped for b in halves[1::2])


def test_what_a_truncated_shard_lacks_is_replaced_by_its_first_images(folder):
    damage(folder)
    batches = list(loader(folder, stop_step=40))
    first = Counter(i & 0xFFFFFF for e, i in seen(batches) if e == 0 and i >> 24 == 1)
    assert first == {0: 4, 1: 3, 2: 3}, "and the fourth, which ends where the break is noticed, is lost with the fifth"
    lines = [line for b in batches for line in b.skipped if "000001" in line]
    assert set(lines) == {f"{folder}/shard-000001.tar: unexpected end of data; 7 of its 10 samples are replaced"}
    assert len(lines) in (6 * 7, 7 * 7), "seven images an epoch"


def test_a_bad_header_is_no_end_of_the_shard(folder):
    path = folder / "shard-000002.tar"
    with tarfile.open(path) as tar:
        seventh = [member for member in tar.getmembers() if member.name.endswith(".png")][6]
    with open(path, "r+b") as file:
        file.seek(seventh.offset)
        file.write(b"\xff" * 512)
    lines = [line for b in loader(folder) for line in b.skipped]
    assert lines == [f"{path}: it ends after 6 images; 4 of its 10 samples are replaced"] * len(lines)
    assert lines


def test_a_broken_image_is_replaced_by_the_next_of_its_slot(folder):
    shards = stream(folder, streams=1, global_batch=1)
    shard = shards.order.slot(0).shard
    path = shards.urls[shard]
    clean = seen(loader(shards, stop_step=10))
    places = [i & 0xFFFFFF for _, i in clean]
    key = break_image(path, places[4])
    batches = list(loader(folder, stop_step=10, stream_options={"streams": 1, "global_batch": 1}))
    assert seen(batches) == [*clean[:4], clean[5], *clean[5:]]
    (line,) = [line for b in batches for line in b.skipped]
    assert line.startswith(f"{path}, {key}: ")
    assert [len(b.skipped) for b in batches] == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert torch.equal(batches[4].images, batches[5].images)


def test_the_last_of_a_slot_is_replaced_by_its_first(folder):
    options = {"streams": 1, "global_batch": 2}
    shards = stream(folder, **options)
    clean = seen(loader(shards, stop_step=5))
    break_image(shards.urls[clean[9][1] >> 24], clean[9][1] & 0xFFFFFF)
    assert seen(loader(folder, stop_step=5, stream_options=options))[9] == clean[0]


def test_a_sample_without_image_is_left_out_and_named(folder):
    path = folder / "shard-000000.tar"
    rewritten = folder / "new.tar"
    with tarfile.open(path) as old, wds.TarWriter(str(rewritten)) as new:
        new.write({"__key__": "alone", "json": b"{}"})
        for member in old.getmembers():
            key, suffix = member.name.split(".")
            if suffix == "png":
                new.write({"__key__": key, "png": old.extractfile(member).read()})
    os.replace(rewritten, path)
    batches = list(loader(path, stop_step=10, stream_options={"streams": 1, "global_batch": 1}))
    assert [line for b in batches for line in b.skipped] == [f"{path}, alone: has no image, only .json"]
    assert sorted(i for _, i in seen(batches)) == list(range(10))


def test_a_key_that_comes_twice_is_two_samples(tmp_path, images):
    data = (images / "a" / "00.png").read_bytes()
    with wds.TarWriter(str(tmp_path / "twice.tar")) as tar:
        for _ in range(3):
            tar.write({"__key__": "same", "png": data})
    batches = list(loader(tmp_path, stop_step=3, stream_options={"streams": 1, "global_batch": 1, "samples": 3}))
    assert sorted(i for _, i in seen(batches)) == [0, 1, 2]


def test_a_missing_shard_is_replaced_by_another(folder):
    os.unlink(folder / "shard-000002.tar")
    batches = list(loader(folder))
    found = seen(batches)
    assert not [i for _, i in found if i >> 24 == 2]
    lines = {line for b in batches for line in b.skipped}
    assert lines == {f"{folder}/shard-000002.tar: No such file or directory; 10 of its 10 samples are replaced"}
    assert_equal([b for b in batches if b.step > 4], list(loader(folder, start_step=5)))


@pytest.mark.parametrize("workers", [0, 1])
def test_no_shard_at_all_is_one_sentence(folder, workers):
    shards = stream(folder)
    for path in folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(
        DataError, match=r"^5 shard\(s\) in a row cannot be read, the last is .*No such file.*: check data\.path"
    ):
        list(loader(shards, workers=workers))


def test_a_shard_too_small_for_its_streams_is_said(tmp_path, images):
    with wds.TarWriter(str(tmp_path / "small.tar")) as tar:
        tar.write({"__key__": "only", "png": (images / "a" / "00.png").read_bytes()})
    with pytest.raises(DataError, match=r"small\.tar \(it has fewer images than data\.streams\): check data\.path"):
        list(loader(tmp_path, stream_options={"samples": 100}))


def test_a_shard_of_broken_images_ends_with_one_sentence(tmp_path):
    with wds.TarWriter(str(tmp_path / "broken.tar")) as tar:
        for i in range(120):
            tar.write({"__key__": f"{i}", "jpg": b"no image"})
    options = {"streams": 1, "global_batch": 1, "samples": 120}
    with pytest.raises(
        DataError, match=r"^100 images in a row cannot be read, the last is .*broken\.tar, .*data\.path"
    ):
        list(loader(tmp_path, stream_options=options))


def test_a_small_shard_of_broken_images_is_replaced_by_the_next(folder):
    for place in range(6):
        break_image(folder / "shard-000004.tar", place)
    batches = list(loader(folder))
    assert not [i for _, i in seen(batches) if i >> 24 == 4]
    assert sum("shard-000004" in line for b in batches for line in b.skipped) >= 6


@pytest.mark.parametrize("workers", [0, 1])
def test_stop_ends_at_the_first_broken_image(folder, workers):
    key = break_image(folder / "shard-000003.tar", 2)
    with pytest.raises(DataError) as caught:
        list(loader(folder, on_error="stop", workers=workers))
    message = str(caught.value)
    assert message.startswith(f"An image cannot be read ({folder}/shard-000003.tar, {key}: ")
    assert message.endswith("): repair or remove it, or set data.on_error=skip.")


def test_stop_ends_at_a_shard_that_breaks_off(folder):
    os.truncate(folder / "shard-000000.tar", 3000)
    with pytest.raises(
        DataError, match=r"^A shard cannot be read to its end \(.*000000\.tar: unexpected end of data\)"
    ):
        list(loader(folder, on_error="stop"))


def test_a_shard_that_breaks_off_once_is_read_on(folder, straight, monkeypatch):
    monkeypatch.setenv("LIVES", str(folder / "lives"))
    (folder / "get").write_text(
        'test -e "$LIVES-$(basename $1)" && exec cat "$1"\ntouch "$LIVES-$(basename $1)"\nhead -c 5000 "$1"; exit 7\n'
    )
    piped = f"pipe:sh {folder}/get {folder}/shard-{{000000..000004}}.tar"
    (folder / "lives-manifest.json").touch()  # it is not the manifest that this is about
    batches = list(loader(piped))
    assert steps(batches) == straight
    assert not [line for b in batches for line in b.skipped]
    assert len(list(folder.glob("lives-shard-*"))) == 5


def test_nothing_that_a_failing_command_wrote_is_lost(folder, straight):
    shards = stream(f"pipe:cat {folder}/shard-{{000000..000004}}.tar")
    shards.urls = [f"{url}; exit 3" for url in shards.urls]
    assert steps(loader(shards)) == straight


def test_a_command_that_falls_silent_is_given_up(folder, monkeypatch):
    monkeypatch.setattr(stream_shards, "SILENCE", 0.2)
    shards = stream(f"pipe:cat {folder}/shard-000000.tar", streams=1, global_batch=1)
    shards.urls = [f"pipe:head -c 15000 {folder}/shard-000000.tar; exec sleep 20"]
    lines = [line for b in loader(shards, stop_step=10) for line in b.skipped]
    assert len(lines) == 7
    assert all(line.endswith("nothing came for 0.2 s; 7 of its 10 samples are replaced") for line in lines)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def served(folder):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "form", ["pipe:cat {folder}/{name}", "pipe:cat '{folder}/{name}' | cat", "file://{folder}/{name}"]
)
def test_a_url_gives_what_the_folder_gives(folder, straight, form):
    url = form.format(folder=folder, name="shard-{000000..000004}.tar")
    assert stream(url).classes == ["a", "b"]
    assert steps(loader(url)) == straight


@pytest.mark.parametrize("workers", [0, 2])
def test_a_web_server_gives_what_the_folder_gives(served, straight, workers):
    assert steps(loader(served + "/shard-{000000..000004}.tar", workers=workers)) == straight


def test_a_list_of_places_gives_what_the_folder_gives(served, folder, straight):
    places = [
        str(folder / "shard-00000[01].tar"),
        f"{served}/shard-{{000002..000003}}.tar",
        f"pipe:cat {folder}/shard-000004.tar",
    ]
    assert steps(loader(places)) == straight


def test_a_shard_that_the_server_has_not_is_named(served, folder):
    shards = stream(served + "/shard-{000000..000004}.tar")
    os.unlink(folder / "shard-000002.tar")
    lines = {line for b in loader(shards) for line in b.skipped}
    assert lines == {
        f"{served}/shard-000002.tar: empty file (its command ended with status 22); 10 of its 10 samples are replaced"
    }


def test_without_manifest_samples_are_spread_evenly(folder):
    os.unlink(folder / "manifest.json")
    shards = stream(folder, samples=40)
    assert (len(shards), shards.counts.tolist(), shards.classes) == (40, [8] * 5, None)
    batches = list(loader(shards, stop_step=20))
    found = Counter(i for e, i in seen(batches) if e == 0)
    longer = {shard << 24 | place: 1 for shard in range(4) for place in range(8)}  # two of each are cut
    shorter = {4 << 24 | place: 1 + (place < 2) for place in range(6)}  # begins again
    assert found == longer | shorter
    assert not [line for b in batches for line in b.skipped]


def test_fewer_shards_than_streams_are_shared(folder):
    paths = [str(folder / "shard-000000.tar"), str(folder / "shard-000004.tar")]
    shards = stream(paths, streams=8)
    assert shards.order.parts == 4
    found = Counter(seen(loader(shards, stop_step=8)))
    every = [(0, place) for place in range(10)] + [(0, 1 << 24 | place) for place in range(6)]
    assert {pair: found[pair] for pair in every} == dict.fromkeys(every, 1)


def test_shared_shards_resume_and_divide(folder):
    one = stream(str(folder / "shard-000000.tar"))
    whole = list(loader(one))
    assert_equal(whole[7:], list(loader(one, start_step=7)))
    assert steps(whole) == steps(*(loader(one, rank=r, world=2, workers=1) for r in range(2)))


@pytest.mark.parametrize(("shards", "batch", "streams"), [(5, 8, 4), (5, 6, 2), (5, 9, 1), (1, 64, 1), (70, 256, 64)])
def test_the_number_of_streams_follows_from_shards_and_batch(folder, shards, batch, streams):
    paths = [str(folder / f"shard-{i % 5:06}.tar") for i in range(shards)]
    assert stream(paths, streams=None, global_batch=batch).streams == streams


def test_workers_are_those_that_divide_a_ranks_streams(folder):
    shards = stream(folder, streams=12, global_batch=24)
    assert [shards.workers_for(2, wanted) for wanted in (0, 1, 4, 5, 6, 16)] == [0, 1, 3, 3, 6, 6]


def sentence(call, *args, **options):
    with pytest.raises(DataError) as caught:
        call(*args, **options)
    return str(caught.value)


def test_shards_without_counts_tell_both_ways(folder):
    os.unlink(folder / "manifest.json")
    assert sentence(stream, folder) == (
        f"There is no manifest that counts the images of the shards ({folder}/manifest.json: No such file or "
        "directory): `elsewhere shards repair FOLDER` where the tars are makes one, or set data.samples=N, the number "
        "of all their images."
    )


def test_a_server_without_manifest_tells_both_ways(folder, served):
    os.unlink(folder / "manifest.json")
    found = sentence(stream, served + "/shard-000000.tar")
    assert found.startswith(f"There is no manifest that counts the images of the shards ({served}/manifest.json: ")
    assert "status 22" in found


def test_a_manifest_that_is_none_is_said(folder):
    (folder / "manifest.json").write_text("<html>")
    assert "it is not what `elsewhere shards write` writes" in sentence(stream, f"file://{folder}/shard-000000.tar")


def test_a_shard_that_the_manifest_lacks_is_named(folder):
    shutil.copy(folder / "shard-000000.tar", folder / "other.tar")
    assert sentence(stream, str(folder / "other.tar")).startswith(f"{folder}/manifest.json does not list other.tar: ")


def test_a_manifest_of_a_later_format_is_refused(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    assert "has format 99, but this version reads format 1: update elsewhere." in sentence(
        stream, f"file://{folder}/shard-000000.tar"
    )


def test_samples_that_contradict_the_manifest_are_refused(folder):
    assert sentence(stream, folder, samples=40) == (
        "data.samples=40, but the manifest beside the shards counts 46: leave data.samples out."
    )
    assert len(stream(folder, samples=46)) == 46


@pytest.mark.parametrize(
    ("path", "options", "words"),
    [
        ("s3://bucket/{000..002}.tar", {}, r"opens no s3: .*pipe:aws s3 cp s3://bucket"),
        ("http://127.0.0.1/{0..1.tar", {}, r"cannot be expanded .*: check its braces"),
        ("pipe:curl ${NOWHERE}/0.tar", {}, r"cannot be expanded \(missing environment variable .*: check its braces"),
        ([], {}, r"data\.path is an empty list"),
        (None, {"streams": 3}, r"data\.streams=3 does not divide optim\.batch_size=8: choose 2 or 4\."),
        (None, {"shuffle_buffer": 0}, r"data\.shuffle_buffer=0 must be 1 or more"),
        ("/nowhere/{0..1}.tar", {}, r"/nowhere/0\.tar does not exist"),
    ],
)
def test_what_does_not_fit_is_said_with_the_way_out(folder, path, options, words):
    with pytest.raises(DataError, match=words):
        stream(folder if path is None else path, **options)


@pytest.mark.parametrize(
    ("division", "words"),
    [
        (
            {"workers": 3},
            r"data\.streams=4 .* 1 rank\(s\) with loader\.workers=3 each: set loader\.workers to 2 or 4\.$",
        ),
        ({"world": 8}, r"data\.streams=4 .*evenly among 8 rank\(s\): set data\.streams, which changes .*, to 8\.$"),
        ({"world": 2, "workers": 4}, r"set loader\.workers to 1 or 2, or data\.streams, .*, to 8\.$"),
    ],
)
def test_ranks_and_workers_that_do_not_divide_the_streams_name_those_that_do(folder, division, words):
    with pytest.raises(DataError, match=words):
        loader(folder, **division)


def test_different_classes_are_refused(folder, written):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "classes": ["c"]}))
    assert "The shards have different classes" in sentence(stream, [str(folder), str(written)])


def test_channels_are_those_of_the_manifest(written):
    options = {"streams": 1, "global_batch": 1, "seed": 0}
    assert Stream(str(written), None, **options).channels == 3
    assert Stream(str(written), 1, **options).channels == 1


def test_a_fingerprint_tells_other_counts_and_streams_apart(written):
    marks = {stream(written).fingerprint, stream(written, streams=2).fingerprint}
    assert len(marks | {stream(str(written / "shard-000000.tar")).fingerprint}) == 3
    assert stream(written).fingerprint in marks


def test_what_a_spawned_worker_needs_pickles(written, straight):
    assert steps(loader(pickle.loads(pickle.dumps(stream(written))))) == straight


@pytest.mark.parametrize(
    ("path", "remote"), [("/data/a.tar", False), ("a b.tar", False), ("pipe:cat a.tar", True), ("gs://b/a.tar", True)]
)
def test_urls_and_commands_are_remote(path, remote):
    assert is_remote(path) == remote


def children():
    return {child.pid for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE}


class Killing(Augment):
    def __call__(self, image, numbers):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_sentence_within_seconds(written):
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"worker died.*loader\.workers"):
        next(iter(loader(written, augment=Killing(size=8), workers=1)))
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("workers", [0, 2])
def test_ending_early_leaves_no_process(folder, workers):
    before = children()
    shards = stream(f"pipe:cat {folder}/shard-{{000000..000004}}.tar")
    shards.urls = [f"{url}; head -c 20000 /dev/zero; exec sleep 20" for url in shards.urls]
    batches = iter(loader(shards, workers=workers, stop_step=10**6))
    next(batches)
    assert len(children() - before) > workers
    begin = time.monotonic()
    batches.close()
    while children() - before and time.monotonic() - begin < 10:
        time.sleep(0.05)
    assert time.monotonic() - begin < 10


def test_a_second_pass_is_the_first(written):
    reader = loader(written, workers=1, stop_step=3)
    assert len(reader) == 3
    assert_equal(list(reader), list(reader))


def test_the_global_random_state_is_left_alone(written):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(loader(written, stop_step=1))
    assert torch.equal(torch.get_rng_state(), before)
