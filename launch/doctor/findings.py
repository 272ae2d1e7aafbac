"""What a probe of the machine found, and how probes are run so that none of them can end the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["ok", "note", "problem"]

_CHILD = """
import importlib, inspect, json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print is no answer
sys.path[:], module, name, arguments = json.loads(sys.argv[1])
said = getattr(importlib.import_module(module), name)(*arguments)
for one in said if inspect.isgenerator(said) else [said]:
    print(json.dumps(one), file=answers, flush=True)
answers.flush()
os._exit(0)  # without the threads of libraries, some of which abort a process that ends under them
"""


@dataclass(frozen=True)
class Finding:
    """A line of the report: what was looked at, how it is, what was found, and the command or setting that mends it.

    `problem` is what fails or misleads, `note` what is missing or slow; `needed` says that `elsewhere pretrain demo`
    cannot do without it.
    """

    name: str
    state: State
    found: str
    fix: str | None = None
    needed: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


class Silent(Exception):
    """A process that was asked gave no whole answer; `answers` are those it gave before."""

    def __init__(self, why: str, answers: list[Any]):
        super().__init__(why)
        self.answers = answers


def guarded(name: str, probe: Callable[[], Finding | Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of a probe as they come; what goes wrong in it is a finding, too."""
    try:
        found = probe()
        yield from [found] if isinstance(found, Finding) else found
    except Exception as error:
        yield Finding(name, "note", f"could not be looked at ({type(error).__name__}: {_first_line(str(error))})")


def ask_each(
    function: Callable[..., Any], *arguments: Any, timeout: float = 300.0, environ: dict[str, str] | None = None
) -> list[Any]:
    """What a function of this package returns or yields, asked in a process of its own, since it may abort that.

    Arguments and answers are what JSON can say. Raises `Silent` where the process ends early or takes longer than
    `timeout` seconds.
    """
    asked = json.dumps([sys.path, function.__module__, function.__name__, arguments])
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", _CHILD, asked], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, errors="replace", env={**os.environ, **(environ or {})},
        start_new_session=True,
    )  # fmt: skip
    why = None
    try:
        out, err = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        out, err = child.communicate()
        why = f"no answer within {timeout:g} s"
    whole = out[: out.rfind("\n") + 1]
    answers = [json.loads(line) for line in whole.splitlines()]
    if why is None and child.returncode:
        why = _last_line(err) or f"exit status {child.returncode}"
        if child.returncode < 0:
            why = f"ended by {signal.Signals(-child.returncode).name}" + (f": {_last_line(err)}" if err.strip() else "")
    if why is not None:
        raise Silent(why, answers)
    return answers


def ask(function: Callable[..., Any], *arguments: Any, **how: Any) -> Any:
    """The one answer of `ask_each`."""
    return ask_each(function, *arguments, **how)[-1]


def size(count: float) -> str:
    """Bytes in a few words, by powers of 1000."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 100 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count / 1e3:.3g} kB"


def _first_line(text: str) -> str:
    return (text.strip() or "no message").splitlines()[0][:300]


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:300]
