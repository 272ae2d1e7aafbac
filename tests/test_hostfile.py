"""Which machines a supervised run has: from a hostfile, SLURM, flags, or alone."""

import socket

import pytest

from elsewhere.launch.cli import main
from elsewhere.launch.errors import UserError
from elsewhere.launch.nodes.hostfile import find_machines, read_hostfile


@pytest.fixture
def hostfile(tmp_path):
    def write(text):
        path = tmp_path / "hosts"
        path.write_text(text)
        return path

    return write


def test_a_hostfile_is_read_as_deepspeed_reads_it(hostfile):
    runner = pytest.importorskip("deepspeed.launcher.runner")
    path = hostfile("# ours\nn0 slots=8\n\nn1  slots=4\n10.0.0.7 slots=2\n")
    assert read_hostfile(path) == dict(runner.fetch_hostfile(str(path)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n0 slots=8\nn1 slots=8\nn0 slots=4\n", "line 3: n0 is there already (line 1)"),
        ("n0 slots=8\nn1 slot=8\n", "line 2: 'n1 slot=8' is not a host"),
        ("n0 slots=0\n", "line 1"),
        ("# nobody\n", "names no host"),
    ],
)
def test_a_bad_line_is_named(hostfile, text, expected):
    with pytest.raises(UserError) as refused:
        read_hostfile(hostfile(text))
    assert expected in str(refused.value)


def test_this_machine_is_found_by_its_address(hostfile):
    found = find_machines(hostfile=hostfile("198.51.100.1 slots=8\n127.0.0.1 slots=2\n"), environ={})
    assert (found.node, found.processes, found.master) == (1, 2, "198.51.100.1")


def test_this_machine_is_found_by_its_name(hostfile):
    own = socket.gethostname()
    assert find_machines(hostfile=hostfile(f"{own} slots=3\n198.51.100.1\n"), environ={}).node == 0


REFUSED = {
    "not among them": ("198.51.100.1\n198.51.100.2\n", {}, "is not among the hosts"),
    "no address": ("localhost\nno-such-host.invalid\n", {}, "no-such-host.invalid has no address here"),
    "contradiction": ("198.51.100.1\n127.0.0.1\n", {"nodes": 3}, "contradict"),
    "beyond": ("198.51.100.1\n127.0.0.1\n", {"node_rank": 2}, "--node-rank 2 is not one of 2"),
    "two numbers": ("198.51.100.1\n127.0.0.1 slots=2\n", {"processes": 3}, "contradict"),
    "more than GPUs": ("198.51.100.1\n127.0.0.1 slots=8\n", {"devices": 4}, "8 processes are asked for"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(hostfile, case):
    text, flags, expected = REFUSED[case]
    with pytest.raises(UserError) as refused:
        find_machines(hostfile=hostfile(text), environ={}, **flags)
    assert expected in str(refused.value)


def test_flags_say_it_without_a_hostfile():
    found = find_machines(nodes=4, node_rank=2, master="gpu0:4000", devices=8, environ={})
    assert (found.node, len(found.names), found.processes, found.master, found.port) == (2, 4, 8, "gpu0", 4000)
    with pytest.raises(UserError, match="--node-rank"):
        find_machines(nodes=4, environ={})


def test_the_first_machine_is_the_one_that_is_named():
    assert find_machines(nodes=2, node_rank=0, master="localhost", environ={}).node == 0
    with pytest.raises(UserError, match=r"--master 198\.51\.100\.1 is another"):
        find_machines(nodes=2, node_rank=0, master="198.51.100.1", environ={})


def test_a_number_that_is_no_port_is_refused():
    with pytest.raises(UserError, match="99999 is no port"):
        find_machines(nodes=2, node_rank=1, master="gpu0:99999", environ={})


def test_alone_it_is_one_process_per_gpu():
    assert find_machines(devices=8, environ={}).processes == 8
    assert find_machines(environ={}).processes == 1


def test_under_a_launcher_it_is_refused():
    with pytest.raises(UserError, match="without torchrun or deepspeed"):
        find_machines(environ={"RANK": "0"})


@pytest.fixture
def answering():
    """A port on which 127.0.0.2 answers and 127.0.0.3 does not."""
    with socket.create_server(("127.0.0.2", 0)) as server:
        yield server.getsockname()[1]


def test_machines_that_answer_are_listed(hostfile, answering, capsys):
    assert main(["hosts", str(hostfile("127.0.0.2 slots=8\n")), "--port", str(answering)]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert words == f"127.0.0.2 127.0.0.2 8 slots answers on port {answering}"


def test_a_machine_that_does_not_answer_is_named(hostfile, answering, capsys):
    path = hostfile("127.0.0.2 slots=8\n127.0.0.3 slots=8\n")
    assert main(["hosts", str(path), "--port", str(answering)]) == 2
    assert f"127.0.0.3 of {path} does not answer on port {answering} (connection refused)" in capsys.readouterr().err


def test_two_names_of_one_machine_are_refused(hostfile, capsys):
    assert main(["hosts", str(hostfile("127.0.0.1 slots=8\nlocalhost slots=8\n"))]) == 2
    assert "are one machine" in capsys.readouterr().err
