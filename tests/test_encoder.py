"""The encoder against timm's own vision transformer, at other sizes and shapes, and as it starts."""

import math
from functools import partial

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from elsewhere.models.positions import Positions, grid_coordinates, sincos
from elsewhere.models.vit import SIZES, Encoder, LastBlock, Size, transformer_blocks

TINY = Size(24, 3, 3)
TIMM_NAMES = {"base": "vit_base_patch16_224", "large": "vit_large_patch16_224", "huge": "vit_huge_patch14_224"}


def encoder(image_size=(16, 8), patch=4, channels=3, size=TINY, seed=0, **options):
    torch.manual_seed(seed)
    built = Encoder(image_size, patch, channels, size, **options)
    for name, parameter in built.named_parameters():  # weights that differ from layer to layer, in every place
        if name != "positions.table":
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("norm.weight") else 0.0, 0.2)
    return built


def timm_twin(ours):
    """timm's model with the weights of ours."""
    twin = VisionTransformer(
        ours.image_size, ours.patch_size, ours.channels, num_classes=0, global_pool="avg", embed_dim=ours.size.width,
        depth=ours.size.depth, num_heads=ours.size.heads, mlp_ratio=ours.size.mlp_ratio, class_token=False,
        fc_norm=False, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    state = {name: tensor for name, tensor in ours.state_dict().items() if name != "positions.table"}
    twin.load_state_dict({**state, "pos_embed": ours.positions()[None]})
    return twin


def images(channels=3, size=(16, 8), batch=2):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


SHAPES = {
    "square": {"image_size": (8, 8), "patch": 2},
    "one patch": {"image_size": (4, 4), "patch": 4},
    "wide": {"image_size": (8, 24), "patch": 8},
    "grey": {"channels": 1},
    "five channels": {"channels": 5},
    "learned": {"positions": "learned"},
    "heads of 4, MLP of 48/11": {"size": Size(44, 2, 11, 48 / 11)},
}


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES.keys())
@torch.no_grad()
def test_features_equal_timms(options):
    ours = encoder(**options)
    batch = images(ours.channels, ours.image_size)
    torch.testing.assert_close(ours.forward_features(batch), timm_twin(ours).forward_features(batch))


@torch.no_grad()
def test_pooled_head_equals_timms():
    ours, batch = encoder(), images()
    expected = timm_twin(ours)(batch)
    torch.testing.assert_close(ours.forward_head(ours.forward_features(batch)), expected)
    torch.testing.assert_close(ours.forward_head(ours.forward_features(batch), pre_logits=True), expected)


@pytest.mark.parametrize("stop_early", [False, True])
@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("indices", [None, 1, 2, 3, [0], [0, 2], [-1], (-3, 1)], ids=str)
@torch.no_grad()
def test_intermediates_equal_timms(indices, norm, output_fmt, stop_early):
    ours = encoder()
    options = {"indices": indices, "norm": norm, "output_fmt": output_fmt, "stop_early": stop_early}
    final, found = ours.forward_intermediates(images(), **options)
    timms_final, expected = timm_twin(ours).forward_intermediates(images(), **options)
    torch.testing.assert_close(final, timms_final)
    torch.testing.assert_close(found, expected)
    only = ours.forward_intermediates(images(), intermediates_only=True, **options)
    torch.testing.assert_close(only, found)


@pytest.mark.parametrize("indices", [0, 4, -1, [3], [-4], [0, 3], []], ids=str)
def test_blocks_that_are_not_there_are_refused(indices):
    with pytest.raises(ValueError, match=r"this encoder has blocks 0 … 2\."):
        encoder().forward_intermediates(images(), indices=indices)


def test_an_unknown_format_of_intermediates_is_refused():
    with pytest.raises(ValueError, match="choose NCHW or NLC"):
        encoder().forward_intermediates(images(), output_fmt="NHWC")


@torch.no_grad()
def test_no_prefix_tokens_come_with_intermediates():
    pairs = encoder().forward_intermediates(images(), return_prefix_tokens=True, intermediates_only=True)
    assert [prefix.shape for _, prefix in pairs] == [(2, 0, 24)] * 3


def test_serves_as_the_backbone_of_a_segmenter():
    """What timm-style users ask of a backbone: width, maps of chosen layers, gradients to its first layer."""
    backbone = encoder()
    head = torch.nn.Conv2d(2 * backbone.num_features, 5, 1)
    maps = backbone.forward_intermediates(images(), indices=[0, 2], intermediates_only=True)
    scores = head(torch.cat(maps, dim=1))
    assert scores.shape == (2, 5, 4, 2)
    scores.sum().backward()
    assert backbone.patch_embed.proj.weight.grad.abs().sum() > 0


def slow_kept(ours, batch, keep):
    """Tokens of the patches `keep` `[B, K]`, image by image, patch by patch."""
    tokens = timm_twin(ours).patch_embed(batch) + ours.positions()
    kept = torch.stack([torch.stack([tokens[i, p] for p in keep[i]]) for i in range(len(batch))])
    for block in ours.blocks:
        kept = block(kept)
    return ours.norm(kept)


@torch.no_grad()
def test_kept_patches_see_each_other_alone():
    ours, keep = encoder(), torch.tensor([[0, 3, 6], [7, 1, 1]])
    torch.testing.assert_close(ours(images(), keep), slow_kept(ours, images(), keep))


@torch.no_grad()
def test_several_selections_come_one_after_another():
    ours, keeps = encoder(), torch.tensor([[[0, 3, 6], [7, 1, 1]], [[2, 5, 4], [0, 1, 2]], [[6, 5, 4], [7, 6, 5]]])
    expected = torch.cat([ours(images(), keep) for keep in keeps])
    torch.testing.assert_close(ours(images(), keeps), expected)


@torch.no_grad()
def test_all_patches_kept_is_the_whole_image():
    ours = encoder()
    torch.testing.assert_close(ours(images(), torch.arange(8).expand(2, -1)), ours(images()))


@pytest.mark.parametrize("last", [1, 2, 3])
@torch.no_grad()
def test_last_layers_are_averaged(last):
    ours = encoder()
    layers = ours.forward_intermediates(images(), norm=True, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(ours(images(), last=last), torch.stack(layers[-last:]).mean(dim=0))


@pytest.mark.parametrize("kind", ["sincos", "learned"])
@torch.no_grad()
def test_runs_at_other_sizes(kind):
    ours = encoder(positions=kind)
    assert ours(images(size=(8, 24))).shape == (2, 12, 24)
    final, (maps,) = ours.forward_intermediates(images(size=(8, 24)), indices=[1])
    assert (final.shape, maps.shape) == ((2, 12, 24), (2, 24, 2, 6))


@pytest.mark.parametrize("kind", ["sincos", "learned", "low_resolution"])
def test_the_training_grid_gives_the_table_itself(kind):
    positions = Positions(16, (4, 6), kind)
    assert torch.equal(positions((4, 6)), positions())


def test_patch_centres_stay_in_place_on_a_finer_grid():
    """Four patches of a grid twice as fine average to the coordinate of the one they fill."""
    fine = torch.stack(grid_coordinates((8, 12), (4, 6))).reshape(2, 4, 2, 6, 2)
    coarse = torch.stack(grid_coordinates((4, 6))).reshape(2, 4, 6)
    torch.testing.assert_close(fine.mean(dim=(2, 4)), coarse)


@pytest.mark.parametrize("onto", [(8, 12), (2, 3), (5, 4)], ids=str)
def test_sincos_on_another_grid_is_analytic(onto):
    """Against the formula in plain Python, at the centre of each patch in units of the training grid."""
    table = Positions(8, (4, 6), "sincos")(onto)
    for row in range(onto[0]):
        for column in range(onto[1]):
            y, x = (row + 0.5) * 4 / onto[0] - 0.5, (column + 0.5) * 6 / onto[1] - 0.5
            expected = [f(c * w) for c in (x, y) for f in (math.sin, math.cos) for w in (1.0, 0.01)]
            found = table[row * onto[1] + column]
            assert torch.allclose(found, torch.tensor(expected), atol=1e-6), (row, column)


def test_learned_positions_on_a_finer_grid_are_bicubic():
    """Against torch's bicubic resampling of each channel as an image."""
    positions = Positions(3, (4, 6), "learned")
    image = positions.table.detach().reshape(4, 6, 3)
    found = positions((8, 9)).detach().reshape(8, 9, 3)
    for channel in range(3):
        expected = torch.nn.functional.interpolate(image[None, None, ..., channel], size=(8, 9), mode="bicubic")
        torch.testing.assert_close(found[..., channel], expected[0, 0])


def test_learned_positions_on_another_grid_keep_rows_and_columns_apart():
    """A table of row numbers stays one, away from the border; torch's bicubic bends a ramp by 0.047."""
    positions = Positions(1, (8, 4), "learned")
    positions.table.data = torch.arange(8.0).repeat_interleave(4)[:, None]
    found = positions((16, 4)).reshape(16, 4)
    expected = ((torch.arange(16) + 0.5) / 2 - 0.5)[:, None].expand(-1, 4)
    torch.testing.assert_close(found[4:-4], expected[4:-4], atol=0.05, rtol=0)


def test_learned_positions_get_gradients_at_another_size():
    ours = encoder(positions="learned")
    ours(images(size=(8, 24))).sum().backward()
    assert ours.positions.table.grad.abs().sum() > 0


def test_sincos_refuses_a_width_that_does_not_divide():
    with pytest.raises(ValueError, match="multiple of 4; 18 is not"):
        sincos(18, *grid_coordinates((2, 2)))


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", SIZES)
def test_every_size_builds(name):
    size = SIZES[name]
    with torch.device("meta"):
        built = Encoder((224, 224), 14 if name in ("huge", "giant") else 16, 3, size)
        assert built.positions().shape == (built.grid[0] * built.grid[1], size.width)
    hidden = int(size.width * size.mlp_ratio)
    block = 4 * size.width**2 + 4 * size.width + 2 * hidden * size.width + hidden + size.width + 4 * size.width
    patch = (3 * built.patch_size**2 + 1) * size.width
    assert parameters(built) == patch + size.depth * block + 2 * size.width


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_sizes_are_those_of_timm(name):
    """The same parameters but for timm's class token and trained positions."""
    with torch.device("meta"):
        built = Encoder((224, 224), 14 if name == "huge" else 16, 3, SIZES[name])
        twin = timm.create_model(TIMM_NAMES[name], num_classes=0)
    assert parameters(built) == parameters(twin) - twin.pos_embed.numel() - twin.cls_token.numel()
    assert round(parameters(built) / 1e6, 1) == {"base": 85.6, "large": 303.1, "huge": 630.4}[name]


@pytest.mark.parametrize("size", [(16, 10), (10, 16), (17, 17)], ids=str)
def test_a_size_that_the_patch_does_not_divide_is_refused(size):
    with pytest.raises(
        ValueError, match=rf"image_size {size[0]}x{size[1]} is not divisible by model.patch_size=4; use"
    ):
        Encoder(size, 4, 3, TINY)
    with pytest.raises(ValueError, match="is not divisible"):
        encoder()(images(size=size))


def test_the_size_advised_is_one_that_works():
    with pytest.raises(ValueError, match="use 16x8, or another patch") as refusal:
        Encoder((17, 9), 4, 3, TINY)
    assert "16x8" in str(refusal.value)
    Encoder((16, 8), 4, 3, TINY)


def deep(scaled, std=0.02):
    """With the released patch of 16 × 16 × 3."""
    torch.manual_seed(0)
    return Encoder((32, 32), 16, 3, Size(192, 4, 3), depth_scaled_init=scaled, init_std=std)


@pytest.mark.parametrize("std", [0.02, 0.05])
@pytest.mark.parametrize("scaled", [True, False])
def test_weights_start_with_their_std(scaled, std):
    """5 %: the std of 36,864 or more normal numbers is known to 0.37 %, 17 of them are looked at."""
    for name, parameter in deep(scaled, std).named_parameters():
        if name.endswith("bias") or "norm" in name:
            continue
        expected = 0.02 if name.startswith("patch_embed") else std
        if scaled and name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
            expected /= math.sqrt(2 * (int(name.split(".")[1]) + 1))
        assert abs(parameter.std().item() / expected - 1) < 0.05, name


@pytest.mark.parametrize(("patch", "channels"), [(16, 3), (4, 3), (1, 1)])
def test_a_patch_embedding_starts_as_large_at_any_patch(patch, channels):
    """Against pixels of std 1, as large as that of 16 × 16 × 3 at std 0.02; 1/sqrt(2 · 4096) is 1.1 %."""
    torch.manual_seed(0)
    built = Encoder((patch * 4, patch * 4), patch, channels, Size(256, 1, 1))
    found = built.patch_embed(torch.randn(16, channels, patch * 4, patch * 4)).square().mean().sqrt().item()
    assert abs(found / (0.02 * math.sqrt(768)) - 1) < 0.1


def test_biases_start_at_zero_and_norms_at_one():
    for name, parameter in deep(True).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name


def test_an_unknown_norm_or_position_is_refused():
    with pytest.raises(ValueError, match="choose torch or apex"):
        encoder(norm="layer")
    with pytest.raises(ValueError, match="choose one of sincos, learned, low_resolution"):
        encoder(positions="sin")


@pytest.mark.parametrize("positions", ["sincos", "learned"])
@pytest.mark.parametrize("keep", [(2, 3), (2, 2, 3)], ids=["a selection", "two of each image"])
def test_patches_that_are_kept_are_embedded_as_among_all(keep, positions):
    """Values, and the gradients of all that makes them, against a whole embedding and a gather."""
    ours = encoder(positions=positions).double()
    batch, weight = images().double(), torch.randn(*keep, TINY.width, dtype=torch.float64).flatten(0, -3)
    index = torch.stack([torch.randperm(8)[: keep[-1]] for _ in range(math.prod(keep[:-1]))]).view(keep)
    taken = [
        torch.gather(ours.embed(batch), 1, part[..., None].expand(-1, -1, TINY.width))
        for part in index.view(-1, *keep[-2:])
    ]
    parameters = [p for p in ours.parameters() if p.requires_grad][:3]
    expected = torch.cat(taken)
    found = ours.embed(batch, index)
    torch.testing.assert_close(found, expected)
    both = (torch.autograd.grad((one * weight).sum(), parameters, allow_unused=True) for one in (found, expected))
    for ours_, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours_, theirs)


def test_pixels_that_are_not_kept_are_not_read():
    batch = images()
    batch[:, :, :4] = torch.nan  # the first row of patches
    assert encoder().embed(batch, torch.tensor([[2, 3], [4, 7]])).isfinite().all()


def test_a_last_block_gives_what_a_block_gives_at_the_end():
    """Output, and the gradients of input and weights, in float64."""
    torch.manual_seed(0)
    last, whole = transformer_blocks(TINY, "torch", last=LastBlock)[-1], transformer_blocks(TINY, "torch")[-1]
    whole.load_state_dict(last.state_dict())
    x, weight = torch.randn(2, 7, TINY.width).double().requires_grad_(), torch.randn(2, 3, TINY.width).double()
    both = []
    for output, block in ((last.double()(x, 3), last), (whole.double()(x)[:, -3:], whole)):
        both.append((output, *torch.autograd.grad((output * weight).sum(), [x, *block.parameters()])))
    for found, expected in zip(*both, strict=True):
        torch.testing.assert_close(found, expected)
