"""Every launcher's variables lead to the five that torch.distributed wants."""

import pytest

from routedvit.training.distributed.world import first_host, launch_environment


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
