"""How long collectives take between the ranks of a process group, beside what the planner's model expects of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
import torch.distributed as dist

from .planning.network import Kind, Network, collective_seconds

SIZES = tuple(1 << power for power in (16, 18, 20, 22, 25))  # bytes: 64 KB … 32 MB


def measure_link(device: torch.device, size: int = 8 << 20, rounds: int = 5) -> tuple[float, float]:
    """Bandwidth (bytes/s) and latency (s, one way) from rank 0 to rank 1, known to all ranks; every rank calls.

    Half of a small message's way there and back is the latency; a large one there and a small one back, without two
    latencies, is the bandwidth.
    """
    small, large = torch.zeros(1, device=device), torch.zeros(size // 4, device=device)
    found = torch.zeros(2, dtype=torch.float64)
    rank = dist.get_rank()

    def there_and_back(sent: torch.Tensor) -> float:
        start = time.perf_counter()
        if rank == 0:
            dist.send(sent, 1)
            dist.recv(small, 1)
        elif rank == 1:
            dist.recv(sent, 0)
            dist.send(small, 0)
        _finish(device)
        return time.perf_counter() - start

    there_and_back(large)  # connections open, and TCP finds its window
    both = statistics.median(there_and_back(small) for _ in range(10 * rounds))
    long = statistics.median(there_and_back(large) for _ in range(rounds))
    if rank == 0:
        found = torch.tensor([size / max(long - both, 1e-9), both / 2], dtype=torch.float64)
    found = found.to(device)
    dist.broadcast(found, 0)
    bandwidth, latency = found.tolist()
    return bandwidth, latency


def measure_collectives(
    device: torch.device, network: Network, sizes: Sequence[int] = SIZES, rounds: int = 5, seconds: float = 0.3
) -> list[dict[str, Any]]:
    """Times of each collective at each size in bytes of the whole tensor; every rank calls, and has the same rows.

    In a round it runs as often as fits into `seconds`, back to back, and the slowest rank's time counts. A row holds
    `measured` (the median of the rounds, s), its quartiles and what the model expects on `network`, as a ring
    (`ring`) and as gloo does it (`gloo`).
    """
    rows, ranks = [], dist.get_world_size()
    for kind in get_args(Kind):
        for size in sizes:
            run, size = _collective(kind, size, device)
            run()
            first = _slowest(_timed(run, 1, device), device)
            repeats = min(max(int(seconds / first), 1), 20)
            times = [_slowest(_timed(run, repeats, device), device) / repeats for _ in range(rounds)]
            low, middle, high = statistics.quantiles(times, n=4) if rounds > 1 else times * 3
            rows.append({
                "kind": kind, "size": size, "measured": middle, "quartiles": [low, high], "repeats": repeats,
                "ring": collective_seconds(kind, size, ranks, network),
                "gloo": collective_seconds(kind, size, ranks, network, "gloo"),
            })  # fmt: skip
    return rows


def measure_network(device: torch.device, local: int, sizes: Sequence[int] = SIZES, rounds: int = 5) -> dict[str, Any]:
    """The link between ranks 0 and 1 and the collectives of all ranks, of which `local` share a machine.

    With more machines than one, ranks 0 and 1 must be on different ones (`local` 1): the link stands for all others.
    """
    bandwidth, latency = measure_link(device, rounds=rounds)
    network = Network(local, bandwidth, latency, bandwidth, latency)
    return {
        "ranks": dist.get_world_size(), "bandwidth": bandwidth, "latency": latency, "rounds": rounds,
        "backend": dist.get_backend(), "rows": measure_collectives(device, network, sizes, rounds),
    }  # fmt: skip


def expected(result: dict[str, Any], bandwidth: float, latency: float) -> list[dict[str, Any]]:
    """The rows of `measure_network` with what the model expects of another link, e.g. the one that was bought."""
    network = Network(1, bandwidth, latency, bandwidth, latency)
    ranks = result["ranks"]
    return [
        {
            **row,
            "ring": collective_seconds(row["kind"], row["size"], ranks, network),
            "gloo": collective_seconds(row["kind"], row["size"], ranks, network, "gloo"),
        }
        for row in result["rows"]
    ]


def _collective(kind: str, size: int, device: torch.device) -> tuple[Callable[[], object], int]:
    """A collective of tensors of its own, and the bytes it really has: as many for each rank."""
    ranks = dist.get_world_size()
    part = max(size // (4 * ranks), 1)
    whole, own = torch.zeros(part * ranks, device=device), torch.zeros(part, device=device)
    run = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, own),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(own, whole),
    }[kind]
    return run, 4 * part * ranks


def _timed(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    dist.barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _finish(device)
    return time.perf_counter() - start


def _slowest(seconds: float, device: torch.device) -> float:
    most = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return float(most)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def print_network_table(result: dict[str, Any]) -> None:
    """Print what `measure_network` returned: a line for each collective and size."""
    gloo = result["backend"] == "gloo"
    print(
        f"{result['ranks']} ranks, {result['backend']}; from rank 0 to rank 1 {result['bandwidth'] / 1e6:.1f} MB/s, "
        f"{1e6 * result['latency']:.0f} µs"
    )
    print(f"{'collective':15} {'KB':>7} {'ms':>9} {'quartiles':>17} {'ring ms':>9} {'to ring':>8}", end="")
    print(f" {'gloo ms':>9} {'to gloo':>8}" if gloo else "")
    for row in result["rows"]:
        low, high = row["quartiles"]
        line = (
            f"{row['kind']:15} {row['size'] / 1024:>7.0f} {1e3 * row['measured']:>9.2f} "
            f"{f'{1e3 * low:.2f}–{1e3 * high:.2f}':>17} {1e3 * row['ring']:>9.2f} {row['measured'] / row['ring']:>8.2f}"
        )
        print(line + (f" {1e3 * row['gloo']:>9.2f} {row['measured'] / row['gloo']:>8.2f}" if gloo else ""))
