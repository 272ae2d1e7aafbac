"""`--supervise N`: one process on each machine starts the trainers there, and all machines start anew after a failure.

The first machine's keeps a hub that the others report to. A start begins when every machine is there with no trainer
left; what ends one on any machine ends it on all, and the next goes on from the newest complete checkpoint.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .guard import CAUSE_FILE
from .hostfile import Machines
from .roll_call import Hub, Member, Seen

_KILL = 15.0  # seconds for trainers to leave after the first signal that they fail with the others
_PATIENCE = 10.0  # seconds of waiting before it is said for whom
_SAYS = 4.0  # seconds in which a trainer's own words come, from whichever machine
_STEADY = 600.0  # seconds of training after which the wait before a restart begins at a second again
_FINAL = (2, 3)  # exit statuses that another start would end with, too: something to mend, a run that diverged
_STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)


@dataclass
class Terms:
    """How often, and how patiently, a run is started again: restarts, seconds to wait for machines, and of silence."""

    restarts: int
    wait: float = 300.0
    silence: float = 22.0


class Chief:
    """The first machine's decisions, as the judge of its hub: the word is the order of the moment.

    `start` and `stop` carry the number of the start they are about; `over` carries the exit status and why.
    """

    def __init__(self, names: Sequence[str], terms: Terms):
        self.names, self.terms = list(names), terms
        self.start, self.restarts = 0, 0
        self.first_cause: str | None = None
        # What others that already trained for a chief before this one are told.
        self._word: dict[str, Any] = {"order": "stop", "start": 0, "cause": "The first machine started anew"}
        self._since = time.monotonic()  # when the machines were first waited for, or began
        self._not_before, self._pause = 0.0, 1.0
        self._lives: dict[str, str] = {}
        self._stopped_since: float | None = None
        self._guessing_since: float | None = None

    def __call__(self, members: dict[str, Seen]) -> dict[str, Any]:
        if self._word["order"] == "stop":
            self._gather(members)
        elif self._word["order"] == "start":
            self._look(members)
        return self._word

    def _machines(self, members: dict[str, Seen]) -> list[tuple[str, Seen | None]]:
        """Every machine, by the name that it gives itself where it is there."""
        out = []
        for number, name in enumerate(self.names):
            seen = members.get(str(number))
            out.append((str(seen.facts["host"]) if seen else name, seen))
        return out

    def _gather(self, members: dict[str, Seen]) -> None:
        if self._contradiction(members):
            return
        now, machines = time.monotonic(), self._machines(members)
        missing = [name for name, seen in machines if seen is None or self._lost(seen)]
        if missing:
            if now - self._since > self.terms.wait:
                cause = f"{', '.join(missing)} did not come {'back ' * bool(self.start)}within {self.terms.wait:g} s"
                cause += f", after: {self.first_cause}" if self.first_cause else ""
                self._end(1, f"{cause}. Start the same command there")
            else:
                self._word = {**self._word, "missing": missing}
            return
        if now < self._not_before or any(seen.facts["state"] != "ready" for _, seen in machines if seen):
            return
        there = [seen.facts for _, seen in machines if seen]
        self.start = 1 + max(self.start, *(int(facts["start"]) for facts in there))
        self._lives = {str(number): facts["life"] for number, facts in enumerate(there)}
        self._since, self._stopped_since, self._guessing_since = now, None, None
        self._word = {
            "order": "start", "start": self.start, "port": _free_port(),
            "processes": [int(facts["processes"]) for facts in there],
        }  # fmt: skip

    def _contradiction(self, members: dict[str, Seen]) -> bool:
        """End the run where a machine was told of another number of machines."""
        for seen in members.values():
            if seen.facts["machines"] != len(self.names):
                self._end(
                    2, f"{seen.facts['host']} was told of {seen.facts['machines']} machines, and the first one of "
                    f"{len(self.names)}: start the same command on all"
                )  # fmt: skip
                return True
        return False

    def _look(self, members: dict[str, Seen]) -> None:
        states: list[str] = []
        causes: list[str] = []
        known: list[str] = []  # what a trainer said itself
        guessed: list[str] = []  # from its exit status alone
        final = None
        for number, (name, seen) in enumerate(self._machines(members)):
            assert seen is not None, "a start is ordered when all are there"
            facts = seen.facts
            states.append(facts["state"])
            if self._lost(seen):
                silent = f"was not heard of for {self.terms.silence:g} s: frozen, or cut off from the network"
                causes.append(f"{name} {silent if seen.connected else 'left: killed, or down'}")
            elif facts["life"] != self._lives[str(number)]:
                causes.append(f"{name} started anew")
            elif facts["state"] == "failed":
                (known if facts["known"] else guessed).append(facts["cause"])
                final = facts["status"] if facts["status"] in _FINAL else final
            elif facts["state"] == "ready" and facts["start"] == self.start:
                causes.append(f"{name} was cut off for a while")
            elif facts["state"] == "ready" and time.monotonic() - self._since > self.terms.silence:
                causes.append(f"{name} did not start")
        if guessed and not (known or causes):
            self._guessing_since = self._guessing_since or time.monotonic()
            if time.monotonic() - self._guessing_since < _SAYS:
                return
        cause = next(iter(known + causes + guessed), None)
        told = next((seen.facts["told"] for seen in members.values() if seen.facts.get("told")), None)
        if final:
            self._end(final, cause or "")
        elif cause and told:  # a run that was told to stop does not start again
            self._end(128 + told, cause)
        elif cause:
            self._fail(cause)
        elif all(state == "finished" for state in states):
            self._end(0, "")
        elif "stopped" in states:
            self._stopped_since = self._stopped_since or time.monotonic()
            late = time.monotonic() - self._stopped_since > self.terms.wait
            if late or all(state in ("stopped", "finished") for state in states):
                self._end(next(s.facts["status"] for s in members.values() if s.facts["state"] == "stopped"), "")

    def _lost(self, seen: Seen) -> bool:
        if seen.gone:
            return seen.facts["state"] not in ("stopped", "finished")
        return seen.away > 3 or seen.age > self.terms.silence

    def _fail(self, cause: str) -> None:
        self.first_cause = self.first_cause or cause
        if self.restarts == self.terms.restarts:
            before = f". Given up after {self.restarts} restarts; the first failure was: {self.first_cause}"
            self._end(1, cause + (before if self.restarts else ""))
            return
        self.restarts += 1
        now = time.monotonic()
        self._pause = 1.0 if now - self._since > _STEADY else min(60.0, 2 * self._pause)
        self._since, self._not_before = now, now + self._pause / 2
        again = f"{cause}. Restart {self.restarts} of {self.terms.restarts} follows"
        self._word = {"order": "stop", "start": self.start, "cause": again}

    def _end(self, status: int, cause: str) -> None:
        self._word = {"order": "over", "start": self.start, "status": status, "cause": cause}


class Supervisor:
    """This machine's part: it follows the chief's orders with `command`, of which it starts a process per device."""

    def __init__(self, machines: Machines, terms: Terms, command: Sequence[str]):
        self.machines, self.terms, self.command = machines, terms, list(command)
        self._hub: Hub | None = None
        self._trainers: list[subprocess.Popen] = []
        self._host = socket.gethostname()
        self._first_rank, self._signal, self._signalled = 0, 0, 0.0
        # One name for all lives of this machine's command, so that those that were killed leave nothing to sweep up.
        name = f"elsewhere-{os.getuid()}-{machines.port}-{machines.node}.cause"
        self._cause = Path(tempfile.gettempdir()) / name

    def run(self) -> int:
        """Train until the run is over, and return its exit status."""
        machines = self.machines
        # Whoever knows the address may speak; a fixed word keeps out what speaks of something else.
        token = "supervise"
        if machines.node == 0:
            try:
                self._hub = Hub(Chief(machines.names, self.terms), token, machines.port)
            except OSError as error:
                raise UserError(
                    f"Port {machines.port} of {self._host} is in use, by another run or a rest of one; choose "
                    "another with --master HOST:PORT."
                ) from error
        where = "localhost" if self._hub else machines.master
        facts = {
            "host": self._host, "machines": len(machines.names), "processes": machines.processes,
            "life": secrets.token_hex(4), "state": "ready", "start": 0,
        }  # fmt: skip
        member = Member(where, machines.port, token, str(machines.node), facts)
        before = {number: signal.signal(number, self._pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            status = self._follow(member)
        finally:
            self._stop()
            member.close()
            if self._hub:
                self._hub.close(patience=10)
            for number, handler in before.items():
                signal.signal(number, handler)
            self._cause.unlink(missing_ok=True)
        return status

    def _follow(self, member: Member) -> int:
        quiet, ticked, start = 0.0, time.monotonic(), 0
        waiting = ticked + _PATIENCE  # when it is next said who is waited for
        while True:
            time.sleep(0.2)
            now, word, ready = time.monotonic(), member.word, member.facts["state"] == "ready"
            # By own ticks, so that a machine that was frozen itself hears what has come before it acts.
            quiet = 0.0 if member.silence < 3 else quiet + min(now - ticked, 1.0)
            ticked = now
            if self._signal and "told" not in member.facts:
                member.tell(told=self._signal)
            if self._signal and not self._trainers and (ready or now - self._signalled > self.terms.silence):
                return 128 + self._signal
            lost = not word or quiet > self.terms.silence or (quiet > 5 and member.refused)
            if not ready:
                waiting = now + _PATIENCE
            elif quiet > self.terms.wait + (self.terms.silence if word else 0):
                raise UserError(self._unheard(member, quiet))
            elif now > waiting and (quiet > _PATIENCE or word.get("missing")):
                waiting = now + 3 * _PATIENCE
                self._say(self._waits(member, quiet))
            if lost and not ready:
                self._say(f"The first machine, {self.machines.master}, was not heard of; the trainers here stop")
                self._stop()
                member.tell(state="ready")
            if lost:
                continue
            order = word.get("order")
            if order == "over":
                self._stop()
                known = self._known_cause()
                if word["cause"] and not (known and known["cause"] == word["cause"]):  # said by a trainer here
                    self._say(word["cause"])
                return int(word["status"])
            if order == "start" and word["start"] > start:
                start = word["start"]
                self._begin(word["port"], word["processes"], first=start == 1)
                member.tell(state="running", start=start)
            elif order == "stop" and not ready:
                self._stop()
                self._say(word["cause"])
                member.tell(state="ready")
            elif self._trainers:
                self._look(member)

    def _begin(self, port: int, processes: list[int], first: bool) -> None:
        """Start the trainers here, `processes` of each machine."""
        machines = self.machines
        self._cause.unlink(missing_ok=True)
        self._first_rank, here = sum(processes[: machines.node]), processes[machines.node]
        environ = {
            **os.environ,
            "WORLD_SIZE": str(sum(processes)), "LOCAL_WORLD_SIZE": str(here), "GROUP_RANK": str(machines.node),
            "MASTER_ADDR": machines.master, "MASTER_PORT": str(port), CAUSE_FILE: str(self._cause),
        }  # fmt: skip
        if here > 1:
            environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
        # A later start finds what the first has begun.
        command = [word for word in self.command if first or word != "--fresh"]
        for local in range(here):
            self._trainers.append(
                subprocess.Popen(
                    command,
                    env={**environ, "RANK": str(self._first_rank + local), "LOCAL_RANK": str(local)},
                    # Of its own group, so that a Ctrl-C comes to it once, from here.
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
            )

    def _look(self, member: Member) -> None:
        """Report what has become of the trainers, once all have ended or one has failed."""
        statuses = [trainer.poll() for trainer in self._trainers]
        bad = [status for status in statuses if status not in (None, 0, *_STOPPED)]
        if bad:
            end = time.monotonic() + _KILL  # the others leave with the first one's cause
            while time.monotonic() < end and not self._cause.exists() and None in statuses:
                time.sleep(0.2)
                statuses = [trainer.poll() for trainer in self._trainers]
            known = self._known_cause()
            rank = self._first_rank + statuses.index(bad[0])
            cause = known["cause"] if known else f"rank {rank} on {self._host} {_how(bad[0])}"
            status = known["status"] if known else (bad[0] if bad[0] > 0 else 128 - bad[0])
            member.tell(state="failed", cause=cause, status=status, known=known is not None)
            self._stop()
        elif None not in statuses:
            self._trainers = []
            stopped = [status for status in statuses if status]
            member.tell(state="stopped", status=stopped[0]) if stopped else member.tell(state="finished")

    def _known_cause(self) -> dict[str, Any] | None:
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self._cause.read_text(encoding="utf-8"))
        return None

    def _stop(self) -> None:
        """End the trainers here, whose checkpoints are complete or absent at any moment."""
        for trainer in self._trainers:
            if trainer.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(trainer.pid, signal.SIGKILL)
        for trainer in self._trainers:
            trainer.wait()
        self._trainers = []

    def _pass_on(self, number: int, _frame: object) -> None:
        """Give a signal to the trainers alone, not to their loader workers."""
        self._signal, self._signalled = number, time.monotonic()
        for trainer in self._trainers:
            if trainer.poll() is None:
                trainer.send_signal(number)

    def _waits(self, member: Member, quiet: float) -> str:
        missing = member.word.get("missing")
        if quiet <= _PATIENCE and missing:
            return f"Waiting for {', '.join(missing)}, {self.terms.wait:g} s at most"
        where = f"{self.machines.master}:{self.machines.port}"
        return f"No answer yet from {where}, the first machine{self._reason(member)}"

    @staticmethod
    def _reason(member: Member) -> str:
        return f" ({member.failure.strerror or member.failure})" if member.failure else ""

    def _unheard(self, member: Member, quiet: float) -> str:
        machines = self.machines
        return (
            f"{self._host} has no answer from {machines.master}:{machines.port}, the first machine, "
            f"for {quiet:.0f} s{self._reason(member)}: start the same command there, and look at names and firewall."
        )

    def _say(self, text: str) -> None:
        print(f"elsewhere: {text}.", file=sys.stderr, flush=True)


def _how(status: int) -> str:
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


_LIBC = ctypes.CDLL(None)


def _die_with_parent() -> None:
    """Let the kernel end a trainer whose supervisor was killed."""
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def supervise(machines: Machines, terms: Terms, arguments: Sequence[str]) -> int:
    """Run `elsewhere` with these arguments on all machines; returns the exit status. Raises UserError."""
    command = [sys.executable, "-m", "elsewhere.launch", *arguments]
    return Supervisor(machines, terms, command).run()
