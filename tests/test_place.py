"""Which process this is, by each launcher's environment."""

import pytest

from elsewhere.launch.errors import UserError
from elsewhere.launch.nodes.place import find_place

# As the launchers were seen to set them: process 3 of 2 machines with 2 processes each.
TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "MASTER_ADDR": "n0",
    "MASTER_PORT": "29500", "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
DEEPSPEED = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2",
    "MASTER_ADDR": "n0", "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.mark.parametrize("environ", [TORCHRUN, DEEPSPEED], ids=["torchrun", "deepspeed"])
def test_the_launchers_agree(environ):
    place = find_place(environ)
    assert (place.rank, place.size, place.local_rank, place.local_size, place.node) == (3, 4, 1, 2, 1)
    assert (place.master, place.port) == ("n0", 29500)


def test_torchruns_own_process_keeps_the_store_and_each_restart_its_own_names():
    assert find_place(TORCHRUN).hosted and find_place(TORCHRUN).life == "2"
    assert not find_place(DEEPSPEED).hosted


def test_alone():
    assert find_place({}).size == 1 and find_place({"RANK": "0", "WORLD_SIZE": "1"}).master is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"RANK": "four"}, "RANK=four"),
        ({"RANK": "4"}, "contradicts itself"),
        ({"LOCAL_RANK": "2"}, "contradicts itself"),
        ({"MASTER_ADDR": ""}, "no MASTER_ADDR"),
        ({"MASTER_PORT": ""}, "no MASTER_PORT"),
    ],
)
def test_an_environment_that_cannot_be_is_refused(change, expected):
    with pytest.raises(UserError) as refused:
        find_place({**TORCHRUN, **change})
    assert expected in str(refused.value)
