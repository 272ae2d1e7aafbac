"""Checkpoints on disk: complete or absent, verified, kept as configured."""

import json
import shutil

import pytest
import torch

from elsewhere.launch.checkpoint import Checkpoints, inspect
from elsewhere.launch.errors import UserError


def save(checkpoints, step, permanent=False):
    return checkpoints.save({"step": step, "weight": torch.full((100,), float(step))}, {"step": step}, permanent)


def steps(checkpoints):
    return [int(path.name.removeprefix("step-")) for path in checkpoints.folders()]


def test_what_is_saved_comes_back(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 7)
    saved, complaints = checkpoints.newest()
    assert saved is not None and saved.step == 7 and not complaints
    assert torch.equal(saved.load()["weight"], torch.full((100,), 7.0))


def test_the_last_ones_and_the_permanent_ones_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 8):
        save(checkpoints, step, permanent=step == 3)
    assert steps(checkpoints) == [3, 6, 7]


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: (path / "state.pt").unlink(), "state.pt is missing"),
        (lambda path: (path / "about.json").unlink(), "about.json is missing"),
        (lambda path: (path / "about.json").write_text("{"), "about.json is missing or damaged"),
        (lambda path: (path / "state.pt").write_bytes((path / "state.pt").read_bytes()[:-9]), "bytes instead of"),
        (lambda path: flip(path / "state.pt"), "checksum"),
        (lambda path: edit(path / "about.json", format=99), "has format 99"),
    ],
)
def test_each_damage_is_named_and_passed_over(damage, complaint, tmp_path):
    checkpoints = Checkpoints(tmp_path)
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


def test_a_kill_while_writing_leaves_no_checkpoint_of_that_name(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    for moment in ("elsewhere.launch.checkpoint._crc32", "elsewhere.launch.checkpoint._sync", "torch.save"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(moment, die)
            save(checkpoints, 2)
        assert steps(checkpoints) == [1], moment
    checkpoints.clean()
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000001"]


def test_a_full_disk_is_one_sentence_and_keeps_the_earlier_one(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)

    def full(state, file):
        file.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(UserError, match=r"could not be written.*make room"):
        save(checkpoints, 2)
    monkeypatch.undo()
    assert inspect(checkpoints.folders()[0]).step == 1
    assert not list(checkpoints.folder.glob(".writing-*"))


def test_a_damaged_checkpoint_of_the_same_step_is_set_aside(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    flip(save(checkpoints, 1) / "state.pt")
    save(checkpoints, 1)
    assert inspect(checkpoints.folders()[0]).step == 1
    assert (checkpoints.folder / "damaged-step-00000001" / "state.pt").exists()


def test_a_pickle_in_its_place_is_not_executed(tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return (shutil.rmtree, (str(tmp_path / "precious"),))

    (tmp_path / "precious").mkdir()
    checkpoints = Checkpoints(tmp_path)
    path = save(checkpoints, 1)
    torch.save({"step": 1, "engine": Bomb()}, path / "state.pt")
    saved = inspect_ignoring_checksum(path)
    with pytest.raises(pickle.UnpicklingError):
        saved.load()
    assert (tmp_path / "precious").is_dir()


def inspect_ignoring_checksum(path):
    from elsewhere.launch.checkpoint import Saved

    return Saved(path, 1, json.loads((path / "about.json").read_text()))
