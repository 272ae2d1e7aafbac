"""The order of samples over epochs, ranks and interruptions: every sample once an epoch, whatever happens."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elsewhere.data.images import DataError
from elsewhere.data.loader import Requests, order


def seen(n, batch, worlds, stops, seed=5, remainder="carry"):
    """`(epoch, sample)` of every step `[steps, batch, 2]`, where each life of the run has another number of ranks."""
    steps, start = [], 0
    for world, stop in zip(worlds, stops, strict=True):
        ranks = [
            list(Requests(n=n, seed=seed, global_batch=batch, micro_batch=batch // world, rank=rank, world=world,
                          start_step=start, stop_step=stop, remainder=remainder))
            for rank in range(world)
        ]  # fmt: skip
        for requests in zip(*ranks, strict=True):
            steps.append(np.concatenate([np.stack([r.epochs, r.ids], axis=1) for r in requests]))
        start = stop
    return np.array(steps)


@st.composite
def interrupted_runs(draw):
    batch = draw(st.sampled_from([6, 12, 24]))
    n = draw(st.integers(batch, 5 * batch))
    total = -(-draw(st.integers(1, 3)) * n // batch)
    cuts = sorted(draw(st.lists(st.integers(0, total), max_size=3)))
    worlds = draw(st.lists(st.sampled_from([1, 2, 3, 6]), min_size=len(cuts) + 1, max_size=len(cuts) + 1))
    return n, batch, worlds, [*cuts, total]


@settings(max_examples=60, deadline=None)
@given(interrupted_runs())
def test_interruptions_and_other_world_sizes_change_nothing(run):
    n, batch, worlds, stops = run
    found = seen(n, batch, worlds, stops).reshape(-1, 2)
    straight = np.concatenate([np.stack([np.full(n, epoch), order(5, epoch, n)], axis=1) for epoch in range(4)])
    assert np.array_equal(found, straight[: len(found)])


def test_every_sample_is_seen_once_an_epoch():
    found = seen(10, 4, [1], [5]).reshape(-1, 2)  # two epochs in five steps
    for epoch in (0, 1):
        assert sorted(found[found[:, 0] == epoch][:, 1].tolist()) == list(range(10))
    assert set(found[8:12, 0].tolist()) == {0, 1}, "the third step ends one epoch and begins the next"


def test_dropping_the_remainder_leaves_whole_steps():
    found = seen(10, 4, [1], [4], remainder="drop")
    assert found[..., 0].tolist() == [[0] * 4] * 2 + [[1] * 4] * 2
    assert np.array_equal(found[2:, :, 1].ravel(), order(5, 1, 10)[:8])


def test_another_remainder_is_refused():
    with pytest.raises(DataError, match=r"data\.remainder='pad' is unknown: choose carry or drop"):
        Requests(n=10, seed=0, global_batch=4, micro_batch=4, stop_step=1, remainder="pad")
