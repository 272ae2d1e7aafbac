"""`elsewhere tune`: its rules, what it leaves alone, and that a tuned recipe is shown, planned and trained."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from elsewhere.launch.cli import main
from elsewhere.launch.config import load_config, result_settings
from elsewhere.launch.errors import UserError
from elsewhere.launch.planning.plan import CIFAR10, IMAGENET
from elsewhere.launch.tuning import rules
from elsewhere.launch.tuning.tune import tune


@pytest.fixture
def folder(tmp_path):
    """96 RGB images of 40×48 pixels in two classes, and their pixels."""
    pixels = np.random.default_rng(0).integers(0, 200, (96, 40, 48, 3), dtype=np.uint8)
    pixels[..., 1] //= 3
    for i, image in enumerate(pixels):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "images", pixels


def kinds(tuned):
    return {one.key: one.kind for one in tuned.choices}


@pytest.mark.parametrize(
    "recipe",
    [
        "stop_vit_b16", pytest.param("adpe_rpe_coord_vit_b16", marks=pytest.mark.long),
        pytest.param("stop_vit_h16", marks=pytest.mark.long), pytest.param("mae_vit_l16", marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_a_recipe_for_its_own_images_stays_as_it_is(recipe):
    """On ImageNet and GPUs that hold the batch, tuning changes no result."""
    tuned = tune(recipe, gpus=64, images=IMAGENET)
    assert result_settings(tuned.config) == result_settings(load_config(recipe))


def test_of_cifar_recipes_cifar_is_what_they_were_made_for():
    tuned = tune("cifar10_mae", gpus=1, images=CIFAR10)
    assert result_settings(tuned.config) == result_settings(load_config("cifar10_mae"))


def test_a_smaller_batch_has_a_smaller_rate_and_a_slower_teacher():
    tuned = tune("stop_vit_b16", ["optim.batch_size=256"], gpus=1, images=IMAGENET).config
    assert (tuned.optim.lr, tuned.optim.start_lr, tuned.optim.final_lr) == (1e-4, 2.5e-5, 1.25e-5)
    # Eight such steps average as one of the recipe's.
    assert tuned.method.teacher.momentum**8 == pytest.approx(0.996, abs=1e-5)


def test_rates_per_256_images_scale_by_themselves():
    tuned = tune("cifar10_adpe_ape_coord", ["optim.batch_size=512"], gpus=1, images=CIFAR10)
    assert (tuned.config.optim.base_lr, tuned.config.method.adversary.base_lr) == (1e-3, 1e-3)
    assert tuned.config.optim.rate == pytest.approx(2e-3)


def test_what_is_set_stays_and_is_written_down():
    given = ["optim.epochs=77", "model.size=micro", "engine.kind=fsdp", "optim.clip_grad=1.0", "optim.lr=3e-4"]
    tuned = tune("cifar10_stop", given, gpus=2, images=5000)
    optim = tuned.config.optim
    assert (optim.epochs, tuned.config.model.size, optim.clip_grad, optim.lr) == (77, "micro", 1.0, 3e-4)
    assert all(kinds(tuned)[item.partition("=")[0]] == "given" for item in given)


def test_a_group_that_is_set_whole_counts_as_what_it_changes():
    tuned = tune("cifar10_stop", ["optim={batch_size: 128, clip_grad: 1.0}"], gpus=1, images=5_000)
    assert tuned.config.optim.batch_size == 128 and kinds(tuned)["optim.clip_grad"] == "given"
    assert kinds(tuned)["optim.epochs"] == "rule of thumb"


@pytest.mark.long
@pytest.mark.parametrize("name", ["stop_vit_h14", "ijepa_vit_l16", "mae_vit_b16", "adpe_rpe_coord_vit_l16"])
def test_every_pretraining_recipe_is_tuned_to_few_small_images(name):
    """Masks, patches and widths fit together, and what was chosen fits the GPU."""
    tuned = tune(name, gpus=2, gpu="a100-40g", images=3000, size=64)
    crop, patch = tuned.config.model.image_size[0], tuned.config.model.patch_size
    assert crop == (32 if tuned.config.data.views > 1 else 64) and crop % patch == 0
    assert tuned.plan["memory"]["total"] <= tuned.plan["gpu_memory"]
    assert tuned.config.optim.batch_size <= 3000 / 8


@pytest.mark.long
def test_freezing_keeps_its_part_of_the_run():
    tuned = tune("stop_vit_h16", gpus=8, images=IMAGENET // 4)
    optim = tuned.config.optim
    assert optim.freeze_lr.epoch / optim.epochs == pytest.approx(250 / 300, rel=0.01)


@pytest.mark.long
def test_memory_that_is_short_is_met_with_checkpointing_and_micro_batches():
    tuned = tune("stop_vit_h16", ["engine.kind=fsdp"], gpus=2, gpu="a10g-24g", images=IMAGENET)
    assert tuned.config.engine.activation_checkpointing != "none"
    assert tuned.plan["memory"]["total"] <= 24e9
    with pytest.raises(UserError, match="Not one image fits"):
        tune("stop_vit_h16", ["model.size=giant"], gpus=1, gpu="a10g-24g", images=IMAGENET)


def test_a_batch_that_is_set_is_cut_into_micro_batches_that_fit():
    tuned = tune("stop_vit_b16", ["optim.batch_size=4096"], gpus=1, gpu="a10g-24g", images=IMAGENET)
    micro = tuned.config.loader.micro_batch
    assert micro and 4096 % micro == 0 and kinds(tuned)["loader.micro_batch"] == "planned"
    assert tuned.plan["memory"]["total"] <= 24e9


@pytest.mark.parametrize(("size", "patch", "grid", "expected"), [
    (224, 16, 14, 16), (96, 16, 14, 6), (32, 16, 14, 2), (16, 16, 7, 2), (448, 16, 14, 16), (98, 16, 14, 7),
    (256, 14, 16, 16 // 2), (97, 16, 14, None), (13, 16, 14, 1),
])  # fmt: skip
def test_patches_divide_the_image_into_about_as_many(size, patch, grid, expected):
    assert rules.nearest_patch(size, patch, grid) == expected


def test_epochs_lie_between_as_many_and_as_many_images_seen():
    for images in (500, 50_000, 400_000, IMAGENET):
        found = [rules.epochs_for(images, 600, IMAGENET, length) for length in ("epochs", "between", "samples")]
        assert found[0] == 600 <= found[1] <= found[2]
        assert found[2] * images == pytest.approx(600 * IMAGENET, rel=0.05)
        assert found[1] ** 2 == pytest.approx(found[0] * found[2], rel=0.1)
    assert rules.epochs_for(14_000_000, 600, IMAGENET, "between") == 55


def test_the_batch_is_the_largest_within_its_bounds():
    rng = np.random.default_rng(1)
    for _ in range(500):
        published, images = int(2 ** rng.integers(6, 13)), int(10 ** rng.uniform(2, 7))
        gpus, fits = int(rng.integers(1, 40)), int(rng.integers(1, 3000))
        batch = rules.batch_for(published, images, gpus, fits)
        within = [n for n in (gpus * 2**k for k in range(20)) if n <= published and 8 * n <= images]
        within = [n for n in within if n <= gpus * fits or n <= 256]
        assert batch == max(within, default=None)


def test_a_teacher_forgets_within_a_tenth_of_the_steps_but_never_faster_than_the_recipes():
    for batch in (32, 256, 2048, 4096):
        for steps in (100, 3_000, 100_000):
            value = rules.teacher_momentum(0.996, batch, 2048, steps)
            assert value <= max(0.996, 1 - 10 / steps) + 1e-12
            assert value >= 0.996 or batch > 2048
    assert rules.teacher_momentum(0.996, 256, 2048, 10**6) == 0.996 ** (1 / 8)


def test_warmup_is_adams_where_the_share_is_less():
    assert rules.warmup_steps(100_000, 0.05, 0.999) == 5000
    assert rules.warmup_steps(20_000, 0.025, 0.999) == pytest.approx(2000)
    assert rules.warmup_steps(1_000, 0.025, 0.999) == pytest.approx(200)


def test_images_of_a_folder_are_counted_and_measured(folder):
    path, pixels = folder
    tuned = tune("stop_vit_b16", ["model.size=nano", "model.depth=2"], gpus=1, data=str(path))
    train = tuned.images
    assert 80 <= train < 96  # a tenth is held out
    values = pixels.reshape(-1, 3).astype(np.float64) / 255
    assert tuned.config.data.mean == pytest.approx(values.mean(0), abs=0.01)
    assert tuned.config.data.std == pytest.approx(values.std(0), abs=0.01)
    assert tuned.size == 40 and tuned.config.model.image_size == (40, 40)  # not enlarged to 224
    assert tuned.config.data.path == str(path)


@pytest.mark.parametrize("recipe", ["stop_vit_b16", pytest.param("adpe_rpe_coord_vit_b16", marks=pytest.mark.long)])
def test_a_tuned_recipe_is_shown_planned_and_trained(recipe, folder, tmp_path, capsys):
    path, mine = folder[0], tmp_path / "mine.yaml"
    command = ["tune", recipe, "model.size=nano", "--data", str(path), "--gpus", "1", "-o", str(mine)]
    assert main([*command, "--json", str(tmp_path / "t.json")]) == 0
    said = capsys.readouterr().out
    chosen = json.loads((tmp_path / "t.json").read_text())["choices"]
    assert all(one["key"] == "about" or one["rule"] in said for one in chosen)
    assert main(["show", str(mine)]) == 0
    assert main(["plan", str(mine), "--gpus", "1", "--gpu", "a100-40g"]) == 0
    small = ["engine.device=cpu", "loader.workers=0", "loader.micro_batch=null", "probe.before=false", "optim.steps=2",
             "probe.after=false", "monitor.tensorboard=false", "optim.warmup_steps=1"]  # fmt: skip
    capsys.readouterr()
    assert main(["pretrain", str(mine), f"run.dir={tmp_path / 'run'}", *small]) == 0
    assert "Finished: 2 steps" in capsys.readouterr().out


def test_the_file_says_what_was_tuned_with_a_rule_for_every_value(tmp_path):
    mine, given = tmp_path / "mine.yaml", ["optim.weight_decay=0.03"]
    assert (
        main(["tune", "cifar10_stop", *given, "--images", "4000", "--gpus", "3", "--size", "28", "-o", str(mine)]) == 0
    )
    tuned = tune("cifar10_stop", given, gpus=3, images=4000, size=28)
    assert result_settings(load_config(str(mine))) == result_settings(tuned.config)
    lines = mine.read_text().splitlines()
    for above, line in zip(["", *lines], lines, strict=False):
        text, _, beside = line.partition("#")
        if text.strip() and not text.rstrip().endswith(":") and not text.startswith(("base:", "about:")):
            assert beside or above.lstrip().startswith("#"), line


def test_a_recipe_of_ones_own_is_tuned_into_another_folder(tmp_path, monkeypatch):
    (tmp_path / "own.yaml").write_text("base: cifar10_mae\nmask: {ratio: 0.6}\n")
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["tune", "own.yaml", "--images", "9000", "--gpus", "1", "-o", "deep/mine.yaml"]) == 0
    assert load_config("deep/mine.yaml").mask.ratio == 0.6


def test_nothing_is_overwritten(tmp_path, capsys):
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: demo\n")
    assert main(["tune", "stop_vit_b16", "--images", "9000", "--gpus", "1", "-o", str(mine)]) == 2
    assert "not overwritten" in capsys.readouterr().err and mine.read_text() == "base: demo\n"


@pytest.mark.parametrize(("arguments", "words"), [
    (["stop_vit_b16"], "--images N, or --data PATH"),
    (["stop_vit_b16", "--images", "0"], "choose 1 or more"),
    (["stop_vit_b16", "--images", "100", "--gpus", "64"], "take fewer GPUs, or more images"),
    (["stop_vit_b16", "--images", "50000", "--size", "97"], "take --size 96 or 98"),
    (["stop_vit_b16", "--images", "50000", "--size", "1"], "choose 4 to 4096"),
    (["stop_vit_b16", "--images", "50000", "--size", "96", "model.patch_size=7"], "does not divide 96"),
    (["stop_vit_b16", "--images", "50000", "--gpu", "h1000"], "did you mean"),
    (["stop_vit_b16", "--images", "50000", "--gpus", "0"], "choose 1 or more"),
    (["cifar10_stop", "--images", "50000", "optim.batch_size=100", "--gpus", "3"], "3 GPUs do not divide it"),
    (["stop_vit_b16", "--images", "50000", "optim.steps=100"], "leave optim.steps out"),
    (["published/stop_vit_b16", "--images", "50000"], "tune stop_vit_b16"),
    (["finetune", "--images", "50000"], "is for pre-training"),
    (["stop_vit_b16", "--data", "/nowhere"], "/nowhere"),
    (["stop_vit_b16", "--images", "5000", "-o", "mine.txt"], "let it end in .yaml"),
    (["stop_vit_b61", "--images", "5000"], "did you mean stop_vit_b16?"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_a_sentence(arguments, words, capsys):
    more = [] if "--gpus" in arguments else ["--gpus", "1"]
    assert main(["tune", *arguments, *more]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and "Traceback" not in err


def test_momentum_is_written_with_digits_enough():
    """1 - m has three significant digits, however near to one it is."""
    tuned = tune("stop_vit_b16", ["optim.batch_size=8"], gpus=1, images=IMAGENET)
    exact = 0.996 ** (8 / 2048)
    assert 1 - tuned.config.method.teacher.momentum == pytest.approx(1 - exact, rel=0.005)
    assert math.isclose(exact, 0.9999843438, abs_tol=1e-9)


def test_a_tuned_recipe_is_not_tuned_again_and_one_of_ones_own_is_understood_by_its_base(tmp_path, capsys):
    tuned, own = tmp_path / "tuned.yaml", tmp_path / "own.yaml"
    tuned.write_text("# elsewhere tune cifar10_stop --images 3000 --gpus 1\nbase: cifar10_stop\n")
    assert main(["tune", str(tuned), "--images", "3000", "--gpus", "4"]) == 2
    assert "was written by `elsewhere tune`: tune cifar10_stop again instead." in capsys.readouterr().err
    own.write_text("base: cifar10_stop")
    found = tune(str(own), gpus=1, images=50_000)
    assert found.config.optim.epochs == load_config("cifar10_stop").optim.epochs
