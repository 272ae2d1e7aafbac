"""The order of samples over epochs, ranks and interruptions: every sample once an epoch, whatever happens."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elsewhere.data.augment import Augment
from elsewhere.data.images import DataError
from elsewhere.data.loader import Loader
from elsewhere.data.order import Mixture, Permutations, Plan, Requests, epoch_length, permutation


def seen(order, batch, worlds, stops):
    """`(epoch, sample)` of every step `[steps, batch, 2]`, where each life of the run has another number of ranks."""
    steps, start = [], 0
    for world, stop in zip(worlds, stops, strict=True):
        plans = [
            Plan(seed=5, global_batch=batch, micro_batch=batch // world, rank=rank, world=world, start_step=start,
                 stop_step=stop)
            for rank in range(world)
        ]  # fmt: skip
        for requests in zip(*(Requests(order, plan) for plan in plans), strict=True):
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
    found = seen(Permutations(n, 5), batch, worlds, stops).reshape(-1, 2)
    straight = np.concatenate([np.stack([np.full(n, epoch), permutation(5, epoch, n)], axis=1) for epoch in range(4)])
    assert np.array_equal(found, straight[: len(found)])


class Numbers:
    """Images of their own number."""

    channels, classes = 1, None

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def read(self, i):
        return np.full((5, 6, 1), i, dtype=np.uint8)

    def label(self, i):
        return i

    def name(self, i):
        return str(i)


@pytest.mark.long
@settings(max_examples=8, deadline=None)
@given(interrupted_runs(), st.lists(st.integers(0, 4), min_size=4, max_size=4))
def test_batches_are_the_same_whatever_workers_ranks_and_interruptions(run, workers):
    n, batch, worlds, stops = run
    source, augment = Numbers(n), Augment(size=4, blur=0.0)
    start, found = 0, []
    for world, count, stop in zip(worlds, workers, stops, strict=False):
        plans = [
            Plan(seed=5, global_batch=batch, micro_batch=batch // world, rank=rank, world=world, start_step=start,
                 stop_step=stop, workers=count)
            for rank in range(world)
        ]  # fmt: skip
        loaders = [Loader(source, augment, None, Permutations(n, 5), plan) for plan in plans]
        found += [torch.cat([one.images for one in step]) for step in zip(*loaders, strict=True)]
        start = stop
    plan = Plan(seed=5, global_batch=batch, micro_batch=batch, stop_step=stops[-1])
    straight = [one.images for one in Loader(source, augment, None, Permutations(n, 5), plan)]
    assert len(found) == len(straight)
    assert all(torch.equal(one, other) for one, other in zip(found, straight, strict=True))


def test_every_sample_is_seen_once_an_epoch():
    found = seen(Permutations(10, 5), 4, [1], [5]).reshape(-1, 2)  # two epochs in five steps
    for epoch in (0, 1):
        assert sorted(found[found[:, 0] == epoch][:, 1].tolist()) == list(range(10))
    assert set(found[8:12, 0].tolist()) == {0, 1}, "the third step ends one epoch and begins the next"


def test_dropping_the_remainder_leaves_whole_steps():
    found = seen(Permutations(10, 5, epoch_length(10, 4, "drop")), 4, [1], [4])
    assert found[..., 0].tolist() == [[0] * 4] * 2 + [[1] * 4] * 2
    assert np.array_equal(found[2:, :, 1].ravel(), permutation(5, 1, 10)[:8])


def test_another_remainder_is_refused():
    with pytest.raises(DataError, match=r"data\.remainder='pad' is unknown: choose carry or drop"):
        epoch_length(10, 4, "pad")


SIZES, WEIGHTS = [7, 50, 3], [0.2, 0.7, 0.1]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=3), st.lists(st.sampled_from([1, 2, 3, 6]), min_size=4, max_size=4))
def test_a_mixture_is_the_same_however_it_is_interrupted(cuts, worlds):
    stops = [*sorted(cuts), 40]
    found = seen(Mixture(SIZES, WEIGHTS, 5), 12, worlds[: len(stops)], stops)
    straight = np.stack(Mixture(SIZES, WEIGHTS, 5).at(np.arange(480)), axis=1)
    assert np.array_equal(found.reshape(-1, 2), straight)


def test_each_data_set_of_a_mixture_has_whole_epochs_of_its_own():
    epochs, ids = Mixture(SIZES, WEIGHTS, 5).at(np.arange(25_000))
    start = 0
    for size in SIZES:
        mine = (ids >= start) & (ids < start + size)
        own, places = epochs[mine], ids[mine] - start
        assert (np.diff(own) >= 0).all()
        for epoch in range(own.max()):
            assert sorted(places[own == epoch]) == list(range(size))
        start += size


def test_a_mixture_keeps_its_shares():
    _, ids = Mixture(SIZES, WEIGHTS, 5).at(np.arange(20_000))
    shares = np.histogram(ids, [0, 7, 57, 60])[0] / 20_000
    assert shares.tolist() == WEIGHTS
    first = np.histogram(ids[:500], [0, 7, 57, 60])[0] / 500
    assert np.abs(first - WEIGHTS).max() < 0.08, "shares hold throughout, not one data set after another"


@pytest.mark.parametrize("weights", [[1, 0], [1, -1], [1, float("nan")], [1, 1e-9]])
def test_weights_that_draw_nothing_are_refused(weights):
    with pytest.raises(DataError, match=r"weights of data\.path"):
        Mixture([5, 5], weights, 0)
