"""Several machines on one: nodes with a network, host name, processes and mounts of their own, joined by a bridge."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

INTERFACE = "eth0"
TOOLS = ("unshare", "nsenter", "ip", "mount", "hostname", "sh")

# The first process of a PID namespace: it prints its PID as the outside sees it, takes its orphans' ends without
# waiting for them, and lives as long as someone holds its standard input open. When it ends, the kernel kills all
# others of its namespace, so that even a test process that was killed with SIGKILL leaves nothing behind.
_HOLD = "read pid rest < /proc/self/stat && {setup} echo $pid && trap '' CHLD && exec cat"
# Mounts made outside reach every node, and none of them reaches the machine. The file of names exists in memory only.
_SETUP_OUTSIDE = (
    "mount --make-rshared / && mount -t tmpfs tmpfs /tmp && printf '%s' \"$HOSTS\" > /tmp/hosts && "
    "mount --bind /tmp/hosts /etc/hosts && umount /tmp && ip link set lo up && "
    "ip link add bridge type bridge stp_state 0 forward_delay 0 && ip link set bridge up &&"
)
_SETUP_NODE = "mount -t proc proc /proc && hostname {name} && ip link set lo up &&"


def _unshare() -> list[str]:
    """The command that makes the outer namespaces, as root or, where allowed, as anyone."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *user, "--net", "--mount", "--pid", "--fork", "--kill-child"]


@functools.cache
def available() -> str | None:
    """Why no cluster can be made here, or None if one can."""
    missing = [tool for tool in TOOLS if shutil.which(tool, path=_path()) is None]
    if missing:
        return f"no namespaces without the command {missing[0]}"
    try:
        with Cluster(1):
            return None
    except RuntimeError as error:
        return str(error)


@functools.cache
def cannot_limit() -> str | None:
    """Why `Cluster.limit` cannot limit a rate here, or None if it can."""
    if available() or shutil.which("tc", path=_path()) is None:
        return available() or "no limits without the command tc"
    try:
        with Cluster(1) as cluster:
            cluster.limit(0, 1e9)
    except RuntimeError as error:
        return str(error)


@functools.cache
def cannot_delay() -> str | None:
    """Why no cluster with a latency can be made here, or None if one can."""
    if available():
        return available()
    try:
        with Cluster(1, latency=1e-3):
            return None
    except RuntimeError as error:
        return str(error)


def _path() -> str:
    return os.environ.get("PATH", os.defpath) + os.pathsep + "/usr/sbin:/sbin"


class Started(subprocess.Popen):
    """A command on a node. Signals reach the command itself, not the process that stands for it outside."""

    def send_signal(self, sig: int) -> None:
        end = time.monotonic() + 5
        while self.poll() is None:
            try:
                child = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
                if child:
                    os.kill(int(child[0]), sig)
                    self.follow(sig)
                    return
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ends just now
            assert time.monotonic() < end, "the command was not started within 5 s"
            time.sleep(0.001)

    def follow(self, sig: int) -> None:
        """nsenter stops itself when its child is stopped; wait for that, or wake it."""
        end = time.monotonic() + 5
        if sig in (signal.SIGCONT, signal.SIGKILL) and self.returncode is None:
            os.kill(self.pid, signal.SIGCONT)
        while sig == signal.SIGSTOP and self.poll() is None and _state(self.pid) != "T" and time.monotonic() < end:
            time.sleep(0.001)


class Cluster:
    """`nodes` machines called n0, n1, … at 10.77.0.10, 10.77.0.11, …; files are shared, /proc is each node's own.

    A packet takes `latency` seconds more to another node; it passes through a process for that, which suits 100 Mbit/s,
    or more with a large `mtu`. A context manager. Raises RuntimeError with the reason where the system forbids it
    (`available` asks first).
    """

    def __init__(self, nodes: int = 4, latency: float = 0.0, mtu: int = 1500):
        self.nodes, self.latency, self.mtu = nodes, latency, mtu
        self.started: list[tuple[int, Started]] = []
        self._holders: list[subprocess.Popen] = []
        self._inits: list[int] = []  # of the nodes, as the outside sees them
        self._outside = 0

    @staticmethod
    def host(node: int) -> str:
        return f"n{node}"

    @staticmethod
    def address(node: int) -> str:
        return f"10.77.0.{10 + node}"

    def __enter__(self) -> Cluster:
        names = "".join(f"{self.address(node)} {self.host(node)}\n" for node in range(self.nodes))
        try:
            hosts = {"HOSTS": "127.0.0.1 localhost\n::1 localhost\n" + names}
            self._outside = self._hold(_unshare(), _SETUP_OUTSIDE, hosts)
            apart = [
                "unshare",
                "--net",
                "--mount",
                "--propagation",
                "slave",
                "--uts",
                "--pid",
                "--fork",
                "--kill-child",
            ]
            for node in range(self.nodes):
                inside = [*self._enter(self._outside, "--net", "--pid"), *apart]
                self._inits.append(self._hold(inside, _SETUP_NODE.format(name=self.host(node))))
            if self.latency:
                self._relay()
            for node in range(self.nodes):
                if not self.latency:
                    self._ip(f"link add port{node} type veth peer name {INTERFACE} netns {self._inits[node]}")
                self._ip(f"link set port{node} mtu {self.mtu} master bridge up")
                # No IPv6 address: a backend that asks for the interface finds the one address that has a name.
                self._ip(
                    f"link set {INTERFACE} mtu {self.mtu} addrgenmode none up",
                    f"addr add {self.address(node)}/24 dev {INTERFACE}",
                    node=node,
                )
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End every process and remove all that was made."""
        if self._outside:
            # The kernel ends all processes of a PID namespace with its first.
            os.kill(self._outside, signal.SIGKILL)
            self._outside = 0
        for _, process in self.started:
            process.follow(signal.SIGKILL)
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream:
                    stream.close()
        for holder in self._holders:
            holder.wait()
            for stream in (holder.stdin, holder.stdout, holder.stderr):
                assert stream
                stream.close()
        self.started, self._holders, self._inits = [], [], []

    def start(
        self,
        node: int,
        command: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        output: str | Path | None = None,
    ) -> Started:
        """Start `command` on a node; what it prints, errors too, is appended to the file `output` or can be read from
        `stdout`. `env` is added to this process's environment. It is killed with all that it started when the cluster
        ends.
        """
        inside = self._enter(self._inits[node], "--net", "--uts", "--pid")
        with contextlib.ExitStack() as opened:
            into = opened.enter_context(open(output, "ab")) if output else subprocess.PIPE
            # A directory of a mount that only the node has is found by its name there alone.
            process = Started(
                [*inside, "sh", "-c", 'cd "$0" && exec "$@"', str(cwd or os.getcwd()), *map(str, command)],
                stdin=subprocess.DEVNULL, stdout=into, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                env={**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1", **(env or {})},
            )  # fmt: skip
        self.started.append((node, process))
        return process

    def processes(self, node: int) -> list[int]:
        """PIDs, as the outside sees them, of all that runs on a node."""
        space = os.readlink(f"/proc/{self._inits[node]}/ns/pid")
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                inside = os.readlink(entry / "ns/pid") == space
            except OSError:
                continue  # it ended, or belongs to someone else
            if inside and int(entry.name) != self._inits[node] and _state(int(entry.name)) not in "ZX":
                found.append(int(entry.name))
        return found

    def kill(self, node: int) -> None:
        """SIGKILL to every process of a node at once; the node itself remains, and can start others."""
        self._signal(node, signal.SIGKILL)
        end = time.monotonic() + 10
        while self.processes(node):
            assert time.monotonic() < end, f"processes of node {node} outlived SIGKILL"
            time.sleep(0.01)

    def freeze(self, node: int) -> None:
        """SIGSTOP to every process of a node."""
        self._signal(node, signal.SIGSTOP)

    def thaw(self, node: int) -> None:
        """SIGCONT to every process of a node."""
        self._signal(node, signal.SIGCONT)

    def cut(self, node: int) -> None:
        """Take a node off the bridge: packets are lost, and nobody is told."""
        self._ip(f"link set port{node} nomaster")

    def join(self, node: int) -> None:
        """Put a node that was cut off back on the bridge."""
        self._ip(f"link set port{node} master bridge")

    def limit(self, node: int, rate: float | None) -> None:
        """Limit what a node sends and what it receives to `rate` bits/s each, or neither.

        A packet crosses two limits, its sender's and its receiver's.
        """
        for where, device in ((node, INTERFACE), (None, f"port{node}")):
            self._tc(where, ["qdisc", "del", "dev", device, "root"], may_fail=True)
            if rate:
                # Little more than a timer's tick may leave at once, or small messages would travel for nothing.
                burst = max(2 * self.mtu + 200, int(rate / 8 * 1e-4))
                limits = ["rate", f"{rate:.0f}bit", "burst", str(burst), "limit", "4mb"]
                self._tc(where, ["qdisc", "add", "dev", device, "root", "tbf", *limits])

    def tmpfs(self, path: str | Path, size: str = "64m", node: int | None = None) -> None:
        """Mount a file system in memory at the folder `path`, which all nodes see, or `node` alone.

        Paths of it are read outside through `seen`. Mount before a process works in the folder.
        """
        target = self._outside if node is None else self._inits[node]
        _run([*self._enter(target), "mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)])

    def seen(self, path: str | Path, node: int | None = None) -> Path:
        """Where this process finds an absolute `path` as all nodes see it, or as `node` does."""
        return Path(f"/proc/{self._outside if node is None else self._inits[node]}/root") / str(path).lstrip("/")

    def _relay(self) -> None:
        inside = self._enter(self._outside, "--net", "--pid")
        script = Path(__file__).with_name("cluster_delay.py")
        relay = subprocess.Popen(
            [*inside, sys.executable, str(script), str(self.latency), *map(str, self._inits)], text=True,
            start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._holders.append(relay)
        assert relay.stdout and relay.stderr
        if not relay.stdout.readline():
            raise RuntimeError(f"no latency: {relay.stderr.read().strip().splitlines()[-1]}")

    def _hold(self, command: Sequence[str], setup: str, env: Mapping[str, str] | None = None) -> int:
        """Start the first process of new namespaces; its PID as the outside sees it."""
        holder = subprocess.Popen(
            [*command, "sh", "-c", _HOLD.format(setup=setup)], text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "PATH": _path(), **(env or {})},
        )  # fmt: skip
        self._holders.append(holder)
        assert holder.stdout and holder.stderr and holder.stdin
        pid = holder.stdout.readline().strip()
        if not pid:
            holder.stdin.close()
            raise RuntimeError(f"no namespaces: {holder.stderr.read().strip() or 'the system gives no reason'}")
        return int(pid)

    @staticmethod
    def _enter(pid: int, *kinds: str) -> list[str]:
        """The command that enters a namespace's mounts, and `kinds` of it."""
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        return ["nsenter", "--target", str(pid), *user, "--mount", *kinds, "--"]

    def _ip(self, *lines: str, node: int | None = None) -> None:
        target = self._outside if node is None else self._inits[node]
        _run([*self._enter(target, "--net"), "ip", "-batch", "-"], "\n".join(lines))

    def _tc(self, node: int | None, arguments: Sequence[str], may_fail: bool = False) -> None:
        target = self._outside if node is None else self._inits[node]
        _run([*self._enter(target, "--net"), "tc", *arguments], may_fail=may_fail)

    def _signal(self, node: int, number: int) -> None:
        # PID -1 is all processes of the namespace but its first and the one that sends.
        inside = self._enter(self._inits[node], "--pid")
        _run([*inside, "sh", "-c", f"kill -{int(number)} -1"], may_fail=True)
        for where, process in self.started:
            if where == node:
                process.follow(number)


def _state(pid: int) -> str:
    """The state of a process as /proc names it; X if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def _run(command: Sequence[str], given: str = "", may_fail: bool = False) -> None:
    done = subprocess.run(command, input=given, capture_output=True, text=True, env={**os.environ, "PATH": _path()})
    if done.returncode and not may_fail:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
