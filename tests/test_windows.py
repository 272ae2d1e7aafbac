"""Attention in windows, against masked attention over the whole grid."""

import pytest
import torch
from torch.nn import functional as F

from elsewhere.models.relative import Relative
from elsewhere.models.vit import Encoder, Size
from elsewhere.models.windows import WindowBlock, attend_in_windows, from_windows, global_blocks, to_windows

SIZE = Size(24, 4, 2)


def encoder(relative=None, grid=(6, 8), class_token=False):
    torch.manual_seed(0)
    made = Encoder((8 * grid[0], 8 * grid[1]), 8, 3, SIZE, "learned", class_token=class_token, relative=relative)
    for name, parameter in made.named_parameters():
        if "relative_" in name or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return made.double().eval()


def masked_attention(block, x, grid, window):
    """The block's residual branch of attention over the padded grid, in which other windows are masked."""
    rows, columns = (-(-side // window) * window for side in grid)
    normed = F.pad(block.norm1(x).unflatten(1, grid), (0, 0, 0, columns - grid[1], 0, rows - grid[0])).flatten(1, 2)
    down, across = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    of = (down // window * 1000 + across // window).flatten()
    attn = block.attn
    heads = SIZE.heads
    q, k, v = attn.qkv(normed).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-2, -1) * attn.scale
    if hasattr(attn, "relative_k"):  # offsets are the same in the whole grid as in a window
        logits = logits + attn.relative_k.logits(q, (rows, columns), None, attn.scale)
    logits = logits.masked_fill(of[:, None] != of[None, :], float("-inf"))
    out = attn.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    return out.unflatten(1, (rows, columns))[:, : grid[0], : grid[1]].flatten(1, 2)


@pytest.mark.parametrize(
    "relative", [None, Relative(), Relative(lookup="interpolated")], ids=["none", "hard", "between"]
)
@pytest.mark.parametrize("grid", [(6, 9), (5, 7)], ids=["whole", "padded"])
def test_a_block_in_windows_is_attention_over_the_grid_with_other_windows_masked(relative, grid):
    block = encoder(relative, grid).blocks[1]
    x = torch.randn(2, grid[0] * grid[1], SIZE.width, dtype=torch.float64)
    expected = x + masked_attention(block, x, grid, 3)
    expected = expected + block.mlp(block.norm2(expected))
    torch.testing.assert_close(WindowBlock(block, 3)(x, grid), expected, rtol=1e-9, atol=1e-10)


def test_windows_hold_their_patches_row_by_row():
    grid, window = (5, 7), 3
    numbers = torch.arange(1.0, 36).reshape(1, 35, 1)
    found = to_windows(numbers, grid, window).squeeze(-1)
    for number, part in enumerate(found):
        top, left = number // 3 * 3, number % 3 * 3
        expected = [
            7 * row + column + 1 if row < 5 and column < 7 else 0
            for row in range(top, top + 3) for column in range(left, left + 3)
        ]  # fmt: skip
        assert part.tolist() == expected


@pytest.mark.parametrize("grid", [(6, 6), (5, 7), (2, 2)])
def test_windows_are_taken_apart_again(grid):
    tokens = torch.randn(3, grid[0] * grid[1], 4)
    assert torch.equal(from_windows(to_windows(tokens, grid, 3), grid, 3), tokens)


# detectron2's ViTDet configurations name the others as windowed.
@pytest.mark.parametrize("depth, expected", [(12, [2, 5, 8, 11]), (24, [5, 11, 17, 23]), (32, [7, 15, 23, 31])])
def test_global_blocks_are_those_of_vitdet(depth, expected):
    assert global_blocks(depth) == expected


def test_windows_as_large_as_the_grid_change_nothing():
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    plain, windowed = encoder(Relative(), (6, 6)), encoder(Relative(), (6, 6))
    attend_in_windows(windowed.blocks, 6, 2)
    assert sum(isinstance(block, WindowBlock) for block in windowed.blocks) == 2
    torch.testing.assert_close(windowed(images), plain(images), rtol=1e-10, atol=1e-10)


def test_windows_keep_the_names_of_weights():
    windowed = encoder(Relative())
    names = list(windowed.state_dict())
    attend_in_windows(windowed.blocks, 3, 2)
    assert list(windowed.state_dict()) == names


def test_relative_positions_that_know_a_class_token_are_refused():
    with pytest.raises(ValueError, match=r"set model\.class_token=false"):
        attend_in_windows(encoder(Relative(), class_token=True).blocks, 3, 2)
