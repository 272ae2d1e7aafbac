"""What ends a run, and how the sentence names rank, machine and step."""

import os
import signal
import time
from pathlib import Path

import pytest

from elsewhere.launch.nodes import guard
from elsewhere.launch.nodes.guard import Judge, ranks
from elsewhere.launch.nodes.roll_call import Seen


def seen(host="n0", age=0.0, away=None, gone=False, **facts):
    usual = {"host": host, "step": 17, "doing": "in forward and backward", "still": 0.1}
    lost = None if away is None else time.monotonic() - away
    return Seen({**usual, **facts}, time.monotonic() - age, lost, gone)


def four(**changed):
    """Four ranks on two machines, some of them changed."""
    usual = {"0": seen(), "1": seen(), "2": seen("n1"), "3": seen("n1")}
    return {**usual, **{name.removeprefix("r"): value for name, value in changed.items()}}


def word(members, wait=1800.0, silence=30.0):
    return Judge(len(members), silence, wait)(members).get("cause")


def test_nothing_is_said_while_all_is_well():
    assert word(four(r3=seen("n1", age=29))) is None
    assert word(four(r3=seen("n1", gone=True, away=100, age=100))) is None


def test_a_lost_connection_is_a_killed_rank():
    assert word(four(r3=seen("n1", age=4, away=4))) == (
        "rank 3 on n1 ended without a word (at step 17, in forward and backward): killed, perhaps for want of memory"
    )
    assert word(four(r3=seen("n1", age=1, away=1))) is None  # it may be coming again


def test_a_connection_that_is_closed_after_a_silence_may_be_made_anew():
    """As one that was frozen does when it thaws, or was cut off when the network is back."""
    assert word(four(r3=seen("n1", age=20, away=0.1))) is None


def test_a_silent_machine_is_named_with_its_ranks():
    found = word(four(r2=seen("n1", age=31), r3=seen("n1", age=32)))
    assert found is not None and found.startswith("ranks 2-3 on n1 were not heard of for 30 s")


def failure(cause, second_hand):
    return {"cause": cause, "status": 1, "second_hand": second_hand}


def test_a_ranks_own_error_comes_before_what_it_does_to_others(monkeypatch):
    judge = Judge(4, 30, 1800)
    first = four(r0=seen(failed=failure("a peer closed the connection", True)))
    assert judge(first) == {}
    both = four(
        r0=first["0"], r3=seen("n1", failed=failure("rank 3 on n1 failed at step 17: ValueError", False))
    )  # fmt: skip
    assert judge(both)["cause"] == "rank 3 on n1 failed at step 17: ValueError"


def test_a_broken_collective_without_another_cause_is_the_cause(monkeypatch):
    judge = Judge(4, 30, 1800)
    members = four(r0=seen(failed=failure("a peer closed the connection", True)))
    assert judge(members) == {}
    monkeypatch.setattr(guard, "_SECOND_HAND", 0.0)
    assert judge(members)["cause"] == "a peer closed the connection"


def test_the_word_does_not_change_once_it_is_spoken():
    judge = Judge(4, 30, 1800)
    spoken = judge(four(r3=seen("n1", age=4, away=4)))
    assert judge(four(r2=seen("n1", failed=failure("later", False)))) == spoken


def test_who_misses_a_collective_is_named_by_the_flight_recorder():
    waits = {"still": 61.0, "collectives": {"0 (gloo)": [12, 11]}}
    members = four(
        r0=seen(**waits), r1=seen(**waits), r2=seen("n1", **waits),
        r3=seen("n1", step=16, doing="waiting for data", still=62.0, collectives={"0 (gloo)": [11, 11]}),
    )  # fmt: skip
    assert word(members, wait=60.0) == (
        "rank 3 on n1 did not come to collective 12 of group 0 (gloo) within 60 s, where ranks 0-2 wait (at step 16, "
        "waiting for data)"
    )
    assert word(members, wait=70.0) is None


def test_long_work_of_all_ranks_is_no_waiting():
    busy = {"still": 100.0, "collectives": {"0 (gloo)": [11, 11]}}
    assert word(four(r0=seen(**busy), r1=seen(**busy), r2=seen("n1", **busy), r3=seen("n1", **busy)), wait=60.0) is None


def test_who_does_not_come_to_the_start_is_named():
    judge = Judge(4, 30, 0.0)
    there = {name: member for name, member in four().items() if name in "01"}
    assert judge(there)["cause"].startswith("ranks 2-3 did not come to the start within 0 s, while ranks 0-1 on n0 did")


@pytest.mark.parametrize(("numbers", "text"), [([3], "rank 3"), ([0, 1, 2, 7], "ranks 0-2, 7"), ([5, 4], "ranks 4-5")])
def test_ranks_in_words(numbers, text):
    assert ranks(numbers) == text


@pytest.mark.long
def test_of_a_machine_whose_first_rank_is_frozen_the_second_one_says_why_it_leaves(tiny, start, wait_for_step):
    launcher = start({**tiny, "engine.silence_seconds": 5, "optim.epochs": 1000, "monitor.log_every": 1}, ranks=2)
    wait_for_step(launcher, tiny["run.dir"], 3)
    started = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    (first,) = (pid for pid in started if b"\0RANK=0\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(int(first), signal.SIGSTOP)
    said = launcher.communicate(timeout=120)[0]  # it kills what is frozen
    assert launcher.returncode != 0
    assert said.count("was not heard of for") == 1 and "its process ended, or the network is cut" in said
