"""Encoders in the files of other projects: their own models give the same tokens, or names, shapes and values agree."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.data import resolve_model_data_config

import elsewhere
from elsewhere.launch.build import build_encoder, build_method
from elsewhere.launch.cli import main
from elsewhere.launch.config import Config
from elsewhere.models.zoo import from_released

ROOT = Path(__file__).resolve().parent.parent
KINDS = {
    "stop": {"method": {"kind": "jepa"}},
    "mae": {"method": {"kind": "mae"}},
    "learned": {"method": {"kind": "mae"}, "model": {"positions": "learned"}},
    "oblong": {"method": {"kind": "jepa"}, "model": {"image_size": (16, 24), "channels": 1}},
}
RELATIVE = {"method": {"kind": "mae_plus"}, "model": {"relative": {"terms": "qkv"}}}


@pytest.fixture
def weights(tmp_path):
    """Writes a random encoder with its description; gives the encoder and the file."""

    def make(method, model=None, data=None):
        torch.manual_seed(0)
        model = {"width": 24, "depth": 2, "heads": 2, "patch_size": 4, "image_size": 16, "mlp_ratio": 4.0} | (
            model or {}
        )
        config = Config.model_validate({"model": model, "method": method, "data": data or {}})
        encoder = build_encoder(config)
        for parameter in encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        path = tmp_path / "weights.safetensors"
        part = "teacher" if method["kind"] == "jepa" else "student"
        described = config.model_dump_json(by_alias=True)
        save_file(encoder.state_dict(), path, {"elsewhere.part": part, "elsewhere.config": described})
        return encoder.eval(), path

    return make


def images(encoder):
    return torch.randn(2, encoder.channels, *encoder.image_size)


def export(path, target, output, *flags):
    return main(["export", str(path), "--to", target, "-o", str(output), *flags])


@pytest.mark.parametrize("kind", KINDS)
def test_timm_loads_the_folder_and_gives_the_same_tokens(kind, weights, tmp_path, close):
    encoder, path = weights(**KINDS[kind])
    assert export(path, "timm", tmp_path / "out") == 0
    model = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True).eval()
    pixels = images(encoder)
    close(model.forward_features(pixels), encoder(pixels))
    if not encoder.num_prefix_tokens:
        close(model(pixels), encoder.forward_head(encoder(pixels)))


def test_timm_s_transform_has_the_pixel_statistics(weights, tmp_path):
    _, path = weights({"kind": "mae"}, data={"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]})
    export(path, "timm", tmp_path / "out")
    found = resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True))
    assert [list(found[name]) for name in ("mean", "std", "input_size")] == [
        [0.1, 0.2, 0.3],
        [0.4, 0.5, 0.6],
        [3, 16, 16],
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_the_folder_and_gives_the_same_tokens(kind, weights, tmp_path, close):
    from transformers import AutoImageProcessor, AutoModel

    encoder, path = weights(**KINDS[kind])
    assert export(path, "hf", tmp_path / "out") == 0
    model, told = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {name for name in told["missing_keys"] if "pooler" not in name} == set()
    assert not told["unexpected_keys"] and not told["mismatched_keys"]
    pixels = images(encoder)
    close(model.eval()(pixel_values=pixels).last_hidden_state, encoder(pixels))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert list(processor.image_mean) == elsewhere.load(path).pixel_mean


@pytest.mark.long
def test_exports_and_transformers_work_from_the_checkout(weights, tmp_path, close):
    """There, a package called `kernels` is on the path: ours, which transformers must not take for the hub's."""
    encoder, path = weights({"kind": "jepa"})
    command = [sys.executable, "-m", "elsewhere.launch", "export", str(path), "--to", "hf", "-o", f"{tmp_path}/out"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    code = (
        "import torch; from transformers import AutoModel; "
        f"model = AutoModel.from_pretrained('{tmp_path}/out').eval(); "
        f"torch.save(model(torch.ones(1, 3, 16, 16)).last_hidden_state.detach(), '{tmp_path}/tokens.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    close(torch.load(tmp_path / "tokens.pt"), encoder(torch.ones(1, 3, 16, 16)))


@pytest.mark.parametrize(
    ("kind", "target"),
    [(kind, target) for target in ("timm", "hf", "mmseg", "vissl") for kind in KINDS]
    + [("stop", "ijepa"), ("oblong", "ijepa"), ("mae", "mae"), ("learned", "mae")],
)
def test_what_was_exported_is_read_back(kind, target, weights, tmp_path, close):
    encoder, path = weights(**KINDS[kind])
    assert export(path, target, tmp_path / "out") == 0
    written = tmp_path / "out"
    if target not in ("timm", "hf"):
        (written,) = (file for file in written.iterdir() if file.name != "README.md")
    pixels = images(encoder)
    close(elsewhere.load(written)(pixels), encoder(pixels))


def test_relative_positions_go_to_the_released_adpe_s_names(weights, tmp_path, close):
    encoder, path = weights(**RELATIVE)
    assert export(path, "mae", tmp_path / "encoder.pth") == 0
    state = torch.load(tmp_path / "encoder.pth", weights_only=True)["model"]
    assert state["blocks.1.attn.rpe_k.lookup_table_weight"].shape == (1, 12, 50)
    assert state["blocks.1.attn.rpe_v.lookup_table_weight"].shape == (1, 50, 12)
    assert state["pos_embed"].shape == (1, 17, 24) and not state["pos_embed"][0, 0].any()
    pixels = images(encoder)
    close(elsewhere.load(tmp_path / "encoder.pth")(pixels), encoder(pixels))


@pytest.mark.golden("B[12]_*_strong")
def test_the_released_names_come_back_exactly(golden, tmp_path):
    """A released encoder, read and exported again, has the names, shapes and values that it was recorded with."""
    config = golden.config
    given, again = tmp_path / "given.pth", tmp_path / "again.pth"
    torch.save({"model": golden.part("state")}, given)
    (tmp_path / "mine.yaml").write_text(
        "base: maeplus_ape_vit_b16\nmodel: {width: 32, depth: 2, heads: 4, patch_size: 4, image_size: 28}\n"
    )
    recipe = ("--recipe", str(tmp_path / "mine.yaml")) if config["pe"] == "ape" else ()
    assert export(given, "mae", again, *recipe) == 0
    found = torch.load(again, weights_only=True)["model"]
    others = ("decoder", "mask_token", "adv_", "no_shift")
    expected = {
        name: tensor for name, tensor in golden.part("state").items() if not any(part in name for part in others)
    }
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_the_names_of_mmsegmentation(weights, tmp_path):
    """As its VisionTransformer has them (mmseg/models/backbones/vit.py), which does not install any more."""
    encoder, path = weights({"kind": "jepa"})
    export(path, "mmseg", tmp_path / "encoder.pth")
    found = torch.load(tmp_path / "encoder.pth", weights_only=True)["state_dict"]
    shapes = {
        "cls_token": (1, 1, 24), "pos_embed": (1, 17, 24), "patch_embed.projection.weight": (24, 3, 4, 4),
        "patch_embed.projection.bias": (24,), "ln1.weight": (24,), "ln1.bias": (24,),
    }  # fmt: skip
    for i in range(2):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in {
            "ln1.weight": (24,), "ln1.bias": (24,), "ln2.weight": (24,), "ln2.bias": (24,),
            "attn.attn.in_proj_weight": (72, 24), "attn.attn.in_proj_bias": (72,),
            "attn.attn.out_proj.weight": (24, 24), "attn.attn.out_proj.bias": (24,),
            "ffn.layers.0.0.weight": (96, 24), "ffn.layers.0.0.bias": (96,), "ffn.layers.1.weight": (24, 96),
            "ffn.layers.1.bias": (24,),
        }.items()}  # fmt: skip
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes
    assert torch.equal(found["layers.1.ffn.layers.1.weight"], encoder.blocks[1].mlp.fc2.weight)
    assert torch.equal(found["pos_embed"][0, 1:], encoder.positions.table) and not found["cls_token"].any()


def test_mmsegmentation_s_attention_is_torch_s(weights, tmp_path, close):
    """Its in_proj_weight belongs to torch's MultiheadAttention, whose queries, keys and values stand as ours do."""
    encoder, path = weights({"kind": "mae"})
    export(path, "mmseg", tmp_path / "encoder.pth")
    state = torch.load(tmp_path / "encoder.pth", weights_only=True)["state_dict"]
    attention = torch.nn.MultiheadAttention(24, 2, batch_first=True)
    prefix = "layers.0.attn.attn."
    attention.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
    tokens = torch.randn(2, 5, 24)
    close(attention(tokens, tokens, tokens)[0], encoder.blocks[0].attn(tokens))


@pytest.mark.parametrize("token", [True, False])
def test_the_names_of_vissl(token, weights, tmp_path):
    encoder, path = weights({"kind": "mae" if token else "jepa"})
    export(path, "vissl", tmp_path / "encoder.torch")
    content = torch.load(tmp_path / "encoder.torch", weights_only=True)
    trunk = content["classy_state_dict"]["base_model"]["model"]["trunk"]
    assert content["classy_state_dict"]["base_model"]["model"]["heads"] == {}
    outside = {"patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
    outside |= {"class_token", "pos_embedding"} if token else {"pos_embed"}
    assert {name for name in trunk if not name.startswith("blocks.")} == outside
    inside = {name for name in encoder.state_dict() if name.startswith("blocks.")}
    assert {name for name in trunk if name.startswith("blocks.")} == inside
    assert torch.equal(trunk["pos_embedding" if token else "pos_embed"][0, int(token) :], encoder.positions.table)


@pytest.mark.parametrize("token", [True, False])
def test_the_names_of_detectron2(token, weights, tmp_path):
    encoder, path = weights({"kind": "mae" if token else "jepa"})
    export(path, "detectron2", tmp_path / "encoder.pth")
    found = torch.load(tmp_path / "encoder.pth", weights_only=True)["model"]
    inside = {name for name in encoder.state_dict() if name.startswith(("blocks.", "patch_embed."))}
    assert set(found) == {f"backbone.net.{name}" for name in inside | {"pos_embed"}}
    assert found["backbone.net.pos_embed"].shape == (1, 16 + token, 24)
    assert torch.equal(found["backbone.net.blocks.1.attn.qkv.weight"], encoder.blocks[1].attn.qkv.weight)


def test_a_run_goes_to_the_released_layout_with_both_encoders_and_predictor(tiny, some_digits, tmp_path):
    result = elsewhere.pretrain("demo", some_digits, **{**tiny, "optim.batch_size": 16})
    assert export(result.run, "ijepa", tmp_path / "encoder.pth.tar") == 0
    content = torch.load(tmp_path / "encoder.pth.tar", weights_only=True)
    assert set(content) == {"encoder", "target_encoder", "predictor", "elsewhere"}
    state = from_released({name: content[name] for name in ("encoder", "target_encoder", "predictor")}, True)
    for which, part in (("teacher", "teacher."), ("student", "encoder.")):
        expected = elsewhere.load(result.run, which)
        again = elsewhere.load(tmp_path / "encoder.pth.tar", which)
        for name, tensor in expected.state_dict().items():
            assert torch.equal(state[part + name], tensor) and torch.equal(again.state_dict()[name], tensor), name


def test_a_run_of_adpe_goes_to_the_released_names_with_its_decoder(tiny_mae, some_digits, tmp_path):
    settings = {**tiny_mae, "model.relative.lookup": "published"}
    run = elsewhere.pretrain("demo_adpe", some_digits, **settings).run
    assert export(run, "mae", tmp_path / "out") == 0
    state = torch.load(tmp_path / "out/encoder.pth", weights_only=True)["model"]
    assert {"mask_token", "decoder_embed.weight", "decoder_pos_embed", "decoder_pred.bias"} <= state.keys()
    assert torch.equal(elsewhere.load(tmp_path / "out/encoder.pth").norm.weight, elsewhere.load(run).norm.weight)


@pytest.fixture
def fine_tuned(tmp_path):
    """A file of a fine-tuned classifier: its encoder has no last norm, and one after pooling."""
    torch.manual_seed(0)
    model = {"width": 24, "depth": 2, "heads": 2, "patch_size": 4, "image_size": 16, "positions": "learned"}
    config = Config.model_validate({"model": model, "method": {"kind": "classify", "classifier": {"classes": 5}}})
    method = build_method(config)
    for parameter in method.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    path = tmp_path / "weights.safetensors"
    described = {"elsewhere.part": "all", "elsewhere.config": config.model_dump_json(by_alias=True)}
    save_file(method.state_dict(), path, described)
    return method.eval(), path


def test_a_fine_tuned_encoder_keeps_its_norm_after_pooling(fine_tuned, tmp_path, close):
    method, path = fine_tuned
    pixels = torch.randn(2, 3, 16, 16)
    expected = method.fc_norm(method.encoder(pixels)[:, 1:].mean(dim=1))
    assert export(path, "timm", tmp_path / "out") == 0
    close(timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True).eval()(pixels), expected)
    for found in (elsewhere.load(path), elsewhere.load(tmp_path / "out")):
        close(found.forward_head(found(pixels)), expected)


def test_a_norm_after_pooling_cannot_go_to_hugging_face(fine_tuned, tmp_path, capsys):
    assert export(fine_tuned[1], "hf", tmp_path / "out") == 2
    assert "was fine-tuned with its last norm after pooling, which Hugging Face's ViT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "target", "text"),
    [
        (RELATIVE, "timm", "has relative positions on qkv, which timm's ViT does not have; --to mae writes them"),
        (RELATIVE, "hf", "has relative positions on qkv, which Hugging Face's ViT does not have"),
        (RELATIVE, "detectron2", "which detectron2's ViT does not have"),
        (
            {"method": {"kind": "mae_plus"}, "model": {"relative": {"terms": "k", "lookup": "interpolated"}}},
            "mae",
            "(model.relative.lookup=interpolated), which the released AdPE does only in a way of its own",
        ),
        (KINDS["stop"], "mae", "has no class token, which the released MAE has; --to ijepa has none either"),
        (KINDS["mae"], "ijepa", "has a class token, which the released I-JEPA has no place for; choose --to mae"),
        ({"method": {"kind": "mae"}, "model": {"norm_eps": 1e-5}}, "timm", "model.norm_eps=1e-05"),
        ({"method": {"kind": "mae"}, "model": {"mlp_ratio": 3.0}}, "vissl", "MLPs of 3 times its width"),
    ],
)
def test_what_a_project_cannot_express_is_refused(what, target, text, weights, tmp_path, capsys):
    _, path = weights(**what)
    assert export(path, target, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert text in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("target", "taken"), [("timm", "out"), ("mae", "encoder.pth"), ("mae", "encoder.pth.README.md")]
)
def test_nothing_is_overwritten(target, taken, weights, tmp_path, capsys):
    _, path = weights({"kind": "mae"})
    (tmp_path / taken).write_text("mine")
    assert export(path, target, tmp_path / ("out" if target == "timm" else "encoder.pth")) == 2
    assert "exists already and is not overwritten" in capsys.readouterr().err
    assert (tmp_path / taken).read_text() == "mine"


def test_a_file_beside_a_readme_gets_a_card_by_its_name(weights, tmp_path, capsys):
    _, path = weights({"kind": "mae"})
    (tmp_path / "README.md").write_text("mine")
    assert export(path, "mae", tmp_path / "encoder.pth") == 0
    assert "model card in encoder.pth.README.md" in capsys.readouterr().out
    assert (tmp_path / "README.md").read_text() == "mine" and (tmp_path / "encoder.pth.README.md").exists()


def test_an_export_that_fails_leaves_nothing_behind(weights, tmp_path, monkeypatch):
    """The disk is full when the card is written."""
    _, path = weights({"kind": "mae"})
    written = Path.write_text

    def full(self, *rest, **named):
        if self.name == "README.md":
            raise OSError(28, "No space left on device")
        return written(self, *rest, **named)

    monkeypatch.setattr(Path, "write_text", full)
    assert export(path, "timm", tmp_path / "out") == 2
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_half_precision_weights_are_exported_in_float32(weights, tmp_path):
    encoder, path = weights({"kind": "mae"})
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({name: tensor.bfloat16() for name, tensor in encoder.state_dict().items()}, path, metadata)
    assert export(path, "hf", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"
    assert torch.equal(elsewhere.load(tmp_path / "out").norm.weight, encoder.norm.weight.bfloat16().float())
