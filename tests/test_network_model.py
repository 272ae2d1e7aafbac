"""The model of collectives: against a ring that is played out part by part, and against figures done by hand."""

import itertools

import pytest

from elsewhere.launch.planning.network import Network, collective_seconds

NETWORK = Network(
    ranks_per_node=4, inside_bandwidth=100e9, inside_latency=5e-6, between_bandwidth=10e9, between_latency=20e-6
)


def played(kind, size, ranks, network):
    """Seconds of a ring in which ranks hold sets of (part, who added to it) and pass a part on until all is done."""
    everyone = frozenset(range(ranks))
    held = [{part: frozenset([rank]) for part in range(ranks)} for rank in range(ranks)]
    seconds = 0.0

    def step(which, reduces):
        nonlocal seconds
        sent = [(rank, which(rank), held[rank][which(rank)]) for rank in range(ranks)]
        times = []
        for rank, part, adders in sent:
            to = (rank + 1) % ranks
            held[to][part] = held[to].get(part, frozenset()) | adders if reduces else adders
            if rank // network.ranks_per_node == to // network.ranks_per_node:
                times.append(network.inside_latency + size / ranks / network.inside_bandwidth)
            else:
                times.append(network.between_latency + size / ranks / network.between_bandwidth)
        seconds += max(times)

    if kind != "all_gather":
        for number in range(ranks - 1):
            step(lambda rank, number=number: (rank - number) % ranks, reduces=True)
        assert all(held[rank][(rank + 1) % ranks] == everyone for rank in range(ranks))
    else:
        held = [{(rank + 1) % ranks: everyone} for rank in range(ranks)]
    if kind != "reduce_scatter":
        for number in range(ranks - 1):
            step(lambda rank, number=number: (rank + 1 - number) % ranks, reduces=False)
        assert all(set(parts.values()) == {everyone} and len(parts) == ranks for parts in held)
    return seconds


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter"])
def test_the_formula_is_the_ring_played_out(kind):
    for ranks, size in itertools.product((2, 3, 4, 8, 12, 32), (0, 4096, 10**9)):
        expected = played(kind, size, ranks, NETWORK)
        assert collective_seconds(kind, size, ranks, NETWORK) == pytest.approx(expected, rel=1e-12)


def test_an_all_reduce_of_many_ranks_sends_the_tensor_twice():
    # 1 GB at 10 GB/s, out and back: 0.2 s, and 2 · 1023 latencies of 20 µs.
    assert collective_seconds("all_reduce", 10**9, 1024, NETWORK) == pytest.approx(0.2 + 0.04092, rel=2e-3)


def test_within_a_node_its_network_does_not_count():
    assert collective_seconds("all_gather", 4 * 10**9, 4, NETWORK) == pytest.approx(3 * (5e-6 + 1e9 / 100e9))


def test_gloo_asks_before_it_sends_and_reduces_all_to_scatter():
    # Parts of 2.5 MB at 10 GB/s: 250 µs each and two latencies of 20 µs; 3 steps, and 3 back.
    apart = Network(1, 1e9, 0.0, 10e9, 20e-6)
    assert collective_seconds("all_gather", 10**7, 4, apart, "gloo") == pytest.approx(3 * 290e-6)
    for kind in ("all_reduce", "reduce_scatter"):
        assert collective_seconds(kind, 10**7, 4, apart, "gloo") == pytest.approx(6 * 290e-6)


def test_one_rank_sends_nothing():
    assert collective_seconds("all_reduce", 10**9, 1, NETWORK) == 0


@pytest.mark.parametrize("arguments", [("broadcast", 1, 2), ("all_reduce", -1, 2), ("all_reduce", 1, 0)])
def test_what_is_no_collective_is_refused(arguments):
    with pytest.raises(ValueError):
        collective_seconds(*arguments, NETWORK)
