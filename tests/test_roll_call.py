"""A hub hears its members, notices who is gone, and its word reaches all."""

import json
import socket
import time

import pytest

from elsewhere.launch.nodes.roll_call import Hub, Member


def until(true, seconds=5.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "did not come true"
        time.sleep(0.01)


@pytest.fixture
def hub():
    made = Hub(lambda members: {"sum": sum(seen.facts["x"] for seen in members.values())}, "token")
    yield made
    made.close()


def member(hub, name, x, interval=0.1):
    return Member("localhost", hub.port, "token", name, {"x": x}, interval)


def test_the_word_of_all_reaches_each(hub):
    first, second = member(hub, "0", 1), member(hub, "1", 2)
    assert first.wait_for_word(lambda word: word.get("sum") == 3, 5)
    second.tell(x=40)
    assert first.wait_for_word(lambda word: word.get("sum") == 41, 5)
    for one in (first, second):
        one.close()


def test_leaving_is_told_from_a_lost_connection(hub):
    first, second = member(hub, "0", 1), member(hub, "1", 2)
    until(lambda: len(hub.members) == 2)
    first.close()
    until(lambda: hub.members["0"].gone)
    second._ending = True  # so that it does not come again
    with socket.create_connection(("localhost", hub.port)) as killed:
        killed.sendall(json.dumps({"token": "token", "name": "2", "facts": {"x": 0}}).encode() + b"\n")
        until(lambda: "2" in hub.members)
        assert hub.members["2"].connected
        hub.members["2"].heard -= 20  # a silence before
    until(lambda: not hub.members["2"].connected)
    assert not hub.members["2"].gone and hub.members["2"].away < 2 < hub.members["2"].age


def test_a_member_comes_again_when_the_hub_does():
    first = Hub(lambda members: {"hub": 1}, "token")
    one = member(first, "0", 1)
    assert one.wait_for_word(lambda word: word.get("hub") == 1, 5)
    first.close()
    until(lambda: not one.connected)
    second = Hub(lambda members: {"hub": 2}, "token", first.port)
    assert one.wait_for_word(lambda word: word.get("hub") == 2, 5)
    one.close()
    second.close()


@pytest.mark.parametrize(
    "said",
    [
        {"token": "another", "name": "9", "facts": {"x": 1}},
        {"token": "token", "facts": {"x": 1}},
        {"token": "token", "name": "9", "facts": [1]},
        "no object",
    ],
)
def test_strangers_are_not_heard(hub, said):
    with socket.create_connection(("localhost", hub.port)) as stranger:
        stranger.sendall(json.dumps(said).encode() + b"\n")
        stranger.settimeout(5)
        assert stranger.recv(100) == b""
    assert not hub.members


def test_a_line_without_an_end_is_not_kept(hub):
    with socket.create_connection(("localhost", hub.port)) as stranger:
        stranger.settimeout(5)
        with pytest.raises(OSError):  # a reset, or a broken pipe
            while True:
                stranger.sendall(b"x" * (1 << 16))


def test_a_port_that_is_taken_is_an_error(hub):
    with pytest.raises(OSError):
        Hub(lambda members: {}, "token", hub.port)


def test_a_hub_that_closes_does_not_wait_for_who_is_silent(hub):
    with socket.create_connection(("localhost", hub.port)) as frozen:
        frozen.sendall(json.dumps({"token": "token", "name": "2", "facts": {"x": 0}}).encode() + b"\n")
        until(lambda: "2" in hub.members)
        hub.members["2"].heard -= 60
        begun = time.monotonic()
        hub.close(patience=60)
        assert time.monotonic() - begun < 30
