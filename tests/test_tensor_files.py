"""Tensors of a portable checkpoint by name: what torch.distributed.checkpoint wrote comes back, without a group."""

import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp

from elsewhere.launch.errors import UserError
from elsewhere.launch.tensor_files import SafeReader, TensorFiles, read_tensors


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "method.weight": torch.rand(5, 3, generator=generator),
        "method.scale": torch.rand((), generator=generator),
        "method.half": torch.rand(4, 2, generator=generator).bfloat16(),
        "exp_avg.weight": torch.rand(5, 3, generator=generator),
        "ids": torch.arange(7),
        "empty": torch.empty(0, 3),
    }


@pytest.fixture
def folder(tensors, tmp_path):
    dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(tmp_path / "one"), no_dist=True)
    return tmp_path / "one"


def test_every_tensor_comes_back(folder, tensors):
    found = read_tensors(folder, lambda _: True)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_only_the_wanted_ones_are_read(folder, tensors):
    assert read_tensors(folder, lambda name: name.startswith("exp_avg.")).keys() == {"exp_avg.weight"}


def test_shapes_and_types_are_known_without_reading(folder, tensors):
    (folder / "__0_0.distcp").unlink()
    described = TensorFiles(folder).described
    assert {name: (one.shape, one.dtype) for name, one in described.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }


def test_torch_loads_through_the_safe_reader(folder, tensors):
    state = {"method.weight": torch.zeros(5, 3)}
    dcp.load(state, storage_reader=SafeReader(folder), no_dist=True)
    assert torch.equal(state["method.weight"], tensors["method.weight"])


# In a function: the mesh keeps gloo's threads, and one that still runs while Python ends aborts the process.
WRITER = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Shard, Replicate, distribute_tensor

def write(folder):
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    state = {}
    for name, shape, placement in [("rows", (7, 3), Shard(0)), ("columns", (4, 5), Shard(1)), ("one", (1, 2), Shard(0)),
                                   ("same", (3, 3), Replicate())]:
        values = torch.arange(float(torch.Size(shape).numel())).view(shape)
        state[name] = distribute_tensor(values, mesh, [placement])
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder))
    dist.destroy_process_group()

dist.init_process_group("gloo")
write(sys.argv[1])
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Tensors 0, 1, 2, … that two processes hold in uneven parts."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "writer.py").write_text(WRITER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(folder / "writer.py"), str(folder / "saved")],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "saved"


@pytest.mark.long
@pytest.mark.parametrize(("name", "shape"), [("rows", (7, 3)), ("columns", (4, 5)), ("one", (1, 2)), ("same", (3, 3))])
def test_the_parts_of_two_ranks_make_up_each_tensor(two_ranks, name, shape):
    assert len(list(two_ranks.glob("*.distcp"))) == 2
    found = TensorFiles(two_ranks).read(name)
    assert found.shape == shape and found.flatten().tolist() == list(range(found.numel()))


@pytest.mark.long
def test_a_missing_part_is_named(two_ranks, tmp_path):
    import shutil

    shutil.copytree(two_ranks, tmp_path / "saved")
    (tmp_path / "saved" / "__1_0.distcp").unlink()
    with pytest.raises(UserError, match=r"__1_0\.distcp cannot be read \(No such file"):
        TensorFiles(tmp_path / "saved").read("rows")


def edit(folder, change):
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def test_a_tensor_whose_parts_do_not_cover_it_is_damaged(folder):
    edit(folder, lambda metadata: setattr(metadata.state_dict_metadata["method.weight"], "size", torch.Size([6, 3])))
    with pytest.raises(UserError, match=r"pieces of method\.weight do not make it up"):
        TensorFiles(folder).read("method.weight")


def test_another_tensor_in_its_place_is_damaged(folder):
    def swap(metadata):
        places = {index.fqn: index for index in metadata.storage_data}
        metadata.storage_data[places["method.weight"]] = metadata.storage_data[places["ids"]]

    edit(folder, swap)
    with pytest.raises(UserError, match=r"damaged at method\.weight: another tensor"):
        TensorFiles(folder).read("method.weight")


def test_no_file_outside_the_folder_is_read(folder, tmp_path):
    (folder / "__0_0.distcp").rename(tmp_path / "outside.distcp")

    def lead_out(metadata):
        for info in metadata.storage_data.values():
            info.relative_path = "../outside.distcp"

    edit(folder, lead_out)
    with pytest.raises(UserError, match="does not say where"):
        TensorFiles(folder).read("ids")


def test_a_cut_file_is_one_sentence(folder):
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"__0_0\.distcp is damaged at") as caught:
        read_tensors(folder, lambda _: True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [5, 6])
def test_metadata_of_earlier_and_later_versions_of_torch_is_read(folder, tensors, count, monkeypatch):
    """Later ones write six properties of a tensor where earlier ones write, and read, five."""
    from torch.distributed.checkpoint.metadata import TensorProperties

    metadata, get = pickle.loads((folder / ".metadata").read_bytes()), TensorProperties.__getstate__
    monkeypatch.setattr(TensorProperties, "__getstate__", lambda self: (*get(self), (1,))[:count])
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert torch.equal(TensorFiles(folder).read("method.weight"), tensors["method.weight"])
