"""`elsewhere reproduce` on a stand-in for a published checkpoint: its format, another size, a small set."""

import json

import pytest
import torch

from elsewhere.launch.build import build_method
from elsewhere.launch.cli import main
from elsewhere.launch.config import load_config
from elsewhere.launch.evaluate.published import PROTOCOLS, PUBLISHED
from elsewhere.tests.conftest import command_line

MODEL = {
    "model.size": "tiny", "model.patch_size": 2, "model.image_size": 8,
}  # fmt: skip
ON = {"engine.device": "cpu", "loader.workers": 0}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A file of the released StoP's kind, of random weights."""
    torch.manual_seed(0)
    method = build_method(load_config("published/stop_vit_b16", {**MODEL, "model.init_std": 0.1}))
    table = method.encoder.positions()[None]

    def part(module):
        return {f"module.{name}": tensor for name, tensor in {**module.state_dict(), "pos_embed": table}.items()}

    state = {"encoder": part(method.encoder), "target_encoder": part(method.teacher), "predictor": {}, "epoch": 600}
    path = tmp_path_factory.mktemp("released") / "stop.pth.tar"
    torch.save(state, path)
    return path


def reproduce(name, weights, folder, *flags, **settings):
    values = command_line({**ON, **MODEL, **settings})
    return main(
        ["reproduce", name, "--weights", str(weights), "--imagenet", "digits", "-o", str(folder), *flags, *values]
    )


def test_every_published_figure_names_recipes_that_are_there():
    for name, published in PUBLISHED.items():
        config = load_config(published.recipe)
        assert set(published.figures) <= set(PROTOCOLS) and published.figures
        assert ("finetune" in published.figures) == (published.finetune is not None)
        if published.finetune:
            tuned = load_config(published.finetune)
            assert tuned.method.kind == "classify" and tuned.model.size == config.model.size
            assert (tuned.model.relative.terms, tuned.model.patch_size) == (config.model.relative.terms, 16), name


@pytest.mark.long
def test_the_frozen_protocols_are_the_probes_own_figures(released, tmp_path, capsys):
    assert reproduce("stop_vit_b16", released, tmp_path / "out", "--cached") == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    rows = {row["measured"]: row for row in json.loads((tmp_path / "out" / "reproduce.json").read_text())["rows"]}
    assert [rows[name]["published"] for name in ("1%", "linear", "linear-last4")] == [60.3, 72.6, 74.5]
    assert "drawn at random; the published figure is of one list" in said and "(--cached)" in said
    probe = ["probe", str(released), "--kind", "linear,low-shot", "data.path=digits", "-o", str(tmp_path / "probe")]
    assert main([*probe, *command_line({**ON, "model.image_size": 8})]) == 0
    entries = json.loads((tmp_path / "probe" / "results.json").read_text())["evaluations"]
    best = {entry["probe"]: entry["best"] for entry in entries}
    assert rows["1%"]["top1"] == best["low-shot"][0]["top1"]
    assert {rows["linear"]["top1"], rows["linear-last4"]["top1"]} <= {row["top1"] for row in best["linear"]}
    assert rows["linear"]["top1"] > 0.2, "twice what chance gives"


@pytest.mark.long
def test_fine_tuning_is_a_run_of_the_published_recipe(released, tmp_path):
    settings = {
        "optim.steps": 3, "optim.batch_size": 32, "monitor.tensorboard": False, "data.rand_augment": None,
        "model.channels": 3,
    }  # fmt: skip
    name = "maeplus_ape_vit_b16"  # of whose kind is a run of ours, too
    from elsewhere.launch.pretrain import pretrain

    mae = pretrain(
        name,
        **{**MODEL, "optim.steps": 1, "optim.batch_size": 32, "data.path": "digits", "data.views": 1,
           "method.decoder.width": 16, "method.decoder.depth": 1, "method.decoder.heads": 2, "loader.workers": 0,
           "monitor.tensorboard": False, "probe.before": False, "probe.after": False,
           "run.dir": str(tmp_path / "mae")},
    ).run  # fmt: skip
    assert reproduce(name, mae, tmp_path / "out", **{**settings}) == 0
    (row,) = json.loads((tmp_path / "out" / "reproduce.json").read_text())["rows"]
    results = json.loads((tmp_path / "out" / "finetune" / "results.json").read_text())
    assert row["top1"] == results["after"]["top1"] and row["published"] == 83.9 and row["images"] == 359
    assert row["protocol"]["recipe"] == "published/finetune_ape_vit_b16"


@pytest.mark.parametrize(
    ("name", "flags", "settings", "message"),
    [
        ("stop_vit_b17", (), {}, "did you mean stop_vit_b16?"),
        ("stop_vit_b16", ("--only", "knn"), {}, "choose of 1%, linear, linear-last4, finetune"),
        ("stop_vit_b16", ("--only", "finetune"), {}, "no protocol is known"),
        ("stop_vit_b16", (), {"optim.epochs": 3}, "optim.epochs=3 is a setting of fine-tuning"),
        ("stop_vit_b16", (), {"model.depth": 3}, "is not stop_vit_b16: its depth is 12, and that of stop_vit_b16 3"),
        ("adpe_rpe_coord_vit_b16", (), {}, "its relative positions is none, and that of adpe_rpe_coord_vit_b16 k"),
    ],
)
def test_what_cannot_be_reproduced_is_one_sentence(name, flags, settings, message, released, tmp_path, capsys):
    assert reproduce(name, released, tmp_path / "out", *flags, **settings) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1
