"""`elsewhere bench scaling`: its collectives are what they say, its rates and efficiencies too, and what it refuses."""

import multiprocessing
import socket
import time

import pytest
import torch
import torch.distributed as dist

from elsewhere.launch.bench_collectives import _slowest, expected, measure_collectives, measure_link
from elsewhere.launch.bench_scaling import bench_scaling, cores, print_scaling_table
from elsewhere.launch.errors import UserError
from elsewhere.launch.planning.network import Network

SMALL = [
    "data.path=digits", "model.width=24", "model.depth=1", "model.heads=3", "method.predictor.width=12",
    "method.predictor.depth=1", "method.predictor.heads=3", "engine.device=cpu", "monitor.tensorboard=false",
]  # fmt: skip
NETWORK = Network(1, 1e9, 1e-4, 1e9, 1e-4)


def in_ranks(count, work):
    """`work(rank)` in `count` forked ranks of gloo; what they return, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def run(rank):
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
        queue.put((rank, work(rank)))
        dist.destroy_process_group()

    children = [context.Process(target=run, args=(rank,), daemon=True) for rank in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    return [value for _, value in sorted((queue.get() for _ in children), key=lambda pair: pair[0])]


def test_the_slowest_rank_counts():
    assert in_ranks(3, lambda rank: _slowest(float(rank % 2), torch.device("cpu"))) == [1.0] * 3


def test_a_collective_is_timed_by_its_kind():
    def work(rank):
        reduce = dist.all_reduce

        def late(tensor, *args, **kwargs):
            time.sleep(0.05 if tensor.numel() > 1 else 0)
            return reduce(tensor, *args, **kwargs)

        dist.all_reduce = late
        rows = measure_collectives(torch.device("cpu"), NETWORK, [4096], rounds=3, seconds=0.1)
        return {row["kind"]: row["measured"] for row in rows}

    found = in_ranks(2, work)
    assert found[0] == found[1]
    assert 0.05 < found[0]["all_reduce"] < 0.1 and found[0]["all_gather"] < 0.03


def test_each_collective_has_the_bytes_that_its_row_says():
    def work(rank):
        seen = {}
        for name, whole in (("all_reduce", 0), ("all_gather_into_tensor", 0), ("reduce_scatter_tensor", 1)):
            original = getattr(dist, name)

            def spy(*tensors, original=original, name=name, whole=whole, **kwargs):
                if tensors[0].dtype == torch.float32:
                    seen[name] = tensors[whole].numel() * 4
                return original(*tensors, **kwargs)

            setattr(dist, name, spy)
        rows = measure_collectives(torch.device("cpu"), NETWORK, [10000], rounds=1, seconds=0.01)
        return seen, [row["size"] for row in rows]

    for seen, sizes in in_ranks(3, work):
        assert set(seen.values()) == {9996} and sizes == [9996] * 3  # the largest that three ranks divide


def test_a_link_is_timed_without_its_latency():
    def work(rank):
        receive = dist.recv

        def late(tensor, *args, **kwargs):
            done = receive(tensor, *args, **kwargs)
            time.sleep(0.04 + (0.1 if tensor.numel() > 1 else 0))
            return done

        dist.recv = late
        return measure_link(torch.device("cpu"), 1 << 20, rounds=1)

    found = in_ranks(2, work)
    assert found[0] == found[1]
    bandwidth, latency = found[0]
    assert 0.04 < latency < 0.06
    assert 0.09 < (1 << 20) / bandwidth < 0.15


def test_rows_are_expected_of_another_link():
    result = {
        "ranks": 4,
        "rows": [{"kind": "all_gather", "size": 4_000_000, "measured": 1.0, "ring": 9.0, "gloo": 9.0}],
    }
    row = expected(result, bandwidth=1e8, latency=0.001)[0]
    assert row["ring"] == pytest.approx(3 * (0.001 + 0.01)) and row["gloo"] == pytest.approx(3 * 0.012)
    assert row["measured"] == 1.0


@pytest.mark.parametrize("ranks", [(), (2, 4)])
def test_without_one_rank_there_is_nothing_to_compare_with(ranks):
    with pytest.raises(UserError, match="--ranks"):
        bench_scaling("demo", SMALL, ranks)


@pytest.mark.long
def test_one_and_two_ranks_are_compared_by_every_round(capsys):
    result = bench_scaling("demo", SMALL, (2, 1), batch=4, steps=2, rounds=2)
    one, two = result["rows"]
    assert (one["ranks"], two["ranks"], result["batch"]) == (1, 2, 4)
    assert one["efficiency"] == 1.0 and one["efficiency_quartiles"] == [1.0, 1.0]
    assert 0 < two["efficiency"] < 3 and two["images_per_second"] > 0
    print_scaling_table(result)
    assert f"of {cores()} cores" in capsys.readouterr().out


@pytest.mark.long
def test_ranks_beyond_the_cores_are_said_plainly(capsys, monkeypatch):
    monkeypatch.setattr("elsewhere.launch.bench_scaling.cores", lambda: 1)
    result = bench_scaling("demo", SMALL, (1, 2), "zero1", batch=2, steps=1, rounds=1)
    print_scaling_table(result)
    assert "2 ranks share 1 cores" in capsys.readouterr().out


@pytest.mark.long
def test_what_a_rank_refuses_is_one_sentence():
    with pytest.raises(UserError, match="replicas"):
        bench_scaling("demo", [*SMALL, "engine.replicas=3"], (1, 2), "fsdp", batch=2)
