"""What a user did wrong, in one sentence with the way out."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Shown without a traceback; the command exits with status 2.

    `shared` says that every rank raises the same error, `said` that it was printed already.
    """

    def __init__(self, message: str, shared: bool = False, said: bool = False):
        super().__init__(message)
        self.shared, self.said = shared, said


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a ValueError of a constructor that checks a user's settings into a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def out_of_memory(error: RuntimeError, micro_batch: int) -> UserError | None:
    """What to do about torch's complaint that no memory is left; None if `error` is another one."""
    text = str(error)
    if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in text:
        return None
    found = text.split(". ")[1 if text.startswith("CUDA out of memory") else 0].strip().splitlines()[0]
    return UserError(
        f"Memory ran out ({found.rstrip('.')}): lower loader.micro_batch (now {micro_batch}; the batch stays what it "
        "is), set engine.activation_checkpointing=full, or divide the weights by engine.kind=fsdp; `elsewhere plan` "
        "says what fits."
    )


def first_of_machine() -> bool:
    """Whether this process says what is wrong: the first of its machine, whose log may be the only one at hand."""
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"


def print_error(error: Exception) -> None:
    """The error's sentence on standard error."""
    print(f"elsewhere: {error}", file=sys.stderr)
