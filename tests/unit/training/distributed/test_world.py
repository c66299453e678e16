"""Every launcher's variables lead to the five that torch.distributed wants."""

import os

import pytest
import torch

from routedvit.training.config.run import ConfigError
from routedvit.training.distributed.world import (
    device_index,
    first_host,
    join_environment,
    launch_environment,
    rank_of,
)


def test_deepspeed_and_torchrun_need_nothing():
    given = {
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1",
    }  # fmt: skip
    assert launch_environment(given) == {}


def test_plain_python_is_one_process_on_a_free_port():
    found = launch_environment({})
    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    assert 1024 <= int(found["MASTER_PORT"]) < 65536


SRUN = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "41234567",
}  # fmt: skip


def test_srun_is_translated():
    found = launch_environment(SRUN)
    assert found["RANK"] == "5"
    assert found["LOCAL_RANK"] == "1"
    assert found["WORLD_SIZE"] == "8"
    assert found["MASTER_ADDR"] == "gpu07"
    assert found["MASTER_PORT"] == launch_environment(SRUN | {"SLURM_PROCID": "0"})["MASTER_PORT"]


def test_a_given_master_wins_under_srun():
    found = launch_environment(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"})
    assert "MASTER_ADDR" not in found
    assert "MASTER_PORT" not in found


def test_a_plain_python_inside_a_batch_script_is_one_process():
    found = launch_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"})
    assert found["WORLD_SIZE"] == "1"


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu07", "gpu07"),
        ("gpu[07-12,20],cpu1", "gpu07"),
        ("gpu[3,5]", "gpu3"),
        ("a1,a2", "a1"),
        ("rack2-n[001-004]-ib", "rack2-n001-ib"),
    ],
)
def test_first_host_of_a_slurm_list(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["", "[1-2]"])
def test_a_node_list_without_a_host_is_a_mistake(nodes):
    with pytest.raises(ConfigError, match="names no host; set MASTER_ADDR"):
        first_host(nodes)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MASTER_ADDR", "", "MASTER_ADDR is empty; name the machine of rank 0"),
        ("MASTER_PORT", "", "MASTER_PORT = '' is no port"),
        ("MASTER_PORT", "29500/tcp", "MASTER_PORT = '29500/tcp' is no port"),
        ("MASTER_PORT", "99999", "MASTER_PORT = '99999' is no port; give a free one"),
    ],
)
def test_a_meeting_point_that_is_none_is_a_mistake(monkeypatch, name, value, said):
    given = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    monkeypatch.setattr(os, "environ", given | {"MASTER_PORT": "29500", name: value})
    with pytest.raises(ConfigError, match=said):
        join_environment()


OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}  # fmt: skip
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1"}


@pytest.mark.parametrize("given", [OPEN_MPI, HYDRA])
def test_mpirun_is_translated_where_it_says_where_to_meet(given):
    found = launch_environment(given | {"MASTER_ADDR": "node1"})
    assert found == {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_PORT": "29500"}
    assert rank_of(given) == 5


@pytest.mark.parametrize("given", [OPEN_MPI, HYDRA])
def test_processes_of_mpirun_are_not_worlds_of_one(given):
    with pytest.raises(ConfigError, match=r"MASTER_ADDR: this is one of 8 processes.*node1"):
        launch_environment(given)


def test_an_mpirun_inside_a_slurm_job_counts_for_itself():
    daemon = SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    found = launch_environment(daemon | OPEN_MPI | {"MASTER_ADDR": "node1"})
    assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) == ("5", "1", "8")
    assert rank_of(daemon | OPEN_MPI) == 5


def test_srun_that_speaks_pmi_is_srun():
    found = launch_environment(SRUN | {"PMI_RANK": "5", "PMI_SIZE": "8"})
    assert (found["LOCAL_RANK"], found["MASTER_ADDR"]) == ("1", "gpu07")


def test_one_process_of_mpirun_is_one_process():
    found = launch_environment({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"})
    assert found["WORLD_SIZE"] == "1"


@pytest.mark.parametrize("name", ["SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"])
def test_the_place_on_the_machine_is_read_from_whoever_says_it(name):
    given = {"RANK": "3", "WORLD_SIZE": "4", name: "2"}
    assert launch_environment(given)["LOCAL_RANK"] == "2"


@pytest.fixture
def gpus(monkeypatch):
    """Runs join_environment on a machine with so many GPUs under an environment."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)

    def join(count, environment):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(os, "environ", dict(environment))
        world = join_environment()
        assert chosen[-1] == world.device
        return world

    return join


@pytest.mark.parametrize("launcher", [SRUN, OPEN_MPI | {"MASTER_ADDR": "node1"}])
def test_the_only_gpu_in_sight_is_this_process_s(gpus, launcher):
    world = gpus(1, launcher)
    assert (world.local_rank, world.device) == (1, torch.device("cuda", 0))
    assert os.environ["LOCAL_RANK"] == "0"  # which DeepSpeed takes for the device
    assert os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", "0") == "0"


def test_with_all_gpus_in_sight_it_is_the_one_of_its_number(gpus):
    world = gpus(8, SRUN)
    assert (world.local_rank, world.device) == (1, torch.device("cuda", 1))
    assert os.environ["LOCAL_RANK"] == "1"


def test_more_processes_than_gpus_are_a_mistake(gpus):
    with pytest.raises(ConfigError, match="LOCAL_RANK = 5, but this process sees 2 GPUs"):
        gpus(2, SRUN | {"SLURM_LOCALID": "5"})


def test_a_place_that_nobody_tells_is_a_mistake_where_there_is_a_choice(gpus):
    given = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    with pytest.raises(ConfigError, match=r"LOCAL_RANK: it is not set.*8 GPUs"):
        gpus(8, given)
    assert gpus(1, given).device == torch.device("cuda", 0)
    assert gpus(8, given | {"RANK": "0", "WORLD_SIZE": "1"}).device == torch.device("cuda", 0)


def test_devices_by_number():
    assert [device_index(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
