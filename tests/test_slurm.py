"""What srun says of a process: environments recorded from SLURM 22.05, node lists as its scontrol expands them."""

import dataclasses
import itertools
import re

import pytest

from elsewhere.launch.errors import UserError
from elsewhere.launch.nodes.slurm import Step, expand_hosts, step

# `env` of a task of `srun --nodes=1 --ntasks=2`, in full.
ONE_NODE = {
    "SLURMD_NODENAME": "n1", "SLURM_CLUSTER_NAME": "trial", "SLURM_CPUS_ON_NODE": "2", "SLURM_GPUS_ON_NODE": "2",
    "SLURM_GTIDS": "0,1", "SLURM_JOBID": "2", "SLURM_JOB_CPUS_PER_NODE": "2", "SLURM_JOB_ID": "2",
    "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", "SLURM_LAUNCH_NODE_IPADDR": "10.177.0.254",
    "SLURM_LOCALID": "1", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "n1", "SLURM_NPROCS": "2",
    "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_SRUN_COMM_HOST": "10.177.0.254", "SLURM_STEPID": "0",
    "SLURM_STEP_GPUS": "0,1", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_SUBMIT_HOST": "vm",
    "SLURM_TASKS_PER_NODE": "2", "SLURM_TOPOLOGY_ADDR": "n1",
}  # fmt: skip


def recorded(job, where, task, node, local_task, nodelist, nodes, tasks, per_node):
    """What `step` reads of a recorded environment, in the order in which the recordings below list it."""
    return {
        "SLURM_JOB_ID": job, "SLURM_STEP_ID": "0", "SLURMD_NODENAME": where, "SLURM_PROCID": task,
        "SLURM_NODEID": node, "SLURM_LOCALID": local_task, "SLURM_STEP_NODELIST": nodelist,
        "SLURM_STEP_NUM_NODES": nodes, "SLURM_STEP_NUM_TASKS": tasks, "SLURM_STEP_TASKS_PER_NODE": per_node,
        "SLURM_LAUNCH_NODE_IPADDR": "10.177.0.254", "SLURM_JOB_NODELIST": "n[1-3]",
    }  # fmt: skip


# `srun --nodes=3 --ntasks=5`, task 4; the same with --distribution=cyclic, tasks 1 and 3; `srun --nodes=3
# --ntasks-per-node=1`, task 2; `srun --nodelist=n2` in a batch job on n[1-2].
BLOCK_4 = recorded("3", "n3", "4", "2", "0", "n[1-3]", "3", "5", "3,1(x2)")
CYCLIC_1 = recorded("5", "n2", "1", "1", "0", "n[1-3]", "3", "5", "3,1(x2)")
CYCLIC_3 = recorded("5", "n1", "3", "0", "1", "n[1-3]", "3", "5", "3,1(x2)")
PER_NODE = recorded("4", "n3", "2", "2", "0", "n[1-3]", "3", "3", "1(x3)")
PART = recorded("7", "n2", "0", "0", "0", "n2", "1", "1", "1")
# `srun --ntasks=3 --distribution=arbitrary` with the hosts n3, n1, n3, task 0.
ARBITRARY = recorded("6", "n3", "0", "1", "0", "n[1,3]", "2", "3", "1,2")

NOT_NEEDED = ("SLURMD_NODENAME", "SLURM_LAUNCH_NODE_IPADDR", "SLURM_JOB_NODELIST")

BATCH = {
    "SLURMD_NODENAME": "n1", "SLURM_CPUS_ON_NODE": "1", "SLURM_GTIDS": "0", "SLURM_JOBID": "7", "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_LOCALID": "0", "SLURM_NNODES": "2",
    "SLURM_NODEID": "0", "SLURM_NODELIST": "n[1-2]", "SLURM_NPROCS": "2", "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "1", "SLURM_PROCID": "0", "SLURM_TASKS_PER_NODE": "1(x2)",
}  # fmt: skip
SALLOC = {
    "SLURM_JOBID": "8", "SLURM_JOB_CPUS_PER_NODE": "1(x2)", "SLURM_JOB_ID": "8", "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2", "SLURM_NNODES": "2", "SLURM_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "1(x2)",
}  # fmt: skip


def refused(environ) -> str:
    with pytest.raises(UserError) as caught:
        step(environ)
    text = str(caught.value)
    assert text.endswith(".") and ". " not in text and "\n" not in text, f"not one sentence: {text}"
    return text


EXPECTED = {
    "one node": (ONE_NODE, (1, 2, 0, 1, 1, 2, "n1", ["n1"])),
    "three nodes": (BLOCK_4, (4, 5, 2, 3, 0, 1, "n1", ["n1", "n2", "n3"])),
    "cyclic, second node": (CYCLIC_1, (1, 5, 1, 3, 0, 1, "n1", ["n1", "n2", "n3"])),
    "cyclic, second round": (CYCLIC_3, (3, 5, 0, 3, 1, 3, "n1", ["n1", "n2", "n3"])),
    "a task per node": (PER_NODE, (2, 3, 2, 3, 0, 1, "n1", ["n1", "n2", "n3"])),
    "a part of the job's nodes": (PART, (0, 1, 0, 1, 0, 1, "n2", ["n2"])),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_a_step_is_read(case):
    environ, expected = EXPECTED[case]
    found = step(environ)
    assert found is not None and dataclasses.astuple(found)[:-1] == expected


@pytest.mark.parametrize("environ", [{}, BATCH, SALLOC], ids=["no SLURM", "batch", "salloc"])
def test_outside_of_an_srun_there_is_no_step(environ):
    assert step(environ) is None


def test_a_batch_job_submitted_from_within_a_step_is_not_that_step():
    """SLURM leaves the step's variables in the job's, and replaces those of the node and the job."""
    inherited = {name: value for name, value in PART.items() if "_STEP_" in name}
    assert step({**inherited, **BATCH}) is None


def port(job, number="0", **more):
    found = step({**BLOCK_4, "SLURM_JOB_ID": job, "SLURM_STEP_ID": number, **more})
    assert isinstance(found, Step)
    return found.port


def test_the_port_is_the_same_on_all_nodes():
    assert port("5") == step(CYCLIC_1).port == step(CYCLIC_3).port  # pyright: ignore


def test_ports_of_neighbouring_jobs_and_steps_do_not_meet():
    """Each has four: `port` to `port + 3`."""
    firsts = sorted([port(str(job)) for job in range(1000, 1050)] + [port("1000", str(one)) for one in range(1, 20)])
    assert all(after - before >= 4 for before, after in itertools.pairwise(firsts))


@pytest.mark.parametrize("job", ["0", "2499", "2500", "67108863", "4294967295"])
def test_ports_lie_below_the_ephemeral_ones(job):
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        ephemeral = int(file.read().split()[0])
    assert port(job) >= 20000 and port(job) + 3 < min(30000, ephemeral)


# What `scontrol show hostnames LIST` of SLURM 22.05 prints.
LISTS = {
    "login": "login",
    "gpu[001-003,7],login,rack[1-2]n[01-02]": "gpu001 gpu002 gpu003 gpu7 login rack1n01 rack1n02 rack2n01 rack2n02",
    "gpu[8-11]": "gpu8 gpu9 gpu10 gpu11",
    "gpu[08-11]": "gpu08 gpu09 gpu10 gpu11",
    "n[098-102]": "n098 n099 n100 n101 n102",
    "n[1,3,5-7,09]": "n1 n3 n5 n6 n7 n09",
    "a[9-10],b[09-10]": "a9 a10 b09 b10",
    "a[01-3]": "a01 a02 a03",
    "x[0000]": "x0000",
    "nid[000012-000015]": "nid000012 nid000013 nid000014 nid000015",
    "b,a,c": "b a c",
    "n3,n1,n2": "n3 n1 n2",
    "n[10,9,8]": "n10 n9 n8",
    "h[1-2],h[1-2]": "h1 h2 h1 h2",
    "a[1-2][3-4]": "a13 a14 a23 a24",
    "r[1-2]c[1-2]n[1-2]": "r1c1n1 r1c1n2 r2c1n1 r2c1n2 r1c2n1 r1c2n2 r2c2n1 r2c2n2",
    "a[1-2]b[01,03-04]c[1-2]": "a1b01c1 a1b01c2 a2b01c1 a2b01c2 a1b03c1 a1b03c2 a2b03c1 a2b03c2 a1b04c1 a1b04c2 "
    "a2b04c1 a2b04c2",
    "gpu-a.site[1-2],gpu_b": "gpu-a.site1 gpu-a.site2 gpu_b",
    "[1-3]": "1 2 3",
    "1-3": "1-3",
}  # fmt: skip


@pytest.mark.parametrize("text", LISTS)
def test_a_list_of_hosts_is_expanded_as_by_scontrol(text):
    assert expand_hosts(text) == LISTS[text].split()


DAMAGED = ["", "a,", ",a", "a,,b", "a[", "a]", "a[1-2", "a1-2]", "a[]", "a[1,]", "a[x]", "a[1-]", "a[-1]", "n[5-3]",
           "a b", "a[1-2]b", "a[[1]]", "a[1-2,b", "a[１-２]", "a[1-65537]", "a[1-999999999999999999]",
           "a[1-300]b[1-300]"]  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_list_is_told(text):
    with pytest.raises(UserError, match=r"^SLURM_STEP_NODELIST(=| is missing)"):
        step({**BLOCK_4, "SLURM_STEP_NODELIST": text})


def test_a_long_list_is_not_told_in_full():
    assert len(refused({**BLOCK_4, "SLURM_STEP_NODELIST": "node," * 500 + "["})) < 300


CHANGED = {
    "a node too few in the list": ({"SLURM_STEP_NODELIST": "n[1-2]"}, "3 nodes and 5 tasks.*NODELIST has 2"),
    "a task too many": ({"SLURM_STEP_TASKS_PER_NODE": "4,1(x2)"}, "SLURM_STEP_TASKS_PER_NODE 6 on 3"),
    "a node too few with tasks": ({"SLURM_STEP_TASKS_PER_NODE": "5"}, "SLURM_STEP_TASKS_PER_NODE 5 on 1"),
    "a task beyond the last": ({"SLURM_PROCID": "5"}, "task 5 of 5"),
    "a node beyond the last": ({"SLURM_NODEID": "3"}, "node 3 of 3"),
    "a local task beyond the node's": ({"SLURM_LOCALID": "1"}, "local task 1"),
    "a number that is none": ({"SLURM_PROCID": "1x"}, "SLURM_PROCID=1x is no number"),
    "a negative number": ({"SLURM_NODEID": "-1"}, "SLURM_NODEID=-1 is no number"),
    "counts that are none": ({"SLURM_STEP_TASKS_PER_NODE": "2(x"}, r"SLURM_STEP_TASKS_PER_NODE=2\(x is no list"),
    "counts beyond measure": ({"SLURM_STEP_TASKS_PER_NODE": "1(x999999999)"}, "is no list such as"),
    "an empty job": ({"SLURM_JOB_ID": ""}, "SLURM_JOB_ID is missing"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_what_contradicts_itself_is_told_in_a_sentence(case):
    changes, expected = CHANGED[case]
    assert re.search(expected, refused({**BLOCK_4, **changes}))


@pytest.mark.parametrize("name", [name for name in BLOCK_4 if name not in NOT_NEEDED])
def test_a_missing_variable_is_named(name):
    assert refused({key: value for key, value in BLOCK_4.items() if key != name}).startswith(f"{name} is missing")


def test_a_first_task_that_is_not_on_the_first_host_is_told():
    assert "without --distribution=arbitrary" in refused(ARBITRARY)
