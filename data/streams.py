"""Random numbers as a function of what they are for, so that order, workers, ranks and restarts change nothing.

A stream is named by (seed, purpose, epoch, sample id). Philox-4x32-10 (Salmon et al., SC 2011) turns the name and
a running index into 32-bit words; numpy carries 32-bit words in uint64, where products do not overflow.
"""

from __future__ import annotations

import zlib

import numpy as np

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _philox(counter: list[np.ndarray], key: tuple[int, int]) -> list[np.ndarray]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def _philox_of_one(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """`_philox` of a single counter in plain integers, a tenth of numpy's time for arrays of one."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} is out of range: choose 0 … 4294967295.")


def words(
    seed: int, purpose: str, epoch: int | np.ndarray, sample_ids: np.ndarray, count: int, start: int = 0
) -> np.ndarray:
    """Raw 32-bit words `start … start+count-1` of each sample's stream: `[B, count]` uint32.

    `epoch` is one for all, or `[B]`. `start` must be a multiple of 4. `seed` has 32 bits, `epoch` 20, ids 44.
    """
    assert start % 4 == 0, "a stream is cut at whole Philox blocks"
    _check_seed(seed)
    ids = np.asarray(sample_ids, dtype=np.uint64)[:, None]
    blocks = -(-count // 4)
    index = np.arange(start // 4, start // 4 + blocks, dtype=np.uint64)[None, :]
    zero = np.zeros((ids.shape[0], blocks), dtype=np.uint64)
    high = (ids >> _SHIFT) | (np.asarray(epoch, dtype=np.uint64)[..., None] << np.uint64(12))
    counter = [zero + index, zero, zero + (ids & _LOW), zero + high]
    out = np.stack(_philox(counter, (seed, zlib.crc32(purpose.encode()))), axis=-1)
    return out.reshape(ids.shape[0], blocks * 4)[:, :count].astype(np.uint32)


def uniforms(
    seed: int, purpose: str, epoch: int | np.ndarray, sample_ids: np.ndarray, count: int, start: int = 0
) -> np.ndarray:
    """Uniform numbers in [0, 1) from each sample's stream: `[B, count]` float64 with 32 random bits."""
    return words(seed, purpose, epoch, sample_ids, count, start) * 2.0**-32


def generator(seed: int, purpose: str, epoch: int, sample_id: int = 0) -> np.random.Generator:
    """A numpy generator for one sample's stream, for draws whose number is not known in advance."""
    _check_seed(seed)
    sample_id, epoch = int(sample_id), int(epoch)  # numpy's would overflow
    counter = (0, 0, sample_id & 0xFFFFFFFF, sample_id >> 32 | epoch << 12)
    first = _philox_of_one(counter, (seed, zlib.crc32(purpose.encode())))  # the stream's first four words
    key = np.array([first[0] << 32 | first[1], first[2] << 32 | first[3]], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))
