"""Collectives of gloo between nodes with limited networks, beside the planner's model: docs/benchmarks/scaling.md.

    python3 tests/measure_collectives.py --nodes 2,4 --rates 100e6,1e9 --latencies 0,1e-3 --json FILE

needs what tests/cluster.py needs, and tc. It takes minutes, and is no test.
"""

import argparse
import json
import os
import platform
import sys
from datetime import date, timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from elsewhere.launch.bench_collectives import SIZES, expected, measure_network, print_network_table
from elsewhere.tests.cluster import Cluster, available, cannot_delay, cannot_limit

PORT = 29400


def numbers(text: str) -> list[float]:
    return [float(item) for item in text.split(",") if item]


def on_a_node(sizes: list[int], rounds: int) -> None:
    """One rank: rank 0 prints what was measured as JSON."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=600))
    found = measure_network(torch.device("cpu"), 1, sizes, rounds)
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


def measure(nodes: int, rate: float, latency: float, mtu: int, sizes: list[int], rounds: int) -> dict:
    """What `measure_network` returns of a rank on each of `nodes` nodes, and the ring's times on the nominal link."""
    with Cluster(nodes, latency, mtu) as cluster:
        for node in range(nodes):
            cluster.limit(node, rate or None)
        place = {"MASTER_ADDR": cluster.host(0), "MASTER_PORT": str(PORT), "WORLD_SIZE": str(nodes)}
        words = ["--sizes", ",".join(map(str, sizes)), "--rounds", str(rounds)]
        ranks = [
            cluster.start(node, [sys.executable, __file__, *words], env={**place, "RANK": str(node)})
            for node in range(nodes)
        ]
        said = [rank.communicate()[0] for rank in ranks]
        if any(rank.returncode for rank in ranks):
            raise SystemExit("\n".join(said))
    found = json.loads(said[0].splitlines()[-1])
    nominal = expected(found, rate / 8, latency) if rate else found["rows"]
    for row, on_paper in zip(found["rows"], nominal, strict=True):
        row["nominal"] = on_paper["ring"]
    return {"nodes": nodes, "rate": rate, "added": latency, "mtu": mtu, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=numbers, default=[2, 4])
    parser.add_argument("--rates", type=numbers, default=[100e6, 1e9], help="bits/s of each node's link; 0: no limit")
    parser.add_argument("--latencies", type=numbers, default=[0.0], help="s added to each packet's way")
    # Ethernet's 1500 bytes cost more packets at 1 Gbit/s than two shared cores pass on.
    parser.add_argument("--mtu", type=int, default=9000, help="bytes of the largest packet")
    parser.add_argument("--sizes", type=numbers, default=list(SIZES), help="bytes of the whole tensor")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes]
    if "RANK" in os.environ:
        return on_a_node(sizes, arguments.rounds)
    reason = available() or cannot_limit() or (cannot_delay() if any(arguments.latencies) else None)
    if reason:
        raise SystemExit(f"{reason}; there is nothing to measure.")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {date.today().isoformat()}")
    results = []
    for rate in arguments.rates:
        for latency in arguments.latencies:
            for nodes in arguments.nodes:
                what = f"{nodes:.0f} nodes, {rate / 1e6:.0f} Mbit/s, {1e3 * latency:g} ms added"
                print(f"\n{what}; load average {os.getloadavg()[0]:.1f}", flush=True)
                result = measure(int(nodes), rate, latency, arguments.mtu, sizes, arguments.rounds)
                print_network_table(result)
                sys.stdout.flush()
                results.append(result)
                if arguments.json:
                    arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
