"""How many files a process may have open: batches in shared memory, shards, connections to other ranks."""

from __future__ import annotations

import resource

from ..errors import UserError

FEWEST_FILES = 64  # with 24 a run waited for its loader for ever, with 40 it trained


def allow_open_files(ranks: int) -> None:
    """Let this process, and those that it starts, open the files that a run of `ranks` needs.

    Raises UserError where the system forbids even what one process needs, which would wait for its loader for ever.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ranks + 4096
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < FEWEST_FILES:
            raise UserError(
                f"A process may open only {soft} files at once here, and a run needs {FEWEST_FILES} or more: raise the "
                "hard limit (`ulimit -n 4096` as root, or `docker run --ulimit nofile=65536`)."
            )
