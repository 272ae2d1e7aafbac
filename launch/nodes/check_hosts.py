"""`elsewhere hosts FILE`: whether a hostfile is one, and whether its machines answer, before a launcher tries them."""

from __future__ import annotations

import argparse
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import UserError
from .hostfile import address, read_hostfile

_PATIENCE = 5.0


def add_hosts_command(commands: Any) -> None:
    """Add `hosts` to `commands`, what `add_subparsers` returned."""
    text = "Check a hostfile (HOST slots=N) and whether each machine answers, before a launcher tries them."
    command = commands.add_parser("hosts", help=text, description=text)
    command.add_argument("hostfile", type=Path)
    command.add_argument("--port", type=int, default=22, help="where a machine must answer (22, ssh)")


def run_hosts(arguments: argparse.Namespace) -> int:
    """Run `elsewhere hosts`; the exit status. Raises UserError that names every host which does not answer."""
    if not 0 < arguments.port < 65536:
        raise UserError(f"--port {arguments.port} is no port; give one of 1 to 65535, 22 for ssh.")
    hosts = read_hostfile(arguments.hostfile)
    addresses = {host: address(host, str(arguments.hostfile)) for host in hosts}
    twice = {found: [host for host in hosts if addresses[host] == found] for found in addresses.values()}
    for found, names in twice.items():
        if len(names) > 1:
            raise UserError(
                f"{arguments.hostfile}: {' and '.join(names)} are one machine, {found}; take one of them out."
            )
    with ThreadPoolExecutor(min(64, len(hosts))) as threads:
        answers = dict(
            zip(hosts, threads.map(lambda host: _answer(addresses[host], arguments.port), hosts), strict=True)
        )
    for host, slots in hosts.items():
        said = f"{slots} slot{'s' * (slots != 1)}" if slots else "a process per GPU"
        print(f"{host:24} {addresses[host]:16} {said:18} {answers[host] or f'answers on port {arguments.port}'}")
    silent = [host for host, answer in answers.items() if answer]
    if silent:
        raise UserError(
            f"{', '.join(silent)} of {arguments.hostfile} {'do' if len(silent) > 1 else 'does'} not answer on port "
            f"{arguments.port} ({answers[silent[0]]}): start the machine or its ssh, or take it out."
        )
    return 0


def _answer(where: str, port: int) -> str | None:
    """Why nothing answers there, or None."""
    try:
        socket.create_connection((where, port), timeout=_PATIENCE).close()
    except TimeoutError:
        return f"silent for {_PATIENCE:g} s"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None
