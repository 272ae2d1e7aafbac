"""How long a step takes: what ranks exchange, what they compute, and what loaders must deliver."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...models.jepa import Jepa
from ...models.method import Method
from .hardware import Gpu, Link
from .memory import FLOAT, Division, Weight, block_bytes, kept_gathered, numel, persistent
from .network import Kind, Network, collective_seconds

DDP_BUCKET = 25 * 2**20  # bytes of gradients that DistributedDataParallel sends at once

# Share of the data sheet's peak. Goals of this project for one H200 (45, 50 and 55 % of the 790 TFLOP/s that matrix
# products reach of 989), not measurements; smaller encoders have no goal, and no chance of it.
ASSUMED_MFU = {"base": 0.36, "large": 0.40, "huge": 0.44, "giant": 0.44}
SMALL_MFU = 0.20

# Images per CPU-second of one core, decoded and cropped to one and to four crops: the least of three runs from files,
# docs/benchmarks/data.md, photos of 500 × 375 pixels.
IMAGES_PER_CORE = {1: 605.0, 4: 365.0}


@dataclass(frozen=True)
class Exchange:
    """A collective of `size` bytes of whole tensors, `times` a step, among all ranks, one model's or its copies'."""

    what: str
    kind: Kind
    size: float
    times: float
    among: str = "all"  # all | shards | replicas


def exchanges(weights: list[Weight], by: Division, adversary: int = 0) -> list[Exchange]:
    """What every rank takes part in during a step of all its micro-batches; `adversary` counts its numbers."""
    out = []
    if by.ranks == 1:
        return out
    trained, micro = FLOAT * numel(weights, True), by.accumulation
    if by.kind == "fsdp":
        moving, still = (
            block_bytes([one for one in weights if one.trained == kind], by.shards) for kind in (True, False)
        )
        root, outside = moving.pop(""), still.pop("")
        out.append(Exchange("weights outside of blocks", "all_gather", root + outside, micro, "shards"))
        for what, sizes, times in (
            ("blocks, forward", moving, len(moving)),
            ("blocks, backward", moving, len(moving)),
            # In the backward the block before the student's first is fetched ahead, which is the teacher's last.
            ("teacher's blocks", still, len(still) + 1),
        ):
            if sizes:
                mean = sum(sizes.values()) / len(sizes)
                out.append(Exchange(what, "all_gather", mean, micro * times, "shards"))
        count, padded = 1 + len(moving), root + sum(moving.values())
        out.append(Exchange("gradients", "reduce_scatter", padded / count, count, "shards"))
        if by.replicas > 1:
            out.append(Exchange("gradients of replicas", "all_reduce", padded / by.shards / count, count, "replicas"))
    elif by.kind == "zero" and by.stage == 3:
        small = FLOAT * numel(persistent(weights, by))
        again = FLOAT * numel(weights, True) - FLOAT * numel(kept_gathered(weights, by), True)
        forward = FLOAT * numel(weights) - small
        bucket = FLOAT * float(by.zero.get("stage3_prefetch_bucket_size", 5e7))
        out += _in_pieces("weights, forward", "all_gather", forward, bucket, micro)
        out += _in_pieces("weights, backward", "all_gather", max(0.0, again), bucket, micro)
        out += _in_pieces("gradients", "reduce_scatter", trained, _bucket(by), micro)
        out += _in_pieces("small weights", "all_gather", small, bucket, 1)
    elif by.kind == "zero" and by.stage:
        # DeepSpeed sums buckets over all ranks, of which each keeps its part; ZeRO 2 does so for each micro-batch.
        out += _in_pieces("gradients", "all_reduce", trained, _bucket(by), micro if by.stage == 2 else 1)
        gathered = FLOAT * float(by.zero.get("allgather_bucket_size", 5e8))
        out += _in_pieces("weights after the step", "all_gather", trained, gathered, 1)
    else:
        size = DDP_BUCKET if by.kind == "ddp" else _bucket(by)
        out += _in_pieces("gradients", "all_reduce", trained, size, 1)
    if adversary:
        out.append(Exchange("adversary's gradients", "all_reduce", FLOAT * adversary, 1))
    return out


def _bucket(by: Division) -> float:
    return FLOAT * float(by.zero.get("reduce_bucket_size", 5e8))


def _in_pieces(what: str, kind: Kind, size: float, piece: float, times: int) -> list[Exchange]:
    """`size` bytes sent in messages of at most `piece`, `times` a step."""
    if size <= 0:
        return []
    count = max(1, -(-int(size) // int(piece)))
    return [Exchange(what, kind, size / count, count * times)]


def members(exchange: Exchange, by: Division) -> int:
    """The ranks that take part in one exchange."""
    return {"all": by.ranks, "shards": by.shards, "replicas": by.replicas}[exchange.among]


def sent(exchange: Exchange, by: Division) -> float:
    """Bytes that a rank sends for an exchange in a step, in a ring."""
    ranks = members(exchange, by)
    return exchange.times * exchange.size * (2 if exchange.kind == "all_reduce" else 1) * (ranks - 1) / ranks


def exchange_seconds(exchange: Exchange, by: Division, network: Network) -> float:
    """Seconds that an exchange takes of a step, at the links' full bandwidth."""
    if exchange.among == "replicas":
        # Neighbours in such a group are `shards` ranks apart, and as many groups share a node's network.
        apart = min(by.shards, network.ranks_per_node)
        network = replace(
            network, ranks_per_node=max(1, network.ranks_per_node // by.shards),
            between_bandwidth=network.between_bandwidth / apart,
        )  # fmt: skip
    return exchange.times * collective_seconds(exchange.kind, round(exchange.size), members(exchange, by), network)


def make_network(ranks_per_node: int, within: Link, between: Link) -> Network:
    """The network of two links of the table."""
    return Network(ranks_per_node, within.bandwidth, within.latency, between.bandwidth, between.latency)


def computed_again(method: Method, flops: float, policy: str | int) -> float:
    """Share of a step's operations that activation checkpointing adds: forwards of trained blocks.

    What `selective` computes again are no matrix products; other trained parts are counted as if they were blocks.
    """
    if policy in ("none", "selective"):
        return 0.0
    teacher = method.flops_per_image(0, 0, 0, 0) if isinstance(method, Jepa) else 0.0
    return (flops - teacher) / 3 / flops / (policy if isinstance(policy, int) else 1)


def compute_seconds(flops: float, gpu: Gpu, half: bool, mfu: float) -> float:
    """Seconds for `flops` operations on one GPU at a share `mfu` of its peak."""
    return flops / (1e12 * (gpu.half if half else gpu.single) * mfu)


def assumed_mfu(size: str) -> float:
    """The share of the peak that is assumed for an encoder of a size."""
    return ASSUMED_MFU.get(size, SMALL_MFU)


def images_per_core(views: int) -> float:
    """Images per CPU-second that a loader's core decodes into `views` crops, between the measured numbers of crops."""
    one, four = (1 / IMAGES_PER_CORE[n] for n in (1, 4))
    return 1 / (one + (four - one) * (views - 1) / 3)
