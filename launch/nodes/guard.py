"""Ends a run on every rank when one has failed, with that one's error, and says who is missing where all wait."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed import DistError

from ...data.images import DataError
from ..errors import UserError
from .place import Place
from .roll_call import Hub, Member, Seen

CAUSE_FILE = "ELSEWHERE_CAUSE"  # in the environment: where a supervisor reads why its processes ended
_GONE = 3.0  # seconds after which a connection that was lost is not merely being made anew
_SECOND_HAND = 10.0  # seconds in which the cause of a collective's failure shows up, or it is one itself
_GRACE = 5.0  # seconds for a process to leave on its own once the cause is known
_LATER = 2.0  # seconds
_LONG = 5.0  # seconds at one thing after which it is worth saying where the collectives stand


class RankFailed(Exception):
    """Another rank's failure, in a sentence that names it, and the exit status that goes with it."""

    def __init__(self, cause: str, status: int):
        super().__init__(cause)
        self.status = status


def ranks(numbers: list[int]) -> str:
    """`rank 3` or `ranks 0-3, 7`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' * (len(numbers) > 1)} {text}"


def _where(found: Mapping[int, Seen]) -> str:
    """`rank 3 on n1` or `ranks 8-15 on n1`, of members by rank."""
    by_host: dict[str, list[int]] = {}
    for rank, seen in found.items():
        by_host.setdefault(str(seen.facts["host"]), []).append(rank)
    return ", ".join(f"{ranks(those)} on {host}" for host, those in by_host.items())


def _doing(facts: Mapping[str, Any]) -> str:
    step = facts.get("step")
    return f"{facts['doing']}" if step is None else f"at step {step}, {facts['doing']}"


class Judge:
    """Gives the word on the ranks that a hub hears: `{}`, or why the run ends and with which exit status.

    A rank that is silent for `silence` seconds, or that does not come to a collective (or to the start) within `wait`
    seconds, ends the run, as does one that says that it failed, or is gone.
    """

    def __init__(self, size: int, silence: float, wait: float):
        self.size, self.silence, self.wait = size, silence, wait
        self._begun = time.monotonic()
        self._word: dict[str, Any] = {}
        self._second_hand: float | None = None

    def __call__(self, members: dict[str, Seen]) -> dict[str, Any]:
        if not self._word:
            there = {int(name): seen for name, seen in members.items() if not seen.gone}
            found = self._failed(there) or self._lost(there) or self._absent(members) or self._stuck(there)
            if found:
                self._word = {"cause": found[0], "status": found[1]}
        return self._word

    def _failed(self, there: dict[int, Seen]) -> tuple[str, int] | None:
        found = [seen.facts["failed"] for seen in there.values() if "failed" in seen.facts]
        for failure in found:
            if not failure["second_hand"]:
                return failure["cause"], failure["status"]
        if not found:
            return None
        self._second_hand = self._second_hand or time.monotonic()
        if time.monotonic() - self._second_hand > _SECOND_HAND:
            return found[0]["cause"], found[0]["status"]
        return None

    def _lost(self, there: dict[int, Seen]) -> tuple[str, int] | None:
        # From when it was lost: one that was frozen may close an old connection and make a new one as it thaws.
        gone = {rank: seen for rank, seen in there.items() if seen.away > _GONE}
        if gone:
            return f"{_where(gone)} ended without a word ({_at(gone)}): killed, perhaps for want of memory", 1
        silent = {rank: seen for rank, seen in there.items() if seen.age > self.silence}
        if silent:
            were = "was" if len(silent) == 1 else "were"
            why = "frozen, or cut off from the network"
            return f"{_where(silent)} {were} not heard of for {self.silence:g} s ({_at(silent)}): {why}", 1
        return None

    def _absent(self, members: dict[str, Seen]) -> tuple[str, int] | None:
        if len(members) == self.size or time.monotonic() - self._begun < self.wait:
            return None
        came = {int(name): seen for name, seen in members.items()}
        return (
            f"{ranks([rank for rank in range(self.size) if rank not in came])} did not come to the start within "
            f"{self.wait:g} s, while {_where(came)} did: was the command started on every machine?"
        ), 1

    def _stuck(self, there: dict[int, Seen]) -> tuple[str, int] | None:
        if all(seen.facts["still"] < self.wait for seen in there.values()):
            return None
        for group, where in _groups(there).items():
            newest = max(entered for entered, _ in where.values())
            waiting = [rank for rank, (entered, done) in where.items() if entered == newest and done < newest]
            missing = {rank: there[rank] for rank, (entered, _) in where.items() if entered < newest}
            if waiting and missing and max(there[rank].facts["still"] for rank in waiting) >= self.wait:
                return (
                    f"{_where(missing)} did not come to collective {newest} of group {group} within {self.wait:g} s, "
                    f"where {ranks(waiting)} wait{'s' * (len(waiting) == 1)} ({_at(missing)})"
                ), 1
        return None


def _groups(there: Mapping[int, Seen]) -> dict[str, dict[int, tuple[int, int]]]:
    """By process group: of each rank that is in it, the last collective that it entered and that was completed."""
    out: dict[str, dict[int, tuple[int, int]]] = {}
    for rank, seen in there.items():
        for group, (entered, done) in seen.facts.get("collectives", {}).items():
            out.setdefault(group, {})[rank] = (entered, done)
    return out


def _at(found: Mapping[int, Seen]) -> str:
    return "; ".join(dict.fromkeys(_doing(seen.facts) for seen in found.values()))


class Guard:
    """This rank's part: it says where it is, learns why a run ends, and ends this process if it stays in a collective.

    Without a `member` (one process on its own) it does nothing.
    """

    def __init__(
        self, place: Place, silence: float = 22.0, member: Member | None = None, hub: Hub | None = None
    ):  # fmt: skip
        self.place, self.silence, self.member, self._hub = place, silence, member, hub
        self._step: int | None = None
        self._doing, self._since = "starting", time.monotonic()
        self._ending = threading.Event()
        self._said = False
        if member is not None:
            self._thread = threading.Thread(target=self._watch, name="guard", daemon=True)
            self._thread.start()

    def at(self, step: int | None, doing: str) -> None:
        """Note what the main thread does from now on."""
        self._step, self._doing, self._since = step, doing, time.monotonic()

    @property
    def cause(self) -> str | None:
        """Why the run ends, if it does."""
        return self.member.word.get("cause") if self.member else None

    def facts(self) -> dict[str, Any]:
        """What the hub hears of this rank."""
        still = time.monotonic() - self._since
        facts = {"host": self.place.host, "step": self._step, "doing": self._doing, "still": round(still, 1)}
        return facts | ({"collectives": collectives()} if still > _LONG else {})

    def _watch(self) -> None:
        member, quiet, ticked = self.member, 0.0, time.monotonic()
        assert member is not None
        while not self._ending.wait(member.interval / 2):
            now = time.monotonic()
            # By own ticks, so that a process that was frozen itself hears what has come before it judges.
            quiet = 0.0 if member.silence < member.interval * 2 else quiet + min(now - ticked, 1.0)
            ticked = now
            if member.word.get("cause"):
                self._leave(member.word["cause"], member.word["status"])
            # A little later than the others would hear of this rank's silence, so that their cause comes first.
            elif quiet > self.silence + _LATER or (member.refused and quiet > 2 * _GRACE):
                self._leave(
                    f"the first machine, {self.place.master}, was not heard of for {quiet:.0f} s "
                    f"({_doing(self.facts())} on {self.place.host}): its process ended, or the network is cut",
                    1,
                    _LATER,
                    own=True,
                )
            else:
                member.tell(**self.facts())

    def _leave(self, cause: str, status: int, grace: float = _GRACE, own: bool = False) -> None:
        """End this process soon, whatever its main thread waits for; `own` is a cause that only this rank knows of."""
        if self._ending.wait(grace):
            return
        # On the first machine it is rank 0 that was not heard of, so its neighbour speaks.
        self.say(cause, 1 if own and self.place.rank == self.place.local_rank == 1 else 0)
        note_cause(cause, status)
        # Before their parent, which they would outlive for seconds.
        for worker in multiprocessing.active_children():
            worker.kill()
        sys.stdout.flush()
        if self._hub is not None and self.member is not None:
            self.member.close()  # or the hub would wait for it
            self._hub.close(patience=_GRACE)
        os._exit(status)

    def say(self, cause: str, speaker: int = 0) -> None:
        """Say once on each machine, by the process `speaker` of it, why the run ends."""
        if not self._said and self.place.local_rank == speaker:
            print(f"elsewhere: {cause}.", file=sys.stderr, flush=True)
        self._said = True

    def failed(self, error: BaseException, of_machine: bool = False) -> None:
        """Tell all ranks of this one's failure, after saying it here; `of_machine`, the first of a machine does.

        Raises RankFailed where the failure is a collective's and comes from another rank's.
        """
        status = 2 if isinstance(error, UserError | DataError) else getattr(error, "status", 1)
        if getattr(error, "shared", False) and self.place.local_rank == 0:
            note_cause(str(error).rstrip("."), status)
        if self.member is None or isinstance(error, RankFailed) or getattr(error, "shared", False):
            return
        second_hand = _of_a_collective(error) or (of_machine and self.place.local_rank > 0)
        name = "" if status != 1 else f"{type(error).__name__}: "
        text = (str(error).strip() or type(error).__name__).rstrip(".")
        place = f"rank {self.place.rank} on {self.place.host} failed {_doing(self.facts())}"
        cause = f"{place}: {name}{text.splitlines()[0] if second_hand else text}"
        if not second_hand:
            print(f"elsewhere: {cause}.", file=sys.stderr, flush=True)
            if name:
                traceback.print_exception(error)
            self._said = True
            error.said = True  # pyright: ignore
            note_cause(cause, status)
        self.member.tell(**self.facts(), failed={"cause": cause, "status": status, "second_hand": second_hand})
        known = self.member.wait_for_word(lambda word: "cause" in word, _SECOND_HAND + 5 if second_hand else 3)
        if second_hand and known:
            cause, status = self.member.word["cause"], self.member.word["status"]
            self.say(cause)
            note_cause(cause, status)
            raise RankFailed(cause, status) from error

    def close(self) -> None:
        """Take leave; rank 0 waits a little for the others to do so."""
        if self.member is None:
            return
        self._ending.set()
        self.member.close()
        if self._hub is not None:
            self._hub.close(patience=_GRACE)


def note_cause(cause: str, status: int) -> None:
    """Leave a supervisor the cause; the first one counts."""
    path = os.environ.get(CAUSE_FILE)
    if path:
        try:
            with Path(path).open("x", encoding="utf-8") as file:
                json.dump({"cause": cause, "status": status}, file)
        except FileExistsError:
            pass


def _of_a_collective(error: BaseException) -> bool:
    """Whether an error may merely be what another rank's end looks like from here."""
    text = str(error)
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError)
        and any(word in text for word in ("gloo", "Gloo", "NCCL", "onnection closed", "onnection reset", "Broken pipe"))
    )


def collectives() -> dict[str, list[int]]:
    """By process group, the last collective that was entered and the last completed, of torch's flight recorder."""
    dumps: list[Callable] = []
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        dump = getattr(torch._C._distributed_c10d, name, None)  # pyright: ignore
        if dump is not None and (name == "_dump_fr_trace_json" or torch.cuda.is_initialized()):
            dumps.append(dump)
    out: dict[str, list[int]] = {}
    for dump, backend in zip(dumps, ("gloo", "nccl"), strict=False):
        try:
            found = json.loads(dump(False)).get("pg_status", {})
        except (RuntimeError, ValueError):
            continue
        for group, status in found.items():
            last = [int(status[f"last_{what}_collective"]) for what in ("enqueued", "completed")]
            out[f"{group} ({backend})"] = last
    return out
