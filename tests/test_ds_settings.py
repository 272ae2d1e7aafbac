"""DeepSpeed settings: completed from the recipe, accepted by DeepSpeed, and refused where they say something else."""

import json
import subprocess
import sys

import pytest

from elsewhere.launch.engine import ds_settings
from elsewhere.launch.engine.ds_settings import check_recipe, load_settings, offloads_optimizer, stage
from elsewhere.launch.errors import UserError

RECIPE = {"batch_size": 64, "micro_batch": 16, "accumulation": 4, "clip_grad": 3.0, "world": 1}
NAMES = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")


@pytest.fixture(scope="module")
def deepspeed_config():
    """DeepSpeed's own reading of settings; the import takes seconds."""
    config = pytest.importorskip("deepspeed.runtime.config")
    return config.DeepSpeedConfig


@pytest.fixture
def write(tmp_path):
    def to_file(content):
        path = tmp_path / "mine.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return to_file


def refusal(name, **more):
    with pytest.raises(UserError) as error:
        load_settings(name, **{**RECIPE, **more})
    return str(error.value)


def test_packaged_names():
    assert tuple(ds_settings.names()) == NAMES


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_reads_the_packaged_settings_as_the_recipe_says(name, device_type, deepspeed_config):
    settings = load_settings(name, **RECIPE, device_type=device_type)
    config = deepspeed_config(settings)
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu) == (64, 16)
    assert (config.gradient_accumulation_steps, config.gradient_clipping) == (4, 3.0)
    assert settings["fp16"] == settings["bf16"] == {"enabled": False}
    assert config.zero_allow_untested_optimizer
    zero = config.zero_config
    assert zero.stage == int(name[4]) == stage(settings)
    assert (zero.offload_optimizer is not None) == name.endswith("offload") == offloads_optimizer(settings)
    assert (zero.offload_param is not None) == (name == "zero3_offload")
    assert zero.stage < 3 or not zero.memory_efficient_linear
    for offload in (zero.offload_optimizer, zero.offload_param):
        assert offload is None or (offload.device, offload.pin_memory) == ("cpu", device_type == "cuda")


@pytest.mark.parametrize("name", NAMES)
def test_packaged_files_are_what_deepspeed_takes_but_for_auto(name, deepspeed_config):
    """A user of DeepSpeed can copy them."""
    given = json.loads((ds_settings.PACKAGED / f"{name}.json").read_text())
    numbers = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1}
    config = deepspeed_config(given | numbers | {"gradient_clipping": 0.5})
    zero = config.zero_config.model_dump(by_alias=True, exclude_unset=True)
    for key, value in given["zero_optimization"].items():
        assert (key in zero) and (isinstance(value, dict) or zero[key] == value)


def test_zero_options_are_deepspeeds(deepspeed_config):
    from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    def options(*models):
        return {field.alias or name for model in models for name, field in model.model_fields.items()}

    offload = options(DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig)
    assert options(DeepSpeedZeroConfig) >= ds_settings._ZERO | ds_settings._ZERO_AT.keys()
    assert not _REMOVED_ZERO_CONFIG_KEYS.keys() & ds_settings._ZERO
    assert offload >= ds_settings._OFFLOAD | ds_settings._OFFLOAD_AT.keys()


def test_clipping_off_is_written_out(write):
    """DeepSpeed would clip at 1.0 where nothing is said."""
    assert load_settings(write({}), **{**RECIPE, "clip_grad": 0.0})["gradient_clipping"] == 0.0


def test_numbers_that_agree_with_the_recipe_are_taken(write):
    own = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 4,
           "gradient_clipping": 3}  # fmt: skip
    settings = load_settings(write(own), **RECIPE)
    assert {key: settings[key] for key in own} == own


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("train_batch_size", 32, "optim.batch_size=64"),
        ("train_micro_batch_size_per_gpu", 8, "loader.micro_batch=16"),
        ("gradient_accumulation_steps", 2, "4 micro-batches"),
        ("gradient_clipping", 1.0, "optim.clip_grad=3"),
        ("fp16", {"enabled": True}, "engine.precision"),
        ("bf16", {"enabled": True}, "engine.precision"),
        ("bfloat16", {"enabled": True}, "engine.precision"),
        ("amp", {"enabled": True, "opt_level": "O1"}, "engine.precision"),
        ("torch_autocast", {"enabled": True, "dtype": "bfloat16"}, "engine.precision"),
        ("optimizer", {"type": "AdamW"}, "optim.kind"),
        ("scheduler", {"type": "WarmupLR"}, "optim.schedule"),
        ("activation_checkpointing", {"partition_activations": True}, "engine.activation_checkpointing"),
        ("compile", {"deepcompile": True}, "engine.compile"),
        ("checkpoint", {"load_universal": True}, "checkpoint.load_universal"),
        ("data_efficiency", {"enabled": True}, "data_efficiency"),
        ("curriculum_learning", {"enabled": True}, "curriculum_learning"),
        ("compression_training", {"weight_quantization": {}}, "compression_training"),
        ("tensor_parallel", {"autotp_size": 2}, "tensor_parallel"),
        ("pipeline", {"stages": 2}, "pipeline"),
        ("prescale_gradients", True, "gradients are summed"),
        ("communication_data_type", "fp16", "gradients are summed"),
        ("gradient_predivide_factor", 2.0, "gradients are summed"),
        ("gradient_allreduce_op", "sum", "gradients are summed"),
        ("zero_allow_untested_optimizer", False, "leave it out"),
        ("gradient_cliping", 1.0, "did you mean gradient_clipping?"),
        ("zero_optimization", True, "group of settings"),
    ],
)
def test_what_contradicts_the_recipe_is_refused(write, key, value, says):
    message = refusal(write({key: value}))
    assert key in message and says in message


def test_true_is_not_one(write):
    path = write({"gradient_accumulation_steps": True})
    assert "1 micro-batches" in refusal(path, batch_size=16, accumulation=1)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"stage": 4}, "choose 0, 1, 2 or 3"),
        ({"stage": True}, "choose 0, 1, 2 or 3"),
        ({"stage": "auto"}, "choose 0, 1, 2 or 3"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "needs stage 3"),
        ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, "needs stage 1"),
        ({"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/"}}, "never tried"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}}, "needs a GPU"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "offload_optimizer.ratio"),
        ({"stage": 3, "memory_efficient_linear": True}, "engine.activation_checkpointing=selective"),
        ({"stage": 3, "zero_quantized_weights": True}, "changes the result"),
        ({"stage": 3, "zero_quantized_gradients": True}, "changes the result"),
        ({"stage": 3, "zero_hpz_partition_size": 8}, "zero_hpz_partition_size"),
        ({"stage": 3, "mics_shard_size": 8}, "not known"),
        ({"stage": 2, "overlap_com": True}, "did you mean overlap_comm?"),
        ({"stage": 2, "cpu_offload": True}, "cpu_offload"),
        ({"stage": 2, "offload_optimizer": "cpu"}, "group of settings"),
    ],
)
def test_zero_options_that_cannot_be_served_are_refused(write, section, says):
    assert says in refusal(write({"zero_optimization": section}))


def test_sections_that_are_switched_off_or_auto_are_no_contradiction(write, deepspeed_config):
    own = {
        "fp16": {"enabled": False}, "bf16": {"enabled": "auto"}, "amp": {"enabled": False},
        "torch_autocast": {"enabled": False}, "curriculum_learning": {"enabled": False},
        "communication_data_type": "fp32", "prescale_gradients": False, "steps_per_print": "auto",
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "offload_param": {"device": "none"},
                              "zero_quantized_gradients": False},
    }  # fmt: skip
    settings = load_settings(write(own), **RECIPE)
    assert "auto" not in json.dumps(settings)
    config = deepspeed_config(settings)
    assert config.zero_config.stage == 3 and config.zero_config.offload_param is None


def test_what_prints_and_profiles_is_passed_on(write, deepspeed_config):
    own = {"wall_clock_breakdown": True, "steps_per_print": 7, "comms_logger": {"enabled": True},
           "flops_profiler": {"enabled": True}, "tensorboard": {"enabled": False, "output_path": "there"},
           "checkpoint": {"tag_validation": "Ignore"}}  # fmt: skip
    settings = load_settings(write(own), **RECIPE)
    assert {key: settings[key] for key in own} == own
    assert deepspeed_config(settings).steps_per_print == 7


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{\n  "zero_optimization": {\n    "stage": 2,\n  }\n}', "line 4"),
        ("stage: 2", "line 1"),
        ('{\n// why\n"a": 1}', "line 2"),
        ("[1]", "line 1"),
        (
            '{"zero_optimization": {"stage": 1,\n "overlap_comm": true,\n "stage": 2}}',
            "line 3, sets stage a second time",
        ),
        ('{"gradient_clipping": "auto",\n"gradient_clipping": 1}', "line 2, sets gradient_clipping a second time"),
    ],
)
def test_a_file_that_cannot_be_meant_is_named_with_its_line(write, text, line):
    path = write(text)
    assert f"{path}, {line}" in refusal(path)


def test_one_name_in_two_sections_is_no_repetition(write):
    own = {"wall_clock_breakdown": False, "tensorboard": {"enabled": False}, "comms_logger": {"enabled": False}}
    assert load_settings(write(own), **RECIPE)["comms_logger"] == {"enabled": False}


def test_misspelt_names_and_missing_files_are_refused_with_what_there_is():
    assert "did you mean zero2?" in (message := refusal("zero_2")) and all(name in message for name in NAMES)
    assert "check the path" in refusal("nowhere.json")
    assert "leave .json out" in refusal("zero2.json")


FITS = {"optimizer_kind": "adamw", "clip_grad": 0.0, "clip_scope": "all", "precision": "float32", "compile": False}


@pytest.mark.parametrize(
    ("name", "recipe", "says"),
    [
        ("zero0", {"precision": "float16"}, "engine.deepspeed=zero1"),
        ("zero2_offload", {"optimizer_kind": "apex_adamw"}, "optim.kind=adamw"),
        ("zero2", {"clip_grad": 1.0, "clip_scope": "encoder"}, "optim.clip_scope=all"),
        ("zero3", {"compile": True}, "engine.compile=false"),
    ],
)
def test_recipes_that_a_setting_cannot_serve_are_refused(name, recipe, says):
    with pytest.raises(UserError, match=says):
        check_recipe(load_settings(name, **RECIPE), **{**FITS, **recipe})


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        *((name, {}) for name in NAMES),
        ("zero0", {"precision": "bfloat16"}),
        ("zero1", {"precision": "float16"}),
        ("zero2", {"optimizer_kind": "apex_adamw"}),
        ("zero2", {"clip_scope": "encoder"}),
        ("zero2", {"clip_grad": 1.0}),
        ("zero2", {"compile": True}),
    ],
)
def test_other_recipes_are_served(name, recipe):
    check_recipe(load_settings(name, **RECIPE), **{**FITS, **recipe})


def test_settings_are_read_without_deepspeed():
    """Its import takes seconds, and a recipe is checked before anything else."""
    code = "import sys, elsewhere.launch.engine.ds_settings; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
