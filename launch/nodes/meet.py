"""How the processes of a run meet: one store, a hub that knows who came, and a word about who did not."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistError

from ..errors import UserError
from .place import Place
from .roll_call import Hub, Member, Seen

_KEY = "roll call"


def meet(
    place: Place, judge: Callable[[dict[str, Seen]], Mapping[str, Any]], patience: float, facts: dict[str, Any]
) -> tuple[Store, Hub | None, Member]:
    """The store of these processes, and a member of the hub that rank 0 keeps.

    Raises UserError if the store's port is taken, or if rank 0 does not show up within `patience` seconds.
    """
    assert place.master is not None
    store = _open_store(place, patience)
    hub = None
    if place.rank == 0:
        token = secrets.token_hex(8)
        hub = Hub(judge, token)
        store.set(_KEY, f"{hub.port} {token}")
    try:
        port, token = store.get(_KEY).decode().split()
    except DistError as error:
        raise UserError(
            f"Rank 0 has not come to {place.master}:{place.port} within {patience:g} s: was the command started on "
            "every machine?"
        ) from error
    interval = max(1.0, place.size / 512)  # so that the hub of many ranks has time left
    # Its own host does not need to be found by the name that others know it by.
    host = "localhost" if hub else place.master
    return store, hub, Member(host, int(port), token, str(place.rank), facts, interval)


def _open_store(place: Place, patience: float) -> Store:
    master, port, keeps = place.master, place.port, place.rank == 0 and not place.hosted
    assert master is not None
    _check_name(master)
    try:
        store = TCPStore(
            master, port, None, keeps, timedelta(seconds=patience), wait_for_workers=False, multi_tenant=True
        )  # pyright: ignore
    except (DistError, RuntimeError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise UserError(
                f"Port {port} of {place.host} is in use, by another run or a rest of one; choose another "
                "(MASTER_PORT, --master-port or --master_port)."
            ) from error
        raise UserError(
            f"{place.host} does not reach {master}:{port} within {patience:g} s: is that the first machine's name, was "
            "the command started there, and does a firewall let the port through?"
        ) from error
    return PrefixStore(f"elsewhere {place.life}", store)


def _check_name(master: str) -> None:
    """Say that a name is wrong before the store tries it for minutes."""
    try:
        socket.getaddrinfo(master, None)
    except OSError as error:
        raise UserError(
            f"The first machine's name {master} is not known on {socket.gethostname()}: check MASTER_ADDR or the "
            "hostfile, or give its address."
        ) from error
