"""Who is there: members say every second how they are, a hub hears them, and its word goes back to all.

Lines of JSON over TCP, so that a member that is killed is known at once, and one that is frozen or cut off by its
silence, whatever the main thread of either side waits for.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_TICK = 0.25  # seconds between two looks of the hub
_DEAD = 10.0  # seconds without an answer after which a member connects anew
_LONGEST = 1 << 20  # bytes of a line; a member says far less


@dataclass
class Seen:
    """What the hub knows of a member: its latest facts, when they came, and since when it is not connected."""

    facts: dict[str, Any]
    heard: float  # of time.monotonic
    lost: float | None = None  # of time.monotonic, when its connection was closed
    gone: bool = False  # it took its leave

    @property
    def age(self) -> float:
        """Seconds since it was last heard."""
        return time.monotonic() - self.heard

    @property
    def connected(self) -> bool:
        return self.lost is None

    @property
    def away(self) -> float:
        """Seconds since its connection was lost; 0 while it is there."""
        return 0.0 if self.lost is None else time.monotonic() - self.lost


class _Line:
    """A connection of the hub: what has come of a line, and what has not been taken yet of the answers."""

    def __init__(self, connection: socket.socket):
        self.connection, self.read, self.unsent, self.name = connection, b"", b"", ""


class Hub:
    """Hears the members; `judge(members)` gives the word to all, from the latest of each, several times a second.

    `token` must stand in what a member says: a port is open to whoever reaches it. Raises OSError where `port` (0:
    any) is taken.
    """

    def __init__(self, judge: Callable[[dict[str, Seen]], Mapping[str, Any]], token: str, port: int = 0):
        self._judge, self._token = judge, token
        self.members: dict[str, Seen] = {}
        self._word = b""
        self._server = _listen(port)
        self.port: int = self._server.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="roll call", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        looked = 0.0
        while not self._ending.is_set():
            for key, _ in self._selector.select(_TICK):
                if key.fileobj is self._server:
                    self._accept()
                else:
                    self._hear(key.data)
            if time.monotonic() - looked >= _TICK:
                looked = time.monotonic()
                self._speak()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # pyright: ignore
        self._selector.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._server.accept()
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ, _Line(connection))

    def _hear(self, line: _Line) -> None:
        try:
            found = line.connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            found = b""
        line.read += found
        *whole, line.read = line.read.split(b"\n")
        if not found or len(line.read) > _LONGEST or not all(self._note(line, text) for text in whole):
            self._drop(line)
            return
        if whole:
            self._answer(line)

    def _note(self, line: _Line, text: bytes) -> bool:
        """Take what a member says; False for a stranger."""
        try:
            said = json.loads(text)
            if said["token"] != self._token:
                return False
            name, facts, leaving = str(said["name"]), dict(said["facts"]), bool(said.get("leaving"))
        except (ValueError, KeyError, TypeError):
            return False
        line.name = name
        self.members[name] = Seen(facts, time.monotonic(), gone=leaving)
        return True

    def _drop(self, line: _Line) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(line.connection)
        line.connection.close()
        others = (key.data.name for key in self._selector.get_map().values() if key.data)
        if line.name in self.members and line.name not in others:  # it has not come again already
            self.members[line.name].lost = time.monotonic()

    def _speak(self) -> None:
        """Judge, and tell everybody where the word is a new one."""
        word = json.dumps(dict(self._judge(self.members))).encode() + b"\n"
        if word != self._word:
            self._word = word
            for key in list(self._selector.get_map().values()):
                if key.data and key.data.name:
                    self._answer(key.data)

    def _answer(self, line: _Line) -> None:
        text = line.unsent or self._word  # an answer is not cut in two; it hears the latest next time
        try:
            sent = line.connection.send(text) if text else 0
        except BlockingIOError:
            sent = 0
        except OSError:
            self._drop(line)
            return
        line.unsent = text[sent:] if sent else line.unsent

    def close(self, patience: float = 0.0) -> None:
        """Stop hearing, after `patience` seconds at most in which the members that are there may leave."""
        end = time.monotonic() + patience
        while time.monotonic() < end and any(
            seen.connected and not seen.gone and seen.age < patience for seen in list(self.members.values())
        ):
            time.sleep(0.05)
        self._ending.set()
        self._thread.join(5)


class Member:
    """Tells a hub how this process is, and keeps the hub's latest word; comes again when a connection is lost."""

    def __init__(self, host: str, port: int, token: str, name: str, facts: dict[str, Any], interval: float = 1.0):
        self._where, self._token, self.name, self.interval = (host, port), token, name, interval
        self.facts = facts
        self.word: dict[str, Any] = {}
        self.failure: OSError | None = None  # of the last try to connect
        self._heard = time.monotonic()
        self._connected = False
        self._changed = threading.Condition()
        self._new = True
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="roll call member", daemon=True)
        self._thread.start()

    @property
    def silence(self) -> float:
        """Seconds since the hub last answered, or since this began."""
        return time.monotonic() - self._heard

    @property
    def connected(self) -> bool:
        return self._connected

    @property
    def refused(self) -> bool:
        """Whether the hub's machine answers, and no hub is there: sooner known than its silence."""
        return not self._connected and isinstance(self.failure, ConnectionRefusedError)

    def tell(self, **facts: Any) -> None:
        """Say something new, soon."""
        with self._changed:
            self.facts = {**self.facts, **facts}
            self._new = True
            self._changed.notify_all()

    def wait_for_word(self, wanted: Callable[[dict[str, Any]], bool], seconds: float) -> bool:
        """Whether a word that is `wanted` comes within `seconds`."""
        end = time.monotonic() + seconds
        with self._changed:
            while not wanted(self.word):
                left = end - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
        return True

    def _run(self) -> None:
        while not self._ending:
            try:
                connection = socket.create_connection(self._where, timeout=5)
            except OSError as error:
                self.failure = error
                time.sleep(min(self.interval, 0.5))
                continue
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(None)
            self._connected, self.failure = True, None
            hearing = threading.Thread(target=self._hear, args=(connection,), daemon=True)
            hearing.start()
            try:
                self._speak(connection)
            except OSError as error:
                self.failure = error
            self._connected = False
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _speak(self, connection: socket.socket) -> None:
        """Send facts every interval and whenever there are new ones, until the connection or this member ends."""
        heard, quiet = self._heard, 0.0
        while True:
            begun = time.monotonic()
            with self._changed:
                self._new, facts, ending = False, self.facts, self._ending
            said = {"token": self._token, "name": self.name, "facts": facts, "leaving": ending}
            connection.sendall(json.dumps(said).encode() + b"\n")
            if ending:
                return
            with self._changed:
                self._changed.wait_for(lambda: self._new or self._ending or not self._connected, self.interval)
            # By own ticks, so that a process that was frozen itself hears what has come before it gives up.
            quiet = 0.0 if self._heard > heard else quiet + min(time.monotonic() - begun, 2 * self.interval)
            heard = self._heard
            # A connection that died of a cut would be missed by TCP after a quarter of an hour.
            if not self._connected or quiet > _DEAD:
                return

    def _hear(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), connection.makefile("rb") as lines:
            for line in lines:
                word = json.loads(line)
                with self._changed:
                    self._heard, self.word = time.monotonic(), word
                    self._changed.notify_all()
        with self._changed:
            self._connected = False
            self._changed.notify_all()

    def close(self) -> None:
        """Take leave."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._thread.join(2)


def _listen(port: int) -> socket.socket:
    """A socket that hears on every address, of IPv6 as well where there is that."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
        except OSError as error:
            if error.errno in (98, 48):  # in use
                raise
    return socket.create_server(("", port), backlog=4096)
