"""Encoders of other projects: what was recorded of the released models, and timm's and transformers' own."""

import argparse
import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch.nn import functional as F

import elsewhere
from elsewhere.launch.build import build_method
from elsewhere.launch.config import load_config
from elsewhere.launch.encoder_weights import encoder_weights
from elsewhere.launch.errors import UserError
from elsewhere.launch.foreign import described
from elsewhere.launch.load import start_from, start_task_encoder
from elsewhere.models.mae import Attack, Decoder, Mae
from elsewhere.models.positions import grid_coordinates, sincos
from elsewhere.models.vit import SIZES, Encoder, Size
from elsewhere.models.zoo_in import read_foreign

RECIPE = (
    "base: {base}\nmodel: {{width: {width}, depth: {depth}, heads: {heads}, patch_size: 4, image_size: {pixels}}}\n"
)


@pytest.fixture
def recipe(tmp_path):
    """A recipe of the encoder of a recording."""

    def write(config, base="stop_vit_b16", **model):
        text = RECIPE.format(
            base=base, width=config["embed_dim"], depth=config["depth"], heads=config["num_heads"],
            pixels=config["img_size"],
        )  # fmt: skip
        path = tmp_path / "mine.yaml"
        path.write_text(text + (f"method: {{kind: {model.pop('kind')}}}\n" if "kind" in model else ""))
        return str(path)

    return write


@pytest.mark.golden("A2_*")
@pytest.mark.parametrize("which", ["teacher", "student"])
def test_a_released_stop_encoder_gives_the_recorded_tokens(which, golden, recipe, tmp_path, close):
    state = {f"module.{name}": tensor for name, tensor in golden.part("state").items()}
    other = {name: tensor + 1 for name, tensor in state.items()}
    encoders = {"target_encoder": state, "encoder": other} if which == "teacher" else {"encoder": state}
    torch.save({**encoders, "predictor": {}, "opt": {}, "epoch": 3}, tmp_path / "latest.pth.tar")
    encoder = elsewhere.load(tmp_path / "latest.pth.tar", which, recipe(golden.config))
    assert encoder.positions.kind == "sincos"
    close(encoder(golden.tensors["in.imgs"]), golden.tensors["out.full_K1"])
    close(encoder(golden.tensors["in.imgs"], last=2), golden.tensors["out.full_K2"])


@pytest.mark.golden("B[12]_*_strong")
def test_a_released_adpe_encoder_gives_the_recorded_latent(golden, recipe, tmp_path, close):
    """Relative tables tell the heads and the kind of lookup; absolute positions need a recipe for the heads."""
    config, state = golden.config, golden.part("state")
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": state, "optimizer": {}, "epoch": 1, "args": argparse.Namespace(pe_type=0)}, path)
    encoder = elsewhere.load(path, recipe=recipe(config, "maeplus_ape_vit_b16") if config["pe"] == "ape" else None)
    if config["pe"] == "rpe":
        assert encoder.relative is not None and encoder.size.heads == config["num_heads"]
        assert encoder.relative.lookup == ("published" if config["adv_type"] == 2 else "hard")
    mode = ("none", "embedding", "coordinate")[config["adv_type"]]
    released = config["pe"] == "ape" and mode == "embedding"
    decoder = Decoder(32, encoder.grid, Size(8, 1, 2), 48, mask_token=False, relative=encoder.relative)
    method = Mae(
        encoder, decoder, mask_token="adversary" if released else "learned",
        attack=Attack(mode, where="queries", per="table"), mean=(0.0,) * 3, std=(1.0,) * 3,
    )  # fmt: skip
    adversary = {name: torch.zeros_like(tensor) for name, tensor in method.attack_tensors().items()}
    if method.mask_token is not None:
        method.mask_token.data = state["mask_token"]
    if released:
        adversary["mask_token"] = state["adv_token"][0]
    elif config["pe"] == "ape" and mode == "coordinate":
        adversary["shift"] = state["adv_token"].flip(0)[None]
    elif mode == "coordinate":
        adversary["encoder"] = torch.stack([state[f"blocks.{i}.attn.rpe_k.adv_shift"] for i in range(2)])
    seen = []
    encoder.norm.register_forward_hook(lambda *call: seen.append(call[-1]))
    noise = golden.replay("rng.mask_noise")[0]
    visible = noise.argsort(dim=1)[:, :12].sort(dim=1).values
    method.predict(golden.tensors["in.imgs"], visible, adversary)
    close(seen[0], golden.tensors["out.latent"], "latent")


@pytest.mark.golden("B4_*")
def test_a_released_finetuned_vit_gives_the_recorded_features(golden, recipe, tmp_path, close):
    """`pe_type` among the saved arguments tells hard tables (1) from interpolated ones (2)."""
    config, path = golden.config, tmp_path / "checkpoint-99.pth"
    arguments = argparse.Namespace(pe_type={"ape": 0, "rpe": 1, "rpe_interpolate": 2}[config["pe"]])
    torch.save({"model": golden.part("state"), "args": arguments}, path)
    if config["pe"] == "ape":
        (tmp_path / "mine.yaml").write_text(
            f"base: maeplus_ape_vit_b16\nmodel: {{width: 32, depth: 2, heads: 4, patch_size: 4, "
            f"image_size: {config['img_size']}, positions: learned}}\n"
        )
    encoder = elsewhere.load(path, recipe=str(tmp_path / "mine.yaml") if config["pe"] == "ape" else None)
    tokens = encoder(golden.tensors["in.imgs"])
    features = encoder.forward_head(tokens) if config["global_pool"] else tokens[:, 0]
    close(features, golden.tensors["out.features"], "features")


@pytest.mark.golden("B4_rpe_cls_img28")
def test_a_finetuned_relative_vit_without_arguments_asks_how_its_table_is_read(golden, tmp_path):
    torch.save({"model": golden.part("state")}, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match=r"does not say whether its table is read between .* or hard; name a recipe"):
        elsewhere.load(tmp_path / "checkpoint.pth")


@pytest.mark.golden("A2_encoder")
def test_heads_that_the_shapes_hide_are_asked_for(golden, tmp_path):
    torch.save({"target_encoder": golden.part("state")}, tmp_path / "latest.pth.tar")
    with pytest.raises(UserError, match="does not say how many heads its attention has; name a recipe"):
        elsewhere.load(tmp_path / "latest.pth.tar")


@pytest.mark.golden("A2_encoder")
def test_a_table_that_is_not_of_sines_and_cosines_stays_as_it_is(golden, tmp_path):
    """An image of 32 pixels read in another order of rows, e.g., has the same numbers in other places."""
    state = golden.part("state")
    state["pos_embed"] = state["pos_embed"].flip(1)
    torch.save({"target_encoder": state}, tmp_path / "latest.pth.tar")
    weights = encoder_weights(tmp_path / "latest.pth.tar")
    assert torch.equal(weights.state["positions.table"], state["pos_embed"][0])


@pytest.mark.parametrize("size", ["base", "large", "huge", "giant"])
def test_standard_sizes_tell_their_heads(size, tmp_path):
    with torch.device("meta"):
        encoder = Encoder((32, 32), 16, 3, SIZES[size])
    state = {name: torch.zeros(1).expand(tensor.shape) for name, tensor in encoder.state_dict().items()}
    state["pos_embed"] = torch.zeros(1).expand(1, 4, encoder.embed_dim)
    config = described(read_foreign(state, "encoder"))
    assert config is not None and config.model.heads == SIZES[size].heads
    assert config.model.image_size == (32, 32) and config.method.kind == "jepa"


SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 5}


def timm_vit(**settings):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **{**SMALL, **settings}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def timm_folder(tmp_path):
    """A folder as timm writes it, and the model."""

    def write(**settings):
        model = timm_vit(**settings)
        save_for_hf(model, tmp_path / "timm", safe_serialization=True)
        return model, tmp_path / "timm"

    return write


TIMM = {
    "with a class token": {},
    "no class token": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "a position for patches alone": {"no_embed_class": True},
    "no bias of queries, keys and values": {"qkv_bias": False},
    "one channel": {"in_chans": 1},
    "another eps": {"norm_layer": None},
    "no square": {"img_size": (32, 48)},
}


@pytest.mark.parametrize("settings", TIMM.values(), ids=TIMM.keys())
def test_a_timm_folder_gives_timm_s_tokens(settings, timm_folder, close):
    model, folder = timm_folder(**settings)
    encoder = elsewhere.load(folder)
    images = torch.randn(2, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    close(encoder(images), model.forward_features(images))


def test_a_timm_model_that_norms_what_it_pooled_gives_timm_s_features(timm_folder, close):
    model, folder = timm_folder(global_pool="avg")
    encoder = elsewhere.load(folder)
    images = torch.randn(2, 3, 32, 32)
    close(encoder.forward_head(encoder(images)), model.forward_head(model.forward_features(images), pre_logits=True))


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors", "checkpoint.pth.tar"])
def test_a_bare_timm_file_needs_a_recipe_for_its_heads(name, tmp_path, close):
    model, path = timm_vit(), tmp_path / "alone" / name
    path.parent.mkdir()
    if name.endswith("safetensors"):
        save_file(model.state_dict(), path)
    else:
        torch.save({"state_dict": model.state_dict()} if "tar" in name else model.state_dict(), path)
    (tmp_path / "mine.yaml").write_text(
        "base: mae_vit_b16\nmodel: {width: 48, depth: 2, heads: 4, patch_size: 8, image_size: 32, positions: learned}\n"
    )
    with pytest.raises(UserError, match="how many heads"):
        elsewhere.load(path)
    images = torch.randn(1, 3, 32, 32)
    close(elsewhere.load(path, recipe=str(tmp_path / "mine.yaml"))(images), model.forward_features(images))


def test_pixel_statistics_are_those_that_timm_says(tmp_path):
    """timm's augreg models say 0.5; MAE's say ImageNet's."""
    for tag, mean in (("augreg_in21k", [0.5] * 3), ("mae", [0.485, 0.456, 0.406])):
        name = f"vit_base_patch16_224.{tag}"
        model = timm.create_model(name, depth=1, img_size=32, num_classes=0)
        save_for_hf(model, tmp_path / tag, safe_serialization=True)
        assert elsewhere.load(tmp_path / tag).pixel_mean == mean


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"reg_tokens": 2, "no_embed_class": True}, r"reg_token \(register tokens\)"),
        ({"init_values": 0.1}, r"blocks.\*.ls1.gamma \(2 tensors, LayerScale\), blocks.\*.ls2.gamma \(2 tensors"),
        ({"qk_norm": True}, r"blocks.\*.attn.q_norm.weight \(2 tensors, norms of queries\)"),
        ({"pre_norm": True}, r"norm_pre.bias \(a norm before the blocks\), norm_pre.weight"),
    ],
)
def test_what_has_no_place_is_listed_and_refused_unless_allowed(settings, named, timm_folder):
    _, folder = timm_folder(**settings)
    with pytest.raises(UserError, match=f"has what an encoder here has no place for: .*{named}") as caught:
        elsewhere.load(folder)
    assert "\n" not in str(caught.value)
    assert (
        elsewhere.load(folder, allow=["reg_token", "blocks.*", "norm_pre.*", "patch_embed.proj.bias"]).size.heads == 4
    )


@pytest.mark.parametrize("settings", [{"act_layer": "quick_gelu"}, {"act_layer": "relu"}, {"act_layer": "gelu_tanh"}])
def test_another_activation_is_refused(settings, timm_folder):
    _, folder = timm_folder(**settings)
    with pytest.raises(UserError, match="in its MLPs, and an encoder here has exact GELU"):
        elsewhere.load(folder)


def test_a_missing_tensor_is_named_unless_allowed(timm_folder):
    model, folder = timm_folder()
    state = load_file(folder / "model.safetensors")
    for i in range(2):
        del state[f"blocks.{i}.mlp.fc2.bias"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks blocks.\*.mlp.fc2.bias \(2 tensors\)"):
        elsewhere.load(folder)
    encoder = elsewhere.load(folder, allow=["blocks.*.mlp.fc2.bias"])
    assert torch.equal(encoder.norm.weight, model.norm.weight)


def test_a_timm_name_is_what_timm_creates(timm_folder, close):
    model, folder = timm_folder()
    encoder, images = elsewhere.load(f"timm:local-dir:{folder}"), torch.randn(1, 3, 32, 32)
    close(encoder(images), model.forward_features(images))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no_such_vit", "timm could not give the pre-trained model .*no_such_vit.*; check the name"),
        ("local-dir:nowhere", "timm could not give the pre-trained model .*; check the name"),
    ],
)
def test_a_timm_name_that_fails_is_one_sentence(name, text):
    with pytest.raises(UserError, match=text) as caught:
        elsewhere.load(f"timm:{name}")
    assert "\n" not in str(caught.value)


def test_a_timm_model_of_another_kind_is_refused(tmp_path):
    save_for_hf(timm.create_model("resnet18"), tmp_path / "resnet", safe_serialization=True)
    with pytest.raises(UserError, match="is timm's ResNet, and only its VisionTransformer is known here"):
        elsewhere.load(tmp_path / "resnet")


HUB = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80, "image_size": 32,
    "patch_size": 8, "layer_norm_eps": 1e-2,
}  # fmt: skip


def hub_model(kind, **settings):
    import transformers

    torch.manual_seed(0)
    config = {"ViT": "ViTConfig", "IJepa": "IJepaConfig", "ViTMAE": "ViTMAEConfig"}[kind]
    names = {"ViT": "ViTForImageClassification", "IJepa": "IJepaModel", "ViTMAE": "ViTMAEForPreTraining"}
    more = {"decoder_num_hidden_layers": 1, "decoder_hidden_size": 16, "decoder_intermediate_size": 16,
            "decoder_num_attention_heads": 2} if kind == "ViTMAE" else {}  # fmt: skip
    model = getattr(transformers, names[kind])(getattr(transformers, config)(**{**HUB, **more, **settings})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if kind == "ViTMAE":  # the published checkpoints' table; transformers 5 makes fresh ones with the row first
        table = sincos(48, *grid_coordinates((4, 4))).float()
        model.vit.embeddings.position_embeddings.data = F.pad(table, (0, 0, 1, 0))[None]
    return model


@pytest.mark.parametrize(
    ("kind", "form"),
    [("ViT", "folder"), ("IJepa", "folder"), ("ViTMAE", "folder"), ("ViT", "shards"), ("IJepa", "file"),
     ("ViT", "in memory"), ("IJepa", "in memory")],
)  # fmt: skip
def test_hugging_face_s_models_give_their_tokens(kind, form, tmp_path, close):
    model, folder = hub_model(kind), tmp_path / "hub"
    model.save_pretrained(folder, max_shard_size="40KB" if form == "shards" else "1GB")
    if form == "shards":
        assert len(list(folder.glob("*.safetensors"))) > 1
    if form == "in memory":
        save_file(model.state_dict(), folder / "model.safetensors")
    encoder = elsewhere.load(folder / "model.safetensors" if form == "file" else folder)
    assert encoder.positions.kind == ("sincos" if kind == "ViTMAE" else "learned")
    images = torch.randn(2, 3, 32, 32)
    inside = {"ViT": lambda: model.vit, "IJepa": lambda: model, "ViTMAE": lambda: model.vit}[kind]()
    if kind == "ViTMAE":  # all patches, in their order
        inside.config.mask_ratio = 0.0
        found = inside(images, noise=torch.arange(16.0).expand(2, -1)).last_hidden_state
    else:
        found = inside(images).last_hidden_state
    close(encoder(images), found)


def test_pixel_statistics_are_those_of_the_preprocessor(tmp_path):
    hub_model("ViT").save_pretrained(tmp_path / "hub")
    assert elsewhere.load(tmp_path / "hub").pixel_mean == [0.485, 0.456, 0.406]
    said = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "hub/preprocessor_config.json").write_text(json.dumps(said))
    encoder = elsewhere.load(tmp_path / "hub")
    assert (encoder.pixel_mean, encoder.pixel_std) == ([0.5] * 3, [0.5] * 3)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"hidden_act": "relu"}, "has hidden_act=relu, and an encoder here has gelu"),
        ({"model_type": "swin"}, "is a model of type swin; only vit, ijepa and vit_mae are known here"),
    ],
)
def test_another_model_of_hugging_face_is_refused(change, text, tmp_path):
    hub_model("ViT").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=text):
        elsewhere.load(tmp_path)


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"layer1.0.conv1.weight": torch.zeros(1)}, "is of no known format .* it holds layer1.0.conv1.weight"),
        ({}, "is of no known format .* it holds nothing"),
        ({"encoder": {"module.x": torch.zeros(1)}}, "has no target_encoder; choose which=student"),
    ],
)
def test_what_is_no_encoder_is_refused_in_a_sentence(state, text, tmp_path):
    torch.save(state, tmp_path / "some.pth")
    with pytest.raises(UserError, match=text) as caught:
        elsewhere.load(tmp_path / "some.pth")
    assert "\n" not in str(caught.value)


SETTINGS = {
    "model.width": 48, "model.depth": 2, "model.heads": 4, "model.patch_size": 8, "model.image_size": 32,
    "model.channels": 3, "data.mean": None, "data.std": None,
}  # fmt: skip


class TestAStart:
    """`init.from` with another project's weights."""

    def method(self, recipe="demo", **settings):
        return build_method(load_config(recipe, {**SETTINGS, **settings}))

    def test_fills_student_and_teacher_without_the_class_token(self, timm_folder):
        model, folder = timm_folder()
        method = self.method(**{"model.positions": "learned"})
        said = start_from(method, f"timm:local-dir:{folder}")
        assert said == f"the timm ViT encoder of timm:local-dir:{folder}, without its class token"
        for part in (method.encoder, method.teacher):
            assert torch.equal(part.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
            assert torch.equal(part.positions.table, model.pos_embed[0, 1:])

    def test_learned_positions_are_not_put_under_sin_cos_ones(self, timm_folder):
        _, folder = timm_folder()
        with pytest.raises(UserError, match=r"^init.from: .* has learned positions .* set model.positions=learned.$"):
            start_from(self.method(), str(folder))

    def test_other_heads_are_refused(self, timm_folder):
        _, folder = timm_folder()
        method = self.method(**{"model.positions": "learned", "model.heads": 3})
        with pytest.raises(UserError, match=r"was trained with model.heads=4,"):
            start_from(method, str(folder))

    def test_another_eps_is_refused(self, tmp_path):
        hub_model("IJepa").save_pretrained(tmp_path)
        settings = {"model.positions": "learned", "model.mlp_ratio": 80 / 48}
        with pytest.raises(UserError, match=r"was trained with model.norm_eps=0.01,"):
            start_from(self.method(**settings), str(tmp_path))
        start_from(self.method(**settings, **{"model.norm_eps": 1e-2}), str(tmp_path))

    @pytest.mark.golden("A2_encoder")
    def test_takes_heads_from_the_recipe_where_the_file_does_not_say(self, golden, tmp_path):
        torch.save({"target_encoder": golden.part("state")}, tmp_path / "latest.pth.tar")
        settings = {"model.width": 48, "model.depth": 3, "model.heads": 3, "model.patch_size": 4}
        method = self.method(**settings)
        start_from(method, str(tmp_path / "latest.pth.tar"))
        assert torch.equal(method.teacher.norm.weight, golden.tensors["state.norm.weight"])

    def test_a_run_trains_from_them(self, timm_folder, tiny, some_digits, capsys):
        model, folder = timm_folder(img_size=8, patch_size=2, in_chans=1)
        settings = {"model.width": 48, "model.heads": 4, "model.patch_size": 2, "model.positions": "learned",
                    "mask.context_keep": 6, "mask.target_scale": [0.2, 0.3], "init.from": str(folder)}  # fmt: skip
        slow = {"optim.batch_size": 16, "optim.lr": 1e-9, "optim.start_lr": 1e-9, "optim.final_lr": 1e-9}
        result = elsewhere.pretrain("demo", some_digits, **{**tiny, **settings, **slow})
        assert "encoder weights from the timm ViT encoder of" in capsys.readouterr().out
        trained = elsewhere.load(result.run)
        torch.testing.assert_close(
            trained.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight, rtol=0, atol=1e-3
        )

    @pytest.mark.golden("B4_ape_gp_img28")
    def test_a_task_takes_a_fresh_norm_where_fine_tuning_moved_it(self, golden, tmp_path):
        torch.save({"model": golden.part("state")}, tmp_path / "checkpoint.pth")
        encoder = Encoder((28, 28), 4, 3, Size(32, 2, 4), "learned", class_token=True)
        said = start_task_encoder(encoder, tmp_path / "checkpoint.pth")
        assert said.endswith("with a fresh last norm, for it was fine-tuned to one after pooling")
        assert torch.equal(encoder.norm.weight, torch.ones(32))
        assert torch.equal(encoder.cls_position[0], golden.tensors["state.pos_embed"][0, :1])


def test_an_mae_encoder_alone_is_read_as_published(tmp_path, close):
    """mae_pretrain_vit_*.pth hold `{model: …}` without decoder, and a fixed table with a zero row for the class."""
    torch.manual_seed(0)
    source = Encoder((32, 32), 8, 3, Size(48, 2, 4), class_token=True).eval()
    state = {**source.state_dict(), "pos_embed": F.pad(source.positions.table, (0, 0, 1, 0))[None]}
    torch.save({"model": state}, tmp_path / "mae_pretrain.pth")
    (tmp_path / "mine.yaml").write_text(
        "base: mae_vit_b16\nmodel: {width: 48, depth: 2, heads: 4, patch_size: 8, image_size: 32}\n"
    )
    encoder = elsewhere.load(tmp_path / "mae_pretrain.pth", recipe=str(tmp_path / "mine.yaml"))
    images = torch.randn(2, 3, 32, 32)
    close(encoder(images), source(images))
