"""A task's encoder from a pre-trained one: other grids, without class token, learned positions."""

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from elsewhere.launch.build import build_encoder
from elsewhere.launch.config import Config
from elsewhere.launch.errors import UserError
from elsewhere.launch.load import start_task_encoder
from elsewhere.models.positions import sincos
from elsewhere.models.relative import Relative
from elsewhere.models.vit import Encoder, Size

SIZE = Size(24, 2, 2, 4.0)
RELATIVE = {"terms": "qkv", "lookup": "interpolated"}


@pytest.fixture
def weights(tmp_path):
    """Writes the random encoder of a configuration to a file with its description; gives encoder and path."""

    def make(kind="mae_plus", relative=None, **model):
        torch.manual_seed(0)
        model = {"width": 24, "depth": 2, "heads": 2, "patch_size": 4, "image_size": 16, "channels": 1, **model}
        model |= {"relative": relative} if relative else {}
        config = Config.model_validate({"model": model, "method": {"kind": kind}})
        encoder = build_encoder(config)
        for parameter in encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        path = tmp_path / f"{kind}.safetensors"
        part = "teacher" if kind == "jepa" else "student"
        save_file(
            encoder.state_dict(),
            path,
            {"elsewhere.part": part, "elsewhere.config": config.model_dump_json(by_alias=True)},
        )
        return encoder.eval(), path

    return make


def task(pixels=16, class_token=True, relative=None, positions="learned"):
    return Encoder((pixels, pixels), 4, 1, SIZE, positions, class_token=class_token, relative=relative).eval()


@pytest.mark.parametrize("relative", [None, RELATIVE])
def test_at_its_own_size_the_task_encoder_gives_the_same_tokens(relative, weights, close):
    source, path = weights(relative=relative)
    encoder = task(relative=Relative(**relative) if relative else None)
    start_task_encoder(encoder, path)
    images = torch.rand(2, 1, 16, 16)
    close(encoder(images), source(images))


@pytest.mark.parametrize("pixels", [8, 28])
def test_exact_resampling_gives_what_the_pretrained_encoder_gives_at_that_size(pixels, weights, close):
    source, path = weights("jepa")
    encoder = task(pixels, class_token=False)
    said = start_task_encoder(encoder, path)
    images = torch.rand(2, 1, pixels, pixels)
    close(encoder(images), source(images))
    assert said == f"the teacher of {path}, its positions 4x4 resampled to {pixels // 4}x{pixels // 4}"


def by_hand(table, side):
    """Bicubic interpolation of a square table [N, D]."""
    old = int(len(table) ** 0.5)
    image = table.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    return F.interpolate(image, (side, side), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(0, 2)


def test_bicubic_resampling_interpolates_the_table_as_published(weights, close):
    _, path = weights()
    encoder = task(32)
    start_task_encoder(encoder, path, resample="bicubic")
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    close(encoder.positions.table, by_hand(sincos(24, rows.flatten(), columns.flatten()).float(), 8))
    assert encoder.cls_position is not None and not encoder.cls_position.any()


def test_learned_positions_are_interpolated_and_the_class_tokens_kept(weights, close):
    source, path = weights("mae", positions="learned")
    encoder = task(32)
    start_task_encoder(encoder, path)
    close(encoder.positions.table, by_hand(source.positions.table.detach(), 8))
    close(encoder.cls_position, source.cls_position)


@pytest.mark.parametrize("method", ["product", "cross", "euclidean"])
@pytest.mark.parametrize(("terms", "mode"), [("qkv", "contextual"), ("qk", "bias")])
def test_relative_tables_lose_the_prefix_bucket_with_the_class_token(terms, mode, method, weights):
    relative = {"terms": terms, "mode": mode, "method": method}
    source, path = weights(relative=relative)
    encoder = task(class_token=False, relative=Relative(**relative))
    start_task_encoder(encoder, path)
    tables = {name: one for name, one in encoder.named_parameters() if "relative_" in name}
    assert tables
    for name, table in tables.items():
        whole = source.state_dict()[name]
        assert torch.equal(
            table, whole.narrow(1 if "_v" in name else -1, 0, whole.shape[1 if "_v" in name else -1] - 1)
        )


def test_without_class_token_the_blocks_are_those_of_the_weights(weights):
    source, path = weights()
    encoder = task(class_token=False)
    start_task_encoder(encoder, path)
    assert torch.equal(encoder.blocks[1].mlp.fc2.weight, source.blocks[1].mlp.fc2.weight)


@pytest.mark.parametrize(
    ("of", "to", "text"),
    [
        ({"kind": "jepa"}, {}, "no class token and this encoder one; set model.class_token=false"),
        ({}, {"relative": Relative()}, "absolute positions alone and this recipe's encoder relative positions on k"),
        ({"relative": RELATIVE}, {}, "has relative positions on kqv and this recipe's encoder absolute"),
        (
            {"relative": {"terms": "k", "lookup": "published"}},
            {"relative": Relative()},
            "was trained with model.relative.lookup=published, and this encoder has another",
        ),
        ({"patch_size": 2}, {}, r"patch_embed.proj.weight is \(24, 1, 2, 2\) there and \(24, 1, 4, 4\) here"),
        ({"width": 32}, {}, r"proj.bias is \(32,\) there and \(24,\) here"),
        ({"positions": "learned", "kind": "mae"}, {"positions": "sincos"}, "set model.positions=learned"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence(of, to, text, weights):
    _, path = weights(**of)
    with pytest.raises(UserError, match=text) as caught:
        start_task_encoder(task(**to), path)
    assert "\n" not in str(caught.value)


def test_what_is_allowed_may_be_missing(weights):
    source, path = weights()
    encoder = task(relative=Relative())
    start_task_encoder(encoder, path, allow=["blocks.*.relative_k.table"])
    assert torch.equal(encoder.norm.weight, source.norm.weight)
