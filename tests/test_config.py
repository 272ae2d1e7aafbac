"""Recipes and overrides: inheritance, refusals that name the way out, and what the packaged recipes say."""

import ast
import re
from pathlib import Path

import pytest
import torch
import yaml

from elsewhere.launch import config as module
from elsewhere.launch.build import build_adversary, build_augment, build_masks, build_method, build_schedules
from elsewhere.launch.config import (
    RECIPES,
    TASKS,
    Config,
    differences,
    load_config,
    recipe_names,
    result_settings,
    setting_names,
)
from elsewhere.launch.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
NAMES = recipe_names()


def refusal(recipe, overrides=()):
    with pytest.raises(UserError) as caught:
        load_config(recipe, overrides)
    message = str(caught.value)
    assert "\n" not in message and message.endswith((".", "?", ")"))
    return message


@pytest.fixture
def write(tmp_path):
    """Write recipes by name; returns the path of the last."""

    def put(**recipes):
        for name, text in recipes.items():
            path = tmp_path / f"{name}.yaml"
            path.write_text(text)
        return str(path)

    return put


def test_a_recipe_inherits_from_a_packaged_one(write):
    config = load_config(write(mine="base: demo\noptim: {lr: 5e-3}"))
    assert (config.optim.lr, config.optim.batch_size) == (5e-3, load_config("demo").optim.batch_size)


def test_a_recipe_inherits_from_a_file_beside_it(write, monkeypatch):
    monkeypatch.chdir("/")
    config = load_config(write(parent="optim: {lr: 1, epochs: 7}", child="base: parent.yaml\noptim: {lr: 2}"))
    assert (config.optim.lr, config.optim.epochs) == (2, 7)


def test_of_several_bases_the_later_one_wins(write):
    one, two = "optim: {lr: 1, epochs: 7, eps: 1}", "optim: {lr: 2, epochs: 8}"
    config = load_config(write(one=one, two=two, mine="base: [one.yaml, two.yaml]\noptim: {lr: 3}"))
    assert (config.optim.lr, config.optim.epochs, config.optim.eps) == (3, 8, 1)


def test_a_grandparent_is_inherited(write):
    recipes = {"a": "seed: 5\noptim: {lr: 1}", "b": "base: a.yaml\noptim: {epochs: 9}", "c": "base: b.yaml"}
    config = load_config(write(**recipes))
    assert (config.seed, config.optim.lr, config.optim.epochs) == (5, 1, 9)


def test_two_bases_may_share_a_parent(write):
    recipes = {"a": "seed: 5", "b": "base: a.yaml", "c": "base: a.yaml", "d": "base: [b.yaml, c.yaml]"}
    assert load_config(write(**recipes)).seed == 5


def test_a_file_beside_comes_before_one_in_the_working_directory(write, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "parent.yaml").write_text("seed: 1")
    path = write(parent="seed: 2", child="base: parent.yaml")
    monkeypatch.chdir(tmp_path / "work")
    assert load_config(path).seed == 2


@pytest.mark.parametrize("loop", [{"a": "base: a.yaml"}, {"a": "base: b.yaml", "b": "base: [demo, a.yaml]"}], ids=len)
def test_a_loop_of_bases_is_refused(write, loop):
    assert "is its own base; take the loop of `base:` lines apart" in refusal(write(**loop))


def test_a_null_of_a_recipe_overrides_a_group_of_its_base(write):
    assert load_config(write(mine="base: stop_vit_h16\noptim: {freeze_lr: null}")).optim.freeze_lr is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\noptim: [1", "cannot be read: line 2, expected ',' or ']', but got '<stream end>'."),
        ("- 1\n- 2", "must hold `key: value` lines"),
        ("just words", "must hold `key: value` lines"),
        ("base: nowhere", "There is no recipe or file called nowhere"),
        ("base: nowhere.yaml", "There is no recipe or file called nowhere.yaml"),
        ("optim: {lrr: 1}", "There is no setting optim.lrr; did you mean optim.lr?"),
    ],
)
def test_a_broken_recipe_is_refused(write, text, words):
    assert words in refusal(write(mine=text))


def test_a_recipe_of_binary_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(str(tmp_path / "mine.yaml"))


def test_an_empty_recipe_is_the_defaults(write):
    path = write(mine="")
    assert load_config(path).to_dict() == {**Config().to_dict(), "run": {"dir": "runs/mine"}}


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("demos", "did you mean demo?"),
        ("stop_vit_b", "did you mean stop_vit_b16?"),
        ("ijepa-vit-l16", "did you mean ijepa_vit_l16?"),
        ("published_stop_vit_b16", "did you mean published/stop_vit_b16?"),
        ("qqq", "`elsewhere configs` lists them."),
        ("", "`elsewhere configs` lists them."),
        ("/tmp", "`elsewhere configs` lists them."),
    ],
)
def test_an_unknown_recipe_is_refused_with_the_nearest(wrong, right):
    assert refusal(wrong) == f"There is no recipe or file called {wrong}; {right}"


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("optim.lrr", "optim.lr"),
        ("optim.batchsize", "optim.batch_size"),
        ("optim.learning_rate", "optim.lr"),
        ("optim.wd", "optim.weight_decay"),
        ("optimizer", "optim"),
        ("metod", "method"),
        ("engine.precison", "engine.precision"),
        ("method.stop.st", "method.stop.std"),
        ("method.predictor.dept", "method.predictor.depth"),
        ("lr", "optim.lr"),
        ("epochs", "optim.epochs"),
        ("batch_sizes", "optim.batch_size"),
        ("optim.freeze_lr.epok", "optim.freeze_lr.epoch"),
        ("loader.on_error", "data.on_error"),
        ("data.channels", "model.channels"),
        ("mask.contextkeep", "mask.context_keep"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest(wrong, right):
    assert refusal("demo", [f"{wrong}=1"]).startswith(f"There is no setting {wrong}; did you mean {right}?")


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [("xyzzy", "`elsewhere show` lists them."), ("method.stop.xyzzy", "method.stop has where, std, covariance.")],
)
def test_an_unknown_setting_near_to_none_is_refused_with_the_list(wrong, hint):
    assert refusal("demo", [f"{wrong}=1"]) == f"There is no setting {wrong}; {hint}"


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("optim.kind=sgd", "optim.kind=sgd is not possible; choose 'adamw' or 'apex_adamw'."),
        ("method.stop.where=off", "choose 'none', 'targets', 'context' or 'both'."),
        ("engine.precision=16", "choose 'auto', 'float32', 'bfloat16' or 'float16'."),
        ("mask.setting=old", "choose 'recommended' or 'published'."),
        ("data.on_error=ignore", "choose 'stop' or 'skip'."),
        ("loader.workers=some", "loader.workers='some' is not possible: input should be a valid integer"),
        ("loader.workers=some", ", or 'auto'."),
    ],
)
def test_a_value_outside_a_choice_is_refused_with_the_choice(override, allowed):
    assert allowed in refusal("demo", [override])


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("optim.lr=fast", "should be a valid number"),
        ("optim.lr=-1", "greater than 0"),
        ("optim.lr=inf", "finite number"),
        ("optim.lr=nan", "finite number"),
        ("optim.epochs=1.5", "valid integer"),
        ("optim.epochs=0", "greater than or equal to 1"),
        ("data.flip=2", "less than or equal to 1"),
        ("model.image_size=[1,2,3]", "at most 2 items"),
        ("seed=-1", "greater than or equal to 0"),
        ("seed=4294967296", "less than 4294967296"),
        ("seed=null", "valid integer"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(override, reason):
    key = override.split("=")[0]
    message = refusal("demo", [override])
    assert message.startswith(f"{key}=") and reason in message


def test_a_group_is_not_a_value():
    assert refusal("demo", ["model=3"]) == "model is a group of settings; set one of them, e.g. model.size=…."


def test_further_complaints_are_counted():
    assert refusal("demo", ["optim.lr=-1", "model.size=x", "qqq=1"]).endswith("(2 more like it.)")


@pytest.mark.parametrize("override", ["optim.lr", "", "=", "=3"])
def test_an_override_without_key_or_value_is_refused(override):
    assert refusal("demo", [override]) == f"{override!r} is not an override; write key=value, e.g. optim.lr=1e-3."


def test_an_override_that_is_no_yaml_is_named():
    assert "The override optim.lr=[1 cannot be read" in refusal("demo", ["seed=1", "optim.lr=[1"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.lr=2e-3", "model.image_size=[8,16]"],
        ["optim={lr: 2e-3}", "model.image_size=[8, 16]"],
        {"optim.lr": 2e-3, "model.image_size": (8, 16)},
        {"optim__lr": 2e-3, "model__image_size": [8, 16]},
        {"optim": {"lr": 2e-3}, "model": {"image_size": [8, 16]}},
    ],
    ids=["dots", "braces", "dotted mapping", "underscores", "nested"],
)
def test_overrides_can_be_written_in_several_ways(overrides):
    expected = load_config("demo").to_dict()
    expected["optim"]["lr"], expected["model"]["image_size"] = 2e-3, [8, 16]
    assert load_config("demo", overrides).to_dict() == expected


def test_the_last_override_wins():
    assert load_config("demo", ["seed=1", "seed=2"]).seed == 2


def test_an_override_may_hold_an_equals_sign():
    assert load_config("demo", ["data.path=/a=b"]).data.path == "/a=b"


@pytest.mark.parametrize(
    ("given", "paths", "weights"),
    [
        ("/a", ["/a"], None),
        ("[/a,/b]", ["/a", "/b"], None),
        ("[{path: /a, weight: 3},/b]", ["/a", "/b"], [3.0, 1.0]),
        ("[{path: /a},{path: /b, weight: 0.5}]", ["/a", "/b"], [1.0, 0.5]),
        ("null", [], None),
    ],
)
def test_images_may_be_in_several_places(given, paths, weights):
    assert load_config("demo", [f"data.path={given}"]).data.places() == (paths, weights)


def test_weights_of_several_places_change_the_result():
    before, after, moved = (
        result_settings(load_config("demo", [f"data.path=[{{path: {a}, weight: {weight}}},/b]"]))
        for a, weight in (("/a", 2), ("/a", 3), ("/c", 2))
    )
    assert differences(before, after) == ["weights in data.path: [2.0, 1.0] -> [3.0, 1.0]"]
    assert before == moved


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.path=[{path: /a, weight: 0}]", r"data\.path\.0.*weight=0 is not possible: .*greater than 0"),
        ("data.path=[{paht: /a}]", r"There is no setting data\.path.*paht"),
        ("data.path=3", r"data\.path=3 is not possible"),
        ("data.source=ffvc", r"data\.source=ffvc is not possible; choose .*'ffcv'"),
    ],
)
def test_places_that_cannot_be(override, sentence):
    with pytest.raises(UserError, match=sentence):
        load_config("demo", [override])


def test_an_override_sets_a_group_that_the_recipe_leaves_out():
    freeze = load_config("demo", ["optim.freeze_lr.epoch=3"]).optim.freeze_lr
    assert freeze is not None and (freeze.epoch, freeze.strategy) == (3, "const")


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("1E-3", 1e-3), ("1.5e-3", 1.5e-3), ("1e3", 1e3), ("3", 3)]
)
def test_numbers_with_an_exponent_are_numbers(write, text, value):
    """YAML 1.1 reads 1e-3 as a word; here it is not one, in a recipe nor in an override."""
    assert load_config(write(mine=f"optim: {{lr: {text}}}")).optim.lr == value
    assert load_config("demo", [f"optim.lr={text}"]).optim.lr == value


@pytest.mark.parametrize(("given", "pair"), [("8", (8, 8)), ("[8,16]", (8, 16))])
def test_an_image_size_is_a_number_or_two(given, pair):
    assert load_config("demo", [f"model.image_size={given}"]).model.image_size == pair


def test_a_run_lives_in_a_folder_named_after_its_recipe(write):
    assert load_config("demo").run.dir == "runs/demo"
    assert load_config("published/stop_vit_b16").run.dir == "runs/published/stop_vit_b16"
    assert load_config(write(mine="base: demo")).run.dir == "runs/mine"
    assert load_config("demo", ["run.dir=/x"]).run.dir == "/x"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_shown_loads_back(name, tmp_path):
    config = load_config(name, ["seed=7"])
    path = tmp_path / "shown.yaml"
    path.write_text(config.to_yaml())
    assert load_config(str(path)) == config


@pytest.mark.parametrize(
    "override",
    [
        "seed=9", "model.size=tiny", "method.stop.std=0.1", "mask.target_blocks=2", "data.flip=0.1", "optim.lr=1",
        "init.from=x", "optim.freeze_lr.epoch=1", "data.holdout=0.2",
    ],
)  # fmt: skip
def test_settings_that_change_the_result(override):
    before, after = (result_settings(load_config("demo", o)) for o in ((), [override]))
    key = override.split("=")[0]
    changed = {line.split(":")[0] for line in differences(before, after)}
    assert key in changed and all(name.startswith(key.removesuffix(".epoch")) for name in changed)


@pytest.mark.parametrize(
    "override",
    [
        "loader.workers=3", "loader.micro_batch=2", "loader.prefetch=5", "loader.augment=device",
        "engine.precision=bfloat16", "run.dir=x", "kernels=reference",
        "checkpoint.every_steps=3", "monitor.log_every=1", "probe.every_epochs=1", "engine.device=cpu", "about=x",
        "data.path=/elsewhere", "data.val_path=/elsewhere", "data.on_error=skip", "data.source=shards",
    ],
)  # fmt: skip
def test_settings_that_do_not_change_the_result(override):
    config = load_config("demo", [override])
    assert config.to_dict() != load_config("demo").to_dict()
    assert result_settings(config) == result_settings(load_config("demo"))


def test_every_section_is_on_one_side():
    efficiency = {"about", "kernels", "engine", "loader", "checkpoint", "monitor", "probe", "run"}
    assert set(Config.model_fields) == efficiency | set(module.RESULT_SECTIONS)


def test_differences_are_listed_by_name():
    before, after = {"a.b": 1, "c": 2, "d": 3}, {"a.b": 1, "c": 4, "e": 5}
    assert differences(before, after) == ["c: 2 -> 4", "d: 3 -> None", "e: None -> 5"]


def test_result_settings_survive_json():
    """They are stored in a checkpoint's description and compared when it is read."""
    import json

    settings = result_settings(load_config("stop_vit_h16"))
    assert json.loads(json.dumps(settings)) == settings


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_builds(name):
    config = load_config(name)
    assert config.about and "\n" not in config.about
    with torch.device("meta"):
        method = build_method(config)
    build_augment(config)
    build_schedules(config, 10)
    masks = build_masks(config, method.encoder.grid)
    assert (build_adversary(config, method) is None) == (config.method.adversary.mode == "none")
    if masks is None:
        assert config.method.kind in TASKS
        return
    drawn = masks(0, 0, 0, torch.arange(2).numpy())
    patches = drawn.context if config.method.kind == "jepa" else drawn.visible
    assert patches.max() < method.encoder.grid[0] * method.encoder.grid[1]


def test_the_recipes_of_the_plan_are_there():
    sizes = ("b16", "l16", "h16", "h14")
    expected = {"demo"} | {f"{kind}_vit_{size}" for kind in ("stop", "ijepa") for size in sizes}
    expected |= {f"published/stop_vit_{size}" for size in ("b16", "l16", "h16")}
    assert expected <= set(NAMES)


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("ijepa_") or n.endswith("_ijepa")])
def test_ijepa_is_stop_without_noise(name):
    """Like for like: nothing but the noise may differ."""
    ijepa, stop = load_config(name).to_dict(), load_config(name.replace("ijepa", "stop")).to_dict()
    assert (ijepa["method"]["stop"].pop("where"), stop["method"]["stop"].pop("where")) == ("none", "targets")
    for config in (ijepa, stop):
        del config["about"], config["run"]
    assert ijepa == stop


PUBLISHED = {  # the released code's hyper-parameters; context_scale to crop_scale are those of all three
    "b16": {
        "model.size": "base", "method.predictor.depth": 6, "method.stop.std": 0.25, "optim.epochs": 600,
        "optim.lr": 8e-4, "optim.final_lr": 1e-4, "optim.warmup_epochs": 15, "optim.freeze_lr": None,
        "optim.freeze_weight_decay": None, "engine.precision": "float32",
    },
    "l16": {
        "model.size": "large", "method.predictor.depth": 12, "method.stop.std": 0.25, "optim.epochs": 600,
        "optim.lr": 8e-4, "optim.final_lr": 1e-4, "optim.warmup_epochs": 15, "optim.freeze_lr": None,
        "optim.freeze_weight_decay": None, "engine.precision": "float32",
    },
    "h16": {
        "model.size": "huge", "method.predictor.depth": 12, "method.stop.std": 0.2, "optim.epochs": 300,
        "optim.lr": 1e-3, "optim.final_lr": 1e-6, "optim.warmup_epochs": 40,
        "optim.freeze_lr": {"epoch": 250, "strategy": "const"},
        "optim.freeze_weight_decay": {"epoch": 250, "strategy": "const"}, "engine.precision": "float16",
    },
}  # fmt: skip
PUBLISHED_ALL = {
    "model.patch_size": 16, "model.image_size": [224, 224], "model.depth_scaled_init": False, "model.init_std": 0.02,
    "model.positions": "sincos", "model.width": None, "model.depth": None, "model.heads": None,
    "method.predictor.width": 384, "method.predictor.heads": None, "method.predictor.positions": "sincos",
    "method.stop.where": "targets", "method.stop.covariance": "tied", "method.mask_token": "projection_bias",
    "method.pairing": "published", "method.teacher.momentum": 0.996, "method.teacher.final_momentum": 1.0,
    "method.teacher.layers": 1, "mask.setting": "published", "mask.context_scale": [0.85, 1.0],
    "mask.context_blocks": 1, "mask.target_blocks": 4, "mask.target_scale": [0.15, 0.2],
    "mask.target_aspect": [0.75, 1.5], "mask.min_keep": 10, "data.crop_scale": [0.3, 1.0],
    "data.interpolation": "bilinear", "data.flip": 0.5, "data.blur": 0.5, "data.grayscale": 0.2,
    "data.colour_jitter": 0.0, "optim.kind": "adamw", "optim.batch_size": 2048, "optim.start_lr": 2e-4,
    "optim.weight_decay": 0.04, "optim.final_weight_decay": 0.4, "optim.betas": [0.9, 0.999], "optim.eps": 1e-8,
    "optim.clip_grad": 0.0, "optim.clip_scope": "encoder", "optim.stretch": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_recipes_hold_the_published_numbers(size):
    values = load_config(f"published/stop_vit_{size}").to_dict()
    for key, expected in {**PUBLISHED_ALL, **PUBLISHED[size]}.items():
        found = values
        for part in key.split("."):
            found = found[part]
        assert found == expected, key


def test_the_published_freeze_can_be_linear():
    config = load_config("published/stop_vit_h16", ["optim.freeze_lr.strategy=linear"])
    assert config.optim.freeze_lr.model_dump() == {"epoch": 250, "strategy": "linear"}


@pytest.mark.parametrize("size", PUBLISHED)
def test_recommended_recipes_differ_from_published_ones_where_it_is_decided(size):
    """The decisions for StoP, and nothing else that changes a result."""
    published, recommended = (result_settings(load_config(f"{p}stop_vit_{size}")) for p in ("published/", ""))
    changed = {line.split(":")[0] for line in differences(published, recommended)}
    assert changed == {
        "method.mask_token", "method.pairing", "mask.setting", "mask.context_keep", "model.depth_scaled_init",
        "optim.clip_scope", "data.remainder",
    }  # fmt: skip


def test_recipes_are_plain_yaml_with_a_line_about_them():
    for path in RECIPES.rglob("*.yaml"):
        values = yaml.safe_load(path.read_text())
        assert next(iter(values)) == "about", path
        assert len(values["about"]) <= 110, path


def test_messages_name_settings_that_exist():
    """Every `section.setting` in a sentence of the code is one; advice that is refused would be none."""
    known = set(setting_names()) | set(module.SHORT_NAMES)
    known |= {
        "model.safetensors",
        "model.safetensors.index.json",
        "method.fc_norm",
    }  # files, and a tensor of a checkpoint
    sections = [name for name in known if f"{name}." in " ".join(known)]
    pattern = re.compile(rf"(?<![\w./])(?:{'|'.join(sections)})(?:\.[a-z_]+)+(?![\w(/])")
    wrong = []
    for folder in ("launch", "models", "kernels", "data"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found = pattern.findall(node.value)
                    wrong += [f"{path.name}:{node.lineno} {name}" for name in found if name not in known]
    assert wrong == []


def test_a_stored_configuration_is_read_whatever_is_the_default_of_what_it_does_not_use():
    """Or a checkpoint could not be read once another method's default has changed."""
    values = load_config("demo").to_dict()
    values["method"]["segmenter"]["auxiliary"] = 0.123
    assert Config.stored(values).method.segmenter.auxiliary == 0.123
    with pytest.raises(ValueError, match=r"method\.segmenter\.auxiliary belongs to method.kind=segment"):
        Config.model_validate(values)
