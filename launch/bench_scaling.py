"""What more ranks on one machine bring: whole steps of 1, 2, 4 … ranks with the same batch each, in turns."""

from __future__ import annotations

import multiprocessing
import os
import platform
import socket
import statistics
from collections.abc import Sequence
from datetime import date
from multiprocessing.connection import Connection
from typing import Any

from .config import load_config, refuse_task
from .errors import UserError
from .host import cores


def bench_scaling(
    recipe: str,
    overrides: Sequence[str],
    ranks: Sequence[int] = (1, 2, 4),
    engine: str = "ddp",
    batch: int | None = None,
    steps: int = 5,
    rounds: int = 5,
    network: bool = False,
) -> dict[str, Any]:
    """Time steps of an engine on 1 and more local ranks, `batch` images a step and rank (weak scaling).

    Each number of `ranks` is a process group of its own that waits while the others take their `steps`, `rounds`
    times. Processes share the cores evenly at the largest number of ranks, and have as many threads at every other.
    Returns machine, versions, date and `rows` with images/s and the efficiency, images/s and rank relative to one rank
    in the same round, both with quartiles; with `network`, also each group's collectives beside the planner's model.
    Raises UserError for what cannot be measured.
    """
    counts = sorted(set(ranks))
    if not counts or counts[0] != 1:
        raise UserError(
            f"--ranks {','.join(map(str, ranks))} compares with nothing; let it hold 1, e.g. --ranks 1,2,4."
        )
    from .bench_engines import engine_settings

    overrides = [*overrides, *engine_settings(engine)]
    # Before the first is built: that takes seconds.
    refuse_task(load_config(recipe, overrides), "`elsewhere bench scaling`")
    threads = max(cores() // counts[-1], 1)
    groups: list[_Group] = []
    rows = []
    try:
        for count in counts:
            group = _Group(count, (recipe, overrides, batch, threads))
            groups.append(group)
            rows.append({**group.answers()[0], "ranks": count, "rates": []})  # one is built while no other is measured
        for _ in range(rounds):
            for row, group in zip(rows, groups, strict=True):
                row["rates"].append(row["ranks"] * row["batch"] * steps / max(group.ask(steps)))
        for row, group in zip(rows, groups, strict=True):
            if network and row["ranks"] > 1:
                row["network"] = group.ask("network")[0]
    finally:
        for group in groups:
            group.close()
    alone = rows[0]["rates"]
    for row in rows:
        rates = row.pop("rates")
        shares = [rate / one / row["ranks"] for rate, one in zip(rates, alone, strict=True)]
        row |= {"images_per_second": statistics.median(rates), "quartiles": _quartiles(rates)}
        row |= {"efficiency": statistics.median(shares), "efficiency_quartiles": _quartiles(shares)}
    import torch

    most = rows[-1]
    return {
        "hardware": most["hardware"], "on_cpu": most["on_cpu"], "cores": cores(), "threads": threads,
        "torch": torch.__version__, "python": platform.python_version(), "date": date.today().isoformat(),
        "recipe": recipe, "overrides": overrides, "engine": engine, "batch": most["batch"], "steps": steps,
        "rounds": rounds, "rows": rows,
    }  # fmt: skip


class _Group:
    """Processes of this machine that form one process group, each with a pipe to this one."""

    def __init__(self, count: int, case: tuple[str, list[str], int | None, int]):
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.children, self.pipes = [], []
        for rank in range(count):
            environment = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            ours, theirs = context.Pipe()
            values = {key: str(value) for key, value in environment.items()}
            child = context.Process(target=_run, args=(theirs, values, *case), daemon=True)
            child.start()
            theirs.close()
            self.children.append(child)
            self.pipes.append(ours)

    def ask(self, what: int | str) -> list[Any]:
        """Have every rank take steps, or measure the network; the answers by rank."""
        for pipe in self.pipes:
            try:
                pipe.send(what)
            except ConnectionError:
                continue  # its end of the pipe says so again, after what it last wrote there
        return self.answers()

    def answers(self) -> list[Any]:
        found = []
        for pipe in self.pipes:
            try:
                answer = pipe.recv()
            except (EOFError, ConnectionError) as error:
                raise UserError(
                    "A measured process ended early: it printed why, or memory ran out; then lower --batch or --ranks."
                ) from error
            if isinstance(answer, str):
                raise UserError(answer)
            found.append(answer)
        return found

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for child in self.children:
            child.join(10)
            child.kill()
            child.join()


def _run(
    pipe: Connection, environment: dict[str, str], recipe: str, overrides: list[str], batch: int | None, threads: int
) -> None:
    """One rank: build the case, then do what it is asked for; a sentence is what a user did wrong."""
    os.environ.update(environment)
    import torch

    from .bench_batches import fixed_batches
    from .bench_collectives import measure_network
    from .bench_engines import _stepper
    from .bench_loops import fresh_method
    from .engine.choose import build_engine, check_engine
    from .monitor import hardware
    from .world import join

    torch.set_num_threads(threads)
    world = None
    try:
        config = load_config(recipe, overrides)
        world = join(config.engine.device, group=True)
        on_cpu = world.device.type == "cpu"
        batch = batch or config.loader.micro_batch or (8 if on_cpu else 128)
        size = {"batch_size": batch * world.size}
        config = config.model_copy(update={"optim": config.optim.model_copy(update=size)})
        world.agree(lambda: check_engine(config, world, batch, 1))
        engine = build_engine(config, fresh_method(config, world), world, batch, 1)
        take = _stepper(engine, fixed_batches(config, world, batch), config.method.teacher.momentum)
        for _ in range(2):  # the first steps pay for caches, compilers and the optimiser's state
            take()
        pipe.send({"batch": batch, "hardware": hardware(world), "on_cpu": on_cpu})
        while True:
            what = pipe.recv()
            world.gather_host(None)  # ranks begin together
            if what == "network":
                pipe.send(measure_network(world.device, world.local_size))
            else:
                pipe.send(sum(take() for _ in range(what)))
    except UserError as error:
        pipe.send(str(error))
    except EOFError:
        pass  # all is measured
    finally:
        if world is not None:
            world.close()


def _quartiles(values: Sequence[float]) -> list[float]:
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else [*values] * 3
    return [low, high]


def print_scaling_table(result: dict[str, Any]) -> None:
    """Print what `bench_scaling` returned: a line for each number of ranks, and what the machine cannot show."""
    from .bench_collectives import print_network_table

    print(f"{result['hardware']}, torch {result['torch']}, Python {result['python']}, {result['date']}")
    words = f", {result['batch']} images per step and rank, {result['rounds']} rounds of {result['steps']} steps"
    print(" ".join([result["recipe"], *result["overrides"]]) + words)
    if result["on_cpu"]:
        most = result["rows"][-1]["ranks"]
        print(f"Every rank computes with {result['threads']} of {result['cores']} cores.")
        if most > result["cores"]:
            print(
                f"Up to {most} ranks share {result['cores']} cores: with more ranks than cores, ranks wait for each "
                "other's computing, and the efficiency says nothing about the network."
            )
    print(f"\n{'ranks':>5} {'images/s':>9} {'quartiles':>15} {'efficiency':>10} {'quartiles':>11}")
    for row in result["rows"]:
        low, high = row["quartiles"]
        least, most = row["efficiency_quartiles"]
        print(
            f"{row['ranks']:>5} {row['images_per_second']:>9.1f} {f'{low:.1f}–{high:.1f}':>15} "
            f"{row['efficiency']:>10.2f} {f'{least:.2f}–{most:.2f}':>11}"
        )
    for row in result["rows"]:
        if "network" in row:
            print()
            print_network_table(row["network"])
