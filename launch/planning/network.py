"""How long a collective takes on a network, by the ring model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["all_reduce", "all_gather", "reduce_scatter"]
Algorithm = Literal["ring", "gloo"]


@dataclass(frozen=True)
class Network:
    """What ranks send over: links within a node and one network that the ranks of a node share."""

    ranks_per_node: int
    inside_bandwidth: float  # bytes/s that each rank sends to another of its node
    inside_latency: float  # s
    between_bandwidth: float  # bytes/s that a node sends to others
    between_latency: float  # s


def collective_seconds(kind: Kind, size: int, ranks: int, network: Network, algorithm: Algorithm = "ring") -> float:
    """Seconds that a collective of `ranks` takes, for `size` bytes of the whole tensor (before it is split or after).

    Ranks form one ring, node after node, and a rank passes 1/n of the tensor on in each of n - 1 steps, twice as many
    for an all-reduce, which is a reduce-scatter and an all-gather. A step lasts as long as its slowest link: latency
    α + (size / n) / bandwidth β, so that

        T = (n - 1) · max over links (α + size / (n · β))        all-gather, reduce-scatter
        T = 2 (n - 1) · max over links (α + size / (n · β))      all-reduce

    Of a ring that crosses nodes, one link leaves each node and has the node's whole network. Adding numbers up, which
    is not sending, is left out. Source: Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication
    Operations in MPICH" (2005), sections 4.1, 4.4 and 4.5; that no all-reduce sends less: Patarasuk and Yuan,
    "Bandwidth Optimal All-reduce Algorithms for Clusters of Workstations" (2009).

    `gloo` is the ring as PyTorch's CPU backend runs it: the receiver of a part says that it is ready before the part
    leaves, which is another latency a step, and a reduce-scatter is an all-reduce of which each rank keeps its part
    (gloo's allreduce.cc, allgather.cc and transport/tcp/pair.cc; ProcessGroupGloo.cpp; docs/benchmarks/scaling.md).
    """
    if kind not in get_args(Kind):
        raise ValueError(f"{kind} is not a collective of this model; it knows {', '.join(get_args(Kind))}.")
    if ranks < 1 or size < 0 or network.ranks_per_node < 1:
        raise ValueError("A collective has at least one rank, and a size of 0 or more bytes.")
    if ranks == 1:
        return 0.0
    part = size / ranks
    messages = 2 if algorithm == "gloo" else 1
    links = []
    if network.ranks_per_node > 1:
        links.append(messages * network.inside_latency + part / network.inside_bandwidth)
    if ranks > network.ranks_per_node:
        links.append(messages * network.between_latency + part / network.between_bandwidth)
    twice = kind == "all_reduce" or (algorithm == "gloo" and kind == "reduce_scatter")
    return (2 if twice else 1) * (ranks - 1) * max(links)
