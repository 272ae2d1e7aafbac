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


def first_of_machine() -> bool:
    """Whether this process says what is wrong: the first of its machine, whose log may be the only one at hand."""
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"


def print_error(error: Exception) -> None:
    """The error's sentence on standard error."""
    print(f"elsewhere: {error}", file=sys.stderr)
