"""Checkpoints by deepspeed itself: the weights that were live come back bit for bit, or one sentence says why not."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from elsewhere.launch.errors import UserError
from elsewhere.launch.weights import open_weights, write_part
from elsewhere.launch.zero_files import ZeroFiles, find_zero

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"),
]

# Odd sizes, two groups, shared, frozen and zero-element parameters, buffers that are saved and one that is not.
TRAINER = """
import os, sys
import torch, torch.nn as nn
import deepspeed
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.again = nn.Linear(5, 7), nn.Linear(7, 7, bias=False), nn.Linear(7, 7, bias=False)
        self.again.weight = self.two.weight
        self.frozen = nn.Linear(7, 3).requires_grad_(False)
        self.scale, self.norm, self.last = nn.Parameter(torch.tensor([1.5])), nn.LayerNorm(3), nn.Linear(3, 1)
        self.register_buffer("mean", torch.rand(3))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("unsaved", torch.ones(2), persistent=False)

    def forward(self, x):
        self.count += 1
        x = self.frozen(self.again(self.two(self.one(x).tanh())))
        return self.last(self.norm(x + self.mean.to(x.dtype)) * self.scale).sum()


def live(engine, stage):
    for name, p in engine.module.named_parameters(remove_duplicate=False):
        # Where deepspeed holds another copy in float32, that; it finds the wrong one with round_robin_gradients.
        if p.dtype != torch.float32 and p.requires_grad:
            yield name, safe_get_full_fp32_param(p).clone()
            continue
        with deepspeed.zero.GatheredParameters([p], enabled=stage == 3):
            yield name, p.detach().clone()
    for name in ("mean", "count", "mask"):
        yield name, getattr(engine.module, name).clone()


for case in sys.argv[2:]:
    kind, stage, *flags = case.split("-")
    stage = int(stage)
    torch.manual_seed(0)
    net = Net()
    split = [[p for p in net.parameters() if (p.ndim > 1) == decays] for decays in (True, False)]
    optimizer = torch.optim.AdamW([{"params": split[0]}, {"params": split[1], "weight_decay": 0.0}], lr=1e-2)
    zero = {"stage": stage, "round_robin_gradients": "robin" in flags, "stage3_param_persistence_threshold": 0}
    if "groups" in flags:
        zero["sub_group_size"] = 20
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    if kind == "bfloat16":
        config["bf16"] = {"enabled": True}
    engine = deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]
    for _ in range(2):
        loss = engine(torch.randn(4, 5, dtype=getattr(torch, kind)))
        engine.backward(loss)
        engine.step()
    folder = os.path.join(sys.argv[1], case)
    engine.save_checkpoint(folder)
    found = dict(live(engine, stage))
    if torch.distributed.get_rank() == 0:
        torch.save(found, os.path.join(folder, "live.pt"))
        if stage:
            torch.save(get_fp32_state_dict_from_zero_checkpoint(folder), os.path.join(folder, "theirs.pt"))
    torch.distributed.barrier()
os._exit(0)  # gloo's threads, which DeepSpeed keeps, may abort a Python that ends under them
"""
CASES = ["float32-0", "float32-1", "float32-2", "float32-3", "bfloat16-1", "bfloat16-3", "float32-2-robin",
         "float32-3-groups"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a checkpoint of two ranks for each case, its live weights, and what deepspeed's own tool reads."""
    folder = tmp_path_factory.mktemp("zero")
    (folder / "trainer.py").write_text(TRAINER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*launcher, str(folder / "trainer.py"), str(folder), *CASES],
        capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def zero_files(folder):
    found = find_zero(folder)
    assert found is not None
    return ZeroFiles(found)


@pytest.mark.parametrize("case", CASES)
def test_the_live_weights_come_back_bit_for_bit(case, trained):
    files, live = zero_files(trained / case), torch.load(trained / case / "live.pt")
    assert files.described.keys() == live.keys()
    for name, tensor in live.items():
        found = files.read(name)
        assert found.shape == tensor.shape and found.dtype == tensor.dtype, name
        assert torch.equal(found, tensor), name


@pytest.mark.parametrize("case", CASES[1:])
def test_deepspeeds_own_tool_reads_the_same(case, trained, tmp_path):
    """It loses frozen parameters in stage 1 (DeepSpeed#3090), and this does not."""
    theirs = torch.load(trained / case / "theirs.pt")
    write_part(trained / case, tmp_path / "weights.safetensors", None, torch.float32)
    ours = load_file(tmp_path / "weights.safetensors")
    lost = {"frozen.weight", "frozen.bias"} if "-1" in case else set()
    assert ours.keys() - theirs.keys() == lost and not theirs.keys() - ours.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor.float() if tensor.is_floating_point() else tensor), name


@pytest.mark.parametrize(("case", "stage"), [("float32-0", 0), ("float32-1", 1), ("float32-2", 2), ("bfloat16-3", 3)])
def test_stage_ranks_and_step_are_told(case, stage, trained):
    files = zero_files(trained / case)
    groups = [5 * 7 + 7 * 7 + 3, 7 + 1 + 3 + 3 + 1] if stage else []
    assert (files.stage, files.ranks, files.step, files.groups) == (stage, 2, 2, groups)


def test_deepspeed_is_not_imported(trained, tmp_path):
    code = (
        "import sys; from elsewhere.launch.cli import main; "
        f"status = main(['consolidate', {str(trained / 'float32-3')!r}, '-o', 'weights.safetensors']); "
        "sys.exit(status or 'deepspeed' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_another_projects_model_has_no_parts(trained, tmp_path):
    with pytest.raises(UserError, match=r"not of a method of this package.* choose --part all"):
        write_part(trained / "float32-2", tmp_path / "weights.safetensors", "teacher", torch.float32)


def test_the_tags_folder_will_do(trained):
    assert open_weights(trained / "float32-2" / "global_step2").names == open_weights(trained / "float32-2").names


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of a case to damage; returns its folder of files."""

    def make(case):
        shutil.copytree(trained / case, tmp_path / case)
        return tmp_path / case / "global_step2"

    return make


def complaint(folder):
    with pytest.raises(UserError) as caught:
        zero_files(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("float32-1", "zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        ("float32-2", "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        ("float32-2", "mp_rank_00_model_states.pt"),
        ("float32-3", "zero_pp_rank_1_mp_rank_00_model_states.pt"),
        ("bfloat16-3", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"),
    ],
)
def test_a_missing_file_is_named(case, name, copy):
    folder = copy(case)
    (folder / name).unlink()
    assert name in complaint(folder)


def test_a_folder_without_any_optimiser_file_is_not_taken_for_stage_0(copy):
    folder = copy("float32-2")
    for path in folder.glob("*_optim_states.pt"):
        path.unlink()
    assert "lacks zero_pp_rank_0_mp_rank_00_optim_states.pt" in complaint(folder)


def test_a_left_over_rank_is_told(copy):
    folder = copy("float32-2")
    shutil.copy(folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt",
                folder / "zero_pp_rank_2_mp_rank_00_optim_states.pt")  # fmt: skip
    assert "holds 3 optim files and was written by 2 ranks" in complaint(folder)


def test_files_of_two_stages_are_not_mixed(copy, trained):
    folder, name = copy("float32-2"), "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copy(trained / "float32-1" / "global_step2" / name, folder / name)
    assert "other stages or numbers of ranks" in complaint(folder)


def rewrite(path, change):
    """Load and save as torch does by itself, with deepspeed's classes, after a change."""
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def test_another_number_of_ranks_in_the_model_file_is_told(copy):
    folder = copy("float32-2")
    rewrite(folder / "mp_rank_00_model_states.pt", lambda content: content.update(dp_world_size=4))
    assert "optimizer files of 2 ranks and model files of 4" in complaint(folder)


def test_tensor_parallelism_is_refused(copy):
    folder = copy("float32-2")
    rewrite(folder / "mp_rank_00_model_states.pt", lambda content: content.update(mp_world_size=2))
    assert "tensor or pipeline parallelism" in complaint(folder)


def test_too_few_numbers_are_told(copy):
    folder = copy("float32-0")
    shapes = [{"one.weight": torch.Size([70, 50])}]
    path = folder / "mp_rank_00_model_states.pt"
    rewrite(path, lambda content: content.update(param_shapes=shapes))
    state = {"zero_stage": 1, "partition_count": [2], "single_partition_of_fp32_groups": [torch.zeros(8)]}
    for rank in range(2):
        torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    assert "end before one.weight does" in complaint(folder)


def test_a_flipped_bit_is_found(copy):
    folder = copy("float32-2")
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    values = zero_files(folder)._pieces["last.weight"][0].detach().numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(values)] ^= 1
    path.write_bytes(content)
    assert "zero_pp_rank_1_mp_rank_00_optim_states.pt cannot be used: it is damaged (the checksum" in complaint(folder)


def test_a_cut_file_is_told(copy):
    folder = copy("float32-3")
    path = folder / "zero_pp_rank_1_mp_rank_00_model_states.pt"
    path.write_bytes(path.read_bytes()[:-100])
    assert "zero_pp_rank_1_mp_rank_00_model_states.pt cannot be used: it is damaged" in complaint(folder)


def test_a_tag_that_is_not_there_is_told(copy):
    folder = copy("float32-2").parent
    (folder / "latest").write_text("global_step9")
    assert "names 'global_step9', which is not in" in complaint(folder)
