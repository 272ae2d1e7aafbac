"""What is wrong before the processes of a run have met, told to those on other machines that wait for this one."""

from __future__ import annotations

import os
import time

from ..errors import UserError
from .place import find_place

_PATIENCE = 20.0


def announce(error: UserError) -> None:
    """Meet the others only to say why this machine does not take part, and mark `error` as said where that was done.

    On one machine alone every process knows, and its launcher ends them; of several, the first of each tells, while
    its neighbours wait, since a launcher ends all when one has left.
    """
    try:
        place = find_place(os.environ)
    except UserError:
        return
    if place.size == place.local_size:
        return
    if place.local_rank:
        time.sleep(_PATIENCE + 5)
        return
    from .guard import Guard, Judge
    from .meet import meet

    guard = Guard(place)
    try:
        _, hub, member = meet(place, Judge(place.size, _PATIENCE, _PATIENCE), _PATIENCE, guard.facts())
    except UserError:  # nobody is there
        return
    guard = Guard(place, _PATIENCE, member, hub)
    guard.failed(error)
    guard.close()
