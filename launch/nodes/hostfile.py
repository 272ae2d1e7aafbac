"""Which machines a supervised run has, and which of them this one is: from a hostfile, SLURM, flags, or alone."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from . import slurm

PORT = 29400


@dataclass(frozen=True)
class Machines:
    """All machines by name, this one's number among them, its processes, and where the first one listens."""

    names: list[str]
    node: int
    processes: int
    master: str
    port: int


def read_hostfile(path: Path) -> dict[str, int | None]:
    """The hosts of a file with lines `HOST slots=N` (without slots: None), as the deepspeed launcher takes it.

    Raises UserError that names the line which is no such, or a host that is there twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no text"
        raise UserError(f"The hostfile {path} cannot be read ({reason}); check --hostfile.") from error
    hosts: dict[str, int | None] = {}
    at: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        found = re.fullmatch(r"(\S+)(?:\s+slots\s*=\s*([1-9]\d{0,5}))?", line)
        if found is None:
            raise UserError(f"{path}, line {number}: {line!r} is not a host with a number; write HOST slots=8.")
        host, slots = found.groups()
        if host in hosts:
            raise UserError(f"{path}, line {number}: {host} is there already (line {at[host]}); take one of them out.")
        hosts[host], at[host] = int(slots) if slots else None, number
    if not hosts:
        raise UserError(f"The hostfile {path} names no host; write a line HOST slots=8 for each machine.")
    return hosts


def address(host: str, where: str) -> str:
    """The address of a host; raises UserError that says `where` it was named if it has none."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)[0][4][0])
    except OSError as error:
        raise UserError(f"{where}: {host} has no address here; correct the name, or write its address.") from error


def _is_here(address: str) -> bool:
    """Whether an address is one of this machine's: only such can be bound."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _own_line(hosts: list[str], path: Path) -> int:
    own = socket.gethostname()
    if own in hosts:
        return hosts.index(own)
    here = [number for number, host in enumerate(hosts) if _is_here(address(host, str(path)))]
    if len(here) == 1:
        return here[0]
    many = f"is {' and '.join(hosts[number] for number in here)}" if here else "is not among the hosts"
    raise UserError(f"This machine, {own}, {many} of {path} ({', '.join(hosts)}); give --node-rank.")


def find_machines(
    *,
    hostfile: Path | None = None,
    nodes: int | None = None,
    node_rank: int | None = None,
    master: str | None = None,
    processes: int | None = None,
    devices: int = 0,
    environ: Mapping[str, str] = os.environ,
) -> Machines:
    """The machines of a run; `devices` is the number of GPUs here, of which each gets a process by default.

    Raises UserError for a hostfile or flags that contradict themselves, and for more processes than GPUs.
    """
    step = None if hostfile or nodes else slurm.step(environ)
    slots = None
    if "RANK" in environ:
        raise UserError(
            "--supervise starts the processes of a machine itself: run the command alone on each machine, without "
            "torchrun or deepspeed."
        )
    first = None
    if hostfile is not None:
        hosts = read_hostfile(hostfile)
        names = list(hosts)
        if nodes not in (None, len(names)):
            raise UserError(f"--nodes {nodes} and the {len(names)} hosts of {hostfile} contradict; leave --nodes out.")
        for name in names:
            address(name, str(hostfile))
        node = _own_line(names, hostfile) if node_rank is None else node_rank
        slots, first, port = hosts[names[min(node, len(names) - 1)]], names[0], PORT
    elif step is not None and nodes is None:
        if step.tasks != step.nodes:
            raise UserError(
                f"--supervise starts the processes of a machine itself, and srun started {step.tasks} of it on "
                f"{step.nodes} nodes: give srun --ntasks-per-node=1."
            )
        names, node, first, port = step.hosts, step.node, step.first_host, step.port
    else:
        count = nodes or 1
        node = node_rank if node_rank is not None else 0
        names, port = [f"machine {number}" for number in range(count)], PORT
        names[min(node, count - 1)] = socket.gethostname()
        if count > 1 and (node_rank is None or master is None):
            raise UserError(
                f"--nodes {count} wants to know which machine this is and where the first one listens: add --node-rank "
                "N and --master HOST[:PORT], or give --hostfile FILE."
            )
        first = "localhost" if count == 1 else None
    if not 0 <= node < len(names):
        raise UserError(f"--node-rank {node} is not one of {len(names)} machines, which are counted from 0.")
    if master is not None:
        first, _, text = master.rpartition(":") if re.search(r":\d+$", master) else (master, "", str(port))
        port = int(text)
        if not 0 < port < 65536:
            raise UserError(f"--master {master}: {port} is no port; give one of 1 to 65535, or leave it out.")
        if node == 0 and not _is_here(address(first, "--master")):
            raise UserError(
                f"This machine, {socket.gethostname()}, is to be the first one, and --master {first} is another: give "
                "--node-rank 0 there, or this one's name."
            )
    assert first is not None
    if processes and slots and processes != slots:
        raise UserError(f"--processes {processes} and slots={slots} of {hostfile} contradict; leave --processes out.")
    wanted = processes or slots or devices or 1
    if devices and wanted > devices:
        raise UserError(
            f"{wanted} processes are asked for on {socket.gethostname()}, which has {devices} GPUs; lower --processes "
            "or the hostfile's slots, or use engine.device=cpu."
        )
    return Machines(names, node, wanted, first, port)
