"""What goes wrong between machines, in words: how ranks fail to meet, and how they lose each other.

torch.distributed reports both with the addresses and source lines of its transport. Whoever starts
a run on many machines needs to know which rank, which meeting point and what to look at.

A rank that cannot meet the others ends with `LaunchError`, exit code 1: the other machines may come
up later, so schedulers may try again. A wrong port or interface is the user's, exit code 2.

DeepSpeed names the device to torch, so NCCL makes its first contact while the ranks meet and not
in the first collective.
"""

import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from routedvit.training.config.base import ConfigError
from routedvit.training.distributed.world import World

PATIENCE_SECONDS = 20.0  # before a rank says that it waits for others

# How gloo, NCCL and the store name the loss of a peer.
LOST = re.compile(
    r"(Connection (?:closed|reset) by peer|Broken pipe|Socket closed|Timed out waiting \d+\s*ms"
    r"|remote process exited|Watchdog caught collective operation timeout|ncclRemoteError)"
)
PEER = re.compile(r"\[(\d[\d.]*|[0-9a-fA-F:]+)\]:\d+")


class LaunchError(ConfigError):
    """The ranks did not come together; starting again may help."""

    exit_code = 1


@contextmanager
def connecting(world: World, tell: Callable[[str], None]) -> Iterator[None]:
    """Around the call that connects this process to the others.

    Args:
        tell: called with one line, by the first rank of each machine, when this takes long.

    Raises:
        ConfigError: the port or the network interface cannot be used.
        LaunchError: not all ranks came within torch.distributed's timeout.
    """
    meeting_point = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    line = f"{place(world.rank)} waits at {meeting_point} for the {world.size} ranks of this run"
    timer = threading.Timer(PATIENCE_SECONDS, tell, [line])
    timer.daemon = True
    if world.size > 1 and world.local_rank == 0:
        timer.start()
    try:
        yield
    except RuntimeError as error:
        mistake = _failure_to_meet(error, world, meeting_point)
        if mistake is None:
            raise
        raise mistake from error
    finally:
        timer.cancel()


def record_collectives(folder: Path) -> None:
    """Let NCCL leave in `folder` what each rank waited for, should it ever wait in vain.

    torch keeps the last 2,000 collectives of a rank in memory anyway and writes them down when one
    times out, by default below the home folder, where jobs overwrite each other's. `torchfrtrace`
    compares them. Call it before the ranks connect; what the environment says already stays.
    """
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder.absolute() / "collectives_rank_"))


def place(rank: int) -> str:
    """'rank 8 on node2', for messages of this process."""
    return f"rank {rank} on {socket.gethostname()}"


def lost_rank(error: BaseException) -> str | None:
    """What to tell when another rank is gone; None if `error` is about something else."""
    found = LOST.search(str(error))
    if not isinstance(error, RuntimeError) or found is None:
        return None
    peer = PEER.search(str(error))
    where = f" at {peer.group(1)}" if peer else ""
    return (
        f"lost contact with another rank{where} ({found.group(1)}): it has died or cannot be "
        "reached, its own output says why; the same command goes on from the newest checkpoint"
    )


def _failure_to_meet(error: RuntimeError, world: World, meeting_point: str) -> ConfigError | None:
    text = str(error)
    me = place(world.rank)
    if "EADDRINUSE" in text:
        return ConfigError(
            f"MASTER_PORT: port {meeting_point.rpartition(':')[2]} of this machine is in use, "
            "perhaps by another run; choose another one (deepspeed --master_port N, torchrun "
            "--master-port N, or the environment variable)"
        )
    if interface := re.search(r"Unable to find address for: (\S+)", text):
        return ConfigError(
            f"GLOO_SOCKET_IFNAME: {me} has no network interface {interface.group(1)!r} with an "
            "address; `ip -brief address` lists what it has"
        )
    if joined := re.search(r"(\d+)/\d+ clients joined", text):
        return LaunchError(
            f"only {joined.group(1)} of {world.size} ranks came to {meeting_point} in time; were "
            "all of them started, with this address, and do firewalls let them through?"
        )
    if isinstance(error, dist.DistBackendError):
        return _failure_of_nccl(text, f"{me} met the others at {meeting_point}")
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return LaunchError(
            f"{me} did not reach rank 0 at {meeting_point}: is that its right name, was it "
            "started, and is the port open between the machines?"
        )
    if "connectFullMesh" in text:
        return LaunchError(
            f"{me} met the others at {meeting_point} but cannot connect to all of them; machines "
            "with several networks need GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME)"
        )
    return None


def _failure_of_nccl(text: str, met: str) -> ConfigError:
    """What its first contact between the GPUs failed of; ranks have found each other by then.

    NCCL tells the reason in the line after 'Last error:'. The texts are those of NCCL 2.30 and of
    earlier ones, as they lie in its library; not run.
    """
    _, _, after = text.partition("Last error:")
    reason = (after.strip() or text.strip()).splitlines()[0]
    if re.search("no (socket )?interface found|No usable listening interface found", text):
        named = os.environ.get("NCCL_SOCKET_IFNAME", "not set")
        return ConfigError(
            f"NCCL_SOCKET_IFNAME ({named}): {met}, but NCCL finds no such network interface with "
            "an address; `ip -brief address` lists what this machine has"
        )
    if re.search("Duplicate GPU detected|using the same GPU", text):
        return ConfigError(
            f"LOCAL_RANK, CUDA_VISIBLE_DEVICES: {met}, but two ranks have one GPU ({reason}); "
            "start as many processes on a machine as it has GPUs, numbered from 0"
        )
    if re.search("Mismatched NCCL version|NCCL version mismatch", text):
        return ConfigError(
            f"{met}, but machines have different versions of NCCL ({reason}); give every machine "
            "the same environment, and no other NCCL in LD_LIBRARY_PATH or LD_PRELOAD"
        )
    if "shared memory segment" in text:
        return ConfigError(
            f"{met}, but NCCL gets no shared memory ({reason}); give /dev/shm of the container "
            "more room (docker --shm-size, an emptyDir of medium Memory)"
        )
    if "Cuda failure" in text or "ncclUnhandledCudaError" in text:
        return LaunchError(
            f"{met}, but its GPU fails ({reason}); `nvidia-smi` on that machine tells more, of the "
            "driver too"
        )
    return LaunchError(
        f"{met}, but NCCL does not connect their GPUs ({reason}): machines with several networks "
        "need NCCL_SOCKET_IFNAME, and NCCL's ports must be open between them; if only some are "
        "lost, the output of those says why; NCCL_DEBUG=INFO tells each step"
    )
