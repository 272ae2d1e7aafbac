"""The recipes of MAE, MAE+ and AdPE: every published number, what is recommended instead, and how a batch divides."""

from functools import cache

import pytest

from elsewhere.data.order import Plan
from elsewhere.launch.build import adversary_schedules, build_schedules
from elsewhere.launch.config import differences, load_config, recipe_names, result_settings

ATTACKS = ("adpe_ape_embed", "adpe_ape_coord", "adpe_rpe_embed", "adpe_rpe_coord")
PUBLISHED = [f"published/{name}_vit_b16" for name in (*ATTACKS, "maeplus_ape", "maeplus_rpe")]
RELATIVE = [name for name in PUBLISHED if "_rpe_" in name]
ADVERSARIAL = [name for name in PUBLISHED if "adpe" in name]
IMAGENET = 1_281_167  # images


@cache
def recipe(name, *overrides):
    return load_config(name, overrides)


@cache
def settings_of(name, *overrides):
    """The settings of a recipe, flat and by dotted name."""

    def flat(values, prefix=""):
        for key, value in values.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(flat(recipe(name, *overrides).to_dict()))


def assert_holds(name, expected):
    found = settings_of(name)
    assert {key: found[key] for key in expected} == expected


def test_the_recipes_of_the_plan_are_there():
    expected = {f"mae_vit_{size}" for size in ("b16", "l16", "h14")}
    expected |= {f"maeplus_{kind}_vit_{size}" for kind in ("ape", "rpe") for size in ("b16", "l16", "h14")}
    expected |= {f"{attack}_vit_b16" for attack in ATTACKS} | {f"adpe_rpe_coord_vit_{size}" for size in ("l16", "h14")}
    expected |= {f"cifar10_{name}" for name in (*ATTACKS, "maeplus_ape", "maeplus_rpe", "mae")}
    assert expected | set(PUBLISHED) | {"demo_adpe"} <= set(recipe_names())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_images_are_four_crops_of_112_pixels(name):
    assert_holds(name, {
        "data.views": 4, "model.image_size": [112, 112], "data.crop_scale": [0.08, 1.0], "data.flip": 0.5,
        "data.interpolation": "bicubic", "data.blur": 0.0, "data.grayscale": 0.0, "data.colour_jitter": 0.0,
    })  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_vit_b_16_with_a_decoder_of_8_by_512(name):
    assert_holds(name, {
        "method.kind": "mae_plus", "model.size": "base", "model.patch_size": 16, "model.positions": "sincos",
        "method.decoder.depth": 8, "method.decoder.width": 512, "method.decoder.heads": 16, "mask.ratio": 0.75,
        "method.normalise_pixels": True, "model.init": "xavier", "model.depth_scaled_init": False,
    })  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_runs_are_adamw_over_400_epochs(name):
    assert_holds(name, {
        "optim.kind": "adamw", "optim.betas": [0.9, 0.95], "optim.eps": 1e-8, "optim.weight_decay": 0.05,
        "optim.final_weight_decay": 0.05, "optim.base_lr": 1.5e-4, "optim.lr": None, "optim.start_lr": 0.0,
        "optim.final_lr": 0.0, "optim.epochs": 400, "optim.warmup_epochs": 20, "optim.batch_size": 4096,
        "optim.schedule": "mae_micro", "optim.decay_all": True, "optim.clip_grad": 0.0, "optim.stretch": 1.0,
        "engine.precision": "float16", "data.remainder": "drop",
    })  # fmt: skip


@pytest.mark.parametrize("name", RELATIVE)
def test_published_relative_positions(name):
    lookup = "published" if "coord" in name else "hard"
    assert_holds(name, {
        "model.relative.terms": "k", "model.relative.method": "product", "model.relative.mode": "contextual",
        "model.relative.shared": True, "model.relative.ratio": 1.9, "model.relative.lookup": lookup,
        "model.relative.scaled_queries": True,
    })  # fmt: skip


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "_ape_" in name])
def test_published_absolute_positions_have_no_relative_ones(name):
    assert_holds(name, {"model.relative.terms": "none"})


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_published_adversaries(name):
    """Unbounded by default; on relative positions the embedding is that of queries, on absolute ones the mask token."""
    mode = "embedding" if "embed" in name else "coordinate"
    assert_holds(name, {
        "method.adversary.mode": mode, "method.adversary.norm": "none", "method.adversary.epsilon": None,
        "method.adversary.base_lr": 1.5e-4, "method.adversary.schedule": "cosine", "method.adversary.per": "table",
        "method.adversary.where": "queries" if "rpe_embed" in name else "keys",
        "method.mask_token": "adversary" if "ape_embed" in name else "learned",
    })  # fmt: skip


@pytest.mark.parametrize("name", ["published/maeplus_ape_vit_b16", "published/maeplus_rpe_vit_b16"])
def test_published_mae_plus_has_no_adversary(name):
    assert_holds(name, {"method.adversary.mode": "none", "method.mask_token": "learned"})


@pytest.mark.parametrize("name", PUBLISHED)
def test_rates_grow_with_the_images_of_a_step_crops_not_counted(name):
    config = recipe(name)
    schedules = build_schedules(config, IMAGENET // 4096, 4)
    peaks = schedules.lr, adversary_schedules(config, schedules).lr
    assert peaks == pytest.approx((1.5e-4 * 16, 1.5e-4 * 16))


@pytest.mark.parametrize("name", PUBLISHED)
def test_1600_epochs_are_an_override(name):
    config = recipe(name, "optim.epochs=1600", "optim.warmup_epochs=40")
    schedules = build_schedules(config, 312, 1)
    rates = [schedules.lr_at(step) for step in (0, 20 * 312, 40 * 312, 820 * 312, 1600 * 312)]
    assert rates == pytest.approx([0.0, 1.2e-3, 2.4e-3, 1.2e-3, 0.0])
    changed = {line.split(":")[0] for line in differences(settings_of(name), settings_of(name, "optim.epochs=1600"))}
    assert changed == {"optim.epochs"}


@pytest.mark.parametrize(("ranks", "accumulation"), [(8, 4), (32, 1)])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_batch_is_four_micro_batches_on_one_machine_and_one_on_four(name, ranks, accumulation):
    config = recipe(name)
    micro, batch = config.loader.micro_batch, config.optim.batch_size
    plan = Plan(seed=0, global_batch=batch, micro_batch=micro, world=ranks, stop_step=1)
    assert (micro, plan.micros_per_step, len(plan)) == (128, accumulation, accumulation)


ALL_RECOMMEND = {"optim.schedule": "mae", "optim.decay_all": False, "data.remainder": "carry"}
BOUNDED = {"method.adversary.norm": "l2", "method.adversary.epsilon": 1.0}
RECOMMENDED = {  # in the place of what was published, and nothing else that changes a result
    "maeplus_ape": {},
    "maeplus_rpe": {},
    "adpe_ape_coord": BOUNDED,
    "adpe_ape_embed": {**BOUNDED, "method.mask_token": "learned"},
    "adpe_rpe_coord": {**BOUNDED, "model.relative.lookup": "interpolated"},
    "adpe_rpe_embed": {**BOUNDED, "method.adversary.where": "keys"},
}


@pytest.mark.parametrize("name", RECOMMENDED)
def test_recommended_recipes_differ_from_published_ones_where_it_is_decided(name):
    published, recommended = (result_settings(recipe(f"{p}{name}_vit_b16")) for p in ("published/", ""))
    changed = {key: value for key, value in recommended.items() if published[key] != value}
    assert changed == {**ALL_RECOMMEND, **RECOMMENDED[name]}


@pytest.mark.parametrize("kind", ["ape", "rpe"])
def test_mae_plus_is_adpe_without_its_adversary(kind):
    """Like for like: nothing but the attack, and the lookup that a coordinate attack needs, may differ."""
    names = {f"adpe_{kind}_{mode}": mode for mode in ("embed", "coord")}
    alone = result_settings(recipe(f"maeplus_{kind}_vit_b16"))
    for name, mode in names.items():
        found = differences(alone, result_settings(recipe(f"{name}_vit_b16")))
        changed = {line.split(":")[0] for line in found if not line.startswith("method.adversary.")}
        assert changed == ({"model.relative.lookup"} if (kind, mode) == ("rpe", "coord") else set())


@pytest.mark.parametrize(("size", "patch"), [("l16", 16), ("h14", 14)])
@pytest.mark.parametrize("name", ["mae", "maeplus_ape", "maeplus_rpe", "adpe_rpe_coord"])
def test_sizes_differ_from_vit_b_in_the_encoder_alone(name, size, patch):
    base, other = (result_settings(recipe(f"{name}_vit_{which}")) for which in ("b16", size))
    changed = {key: value for key, value in other.items() if base[key] != value}
    sizes = {"model.size": {"l16": "large", "h14": "huge"}[size], "model.patch_size": patch}
    assert changed == {key: value for key, value in sizes.items() if base[key] != value}


def test_mae_is_published_with_1600_epochs_of_whole_crops():
    assert_holds("mae_vit_b16", {
        "method.kind": "mae", "model.image_size": [224, 224], "data.views": 1, "data.crop_scale": [0.2, 1.0],
        "optim.epochs": 1600, "optim.warmup_epochs": 40, "optim.batch_size": 4096, "optim.base_lr": 1.5e-4,
        "optim.betas": [0.9, 0.95], "optim.weight_decay": 0.05, "mask.ratio": 0.75, "data.flip": 0.5,
        "method.decoder.depth": 8, "method.decoder.width": 512, "method.normalise_pixels": True,
    })  # fmt: skip
