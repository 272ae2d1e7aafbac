"""Random streams: the generator's published words, and that a stream depends on its name alone."""

import numpy as np
import pytest

from elsewhere.data.streams import _philox, _philox_of_one, generator, uniforms, words

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
# Random123 1.14, tests/kat_vectors: counter, key, words of philox4x32-10.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]
IDS = np.array([5, 0, 2**32 + 5, 2**44 - 1, 17])


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_words(counter, key, expected):
    found = _philox([np.array([c], dtype=np.uint64) for c in counter], key)
    assert [int(word[0]) for word in found] == list(expected)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN, ids=["zeros", "ones", "pi"])
def test_philox_of_one_gives_the_published_words(counter, key, expected):
    assert _philox_of_one(counter, key) == expected


@pytest.mark.parametrize("name", [(0, "a", 0, 0), (2**32 - 1, "augment", 2**20 - 1, 2**44 - 1), (7, "b", 3, 2**33 + 5)])
def test_a_generator_is_keyed_by_the_first_words_of_its_stream(name):
    seed, purpose, epoch, sample = name
    first = words(seed, purpose, epoch, np.array([sample]), 4)[0].astype(np.uint64)
    key = first[0::2] << np.uint64(32) | first[1::2]
    expected = np.random.Generator(np.random.Philox(key=key)).random(8)
    assert np.array_equal(generator(*name).random(8), expected)


def test_a_stream_goes_on_where_start_says():
    whole = words(3, "masks", 2, IDS, 40)
    for start in (0, 4, 36):
        assert np.array_equal(words(3, "masks", 2, IDS, 40 - start, start), whole[:, start:])


def test_a_stream_is_not_cut_inside_a_block():
    with pytest.raises(AssertionError, match="whole Philox blocks"):
        words(3, "masks", 2, IDS, 4, start=2)


def test_a_longer_draw_begins_with_the_shorter_one():
    assert np.array_equal(words(3, "masks", 2, IDS, 7), words(3, "masks", 2, IDS, 13)[:, :7])


def test_a_sample_has_its_words_in_any_batch():
    whole = words(3, "masks", 2, IDS, 9)
    shuffled = [3, 1, 4, 0, 2]
    assert np.array_equal(words(3, "masks", 2, IDS[shuffled], 9), whole[shuffled])
    for row, sample in enumerate(IDS):
        assert np.array_equal(words(3, "masks", 2, IDS[row : row + 1], 9)[0], whole[row]), sample


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 4}, {"purpose": "augment"}, {"epoch": 3}, {"epoch": 2**20 - 1}, {"sample_ids": np.array([6])},
        {"sample_ids": np.array([2**32 + 5])}, {"start": 8},
    ],
    ids=str,
)  # fmt: skip
def test_every_part_of_a_name_matters(changed):
    name = {"seed": 3, "purpose": "masks", "epoch": 2, "sample_ids": np.array([5]), "count": 8}
    assert not np.intersect1d(words(**name), words(**{**name, **changed})).size


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match=rf"seed={seed} is out of range: choose 0 … 4294967295\."):
        words(seed, "masks", 0, IDS, 4)


def test_the_largest_seed_is_taken():
    assert words(2**32 - 1, "masks", 0, IDS, 4).shape == (5, 4)


def test_uniforms_are_the_words_as_fractions():
    found = uniforms(3, "masks", 2, IDS, 5)
    assert found.dtype == np.float64
    assert np.array_equal(found * 2**32, words(3, "masks", 2, IDS, 5))


def test_uniforms_fill_the_interval_evenly():
    """4 σ of a mean (σ = 1/sqrt(12 n)) and of sixteen bins' chi-square with 15 degrees of freedom."""
    found = uniforms(0, "masks", 0, np.arange(2000), 50).ravel()
    assert abs(found.mean() - 0.5) < 4 / np.sqrt(12 * found.size)
    counts = np.histogram(found, 16, (0, 1))[0]
    assert ((counts - found.size / 16) ** 2 / (found.size / 16)).sum() < 15 + 4 * np.sqrt(30)


def test_a_generator_repeats_its_stream():
    first, second = generator(3, "order", 2, 7), generator(3, "order", 2, 7)
    assert np.array_equal(first.permutation(100), second.permutation(100))


def test_a_generator_is_the_same_in_every_version():
    """A run must resume with its own order after an update: recorded with version 0.1.0 and numpy 2.4."""
    assert generator(3, "order", 2, 7).integers(0, 1000, 6).tolist() == [386, 398, 948, 352, 395, 865]


@pytest.mark.parametrize("changed", [{"seed": 4}, {"purpose": "augment"}, {"epoch": 3}, {"sample_id": 8}], ids=str)
def test_generators_of_other_names_differ(changed):
    name = {"seed": 3, "purpose": "order", "epoch": 2, "sample_id": 7}
    assert generator(**name).random() != generator(**{**name, **changed}).random()
