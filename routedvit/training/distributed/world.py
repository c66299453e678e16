"""Which process this is among how many, read from whatever launched it.

The `deepspeed` launcher and torchrun set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
`srun` sets only its own variables, which DeepSpeed does not read, and plain `python train.py` sets
none; both are translated here into the five variables that torch.distributed wants.
"""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import torch

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


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
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        found = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    # SLURM_STEP_NUM_TASKS exists only inside srun: a plain python in a batch script is one process.
    elif "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ:
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


def first_host(node_list: str) -> str:
    """First host of a Slurm node list: 'gpu[07-12,20],cpu1' gives 'gpu07'."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\])?([^,\[]*)", node_list)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST={node_list!r} names no host; set MASTER_ADDR")
    prefix, number, suffix = match.groups()
    return prefix + (number or "") + suffix


def join_environment() -> World:
    """Complete os.environ for torch.distributed and choose this process's device.

    Nothing is connected yet; `engine.start` does that.
    """
    os.environ.update(launch_environment(os.environ))
    if os.environ["MASTER_ADDR"] in ("127.0.0.1", "localhost"):
        # One machine: gloo talks over the loopback, even where the host's name does not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu")
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    return World(int(os.environ["RANK"]), local_rank, int(os.environ["WORLD_SIZE"]), device)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
