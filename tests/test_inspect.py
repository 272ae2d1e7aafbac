"""`elsewhere inspect`: what it tells of each kind of checkpoint, and one sentence for anything else."""

import argparse
import json
import re

import pytest
import torch
from safetensors.torch import save_file

import elsewhere
from elsewhere.launch.build import build_method
from elsewhere.launch.cli import main
from elsewhere.launch.config import load_config


@pytest.fixture
def tell(capsys):
    """Run `elsewhere inspect …`; returns exit status, stdout and stderr."""

    def run(*arguments):
        status = main(["inspect", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def run(tiny_mae, some_digits, capsys):
    """A finished run of AdPE: six steps, two checkpoints."""
    settings = {**tiny_mae, "checkpoint.every_steps": 3}
    result = elsewhere.pretrain("demo_adpe", some_digits, **settings)
    capsys.readouterr()
    return result.run


def numbers(printed, title):
    """Tensors and numbers of a line."""
    found = re.search(rf"^{title} +([\d,]+) tensors +([\d,]+) numbers", printed, re.MULTILINE)
    assert found, printed
    return int(found[1].replace(",", "")), int(found[2].replace(",", ""))


def counted(state):
    return len(state), sum(tensor.numel() for tensor in state.values())


def test_a_run_is_told_by_its_newest_checkpoint(tell, run, tiny_mae):
    status, printed, _ = tell(run)
    assert status == 0
    method = build_method(load_config("demo_adpe", tiny_mae))
    assert re.search(r"^step +6, epoch 1$", printed, re.MULTILINE)
    assert re.search(r"^written +by 1 rank of ddp in float32 with torch 2", printed, re.MULTILINE)
    assert numbers(printed, "student") == counted(method.encoder.state_dict())
    assert numbers(printed, "decoder") == counted(method.decoder.state_dict())
    assert numbers(printed, "all") == counted(method.state_dict())
    assert "all there, checksums right" in printed


def test_optimiser_and_adversary_are_counted(tell, run, tiny_mae):
    printed = tell(run)[1]
    moved = {
        name: p for name, p in build_method(load_config("demo_adpe", tiny_mae)).named_parameters() if p.requires_grad
    }
    assert numbers(printed, "optimiser")[0] == 2 * len(moved)
    assert numbers(printed, "adversary")[0] > 0


def test_every_tensor_is_listed_with_shape_and_type(tell, run, tiny_mae):
    method = build_method(load_config("demo_adpe", tiny_mae))
    printed = tell(run / "checkpoints" / "step-00000006", "--tensors")[1]
    for name, tensor in method.state_dict().items():
        assert re.search(rf"^method\.{re.escape(name)} +float32 +{re.escape(str(list(tensor.shape)))}$", printed,
                         re.MULTILINE), name  # fmt: skip


def test_a_damaged_checkpoint_of_a_run_is_told(tell, run):
    (run / "checkpoints" / "step-00000006" / "__0_0.distcp").write_bytes(b"cut")
    status, printed, _ = tell(run)
    assert status == 0
    assert re.search(r"^damaged +\S+step-00000006 is damaged: __0_0\.distcp has 3 bytes", printed, re.MULTILINE)
    assert re.search(r"^step +3,", printed, re.MULTILINE)


def test_a_damaged_checkpoint_itself_is_told_with_its_files(tell, run):
    (run / "checkpoints" / "step-00000006" / "__0_0.distcp").write_bytes(b"cut")
    status, printed, complaint = tell(run / "checkpoints" / "step-00000006")
    assert status == 2 and re.search(r"is damaged: __0_0\.distcp has 3 bytes instead of \d+; take another", complaint)
    assert re.search(r"^step +6", printed, re.MULTILINE)
    assert re.search(r"^file +__0_0\.distcp: 3 bytes, should be [\d,]+ bytes$", printed, re.MULTILINE)


def test_what_an_older_checkpoint_does_not_say_is_left_out(tell, run):
    path = run / "checkpoints" / "step-00000006" / "about.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({key: about[key] for key in ("step", "format", "files")}))
    status, printed, _ = tell(run)
    assert status == 0 and re.search(r"^step +6$", printed, re.MULTILINE) and "written" not in printed


def test_consolidated_weights_are_told(tell, run, tmp_path, tiny_mae):
    assert main(["consolidate", str(run), "-o", str(tmp_path / "w.safetensors"), "--dtype", "bfloat16"]) == 0
    status, printed, _ = tell(tmp_path / "w.safetensors", "--tensors")
    assert status == 0
    state = build_method(load_config("demo_adpe", tiny_mae)).encoder.state_dict()
    assert numbers(printed, "tensors") == counted(state)
    assert re.search(r"^part +student$", printed, re.MULTILINE) and re.search(r"^step +6$", printed, re.MULTILINE)
    assert re.search(r"^norm\.weight +bfloat16 +\[24\]$", printed, re.MULTILINE)


def test_bare_safetensors_are_told(tell, tmp_path):
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.int64)}, tmp_path / "w.safetensors")
    status, printed, _ = tell(tmp_path / "w.safetensors")
    assert status == 0 and numbers(printed, "tensors") == (2, 10)


def test_a_released_file_is_told(tell, tmp_path):
    state = {"module.norm.weight": torch.zeros(24), "module.norm.bias": torch.zeros(24)}
    content = {"encoder": state, "opt": {"state": {}}, "epoch": 3, "args": argparse.Namespace(lr=None)}
    torch.save(content, tmp_path / "jepa-latest.pth.tar")
    status, printed, _ = tell(tmp_path / "jepa-latest.pth.tar", "--tensors")
    assert status == 0 and numbers(printed, "encoder") == (2, 48)
    assert re.search(r"^epoch +3$", printed, re.MULTILINE)
    assert re.search(r"^encoder\.module\.norm\.bias +float32 +\[24\]$", printed, re.MULTILINE)


def test_a_checkpoint_by_deepspeed_is_told(tell, tmp_path):
    """Files of stage 2 and two ranks as deepspeed lays them out, made by hand."""
    shapes = [{"a": torch.Size([2, 3]), "b": torch.Size([5])}]
    model = {"module": {"a": torch.zeros(2, 3), "b": torch.zeros(5)}, "param_shapes": shapes, "buffer_names": [],
             "shared_params": {}, "dp_world_size": 2, "global_steps": 12, "ds_version": "0.19.8"}  # fmt: skip
    torch.save(model, tmp_path / "mp_rank_00_model_states.pt")
    for rank, count in ((0, 6), (1, 5)):
        parts = [torch.arange(6.0)[:count] + 6 * rank]
        state = {"zero_stage": 2, "partition_count": [2], "single_partition_of_fp32_groups": parts}
        torch.save({"optimizer_state_dict": state}, tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    status, printed, _ = tell(tmp_path, "--tensors")
    assert status == 0 and numbers(printed, "all") == (2, 11)
    assert re.search(r"^written +by deepspeed 0\.19\.8, ZeRO stage 2, 2 ranks$", printed, re.MULTILINE)
    assert re.search(r"^step +12$", printed, re.MULTILINE) and "0: 11 numbers that train" in printed
    assert re.search(r"^a +float32 +\[2, 3\]$", printed, re.MULTILINE)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.txt"])
@pytest.mark.parametrize("content", [b"", b"nothing of that kind", None])
def test_anything_else_is_one_sentence(tell, tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    status, printed, complaint = tell(tmp_path / name)
    assert (status, printed) == (2, "") and re.fullmatch(r"elsewhere: [^\n]+\n", complaint)


@pytest.mark.parametrize("inside", ["", "checkpoints"])
def test_an_empty_folder_is_one_sentence(tell, tmp_path, inside):
    (tmp_path / "run" / inside).mkdir(parents=True)
    status, _, complaint = tell(tmp_path / "run")
    assert status == 2 and re.search("holds no checkpoint; give|has no checkpoint yet", complaint)
