"""Pickles of others: only what is on the list is made, by both ways in which torch reads a file."""

import collections
import enum
import io
import pickle
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch._utils import _rebuild_tensor_v2

from elsewhere.launch.errors import UserError
from elsewhere.launch.tensor_files import TensorFiles
from elsewhere.launch.unpickle import ForeignClass, Inert, load_file, restricted
from elsewhere.launch.zero_files import ZeroFiles

TENSORS = {"torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2, "collections.OrderedDict": collections.OrderedDict}


class Harm:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class Colour(enum.Enum):
    RED = 1


class Shell(Harm):
    """Creates a file through a class, and not a function."""

    def __reduce__(self):
        return subprocess.Popen, (["touch", str(self.path)],)


@pytest.mark.parametrize("kind", [Harm, Shell])
def test_the_trap_of_these_tests_works(kind, tmp_path):
    made = pickle.loads(pickle.dumps(kind(tmp_path / "harm")))
    if kind is Shell:
        made.wait()
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize(("kind", "name"), [(Harm, "io.open"), (Shell, "subprocess.Popen")])
def test_a_pickle_runs_nothing_that_is_not_on_the_list(kind, name, tmp_path):
    content = io.BytesIO(pickle.dumps({"a": [kind(tmp_path / "harm")]}))
    with pytest.raises(ForeignClass, match=name):
        restricted({}).load(content)  # pyright: ignore[reportAttributeAccessIssue]
    assert not (tmp_path / "harm").exists()


def test_torch_load_runs_nothing_that_is_not_on_the_list(tmp_path):
    torch.save({"weight": torch.zeros(3), "hook": Harm(tmp_path / "harm")}, tmp_path / "file.pt")
    with pytest.raises(ForeignClass, match=r"it holds io\.open, which is not loaded"):
        load_file(tmp_path / "file.pt", restricted(TENSORS))
    assert not (tmp_path / "harm").exists()


def test_torch_load_still_gives_tensors(tmp_path):
    tensor = torch.rand(5, 3)[1:]
    torch.save({"weight": tensor, "ids": torch.arange(4), "none": None}, tmp_path / "file.pt")
    content = load_file(tmp_path / "file.pt", restricted(TENSORS))
    assert torch.equal(content["weight"], tensor) and content["ids"].tolist() == [0, 1, 2, 3]


def test_the_old_file_format_of_torch_is_not_read_at_all(tmp_path):
    """It is several pickles, the first of which are read before there is a chance to look."""
    torch.save({"hook": Harm(tmp_path / "harm")}, tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(pickle.UnpicklingError, match="no whole archive"):
        load_file(tmp_path / "file.pt", restricted(TENSORS))
    assert not (tmp_path / "harm").exists()


class Attribute:
    """As Python 3.11.0 to 3.11.3 write a member of an enumeration."""

    def __init__(self, *of):
        self.of = of

    def __reduce__(self):
        return getattr, self.of


def test_members_of_enumerations_are_read_as_any_python_wrote_them():
    allowed = {f"{Colour.__module__}.Colour": Colour}
    content = io.BytesIO(pickle.dumps([Attribute(Colour, "RED"), Colour.RED]))
    assert restricted(allowed).load(content) == [Colour.RED, Colour.RED]  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "of", [(Colour, "__class__"), (Colour, "mro"), (Harm, "__init__"), (dict, "RED"), ("text", "format"), (Colour, [])]
)
def test_no_other_attribute_is_reached(of):
    allowed = {f"{one.__module__}.{one.__name__}": one for one in (Colour, Harm, dict)}
    content = io.BytesIO(pickle.dumps(Attribute(*of)))
    with pytest.raises(pickle.UnpicklingError):
        restricted(allowed).load(content)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("attribute", ["__class__", "__reduce_ex__", "__init__.__globals__"])
def test_attributes_of_what_is_allowed_are_not_reached(attribute):
    """Protocol 4 names `OrderedDict.__class__` as if it were a class."""
    content = b"\x80\x04\x8c\x0bcollections\x8c" + bytes([len(attribute) + 12]) + b"OrderedDict." + attribute.encode()
    with pytest.raises(ForeignClass):
        restricted(TENSORS).load(io.BytesIO(content + b"\x93."))  # pyright: ignore[reportAttributeAccessIssue]


def test_an_inert_object_keeps_nothing_of_a_pickle():
    content = pickle.dumps(Path("a/b"))
    loaded = restricted({"pathlib.PosixPath": Inert}).load(io.BytesIO(content))  # pyright: ignore
    assert type(loaded) is Inert and not vars(loaded)


def test_the_metadata_of_a_checkpoint_runs_nothing(tmp_path):
    dcp.save({"weight": torch.zeros(3)}, storage_writer=dcp.FileSystemWriter(tmp_path / "one"), no_dist=True)
    path = tmp_path / "one" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data["hook"] = Harm(tmp_path / "harm")
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"\.metadata is damaged: it holds io\.open") as caught:
        TensorFiles(tmp_path / "one")
    assert not (tmp_path / "harm").exists() and "\n" not in str(caught.value)


def test_a_checkpoint_by_deepspeed_runs_nothing(tmp_path):
    torch.save({"module": {}, "lr_scheduler": Harm(tmp_path / "harm")}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match=r"model_states\.pt cannot be used: it holds io\.open") as caught:
        ZeroFiles(tmp_path)
    assert not (tmp_path / "harm").exists() and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x80", b"not a pickle", pickle.dumps("a word"), b"\x80\x04N\x85R."])
def test_what_is_no_metadata_is_one_sentence(content, tmp_path):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match="is damaged") as caught:
        TensorFiles(tmp_path)
    assert "\n" not in str(caught.value)
