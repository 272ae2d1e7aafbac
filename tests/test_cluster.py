"""The nodes that tests of faults run on: they reach each other, fail one at a time and leave nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from elsewhere.tests.cluster import Cluster, available, cannot_delay, cannot_limit

pytestmark = pytest.mark.skipif(available() is not None, reason=str(available()))

# One line a message, both ways, so that a lost packet shows as silence.
ECHO = """
import socket, sys
listener = socket.create_server(("0.0.0.0", 5000))
print("ready", flush=True)
connection = listener.accept()[0]
while data := connection.recv(1 << 16):
    connection.sendall(data)
"""
ASK = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], 5000))
for number in range(10000):
    connection.sendall(b"x")
    connection.recv(1)
    print(number, flush=True)
    time.sleep(0.02)
"""
SINK = """
import socket
listener = socket.create_server(("0.0.0.0", 5000))
print("ready", flush=True)
connection = listener.accept()[0]
while connection.recv(1 << 16):
    pass
connection.sendall(b"x")
"""
SEND = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], 5000))
start = time.perf_counter()
connection.sendall(bytes(int(sys.argv[2])))
connection.shutdown(socket.SHUT_WR)
assert connection.recv(1) == b"x"
print(time.perf_counter() - start)
"""


def python(cluster, node, text, *arguments, **where):
    return cluster.start(node, [sys.executable, "-S", "-c", text, *arguments], **where)


def talking(cluster, path):
    """Node 1 asks node 0 and writes what came back to `path`."""
    echo = python(cluster, 0, ECHO)
    assert echo.stdout.readline() == "ready\n"
    return echo, python(cluster, 1, ASK, "n0", output=path)


def grows(path, seconds):
    """Whether a file grows within `seconds`."""
    size, end = path.stat().st_size, time.monotonic() + seconds
    while time.monotonic() < end:
        if path.stat().st_size > size:
            return True
        time.sleep(0.01)
    return False


def test_nodes_have_names_and_reach_each_other():
    with Cluster(3) as cluster:
        said = [cluster.start(node, ["hostname"]).communicate()[0] for node in range(3)]
        assert said == ["n0\n", "n1\n", "n2\n"]
        assert python(cluster, 0, SINK).stdout.readline() == "ready\n"
        assert float(python(cluster, 2, SEND, "n0", "1000").communicate()[0]) < 5


def test_a_command_has_its_directory_environment_and_status(tmp_path):
    with Cluster(1) as cluster:
        command = ["sh", "-c", "pwd; echo $FRUIT $GLOO_SOCKET_IFNAME; exit 3"]
        process = cluster.start(0, command, env={"FRUIT": "fig"}, cwd=tmp_path, output=tmp_path / "log")
        assert process.wait(10) == 3
        assert (tmp_path / "log").read_text() == f"{tmp_path}\nfig eth0\n"


def test_a_cut_node_hears_nothing_and_goes_on_when_it_is_joined(tmp_path):
    with Cluster(2) as cluster:
        echo, ask = talking(cluster, tmp_path / "log")
        assert grows(tmp_path / "log", 5)
        cluster.cut(1)
        time.sleep(0.1)
        assert not grows(tmp_path / "log", 1)
        assert ask.poll() is None and echo.poll() is None  # nobody was told
        cluster.join(1)
        assert grows(tmp_path / "log", 10)


def test_a_kill_ends_all_processes_of_its_node_alone():
    with Cluster(2) as cluster:
        first = cluster.start(0, ["sh", "-c", "setsid sleep 100 & sleep 100 & wait"])
        second = cluster.start(1, ["sleep", "100"])
        while len(cluster.processes(0)) < 3:
            time.sleep(0.01)
        cluster.kill(0)
        assert cluster.processes(0) == [] and first.wait(5) == -signal.SIGKILL
        assert second.poll() is None and cluster.processes(1)
        assert cluster.start(0, ["hostname"]).communicate()[0] == "n0\n"


def test_a_frozen_node_goes_on_when_it_is_thawed(tmp_path):
    with Cluster(2) as cluster:
        _, ask = talking(cluster, tmp_path / "log")
        assert grows(tmp_path / "log", 5)
        cluster.freeze(0)
        time.sleep(0.1)
        assert not grows(tmp_path / "log", 0.5) and ask.poll() is None
        cluster.thaw(0)
        assert grows(tmp_path / "log", 5)


def test_a_signal_reaches_the_command_itself():
    text = "import signal, sys; signal.signal(15, lambda *_: sys.exit(7)); print(1, flush=True); signal.pause()"
    with Cluster(1) as cluster:
        process = python(cluster, 0, text)
        process.stdout.readline()
        process.terminate()
        assert process.wait(5) == 7


@pytest.mark.skipif(cannot_limit() is not None, reason=str(cannot_limit()))
@pytest.mark.parametrize("rate", [8e6, 80e6])
def test_a_limit_bounds_what_a_node_sends(rate):
    size = int(rate / 8 / 2)  # half a second's worth
    with Cluster(2) as cluster:
        cluster.limit(1, rate)
        assert python(cluster, 0, SINK).stdout.readline() == "ready\n"
        seconds = float(python(cluster, 1, SEND, "n0", str(size)).communicate()[0])
        assert 0.5 < seconds < 1.0


@pytest.mark.skipif(cannot_delay() is not None, reason=str(cannot_delay()))
def test_a_latency_delays_each_way():
    text = """
import socket, statistics, sys, time
connection, times = socket.create_connection((sys.argv[1], 5000)), []
for _ in range(5):
    start = time.perf_counter()
    connection.sendall(b"x")
    connection.recv(1)
    times.append(time.perf_counter() - start)
print(statistics.median(times))
"""
    with Cluster(2, latency=0.02) as cluster:
        assert python(cluster, 0, ECHO).stdout.readline() == "ready\n"
        assert 0.04 < float(python(cluster, 1, text, "n0").communicate()[0]) < 0.08


def test_a_full_memory_file_system_is_seen_by_every_node(tmp_path):
    with Cluster(2) as cluster:
        cluster.tmpfs(tmp_path, "1m")
        fill = cluster.start(0, ["dd", "if=/dev/zero", f"of={tmp_path}/file", "bs=64k", "count=100"])
        assert "No space left" in fill.communicate()[0]
        size = cluster.start(1, ["stat", "-c", "%s", f"{tmp_path}/file"]).communicate()[0]
        assert int(size) == 1 << 20 == cluster.seen(tmp_path / "file").stat().st_size
        assert not list(tmp_path.iterdir())


def test_a_private_folder_is_seen_by_one_node(tmp_path):
    (tmp_path / "common").touch()
    with Cluster(2) as cluster:
        cluster.tmpfs(tmp_path, node=1)
        assert [cluster.start(n, ["ls"], cwd=tmp_path).communicate()[0] for n in (0, 1)] == ["common\n", ""]


OWNER = """
import time
from pathlib import Path
from elsewhere.tests.cluster import Cluster, available
if available():
    raise SystemExit("forbidden: " + available())
cluster = Cluster(2).__enter__()
cluster.start(0, ["sh", "-c", "setsid sleep 1000 & sleep 1000"])
cluster.start(1, ["sleep", "1000"])
while len(cluster.processes(0)) < 3 or not cluster.processes(1):
    time.sleep(0.01)
print(*cluster.processes(0), *cluster.processes(1), *cluster._inits, *[h.pid for h in cluster._holders], flush=True)
time.sleep(1000)
"""


def machine():
    """What a cluster must not change: the machine's links, mounts, names of namespaces, hosts and host name."""
    names = Path("/run/netns")
    return [
        subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=False).stdout,
        Path("/proc/self/mountinfo").read_text(),
        sorted(os.listdir(names)) if names.is_dir() else [],
        Path("/etc/hosts").read_text(),
        os.uname().nodename,
    ]


def killed_owner(prefix=()):
    """PIDs of all processes of a cluster whose owner was killed with SIGKILL just now."""
    owner = subprocess.Popen(
        [*prefix, sys.executable, "-c", OWNER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert owner.stdout and owner.stderr
    said = owner.stdout.readline().split()
    if not said:
        pytest.skip(owner.stderr.read().strip().splitlines()[-1])
    assert len(said) >= 9
    owner.kill()
    owner.communicate()
    return [int(pid) for pid in said]


def gone(pids, seconds=5.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
            return True
        time.sleep(0.02)
    return False


def test_nothing_is_left_of_a_cluster_that_was_closed():
    before = machine()
    with Cluster(2) as cluster:
        cluster.start(0, ["sh", "-c", "setsid sleep 1000 & sleep 1000"])
        while len(cluster.processes(0)) < 3:
            time.sleep(0.01)
        assert machine() == before
        pids = [*cluster.processes(0), *cluster._inits, *(holder.pid for holder in cluster._holders)]
    assert gone(pids) and machine() == before


def test_nothing_is_left_when_the_owner_is_killed():
    before = machine()
    assert gone(killed_owner()) and machine() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests run as an ordinary user already")
def test_an_ordinary_user_makes_a_cluster():
    user = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    if subprocess.run([*user, sys.executable, "-c", "import elsewhere"], capture_output=True, check=False).returncode:
        pytest.skip("another user cannot run this Python")
    assert gone(killed_owner(user))
