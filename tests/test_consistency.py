"""What does not go together in the MAE family is refused by the command line in a sentence, or warned of."""

import json

import pytest

import elsewhere
from elsewhere.launch.banner import cautions
from elsewhere.launch.cli import main
from elsewhere.launch.config import load_config
from elsewhere.launch.errors import UserError

ALONE = {"method.adversary.mode": "none", "method.adversary.norm": "none", "method.adversary.epsilon": None,
         "method.adversary.base_lr": 1.5e-4}  # fmt: skip
ABSOLUTE = {"model.relative.terms": "none", "model.relative.lookup": "hard"}
EMBEDDING = {"method.adversary.mode": "embedding"}
UNBOUNDED = {"method.adversary.norm": "none", "method.adversary.epsilon": None}
MAE = {"method.kind": "mae", **ALONE, **ABSOLUTE}


def arguments(settings):
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


@pytest.fixture
def refused(tiny_mae, tmp_path, capsys):
    """The sentence that `elsewhere pretrain` ends with, status 2, before anything is trained."""

    def run(**settings):
        status = main(["pretrain", "demo_adpe", *arguments({**tiny_mae, **settings})])
        message = capsys.readouterr().err
        assert status == 2 and message.startswith("elsewhere: ") and message.count("\n") == 1
        assert not list((tmp_path / "run" / "checkpoints").glob("*"))
        return message.removeprefix("elsewhere: ").strip()

    return run


@pytest.fixture
def train(tiny_mae, some_digits):
    def run(settings):
        return elsewhere.pretrain("demo_adpe", some_digits, **{**tiny_mae, **settings})

    return run


def test_a_crop_that_the_patch_does_not_divide(refused):
    expected = "model.image_size 8x8 is not divisible by model.patch_size=3; use 9x9, or another patch."
    assert refused(**{"model.patch_size": 3}) == expected


@pytest.mark.parametrize(
    ("ratio", "sentence"),
    [
        (0.999, "mask.ratio=0.999 keeps none of the 16 patches; choose at most 0.937."),
        (0.0, "mask.ratio=0.0 masks none of the 16 patches; choose at least 0.063."),
    ],
)
def test_a_mask_that_keeps_none_or_all(ratio, sentence, refused):
    assert refused(**{"mask.ratio": ratio}) == sentence


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"method.adversary.norm": "none"},
            "method.adversary.epsilon=1 bounds nothing without a norm; set method.adversary.norm=l2 or linf, or "
            "epsilon=null.",
        ),
        (
            {"method.adversary.epsilon": None},
            "method.adversary.norm=l2 needs a bound; set method.adversary.epsilon, or norm=none.",
        ),
        (
            {"model.relative.lookup": "hard"},
            "method.adversary.mode=coordinate moves patches between buckets, which model.relative.lookup=hard cannot "
            "read; set model.relative.lookup=interpolated, or method.adversary.mode=none or embedding.",
        ),
        (
            {**EMBEDDING, **ABSOLUTE, **UNBOUNDED},
            "method.adversary.mode=embedding needs a bound, or it would only chase the mask token; set "
            "method.adversary.norm=l2 and method.adversary.epsilon.",
        ),
        (
            {**EMBEDDING, "model.relative.terms": "qv"},
            "method.adversary.mode=embedding acts on the term of keys, and model.relative.terms=qv; add k, or choose "
            "mode=coordinate.",
        ),
        (
            {"method.mask_token": "adversary"},
            "method.mask_token=adversary is the absolute embedding attack as released; set "
            "method.adversary.mode=embedding and model.relative.terms=none, or method.mask_token=learned.",
        ),
        (
            {"method.mask_token": "projection_bias"},
            "method.mask_token=projection_bias is not for method.kind=mae_plus; choose learned or adversary.",
        ),
    ],
)
def test_an_adversary_that_cannot_work(settings, sentence, refused):
    assert refused(**settings) == sentence


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {**MAE, "method.stop.std": 0.1},
            "method.stop.std belongs to method.kind=jepa, and this is mae; leave it out, or start from a recipe of "
            "mae.",
        ),
        (
            {**MAE, "model.relative.terms": "k"},
            "model.relative.terms belongs to method.kind=mae_plus, and this is mae; set model.relative.terms=none as "
            "well, or start from a recipe of mae.",
        ),
        (
            {"model.relative.mode": "bias", "model.relative.terms": "kv", **ALONE},
            "model.relative.mode=bias has no term on values (model.relative.terms=kv); take v out, or choose "
            "contextual.",
        ),
        (
            {"model.relative.method": "euclidean", **ALONE},
            "model.relative.lookup=interpolated reads between the buckets of a contextual product table; set "
            "model.relative.method=product and mode=contextual, or without a coordinate attack "
            "lookup=hard.",
        ),
        (
            {"model.patch_size": 1},
            "method.normalise_pixels divides by the deviation within a patch, and a patch of one number has none; set "
            "model.patch_size=2 or more, or method.normalise_pixels=false.",
        ),
        (
            {"optim.lr": 1e-3},
            "optim.lr and optim.base_lr (per 256 images) say the same thing twice; set the other to null.",
        ),
        (
            {"optim.base_lr": None, "optim.lr": None},
            "There is no learning rate; set optim.lr, or optim.base_lr per 256 images.",
        ),
    ],
)
def test_settings_that_do_not_go_together(settings, sentence, refused):
    assert refused(**settings) == sentence


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "model.relative.terms=k",
            "model.relative.terms belongs to method.kind=mae_plus, and this is jepa; set model.relative.terms=none as "
            "well, or start from a recipe of jepa.",
        ),
        (
            "data.views=2",
            "data.views belongs to method.kind=mae or mae_plus, and this is jepa; leave it out, or start from a recipe "
            "of jepa.",
        ),
        (
            "mask.ratio=0.5",
            "mask.ratio belongs to method.kind=mae or mae_plus, and this is jepa; leave it out, or start from a recipe "
            "of jepa.",
        ),
    ],
)
def test_what_jepa_does_not_use(override, sentence, capsys, tmp_path):
    assert main(["pretrain", "demo", override, f"run.dir={tmp_path}/run"]) == 2
    assert capsys.readouterr().err == f"elsewhere: {sentence}\n"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ABSOLUTE,
            "has relative positions on k and this recipe's encoder absolute positions alone; set model.relative.terms "
            "to match.",
        ),
        (
            {"model.relative.terms": "qk"},
            "has relative positions on k and this recipe's encoder relative positions on kq; set model.relative.terms "
            "to match.",
        ),
        (
            {"model.relative.shared": False},
            "does not fit this recipe's encoder: blocks.0.attn.relative_k.table is (1, 12, 50) there and (2, 12, 50) "
            "here; set model as it was trained.",
        ),
    ],
)
def test_a_start_from_other_positions(settings, words, train, refused, tmp_path):
    other = train({"run.dir": f"{tmp_path}/other"}).run
    assert refused(**{"init.from": str(other), **settings}) == f"init.from: {other} {words}"


def test_a_start_from_an_encoder_without_a_class_token(tiny, refused, tmp_path, some_digits):
    other = elsewhere.pretrain("demo", some_digits, **{**tiny, "run.dir": f"{tmp_path}/jepa"}).run
    assert refused(**{"init.from": str(other), **ALONE, **ABSOLUTE}) == (
        f"init.from: {other} has no class token and this recipe's encoder one; set method.kind to match."
    )


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({"model.relative.lookup": "published"}, "model.relative.lookup: interpolated -> published"),
        (
            {**ABSOLUTE, "method.adversary.epsilon": 2.0},
            "method.adversary.epsilon: 1.0 -> 2.0; model.relative.lookup: interpolated -> hard; "
            "model.relative.terms: k -> none",
        ),
        (
            ALONE,
            "method.adversary.base_lr: 0.002 -> 0.00015; method.adversary.epsilon: 1.0 -> None; "
            "method.adversary.mode: coordinate -> none; method.adversary.norm: l2 -> none",
        ),
    ],
)
def test_a_run_goes_on_with_the_positions_and_adversary_it_started_with(settings, changes, tiny_mae, capsys):
    started = {**tiny_mae, "optim.batch_size": 512, "data.views": 1}
    elsewhere.pretrain("demo_adpe", **started)
    capsys.readouterr()
    status = main(["pretrain", "demo_adpe", *arguments({**started, **settings})])
    # Other tensors cannot be taken up, so there the flag is not offered.
    same = "model.relative.terms" not in settings and "method.adversary.mode" not in settings
    way = "choose another run.dir, or pass --allow-config-change" if same else "or choose another run.dir"
    assert (status, capsys.readouterr().err) == (
        2,
        f"elsewhere: The run in {started['run.dir']} was started with other settings ({changes}): set them back, "
        f"{way}.\n",
    )


def test_another_adversary_is_no_change_that_can_be_allowed(tiny_mae, capsys):
    started = {**tiny_mae, "optim.batch_size": 512, "data.views": 1}
    elsewhere.pretrain("demo_adpe", **started)
    capsys.readouterr()
    assert main(["pretrain", "demo_adpe", *arguments({**started, **ALONE}), "--allow-config-change"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("elsewhere: ") and message.count("\n") == 1
    assert "the saved state holds an adversary and this run trains none" in message


FAR = {**UNBOUNDED, "method.adversary.base_lr": 20.0, "monitor.adversary_every": 1}


def said(capsys, words):
    return [line for line in capsys.readouterr().out.splitlines() if words in line]


@pytest.mark.parametrize("positions", [{}, ABSOLUTE], ids=["relative", "absolute"])
def test_a_shift_above_two_patches_is_warned_of_once(positions, train, capsys):
    train({**FAR, **positions})
    (line,) = said(capsys, "The adversary moves patches by ")
    assert line.endswith(
        " patches, more than 2: bound it with method.adversary.norm=l2 and method.adversary.epsilon=1, unless that is "
        "what you want."
    )
    assert float(line.split()[5]) > 2


@pytest.mark.parametrize(
    "settings",
    [
        {**FAR, "method.adversary.base_lr": 1e-3},
        {**FAR, "method.adversary.norm": "l2", "method.adversary.epsilon": 2.0},
        {**FAR, **EMBEDDING, "model.relative.lookup": "hard"},
    ],
    ids=["small", "bounded", "embedding"],
)
def test_other_attacks_are_not_warned_of(settings, train, capsys):
    train(settings)
    assert said(capsys, "The adversary moves patches by ") == []


NO_OP = "caution    this attack does nothing: softmax cancels one vector on a query's whole row; "
UNBOUND = "caution    the shift is unbounded (method.adversary.norm=none); a line here will say so above 2 patches"


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("published/adpe_rpe_embed_vit_b16", [NO_OP + "method.adversary.where=keys acts"]),
        ("published/adpe_rpe_coord_vit_b16", [UNBOUND]),
        ("published/adpe_ape_coord_vit_b16", [UNBOUND]),
        ("published/adpe_ape_embed_vit_b16", []),
        ("published/maeplus_rpe_vit_b16", []),
        ("adpe_rpe_embed_vit_b16", []),
        ("adpe_rpe_coord_vit_b16", []),
        ("demo", []),
    ],
)
def test_the_cautions_of_a_recipe(recipe, expected):
    assert cautions(load_config(recipe)) == expected


@pytest.mark.parametrize("change", ["method.adversary.where=keys", "method.adversary.per=bucket"])
def test_an_attack_that_acts_is_not_called_a_no_op(change):
    assert cautions(load_config("published/adpe_rpe_embed_vit_b16", [change])) == []


def test_the_banner_says_that_the_released_attack_does_nothing(train, capsys):
    train({**EMBEDDING, **UNBOUNDED, "model.relative.lookup": "hard", "method.adversary.where": "queries"})
    assert said(capsys, "caution ") == [NO_OP + "method.adversary.where=keys acts"]


def test_a_base_recipe_is_switched_off_by_name():
    config = load_config("demo_adpe", ["method.adversary.mode=none", "model.relative.terms=none"])
    assert config.method.adversary.epsilon == 1.0, "what only the attack used stays, and does nothing"


def test_relative_terms_may_be_named_in_any_order():
    assert load_config("demo_adpe", ["model.relative.terms=vkq"]).model.relative.terms == "qkv"


def test_the_method_is_changed_by_switching_off_what_it_has_not(capsys):
    assert main(["show", "demo_adpe", "method.kind=mae", "method.adversary.mode=none"]) == 2
    assert "set model.relative.terms=none as well" in capsys.readouterr().err
    switched = ["method.kind=mae", "method.adversary.mode=none", "model.relative.terms=none"]
    assert load_config("demo_adpe", switched).method.kind == "mae"


@pytest.mark.parametrize("setting", ["method.adversary.where=queries", "method.adversary.per=bucket"])
def test_what_a_coordinate_attack_does_not_use(setting):
    with pytest.raises(UserError, match="says how an embedding attacks relative positions"):
        load_config("demo_adpe", [setting])


def test_a_warm_up_longer_than_the_run_is_said():
    found = cautions(load_config("demo_adpe", ["optim.epochs=1"]))
    assert found == [
        "caution    optim.warmup_epochs=2 is longer than optim.epochs=1: the learning rate never reaches its peak"
    ]
