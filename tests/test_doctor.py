"""`elsewhere doctor` in environments that are really broken: packages, limits, compilers, networks, folders."""

import importlib
import json
import os
import stat
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from elsewhere.launch.cli import main
from elsewhere.launch.doctor import building, devices, machine, packages
from elsewhere.launch.doctor.findings import Finding, Silent, ask, guarded

WEB_TOOLKIT = "Pyramid toolkit to add Velruse, Flash Messages,CSRF, ReCaptcha and Sessions"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Put files at the front of sys.path, e.g. `{"apex/__init__.py": ""}`."""

    def make(files):
        for name, text in files.items():
            path = tmp_path / "site" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        importlib.invalidate_caches()

    return make


def test_the_package_called_apex_on_pypi_is_not_nvidias(package):
    """Its files and metadata, as pip lays them; importing it fails, and is not tried."""
    package({
        "apex/__init__.py": "from pyramid.session import UnencryptedCookieSessionFactoryConfig\n",
        "apex/views.py": "", "apex/models.py": "", "apex/forms.py": "",
        "apex-0.9.10.dev0.dist-info/METADATA": (
            f"Metadata-Version: 2.4\nName: apex\nVersion: 0.9.10.dev0\nSummary: {WEB_TOOLKIT}\n"
        ),
        "apex-0.9.10.dev0.dist-info/top_level.txt": "apex\n",
    })  # fmt: skip
    found = packages.apex()
    assert found.state == "problem" and WEB_TOOLKIT in found.found and "not NVIDIA's" in found.found
    assert "pip uninstall apex" in found.fix and not found.needed


def test_nvidias_apex_without_its_extensions_is_told_from_a_whole_one(package):
    """What `pip install` without the CUDA flags leaves: Python files alone."""
    package({
        "apex/__init__.py": "", "apex/optimizers/__init__.py": "from .fused_adam import FusedAdam\n",
        "apex/optimizers/fused_adam.py": "class FusedAdam:\n    pass\n", "apex/normalization/__init__.py": "",
    })  # fmt: skip
    found = packages.apex()
    assert found.state == "problem" and "amp_C" in found.found and "fused_layer_norm_cuda" in found.found


def test_an_import_that_ends_the_process_is_named_and_the_others_still_tried(package):
    package({"first_ok.py": "", "ends_it.py": "import os; os.abort()", "then_bad.py": "raise ImportError('no libGL')"})
    found = packages._broken(["first_ok", "ends_it", "then_bad", "not_there_at_all"])
    assert set(found) == {"ends_it", "then_bad"}
    assert "SIGABRT" in found["ends_it"] and "no libGL" in found["then_bad"]


def test_a_package_that_is_too_old_or_missing_is_a_problem_with_the_command():
    old, missing = packages._one("numpy", ">=999.1", None), packages._one("no-such-package", ">=1", None)
    assert (old.state, old.needed, missing.state) == ("problem", True, "problem")
    assert "setup.py asks for >=999.1" in old.found and old.fix == "python3 -m pip install --upgrade 'numpy>=999.1'"
    assert not packages._one("deepspeed", ">=999", None).needed


def test_versions_are_compared_as_packaging_does():
    specifiers = pytest.importorskip("packaging.specifiers")
    versions = ["1.0", "1.0.31", "1.1", "2.14.1+cu130", "2.9", "2.11", "0.19.8", "0.4.10", "10.1", "9.9.9", "2.11.0"]
    for found in versions:
        for least in versions:
            least = least.partition("+")[0]
            inside = specifiers.SpecifierSet(f">={least}").contains(found, prereleases=True)
            assert packages.older(found, f">={least}") == (not inside), (found, least)


def test_what_setup_asks_for_is_looked_at():
    wanted = dict(packages._requirements())
    assert wanted["torch"] == ">=2.11" and "pytest" not in wanted and "triton" in wanted


def test_a_lowered_limit_of_open_files_is_a_problem():
    """The hard one: a run raises the other by itself."""
    code = (
        "import resource, json, dataclasses; from elsewhere.launch.doctor.machine import open_files;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, {}); print(json.dumps(dataclasses.asdict(open_files())))"
    )

    def under(*limits):
        done = subprocess.run([sys.executable, "-c", code.format(limits)], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    found = under(40, 40)
    assert (found["state"], found["needed"], found["facts"]["hard"]) == ("problem", True, 40)
    assert "raise the hard limit" in found["fix"]
    assert (under(40, 512)["state"], under(40, 512)["needed"], under(40, 2048)["state"]) == ("problem", False, "note")
    assert under(40, 4096)["state"] == "ok" and "40 now, which a run raises" in under(40, 4096)["found"]


def test_a_path_without_a_compiler_is_noted(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert building.compiler().state == "note" and "build-essential" in building.compiler().fix


def test_a_compiler_that_does_not_compile_is_a_problem(tmp_path, monkeypatch):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'error: cc1plus is missing' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(broken))
    found = building.compiler()
    assert found.state == "problem" and "cc1plus is missing" in found.found


def test_two_processes_meet():
    assert building.processes().state == "ok"


@pytest.mark.long
def test_two_processes_that_do_not_meet_say_why(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    found = building.processes()
    assert found.state == "problem" and "nosuch0" in found.found and not found.needed


def test_limits_of_control_groups_are_read_in_both_versions(tmp_path):
    def tree(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    tree({
        "two/cpu.max": "max 100000\n", "two/memory.max": "max\n", "two/a/cpu.max": "250000 100000\n",
        "two/a/memory.max": "8000000000\n", "two/a/b/cpu.max": "max 100000\n", "two/a/b/memory.max": "9000000000\n",
        "own2": "0::/a/b\n",
        "one/cpu,cpuacct/d/cpu.cfs_quota_us": "150000\n", "one/cpu,cpuacct/d/cpu.cfs_period_us": "100000\n",
        "one/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "one/memory/d/memory.limit_in_bytes": "4000000000\n",
        "own1": "4:memory:/d\n3:cpu,cpuacct:/d\n",
        "none/x": "", "own0": "0::/gone\n",
    })  # fmt: skip
    assert machine.cgroup_limits(tmp_path / "two", tmp_path / "own2") == (2.5, 8_000_000_000)
    assert machine.cgroup_limits(tmp_path / "one", tmp_path / "own1") == (1.5, 4_000_000_000)
    assert machine.cgroup_limits(tmp_path / "none", tmp_path / "own0") == (None, None)


def test_a_disk_is_measured_and_left_as_it_was(tmp_path):
    found = machine.disk(tmp_path, False)
    assert found.facts["write"] > 0 and found.facts["read"] > 0 and list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_written_to_are_problems():
    """Not even root makes a file in /proc."""
    here, shared = machine.disk(Path("/proc"), True), machine.shared_memory(1, "/proc")
    assert (here.state, here.needed, shared.state) == ("problem", True, "problem")
    assert not machine.disk(Path("/proc"), False).needed


def test_shared_memory_smaller_than_the_workers_batches_is_a_problem(monkeypatch):
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    assert machine.shared_memory(1).facts["workers"] == 7
    monkeypatch.setattr(machine, "BATCH_BYTES", 10**15)
    found = machine.shared_memory(1)
    assert found.state == "problem" and "--shm-size" in found.fix


# As nvidia-smi of a node with eight GPUs on NVLink and two network cards prints it, cut to four.
TOPOLOGY = """
\x1b[4m\tGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tNV18\tSYS\tPIX\t0-47\t0\t\tN/A
GPU1\tNV18\t X \tNV18\tSYS\tNODE\t0-47\t0\t\tN/A
GPU2\tNV18\tNV18\t X \tSYS\tNODE\t0-47\t0\t\tN/A
GPU3\tSYS\tSYS\tSYS\t X \tSYS\t48-95\t1\t\tN/A
NIC0\tPIX\tNODE\tNODE\tSYS\t X
"""


def test_pairs_of_gpus_are_counted_by_link():
    assert devices.topology(TOPOLOGY, 4) == {"NV18": 3, "SYS": 3}


@pytest.mark.parametrize(("capability", "built", "expected"), [
    ((9, 0), ["sm_80", "sm_90"], True), ((8, 6), ["sm_80", "sm_90"], True), ((7, 0), ["sm_80"], False),
    ((12, 0), ["sm_90"], False), ((12, 0), ["sm_90", "compute_90"], True), ((10, 0), ["sm_100", "sm_120"], True),
    ((9, 0), ["sm_90a"], True),
])  # fmt: skip
def test_whether_torch_has_code_for_a_gpu(capability, built, expected):
    assert devices._compiled_for(capability, built) == expected


@pytest.mark.parametrize(("capability", "said"), [
    ((7, 5), "float16 (no bfloat16), no Triton kernels"), ((6, 1), "float32 alone"), ((8, 0), "bfloat16, Triton"),
])  # fmt: skip
def test_what_a_compute_capability_means(capability, said):
    about = {
        "name": "NVIDIA A100-SXM4-80GB", "capability": list(capability), "memory": 8e10, "free": 8e10, "compiled": True,
        "works": None, "kernels": "triton (the same words in one pass)",
    }  # fmt: skip
    found = devices.gpu(0, about, {"torch": "2.14"})
    assert found.state == "ok" and said in found.found
    assert devices.gpu(0, {**about, "compiled": False}, {"torch": "2.14"}).needed
    assert devices.gpu(0, {**about, "works": "an Xid"}, {"torch": "2.14"}).state == "problem"


def test_a_question_without_an_answer_ends():
    with pytest.raises(Silent, match="no answer within"):
        ask(time.sleep, 600, timeout=0.5)


def test_a_probe_that_fails_is_a_finding():
    def probe():
        yield Finding("first", "ok", "there")
        raise OSError("no such thing")

    assert [(one.name, one.state) for one in guarded("second", probe)] == [("first", "ok"), ("second", "note")]


@pytest.mark.parametrize(("arguments", "words"), [
    (["--disk", "/nowhere"], "is no folder"), (["--json", "/nowhere/x.json"], "not there or not writable"),
])  # fmt: skip
def test_wrong_arguments_are_refused(arguments, words, capsys):
    assert main(["doctor", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.long
def test_where_the_demo_cannot_write_the_exit_status_says_so(tmp_path, monkeypatch, capsys):
    """The whole command, in a folder where nobody can write."""
    monkeypatch.chdir("/proc")
    assert main(["doctor", "--json", str(tmp_path / "d.json")]) == 2
    out, found = capsys.readouterr().out, json.loads((tmp_path / "d.json").read_text())
    assert found["missing"] == ["disk ."] and not found["ok"] and "cannot run here: disk ." in out
    lines = [one for room in found.values() if isinstance(room, list) for one in room if isinstance(one, dict)]
    assert len(lines) > 25 and all(set(one) == set(asdict(Finding("", "ok", ""))) for one in lines)
    assert all(one["found"] in out and (one["fix"] is None or one["fix"] in out) for one in lines)
    assert all(one["fix"] for one in lines if one["state"] == "problem")


@pytest.mark.long
def test_a_package_that_the_demo_needs_and_that_breaks_is_named(package, tmp_path, monkeypatch, capsys):
    package({"timm/__init__.py": "raise ImportError('broken on purpose')\n"})
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--disk", str(tmp_path)]) == 2
    assert "cannot run here: timm" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["site"]
