"""The model card beside exported weights, as huggingface_hub reads it."""

import json
import re
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

import elsewhere
from elsewhere.launch.build import build_encoder
from elsewhere.launch.cli import main
from elsewhere.launch.config import Config
from elsewhere.models import zoo_published
from elsewhere.models.zoo_published import PUBLISHED


@pytest.fixture
def run(tiny, some_digits):
    """A finished run of StoP on images of one's own, with a probe in its results."""
    result = elsewhere.pretrain("demo", some_digits, **{**tiny, "optim.batch_size": 16})
    entry = {
        "probe": "knn", "protocol": {}, "encoder": "the teacher", "data": "digits", "val_data": "held-out digits",
        "train_images": 1438, "val_images": 359, "image_size": 8, "seed": 0,
        "figures": [{"setting": "k=20", "top1": 0.875, "interval": [0.837, 0.905]}],
        "best": [{"setting": "k=20", "top1": 0.875, "interval": [0.837, 0.905]}],
    }  # fmt: skip
    (result.run / "results.json").write_text(json.dumps({"steps": 6, "before": None, "after": None,
                                                         "evaluations": [entry]}))  # fmt: skip
    return result.run


def card_of(checkpoint, target, output, *flags):
    assert main(["export", str(checkpoint), "--to", target, "-o", str(output), *flags]) == 0
    return ModelCard.load(output / "README.md")


@pytest.fixture
def mae(tmp_path):
    """A file of an MAE encoder that describes itself."""
    model = {"width": 24, "depth": 1, "heads": 2, "patch_size": 4, "image_size": 16}
    config = Config.model_validate({"model": model, "method": {"kind": "mae"}})
    path = tmp_path / "weights.safetensors"
    described = {"elsewhere.part": "student", "elsewhere.config": config.model_dump_json(by_alias=True)}
    save_file(build_encoder(config).state_dict(), path, {**described, "elsewhere.step": "1234"})
    return path


def test_a_run_s_card_says_what_was_trained_and_measured(run, tmp_path):
    card = card_of(run, "timm", tmp_path / "out")
    assert card.data.library_name == "timm" and card.data.license == "other" and "stop" in card.data.tags
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 87.5, "held-out digits")
    assert "| knn, k=20 | held-out digits | 359 | 87.50 | 83.70 to 90.50 |" in card.text
    assert "StoP on images of one's own (96 images); 6 steps (1 epochs) of 16 images" in card.text
    assert "optim.batch_size: 16" in card.text and f"Trained with torch {torch.__version__}" in card.text


def test_a_card_names_no_path_of_the_machine_but_the_checkpoint_s_own(run, tmp_path):
    text = card_of(run, "timm", tmp_path / "out").text
    body = text.replace(str(run), "")
    assert str(tmp_path) not in body and "data.path" not in body and "run.dir" not in body


@pytest.mark.parametrize("target", ["timm", "hf", "detectron2", "mmseg", "vissl", "mae"])
def test_every_format_has_a_card_that_says_how_to_load_it(target, mae, tmp_path):
    card = card_of(mae, target, tmp_path / "out")
    assert card.data.license == "other" and card.data.pipeline_tag == "image-feature-extraction"
    assert "1,234 steps" in card.text and "None were measured" in card.text
    words = {"timm": "timm.create_model", "hf": "AutoModel.from_pretrained", "detectron2": "use_cls_token=True",
             "mmseg": "final_norm=True", "vissl": "PARAMS_FILE", "mae": "['model']"}  # fmt: skip
    assert words[target] in card.text


@pytest.mark.parametrize("target", ["timm", "hf"])
def test_the_code_of_a_card_runs(target, mae, tmp_path, close):
    """As it stands there, with the folder's name put in."""
    text = card_of(mae, target, tmp_path / "out").text
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    found: dict = {}
    exec(code.replace("FOLDER", str(tmp_path / "out")), found)
    close(found["tokens"], elsewhere.load(mae)(torch.zeros(1, 3, 16, 16)))


def test_a_published_checkpoint_keeps_its_licence_and_source(tmp_path, monkeypatch):
    entry = replace(PUBLISHED["mae_vit_b16"], name="mae_vit_t16", size="tiny", image_size=32)
    monkeypatch.setitem(zoo_published.PUBLISHED, "mae_vit_t16", entry)
    config = Config.model_validate({"model": {"size": "tiny", "image_size": 32}, "method": {"kind": "mae"}})
    encoder = build_encoder(config)
    table = torch.nn.functional.pad(encoder.positions.table, (0, 0, 1, 0))[None]
    torch.save({"model": {**encoder.state_dict(), "pos_embed": table}}, tmp_path / "mae.pth")
    card = card_of(f"zoo:mae_vit_t16={tmp_path}/mae.pth", "hf", tmp_path / "out")
    assert card.data.license == "cc-by-nc-4.0" and card.data.datasets == ["imagenet-1k"]
    assert "the published checkpoint mae_vit_t16 of https://github.com/facebookresearch/mae" in card.text


@pytest.mark.parametrize(
    ("started", "licence", "text"),
    [
        ("zoo:stop_vit_b16=gone.pth.tar", "cc-by-nc-4.0", "were trained from the published checkpoint stop_vit_b16"),
        ("zoo:maeplus_ape_vit_b16=gone.pth", "other", "under MIT for academic use"),
        ("timm:vit_base_patch16_224.mae", "other", "come from another project (timm:vit_base_patch16_224.mae)"),
        (None, "other", "The owner of these weights has to choose one"),
    ],
)
def test_the_licence_of_what_a_run_started_from_is_named(started, licence, text, mae, tmp_path):
    from safetensors import safe_open

    with safe_open(mae, "pt") as file:
        metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config = json.loads(metadata["elsewhere.config"])
    config["init"]["from"] = started
    save_file(state, mae, {**metadata, "elsewhere.config": json.dumps(config)})
    card = card_of(mae, "timm", tmp_path / "out")
    assert card.data.license == licence and text in card.text
