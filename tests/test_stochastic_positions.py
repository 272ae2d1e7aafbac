"""Stochastic positions: known words, noise that depends on its key alone and is normal, and the noised embedding."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from elsewhere.data import streams
from elsewhere.kernels.stochastic_positions import philox, position_noise, stochastic_positions

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
# Random123 1.14, tests/kat_vectors: counter, key, words of philox4x32-10.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]
SEED, EPOCH, COLUMNS = 11, 6, 24
IDS = torch.tensor([4, 2**32 + 4, 2**44 - 1, 0, 9])
BLOCKS = torch.tensor([0, 1, 2**15, 2**16 - 1, 3])
PATCHES = torch.tensor([[0, 3, 7], [7, 6, 5], [195, 0, 1], [2, 2, 255], [8, 9, 10]])


def draw(ids=IDS, blocks=BLOCKS, patches=PATCHES, columns=COLUMNS, seed=SEED, epoch=EPOCH):
    return position_noise(seed, torch.full_like(ids, epoch), ids, blocks, patches, columns)


def many(columns=64, images=256, patches=49):
    """Noise of many images, `[images, patches, columns]`."""
    ids = torch.arange(images)
    return draw(ids, torch.zeros_like(ids), torch.arange(patches).expand(images, -1), columns)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_words(counter, key, expected):
    found = philox(tuple(torch.tensor([c]) for c in counter), key)
    assert [int(word) for word in found] == list(expected)


def test_philox_agrees_with_the_one_in_numpy():
    """Two implementations that carry their products differently: int64 that wraps, uint64 that does not."""
    rng = np.random.default_rng(0)
    for key in [(0, 0), *rng.integers(0, 2**32, (8, 2)).tolist()]:
        counter = rng.integers(0, 2**32, (4, 500), dtype=np.uint64)
        found = philox(tuple(torch.from_numpy(c.astype(np.int64)) for c in counter), tuple(key))
        expected = streams._philox(list(counter), tuple(key))
        assert np.array_equal(torch.stack(found).numpy(), np.stack(expected).astype(np.int64))


def test_noise_equals_the_documented_key_and_box_muller_in_float64():
    """The layout of key and counter is part of a run's seed: float32 sine and cosine differ by 1e-6 at |n| < 6."""
    quads = COLUMNS // 4
    expected = np.empty((*PATCHES.shape, COLUMNS))
    for row, (sample, block) in enumerate(zip(IDS.tolist(), BLOCKS.tolist(), strict=True)):
        for place, patch in enumerate(PATCHES[row].tolist()):
            for quad in range(quads):
                counter = [quad | block << 16, patch, sample & 0xFFFFFFFF, sample >> 32 | EPOCH << 12]
                words = streams._philox([np.array([c], dtype=np.uint64) for c in counter], (SEED, 0x53746F50))
                a, b, c, d = ((int(word[0] >> np.uint64(9)) + 0.5) / 2**23 for word in words)
                for lane, (radius, turn) in enumerate([(a, b), (a, b - 0.25), (c, d), (c, d - 0.25)]):
                    value = np.sqrt(-2 * np.log(radius)) * np.cos(2 * np.pi * turn)
                    expected[row, place, lane * quads + quad] = value
    assert np.abs(draw().numpy() - expected).max() < 1e-5


def test_a_row_has_its_noise_in_any_order():
    shuffled = torch.tensor([3, 0, 4, 2, 1])
    assert torch.equal(draw(IDS[shuffled], BLOCKS[shuffled], PATCHES[shuffled]), draw()[shuffled])


def test_a_row_has_its_noise_in_any_batch():
    alone = [draw(IDS[i : i + 1], BLOCKS[i : i + 1], PATCHES[i : i + 1]) for i in range(len(IDS))]
    assert torch.equal(torch.cat(alone), draw())


def test_a_patch_has_its_noise_in_any_block_of_patches():
    assert torch.equal(torch.cat([draw(patches=PATCHES[:, :1]), draw(patches=PATCHES[:, 1:])], dim=1), draw())


@pytest.mark.parametrize("part", ["seed", "epoch", "id", "id above 32 bits", "block", "patch"])
def test_every_part_of_the_key_matters(part):
    changed = {
        "seed": {"seed": SEED + 1}, "epoch": {"epoch": EPOCH + 1}, "id": {"ids": IDS ^ 1},
        "id above 32 bits": {"ids": IDS ^ 2**32}, "block": {"blocks": BLOCKS ^ 1}, "patch": {"patches": PATCHES ^ 1},
    }[part]  # fmt: skip
    other = draw(**changed)
    # Equal values can fall together by chance in 23 bits, whole rows of them cannot.
    assert (other == draw()).float().mean() < 0.01


def test_an_id_above_32_bits_is_not_the_one_below():
    low, high = (draw(torch.tensor([i]), BLOCKS[:1], PATCHES[:1]) for i in (4, 2**32 + 4))
    assert not torch.equal(low, high)


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 23, 25])
def test_any_number_of_columns(columns):
    found = draw(columns=columns)
    whole = draw(columns=-(-columns // 4) * 4)
    assert found.shape == (*PATCHES.shape, columns)
    assert torch.equal(found, whole[..., :columns])


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"patches": PATCHES[0]}, r"patches has to be \[R, N\], and is \[3\]"),
        ({"patches": PATCHES.float()}, "patches has to hold integers, and is torch.float32"),
        ({"epochs": torch.ones(5, dtype=torch.bool)}, "epochs has to hold integers, and is torch.bool"),
        ({"sample_ids": IDS[:4]}, r"sample_ids has to be \[R\], and is \[4\] where patches is \[5, 3\]"),
        ({"blocks": BLOCKS[:, None]}, r"blocks has to be \[R\], and is \[5, 1\] where patches is \[5, 3\]"),
        ({"blocks": BLOCKS.to("meta")}, "blocks is on meta and patches on cpu; move one of them"),
        ({"seed": 2**32}, "seed=4294967296 has more than 32 bits"),
        ({"seed": -1}, "seed=-1 has more than 32 bits or is negative"),
        ({"columns": 0}, "0 columns of noise: at least 1"),
        ({"columns": 2**18}, "at most 262,140 fit the counter"),
        ({"dtype": torch.float64}, "dtype=torch.float64 is not for noise"),
        ({"kernels": "cuda"}, "kernels='cuda' is not known"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(changed, words, kernels):
    given = {"seed": SEED, "epochs": IDS, "sample_ids": IDS, "blocks": BLOCKS, "patches": PATCHES, "columns": 8}
    with pytest.raises(ValueError, match=words):
        position_noise(**{**given, "kernels": kernels, **changed})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_noise_is_scaled_in_float32_and_rounded_once(dtype):
    found = position_noise(SEED, IDS % 9, IDS, BLOCKS, PATCHES, COLUMNS, scale=0.2, dtype=dtype)
    expected = position_noise(SEED, IDS % 9, IDS, BLOCKS, PATCHES, COLUMNS) * 0.2
    assert torch.equal(found, expected.to(dtype))


def test_noise_is_float32_and_bounded_by_its_23_bits():
    found = many()
    assert found.dtype == torch.float32
    assert found.abs().max() <= 5.77


def test_moments_are_those_of_a_standard_normal():
    """Within 4 standard errors of n independent draws."""
    found = many().double().flatten()
    n = len(found)
    for moment, expected, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((found**moment).mean() - expected) < 4 * (spread / n) ** 0.5, f"moment {moment}"


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_noise_is_normal(seed):
    """Kolmogorov–Smirnov at p > 1e-3; the seeds are fixed, so it passes always or never."""
    ids = torch.arange(400)
    found = draw(ids, torch.zeros_like(ids), torch.arange(16).expand(400, -1), 32, seed=seed)
    assert kstest(found.flatten().numpy(), "norm").pvalue > 1e-3


def test_each_column_is_normal():
    """The four lanes of a word go through different functions; p > 1e-3 / 64 for 64 tests."""
    found = many().flatten(0, 1).numpy()
    assert min(kstest(column, "norm").pvalue for column in found.T) > 1e-3 / found.shape[1]


@pytest.mark.parametrize("along", ["columns", "patches", "images", "blocks", "epochs"])
def test_no_correlation(along):
    """The largest of m correlations of n independent pairs stays below 5 / sqrt(n) for m < 10,000."""
    ids, patches = torch.arange(1000), torch.arange(4).expand(1000, -1)
    if along == "columns":
        rows = many().flatten(0, 1).T
    elif along == "patches":
        rows = many().transpose(0, 1).flatten(1)
    elif along == "images":
        rows = many(images=64).flatten(1)
    elif along == "blocks":
        rows = torch.stack([draw(ids, torch.full_like(ids, b), patches).flatten() for b in range(8)])
    else:
        rows = torch.stack([draw(ids, torch.zeros_like(ids), patches, epoch=e).flatten() for e in range(8)])
    correlation = torch.corrcoef(rows.double()).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / rows.shape[1] ** 0.5


def embedding(fixed):
    generator = torch.Generator().manual_seed(0)
    noise_width = 6 if fixed else 10
    table, weight, bias, noise = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in [(9, 6), (6, noise_width), (6,), (4, 3, noise_width)]
    )
    patches = torch.randint(9, (4, 3), generator=generator)
    return table, patches, noise, None if fixed else weight, None if fixed else bias


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "tied"])
def test_embedding_equals_the_formula(fixed, biased, dtype):
    table, patches, noise, weight, bias = embedding(fixed)
    expected = np.empty((4, 3, 6))
    for row in range(4):
        for place in range(3):
            moved = noise[row, place].numpy() if fixed else weight.numpy() @ noise[row, place].numpy()
            expected[row, place] = table[patches[row, place]].numpy() + moved
            if biased and not fixed:
                expected[row, place] += bias.numpy()
    args = [None if a is None else a.to(dtype) for a in (weight, bias if biased else None)]
    found = stochastic_positions(table.to(dtype), patches, noise.to(dtype), *args)
    assert np.abs(found.numpy() - expected).max() < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "tied"])
def test_embedding_gradients(fixed):
    table, patches, noise, weight, bias = embedding(fixed)
    leaves = [t.requires_grad_() for t in (table, weight, bias) if t is not None]

    def embed(table, weight=None, bias=None):
        return stochastic_positions(table, patches, noise, weight, bias)

    assert torch.autograd.gradcheck(embed, leaves)


def test_no_noise_leaves_the_position_alone():
    table, patches, noise, weight, _ = embedding(fixed=False)
    assert torch.equal(stochastic_positions(table, patches, 0 * noise, weight), table[patches])
