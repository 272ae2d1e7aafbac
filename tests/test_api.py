"""The Python interface: `elsewhere.load` and `elsewhere.pretrain`."""

import pytest
import torch

import elsewhere
from elsewhere.launch.build import build_method
from elsewhere.launch.config import load_config
from elsewhere.launch.errors import UserError


class Squares(torch.utils.data.Dataset):
    """Bright squares on the left or on the right, by class."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        image = torch.zeros(1, 8, 8)
        image[:, 2:6, 4 * (i % 2) : 4 * (i % 2) + 3] = 0.2 + 0.8 * i / 64
        return image, i % 2


@pytest.fixture
def run(tiny):
    """A finished run on a data set of one's own, with overrides in each way that they can be given."""
    settings = {k: v for k, v in tiny.items() if k not in ("data.path", "optim.batch_size", "optim.epochs")}
    options = {"optim__batch_size": 16, "optim": {"epochs": 2}}
    return elsewhere.pretrain("demo", dataset=Squares(), val_dataset=Squares(), **settings, **options)


def test_pretrain_takes_a_data_set_and_overrides(run, losses):
    assert run.complete and run.steps == 8
    assert len(losses(run.run)) == 8


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_load_gives_the_trained_encoder(which, run, tiny):
    encoder = elsewhere.load(run.run, which=which)
    saved = torch.load(run.run / "checkpoints/step-00000008/state.pt", weights_only=True)["engine"]["method"]
    prefix = "teacher." if which == "teacher" else "encoder."
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, saved[prefix + name]), name
    assert not encoder.training
    assert encoder.num_features == 24
    assert encoder.forward_features(torch.zeros(2, 1, 8, 8)).shape == (2, 64, 24)
    assert (encoder.pixel_mean, encoder.pixel_std) == ([0.3], [0.37])


def test_load_takes_a_checkpoint_folder(run):
    one, other = elsewhere.load(run.run), elsewhere.load(run.run / "checkpoints" / "step-00000008")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_load_reads_a_released_checkpoint(tmp_path, tiny):
    """Released names: `module.` prefixes, a position table with a batch dimension, `target_encoder`."""
    method = build_method(load_config("demo", tiny))
    state = {f"module.{name}": tensor for name, tensor in method.teacher.state_dict().items()}
    state["module.pos_embed"] = torch.zeros(1, 64, 24)
    path = tmp_path / "jepa-latest.pth.tar"
    torch.save({"target_encoder": state, "encoder": state, "predictor": {}, "epoch": 3, "lr": 0.1}, path)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("base: demo\nmodel: {width: 24, depth: 2, heads: 3, patch_size: 1}\n")
    encoder = elsewhere.load(path, recipe=str(recipe))
    assert torch.equal(encoder.norm.weight, method.teacher.norm.weight)
    with pytest.raises(UserError, match="name a recipe"):
        elsewhere.load(path)


@pytest.mark.parametrize("content", [b"", b"not weights", None])
def test_load_refuses_what_is_no_checkpoint_in_a_sentence(content, tmp_path):
    path = tmp_path / "file.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot be read as weights|does not exist"):
        elsewhere.load(path, recipe="demo")


def test_a_run_starts_from_the_encoder_of_another(run, tiny, tmp_path, losses, capsys):
    settings = {**tiny, "run.dir": str(tmp_path / "second"), "init.from": str(run.run)}
    elsewhere.pretrain("demo", **settings)
    assert "encoder weights from the teacher of" in capsys.readouterr().out
    fresh = {**tiny, "run.dir": str(tmp_path / "fresh")}
    elsewhere.pretrain("demo", **fresh)
    assert losses(tmp_path / "second")[0] != losses(tmp_path / "fresh")[0]


def test_a_start_from_another_model_is_refused(run, tiny):
    with pytest.raises(UserError, match=r"does not fit this recipe.s encoder: .* is \(24,\) there and \(48,\) here"):
        elsewhere.pretrain("demo", **{**tiny, "model.width": 48, "run.dir": str(run.run) + "2", "init.from": run.run})
