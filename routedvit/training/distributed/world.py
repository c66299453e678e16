"""Which process this is among how many, and its device, read from whatever launched it.

The `deepspeed` launcher and torchrun set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
`srun` and `mpirun` set only their own variables, which DeepSpeed does not read, and plain `python
train.py` sets none; all are translated here into the five variables that torch.distributed wants.
"""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from routedvit.training.config.base import ConfigError

ACCELERATOR_GIVEN = "DS_ACCELERATOR" in os.environ  # before the engine sets it where it must
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# How MPI counts processes, all of them and those of a machine: Open MPI; MPICH and Intel MPI.
MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)
RANKS = ("RANK", MPI[0][0], "SLURM_PROCID", MPI[1][0])  # the surer first
LOCAL_RANKS = ("LOCAL_RANK", *(names[2] for names in MPI), "SLURM_LOCALID")


@dataclass(frozen=True)
class World:
    """This process's place: `rank` of `size` processes, `local_rank` on its machine."""

    rank: int
    local_rank: int
    size: int
    device: torch.device


def launch_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of `LAUNCHED` that `environ` lacks; empty under deepspeed and torchrun.

    Under `srun` rank 0 is on the first host of the step, and the port follows from the job's
    number, so that every process finds the same one; MASTER_ADDR and MASTER_PORT override both.
    `mpirun` does not say where rank 0 is.

    Raises:
        ConfigError: several processes that do not know where to meet.
    """
    local_rank = local_rank_of(environ) or "0"
    # SLURM_STEP_NUM_TASKS exists only inside srun: a plain python in a batch script is one process.
    slurm = "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ
    mpi = _mpi_names(environ)
    if "RANK" in environ and "WORLD_SIZE" in environ:
        found = {"LOCAL_RANK": local_rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    # An mpirun inside a Slurm job starts its daemons by srun, whose numbers are those of machines.
    elif mpi and (mpi[2] in environ or not slurm):
        rank, size, _ = mpi
        if "MASTER_ADDR" not in environ:
            raise ConfigError(
                f"MASTER_ADDR: this is one of {environ[size]} processes ({size}), which do not "
                "know where to meet; name the machine of rank 0: mpirun -x MASTER_ADDR=node1 ... "
                "(-genv MASTER_ADDR node1 with MPICH and Intel MPI), or use deepspeed or torchrun"
            )
        found = {"RANK": environ[rank], "LOCAL_RANK": local_rank, "WORLD_SIZE": environ[size]}
        found["MASTER_PORT"] = "29500"
    elif slurm:
        found = {
            "RANK": environ["SLURM_PROCID"],
            "LOCAL_RANK": environ["SLURM_LOCALID"],
            "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
            "MASTER_ADDR": first_host(environ["SLURM_STEP_NODELIST"]),
            # below 32768, where Linux begins to take ports for outgoing connections
            "MASTER_PORT": str(20000 + int(environ["SLURM_JOB_ID"]) % 12000),
        }
    else:
        found = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        if "MASTER_PORT" not in environ:
            found["MASTER_PORT"] = str(_free_port())
    return {name: value for name, value in found.items() if name not in environ}


def rank_of(environ: Mapping[str, str]) -> int:
    """This process's number, before anything else is known of the others; 0 if it is alone."""
    return int(next((environ[name] for name in RANKS if environ.get(name)), 0))


def local_rank_of(environ: Mapping[str, str]) -> str | None:
    """This process's number on its machine, as any launcher says it."""
    return next((environ[name] for name in LOCAL_RANKS if environ.get(name)), None)


def _mpi_names(environ: Mapping[str, str]) -> tuple[str, str, str] | None:
    """The variables of the MPI that started this process among others."""
    for names in MPI:
        if names[0] in environ and int(environ.get(names[1], 1)) > 1:
            return names
    return None


def first_host(node_list: str) -> str:
    """First host of a Slurm node list: 'gpu[07-12,20],cpu1' gives 'gpu07'.

    Raises:
        ConfigError: the list names none.
    """
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\])?([^,\[]*)", node_list)
    if match is None:
        raise ConfigError(f"SLURM_STEP_NODELIST = {node_list!r} names no host; set MASTER_ADDR")
    prefix, number, suffix = match.groups()
    return prefix + (number or "") + suffix


def join_environment() -> World:
    """Complete os.environ for torch.distributed and choose this process's device.

    Nothing is connected yet; `engine.start` does that.

    Raises:
        ConfigError: the launcher does not say where the processes meet, or which GPU is whose, or
            says what is no address or port.
    """
    known = local_rank_of(os.environ) is not None
    os.environ.update(launch_environment(os.environ))
    _check_meeting_point(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
    if os.environ["MASTER_ADDR"] in ("127.0.0.1", "localhost"):
        # One machine: gloo talks over the loopback, even where the host's name does not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    local_rank, size = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda":
        known = known or size == 1
        index = device_index(local_rank if known else None, torch.cuda.device_count())
        if index != local_rank:
            # DeepSpeed takes the device of that number, and wants Open MPI's to be the same.
            for name in {"LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"} & os.environ.keys():
                os.environ[name] = str(index)
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return World(int(os.environ["RANK"]), local_rank, size, device)


def _check_meeting_point(address: str, port: str) -> None:
    """What torch would refuse in words of its own, behind a stack; a wrong name it waits for."""
    if not address:
        raise ConfigError("MASTER_ADDR is empty; name the machine of rank 0, or unset it")
    if not port.isdecimal() or int(port) > 65535:
        raise ConfigError(
            f"MASTER_PORT = {port!r} is no port; give a free one of rank 0's machine, up to 65535"
        )


def device_index(local_rank: int | None, visible: int) -> int:
    """Which of the `visible` GPUs is this process's; local_rank is None where nobody says it.

    With one GPU in sight it is that one: `srun --gpus-per-task=1` and CUDA_VISIBLE_DEVICES set for
    each process number it 0 in all of them.

    Raises:
        ConfigError: it cannot be told.
    """
    if visible == 1:
        return 0
    if local_rank is None:
        raise ConfigError(
            f"LOCAL_RANK: it is not set, and so {visible} GPUs are in sight and nothing says which "
            "one is this process's; set it beside RANK and WORLD_SIZE to the process's number on "
            "its machine, from 0, or start with deepspeed, torchrun or srun"
        )
    if local_rank >= visible:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise ConfigError(
            f"LOCAL_RANK = {local_rank}, but this process sees {visible} GPUs "
            f"(CUDA_VISIBLE_DEVICES: {seen}); start as many processes on a machine as it has GPUs, "
            "and let each of them see all (Slurm: --gpus-per-node) or one (--gpus-per-task=1)"
        )
    return local_rank


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
