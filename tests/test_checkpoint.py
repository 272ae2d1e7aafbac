"""Checkpoints on disk: complete or absent, verified, kept as configured, and written beside the training."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from elsewhere.launch import portable
from elsewhere.launch.checkpoint import Checkpoints, Saved, inspect
from elsewhere.launch.errors import UserError
from elsewhere.launch.portable import Piece
from elsewhere.launch.world import join

DATA, METADATA = "__0_0.distcp", ".metadata"


@pytest.fixture
def checkpoints(tmp_path):
    found = Checkpoints(tmp_path)
    yield found
    found.close()


def begin(checkpoints, step, permanent=False, weight=None):
    weight = torch.full((100,), float(step)) if weight is None else weight
    checkpoints.save({"method.weight": Piece.whole(weight)}, {"step": step}, permanent)


def save(checkpoints, step, permanent=False):
    """A whole checkpoint, and its folder."""
    begin(checkpoints, step, permanent)
    checkpoints.finish()
    return checkpoints.folder / f"step-{step:08d}"


def steps(checkpoints):
    return [int(path.name.removeprefix("step-")) for path in checkpoints.folders()]


def test_what_is_saved_comes_back(checkpoints):
    save(checkpoints, 7)
    saved, complaints = checkpoints.newest()
    assert saved is not None and saved.step == 7 and not complaints
    assert torch.equal(saved.tensors("method.")["method.weight"], torch.full((100,), 7.0))


def test_the_last_ones_and_the_permanent_ones_are_kept(checkpoints):
    for step in range(1, 8):
        save(checkpoints, step, permanent=step == 3)
    assert steps(checkpoints) == [3, 6, 7]


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: (path / DATA).unlink(), f"{DATA} is missing"),
        (lambda path: (path / METADATA).unlink(), f"{METADATA} is missing"),
        (lambda path: (path / "about.json").unlink(), "about.json is missing"),
        (lambda path: (path / "about.json").write_text("{"), "about.json is missing or damaged"),
        (lambda path: (path / DATA).write_bytes((path / DATA).read_bytes()[:-9]), "bytes instead of"),
        (lambda path: flip(path / DATA), f"the checksum of {DATA} is wrong"),
        (lambda path: flip(path / METADATA), f"the checksum of {METADATA} is wrong"),
        (lambda path: edit(path / "about.json", format=99), "has format 99"),
    ],
)
def test_each_damage_is_named_and_passed_over(damage, complaint, checkpoints):
    save(checkpoints, 1)
    damage(save(checkpoints, 2))
    saved, complaints = checkpoints.newest()
    assert saved is not None and saved.step == 1
    assert len(complaints) == 1 and complaint in complaints[0]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_kill_while_writing_leaves_no_checkpoint_of_that_name(checkpoints, monkeypatch):
    save(checkpoints, 1)

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    written = portable.write

    def write_and_die(*given):
        written(*given)
        raise Killed

    moments = {
        "elsewhere.launch.portable.write": write_and_die,
        "elsewhere.launch.checkpoint._crc32": die,
        "elsewhere.launch.checkpoint._sync": die,
    }
    for moment, death in moments.items():
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(moment, death)
            save(checkpoints, 2)
        assert steps(checkpoints) == [1], moment
        assert (checkpoints.folder / ".writing-step-00000002" / DATA).exists(), "it died while it wrote"
    checkpoints.clean()
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000001"]


def fill_up(_, file):
    """A disk that takes half of what `torch.save` writes."""
    file.write(b"half")
    raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")


def test_a_full_disk_is_one_sentence_and_keeps_the_earlier_one(checkpoints, monkeypatch):
    save(checkpoints, 1)
    monkeypatch.setattr("torch.save", fill_up)
    with pytest.raises(UserError, match=r"could not be written.*file write failed.*make room") as caught:
        save(checkpoints, 2)
    monkeypatch.undo()
    assert "\n" not in str(caught.value)
    assert inspect(checkpoints.folders()[0]).step == 1
    assert not list(checkpoints.folder.glob(".writing-*"))


def test_a_damaged_checkpoint_of_the_same_step_is_set_aside(checkpoints):
    flip(save(checkpoints, 1) / DATA)
    save(checkpoints, 1)
    assert inspect(checkpoints.folders()[0]).step == 1
    assert (checkpoints.folder / "damaged-step-00000001" / DATA).exists()


class Bomb:
    """Removes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return (shutil.rmtree, (str(self.folder),))


@pytest.fixture
def precious(tmp_path):
    folder = tmp_path / "precious"
    folder.mkdir()
    return folder


def fill(saved):
    saved.fill({"method.weight": Piece.whole(torch.zeros(100))})


@pytest.mark.parametrize("read", [lambda saved: saved.tensors(""), fill], ids=["whole", "pieces"])
def test_a_pickle_in_place_of_the_metadata_is_not_executed(read, precious, checkpoints):
    path = save(checkpoints, 1)
    (path / METADATA).write_bytes(pickle.dumps(Bomb(precious)))
    with pytest.raises(UserError, match=r"metadata is damaged: it holds shutil\.rmtree"):
        read(Saved(path, 1, {}))
    assert precious.is_dir()


@pytest.mark.parametrize("read", [lambda saved: saved.tensors(""), fill], ids=["whole", "pieces"])
def test_a_pickle_in_place_of_a_tensor_is_not_executed(read, precious, checkpoints):
    path = save(checkpoints, 1)
    torch.save(Bomb(precious), path / DATA)
    metadata = pickle.loads((path / METADATA).read_bytes())
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, (path / DATA).stat().st_size
    (path / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(BaseException, match=r"shutil\.rmtree|[Uu]nsupported|[Ww]eights only"):
        read(Saved(path, 1, {}))
    assert precious.is_dir()


@pytest.fixture
def gate(monkeypatch):
    """Writing waits until it is set."""
    opened, write = threading.Event(), portable.write
    monkeypatch.setattr(portable, "write", lambda *given: opened.wait(60) and write(*given))
    yield opened
    opened.set()


def test_what_training_changes_while_it_is_written_is_saved_as_it_was(gate, checkpoints):
    weight = torch.full((100,), 1.0)
    begin(checkpoints, 1, weight=weight)
    weight += 1.0
    gate.set()
    checkpoints.finish()
    assert torch.equal(checkpoints.newest()[0].tensors("")["method.weight"], torch.full((100,), 1.0))


def test_there_is_no_checkpoint_before_it_is_whole(gate, checkpoints):
    begin(checkpoints, 1)
    assert steps(checkpoints) == []
    gate.set()
    checkpoints.finish()
    assert steps(checkpoints) == [1]


def test_one_checkpoint_is_written_after_another(gate, checkpoints):
    begin(checkpoints, 1)
    threading.Timer(0.2, gate.set).start()
    begin(checkpoints, 2)
    assert steps(checkpoints)[0] == 1
    checkpoints.finish()
    assert steps(checkpoints) == [1, 2]


def wait_until_failed(checkpoints, seconds=30.0):
    end = time.monotonic() + seconds
    while not checkpoints.failed():
        assert time.monotonic() < end, "no failure was noticed"
        time.sleep(0.01)


def test_a_failure_is_known_before_it_is_raised_once(gate, checkpoints, monkeypatch):
    begin(checkpoints, 1)
    known = [checkpoints.failed()]
    monkeypatch.setattr("torch.save", fill_up)
    gate.set()
    wait_until_failed(checkpoints)
    with pytest.raises(UserError):
        checkpoints.finish()
    assert [*known, checkpoints.failed()] == [False, False]


def test_the_next_save_raises_what_the_one_before_met(checkpoints, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("torch.save", fill_up)
        begin(checkpoints, 1)
        wait_until_failed(checkpoints)
    with pytest.raises(UserError, match="checkpoint of step 1 could not be written"):
        begin(checkpoints, 2)


def rank_main(folder):
    """Two checkpoints of two processes, of which the second finds its disk full in the second one."""
    world = join("cpu")
    checkpoints = Checkpoints(Path(folder), world=world)

    def pieces(step):
        return {"method.weight": Piece(torch.full((50,), float(step)), (100,), 50 * world.rank)}

    checkpoints.save(pieces(1), {"step": 1})
    checkpoints.finish()
    error, before = "", time.monotonic()
    with mock.patch("torch.save", fill_up if world.rank == 1 else torch.save):
        checkpoints.save(pieces(2), {"step": 2})
        wait_until_failed(checkpoints)
        try:
            checkpoints.finish()
        except UserError as caught:
            error = str(caught)
    everyone = world.gather_host({"error": error, "seconds": time.monotonic() - before})
    if world.first:
        Path(folder, "found.json").write_text(json.dumps(everyone))
    checkpoints.close()
    world.close()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The folder in which two processes wrote, and what each of them met."""
    folder = tmp_path_factory.mktemp("ranks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launcher, __file__, str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "found.json").read_text())


@pytest.mark.slow
def test_the_pieces_of_two_ranks_make_one_checkpoint(two_ranks):
    saved, _ = Checkpoints(two_ranks[0]).newest()
    assert saved is not None and set(saved.about["files"]) == {DATA, "__1_0.distcp", METADATA}
    assert torch.equal(saved.tensors("")["method.weight"], torch.full((100,), 1.0))


@pytest.mark.slow
def test_a_full_disk_of_one_rank_reaches_both(two_ranks):
    for found in two_ranks[1]:
        assert "checkpoint of step 2 could not be written" in found["error"], found


@pytest.mark.slow
def test_a_failed_checkpoint_of_two_ranks_leaves_the_earlier_one_alone(two_ranks):
    assert [path.name for path in (two_ranks[0] / "checkpoints").iterdir()] == ["step-00000001"]


if __name__ == "__main__":
    rank_main(sys.argv[1])
