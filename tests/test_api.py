"""The Python interface: `elsewhere.load` and `elsewhere.pretrain`."""

import argparse
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import elsewhere
from elsewhere.launch.build import build_method
from elsewhere.launch.checkpoint import inspect
from elsewhere.launch.cli import main
from elsewhere.launch.config import load_config
from elsewhere.launch.errors import UserError
from elsewhere.models.zoo import to_released_mae


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


def test_without_images_to_measure_on_it_is_said_that_nothing_is_probed(tiny, capsys):
    settings = {**tiny, "optim.batch_size": 16, "optim.epochs": 1, "probe.after": True}
    del settings["data.path"]
    assert elsewhere.pretrain("demo", dataset=Squares(), **settings).after is None
    assert (
        "No probe: there are no images to measure on; give a second data set as val_dataset." in capsys.readouterr().out
    )


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_load_gives_the_trained_encoder(which, run, tiny):
    encoder = elsewhere.load(run.run, which=which)
    prefix = "method.teacher." if which == "teacher" else "method.encoder."
    saved = inspect(run.run / "checkpoints/step-00000008").tensors(prefix)
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
    state["module.pos_embed"] = method.teacher.positions.table[None]
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


@pytest.mark.parametrize(("part", "which"), [("teacher", "teacher"), ("student", "student"), ("all", "student")])
def test_load_reads_consolidated_weights(part, which, run, tmp_path):
    path = tmp_path / "weights.safetensors"
    assert main(["consolidate", str(run.run), "-o", str(path), "--part", part]) == 0
    encoder, expected = elsewhere.load(path, which=which), elsewhere.load(run.run, which=which)
    assert encoder.pixel_mean == expected.pixel_mean and not encoder.training
    for name, tensor in expected.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor), name


def test_load_reads_half_precision_into_float32(run, tmp_path):
    path = tmp_path / "weights.safetensors"
    assert main(["consolidate", str(run.run), "-o", str(path), "--dtype", "bfloat16"]) == 0
    weight = elsewhere.load(path).norm.weight
    assert torch.equal(weight, elsewhere.load(run.run).norm.weight.bfloat16().float())


@pytest.mark.parametrize(
    ("part", "which", "text"),
    [("predictor", "teacher", "holds the predictor, which is no encoder"), ("teacher", "student", "the teacher alone")],
)
def test_load_refuses_a_part_that_was_not_asked_for(part, which, text, run, tmp_path):
    path = tmp_path / "weights.safetensors"
    assert main(["consolidate", str(run.run), "-o", str(path), "--part", part]) == 0
    with pytest.raises(UserError, match=text):
        elsewhere.load(path, which=which)


def test_bare_safetensors_need_a_recipe(tmp_path, tiny):
    config = load_config("demo", tiny)
    encoder, recipe, path = build_method(config).encoder, tmp_path / "mine.yaml", tmp_path / "weights.safetensors"
    save_file(encoder.state_dict(), path)
    recipe.write_text(config.to_yaml())
    assert torch.equal(elsewhere.load(path, recipe=str(recipe)).norm.weight, encoder.norm.weight)
    with pytest.raises(UserError, match="name a recipe"):
        elsewhere.load(path)


@pytest.mark.parametrize("damage", ["cut", "empty", "words", "recipe"])
def test_damaged_safetensors_are_one_sentence(damage, run, tmp_path):
    path = tmp_path / "weights.safetensors"
    assert main(["consolidate", str(run.run), "-o", str(path)]) == 0
    content = path.read_bytes()
    if damage == "recipe":
        save_file(load_file(path), path, {"elsewhere.part": "teacher", "elsewhere.config": json.dumps({"modle": 1})})
    else:
        path.write_bytes({"cut": content[:-10], "empty": b"", "words": b"these are not weights"}[damage])
    with pytest.raises(UserError, match="cannot be read as weights") as caught:
        elsewhere.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["run", "file"])
def test_a_run_starts_from_the_encoder_of_another(source, run, tiny, tmp_path, losses, capsys):
    path = run.run if source == "run" else tmp_path / "weights.safetensors"
    if source == "file":
        assert main(["consolidate", str(run.run), "-o", str(path)]) == 0
    settings = {**tiny, "run.dir": str(tmp_path / "second"), "init.from": str(path)}
    elsewhere.pretrain("demo", **settings)
    assert "encoder weights from the teacher of" in capsys.readouterr().out
    fresh = {**tiny, "run.dir": str(tmp_path / "fresh")}
    elsewhere.pretrain("demo", **fresh)
    assert losses(tmp_path / "second")[0] != losses(tmp_path / "fresh")[0]


def test_a_start_from_another_model_is_refused(run, tiny):
    with pytest.raises(UserError, match=r"does not fit this recipe.s encoder: .* is \(24,\) there and \(48,\) here"):
        elsewhere.pretrain("demo", **{**tiny, "model.width": 48, "run.dir": str(run.run) + "2", "init.from": run.run})


@pytest.fixture
def mae_run(tiny_mae, some_digits):
    """A finished run of AdPE with relative positions, on 4×4 patches."""
    return elsewhere.pretrain("demo_adpe", some_digits, **tiny_mae)


def test_load_gives_the_encoder_of_a_masked_autoencoder(mae_run):
    encoder = elsewhere.load(mae_run.run)
    saved = inspect(mae_run.run / "checkpoints/step-00000006").tensors("method.encoder.")
    assert encoder.relative is not None
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, saved["method.encoder." + name]), name


@pytest.mark.parametrize("pixels", [8, 12])
def test_its_features_have_a_class_token_at_any_size(pixels, mae_run):
    """Relative tables know no size."""
    encoder = elsewhere.load(mae_run.run)
    images, side = torch.rand(2, 1, pixels, pixels), pixels // 2
    tokens = encoder.forward_features(images)
    assert tokens.shape == (2, 1 + side**2, 24)
    maps, classes = encoder.forward_intermediates(
        images, indices=1, norm=True, intermediates_only=True, return_prefix_tokens=True
    )[0]  # pyright: ignore[reportGeneralTypeIssues]
    assert maps.shape == (2, 24, side, side) and classes.shape == (2, 1, 24)
    assert torch.equal(torch.cat([classes, maps.flatten(2).transpose(1, 2)], dim=1), tokens)


def test_its_head_is_the_mean_of_patches_without_the_class_token(mae_run):
    encoder = elsewhere.load(mae_run.run)
    tokens = torch.rand(2, 17, 24)
    torch.testing.assert_close(encoder.forward_head(tokens), tokens[:, 1:].mean(dim=1))


def test_load_reads_a_released_adpe_checkpoint(tmp_path, tiny_mae):
    """`{model, optimizer, epoch, scaler, args}`, with args a pickled namespace."""
    config = load_config("demo_adpe", {**tiny_mae, "model.relative.lookup": "published"})
    method = build_method(config)
    path, recipe = tmp_path / "checkpoint-399.pth", tmp_path / "mine.yaml"
    released = {"model": to_released_mae(method, method.attack_tensors()), "optimizer": {}, "epoch": 399, "scaler": {}}
    torch.save({**released, "args": argparse.Namespace(model="mae_vit_base", lr=None, betas=(0.9, 0.95))}, path)
    recipe.write_text(config.to_yaml())
    encoder = elsewhere.load(path, recipe=str(recipe))
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, method.encoder.state_dict()[name]), name


class Harm:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_load_refuses_a_pickle_that_runs_code(tmp_path):
    path, harm = tmp_path / "checkpoint.pth", tmp_path / "harm"
    torch.save({"model": {}, "args": argparse.Namespace(hook=Harm(harm))}, path)
    with pytest.raises(UserError, match="cannot be read as weights") as caught:
        elsewhere.load(path, recipe="demo_adpe")
    assert "\n" not in str(caught.value) and not harm.exists()
