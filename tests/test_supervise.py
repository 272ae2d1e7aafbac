"""What the first machine of a supervised run decides, machine by machine."""

import time

import pytest

from elsewhere.launch.nodes import supervise
from elsewhere.launch.nodes.roll_call import Seen
from elsewhere.launch.nodes.supervise import Chief, Terms


class Two:
    """Two machines as their chief sees them."""

    def __init__(self, restarts=1, wait=300.0):
        self.chief = Chief(["n0", "machine 1"], Terms(restarts, wait, 30.0))
        self.members = {str(n): self.seen(n) for n in range(2)}

    @staticmethod
    def seen(number, age=0.0, away=None, gone=False, **facts):
        usual = {
            "host": f"n{number}",
            "life": f"l{number}",
            "machines": 2,
            "processes": 2 + number,
            "state": "ready",
            "start": 0,
        }
        lost = None if away is None else time.monotonic() - away
        return Seen({**usual, **facts}, time.monotonic() - age, lost, gone)

    def put(self, number, **how):
        self.members[str(number)] = self.seen(number, **how)

    def word(self):
        return self.chief(self.members)

    def running(self):
        """After both have begun."""
        start = self.word()["start"]
        for number in range(2):
            self.put(number, state="running", start=start)
        assert self.word()["order"] == "start"
        return start


def test_a_start_waits_for_every_machine_and_says_where_the_processes_are():
    two = Two()
    missing = two.members.pop("1")
    assert two.word()["order"] == "stop"
    two.members["1"] = missing
    word = two.word()
    assert (word["order"], word["start"], word["processes"]) == ("start", 1, [2, 3]) and word["port"] > 0


def test_a_machine_that_never_comes_is_named():
    two = Two(wait=0.0)
    del two.members["1"]
    time.sleep(0.01)
    assert two.word()["cause"].startswith("machine 1 did not come within 0 s. Start the same command there")


def test_a_machine_that_was_told_of_others_is_named():
    two = Two()
    two.put(1, machines=3)
    assert two.word()["cause"] == (
        "n1 was told of 3 machines, and the first one of 2: start the same command on all"
    )  # fmt: skip
    assert two.word()["status"] == 2


def test_who_is_waited_for_is_told():
    two = Two()
    del two.members["1"]
    assert two.word()["missing"] == ["machine 1"]


def test_all_finished_is_the_end():
    two = Two()
    start = two.running()
    two.put(0, state="finished", start=start, gone=True, away=0)
    assert two.word()["order"] == "start"
    two.put(1, state="finished", start=start)
    assert (two.word()["order"], two.word()["status"]) == ("over", 0)


FAULTS = {
    "killed": ({"away": 4, "age": 4}, "n1 left: killed, or down"),
    "silent": ({"age": 31}, "n1 was not heard of for 30 s: frozen, or cut off from the network"),
    "another life": ({"life": "new", "state": "ready", "start": 0}, "n1 started anew"),
    "back from a cut": ({"state": "ready", "start": 1}, "n1 was cut off for a while"),
    "left while running": ({"gone": True, "away": 0}, "n1 left: killed, or down"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_starts_all_anew_once_all_are_ready(fault):
    how, cause = FAULTS[fault]
    two = Two(restarts=1)
    start = two.running()
    two.put(1, **{"state": "running", "start": start, **how})
    word = two.word()
    assert word["order"] == "stop" and word["cause"] == f"{cause}. Restart 1 of 1 follows"
    two.put(1, state="ready", start=start)
    assert two.word()["order"] == "stop"  # the other's trainers are still there
    two.put(0, state="ready", start=start)
    two.chief._not_before = 0.0
    assert two.word()["start"] == start + 1


def test_the_last_restart_is_followed_by_the_first_cause():
    two = Two(restarts=1)
    for cause in ("the first", "the second"):
        start = two.running()
        two.put(1, state="failed", start=start, cause=cause, status=1, known=True)
        word = two.word()
        for number in range(2):
            two.put(number, state="ready", start=start)
        two.chief._not_before = 0.0
    assert word["order"] == "over" and word["status"] == 1
    assert word["cause"] == "the second. Given up after 1 restarts; the first failure was: the first"


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("status", [2, 3])
def test_what_another_start_would_not_mend_is_the_end(status, known, monkeypatch):
    monkeypatch.setattr(supervise, "_SAYS", 0.0)
    two = Two(restarts=9)
    start = two.running()
    two.put(1, state="failed", start=start, cause="There is no such thing.", status=status, known=known)
    assert (two.word()["order"], two.word()["status"]) == ("over", status)


def test_a_known_cause_comes_before_a_neighbours_guess():
    two = Two()
    start = two.running()
    two.put(0, state="failed", start=start, cause="rank 0 on n0 ended with status 1", status=1, known=False)
    assert two.word()["order"] == "start"  # the other's report is under way
    two.put(1, state="failed", start=start, cause="rank 1 on n1 failed", status=1, known=True)
    assert two.word()["cause"].startswith("rank 1 on n1 failed")


def test_told_to_stop_is_no_failure():
    two = Two(restarts=9)
    start = two.running()
    two.put(0, state="stopped", start=start, status=143)
    assert two.word()["order"] == "start"  # the other still writes its checkpoint
    two.put(1, state="stopped", start=start, status=143, gone=True, away=0)
    assert (two.word()["order"], two.word()["status"]) == ("over", 143)


def test_a_failure_of_a_run_that_was_told_to_stop_is_no_reason_to_start_again():
    two = Two(restarts=9)
    start = two.running()
    two.put(0, state="running", start=start, told=15)
    two.put(1, state="failed", start=start, cause="x", status=1, known=True)
    assert (two.word()["order"], two.word()["status"]) == ("over", 143)


def test_the_pause_grows_and_begins_anew_after_a_long_steady_time():
    two = Two(restarts=9)
    pauses = []
    for steady in (0, 0, 0, 1000):
        start = two.running()
        two.chief._since -= steady
        two.put(1, state="failed", start=start, cause="x", status=1, known=True)
        two.word()
        pauses.append(round(two.chief._not_before - time.monotonic(), 1))
        for number in range(2):
            two.put(number, state="ready", start=start)
        two.chief._not_before = 0.0
    assert pauses == [1.0, 2.0, 4.0, 0.5]
