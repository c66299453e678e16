"""Ranks that cannot meet, or lose each other, say so in words."""

import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from routedvit.training.config.run import ConfigError
from routedvit.training.distributed import connection
from routedvit.training.distributed.connection import (
    LaunchError,
    connecting,
    lost_rank,
    record_collectives,
)
from routedvit.training.distributed.world import World


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def meet(monkeypatch: pytest.MonkeyPatch, rank: int, size: int, port: int) -> list[str]:
    """Try to connect for a second; what was told meanwhile."""
    told: list[str] = []
    world = World(rank, 0, size, torch.device("cpu"))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    with connecting(world, told.append):
        dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=1))
    return told


def test_a_port_in_use_is_a_mistake_that_names_the_flag(monkeypatch, taken):
    with pytest.raises(ConfigError, match=f"port {taken} of this machine is in use.*--master_port"):
        meet(monkeypatch, 0, 2, taken)


def test_a_rank_without_a_rank_0_names_itself_and_the_meeting_point(monkeypatch, free):
    with pytest.raises(LaunchError, match=f"rank 1 on .* did not reach rank 0 at 127.0.0.1:{free}"):
        meet(monkeypatch, 1, 2, free)


def test_rank_0_counts_those_who_came(monkeypatch, free):
    with pytest.raises(LaunchError, match=f"only 1 of 2 ranks came to 127.0.0.1:{free}"):
        meet(monkeypatch, 0, 2, free)


def test_a_network_interface_that_does_not_exist_is_named(monkeypatch, free):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    with pytest.raises(ConfigError, match=r"GLOO_SOCKET_IFNAME.*'eth77'"):
        meet(monkeypatch, 0, 1, free)


def test_a_launch_that_failed_may_be_tried_again_and_a_mistake_not():
    assert LaunchError.exit_code == 1
    assert not hasattr(ConfigError("x"), "exit_code")


def test_waiting_long_is_told_once(monkeypatch, free):
    monkeypatch.setattr(connection, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    told: list[str] = []
    with connecting(World(8, 0, 16, torch.device("cpu")), told.append):
        time.sleep(0.2)
    [line] = told
    assert line.startswith("rank 8 on ")
    assert line.endswith("waits at node1:29500 for the 16 ranks of this run")


def test_a_process_alone_and_other_ranks_of_a_machine_keep_silent(monkeypatch):
    monkeypatch.setattr(connection, "PATIENCE_SECONDS", 0.01)
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    told: list[str] = []
    for world in (World(0, 0, 1, torch.device("cpu")), World(3, 3, 16, torch.device("cpu"))):
        with connecting(world, told.append):
            time.sleep(0.05)
    assert told == []


# As torch prints what NCCL says; put together from their texts (NCCLUtils.cpp, libnccl), not run.
NCCL = """NCCL error in: /x/torch/csrc/distributed/NCCLUtils.cpp:94, {kind}, NCCL version 2.27.7
{kind}: what kind of trouble it is.
Last error:
{reason}"""


@pytest.mark.parametrize(
    ("kind", "reason", "words", "code"),
    [
        ("ncclInvalidUsage", "Bootstrap : no socket interface found",
         r"NCCL_SOCKET_IFNAME \(ib7\): rank 3 on .* no such network interface", None),
        ("ncclInvalidUsage", "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1b000",
         "LOCAL_RANK, CUDA_VISIBLE_DEVICES: .*rank 0 and rank 1 both on", None),
        ("ncclInvalidUsage", "Multiple Ranks are using the same GPU/Partition. Set NCCL_MULTI",
         "LOCAL_RANK, CUDA_VISIBLE_DEVICES: .*two ranks have one GPU", None),
        ("ncclInvalidUsage", "Mismatched NCCL version detected : rank 0 22707 rank 3 22605",
         "different versions of NCCL .*22605.* same environment", None),
        ("ncclSystemError", "Error while creating shared memory segment /dev/shm/nccl-x (size 9)",
         "more room .docker --shm-size", None),
        ("ncclUnhandledCudaError", "Cuda failure 802 'system not yet initialized'",
         "its GPU fails .Cuda failure 802", 1),
        ("ncclRemoteError", "socketPollConnect: connect returned No route to host",
         "does not connect their GPUs .*No route to host.* NCCL_SOCKET_IFNAME", 1),
    ],
)  # fmt: skip
def test_what_nccl_says_at_first_contact_is_put_in_words(monkeypatch, kind, reason, words, code):
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib7")
    world = World(3, 3, 16, torch.device("cpu"))
    with pytest.raises(ConfigError, match=words) as raised, connecting(world, print):
        raise dist.DistBackendError(NCCL.format(kind=kind, reason=reason))
    assert "rank 3 on " in str(raised.value)
    assert "met the others at node1:29500" in str(raised.value)
    assert getattr(raised.value, "exit_code", None) == code


def test_a_failure_of_nccl_without_a_reason_is_told_too(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    text = "[3] is setting up NCCL communicator and retrieving ncclUniqueId from [0]: wait timeout"
    with (
        pytest.raises(LaunchError, match="ncclUniqueId"),
        connecting(World(3, 3, 16, torch.device("cpu")), print),
    ):
        raise dist.DistBackendError(text)


# As torch 2.15 prints them.
LOSSES = [
    "[/x/gloo/transport/tcp/pair.cc:545] Read error [192.0.2.2]:41642: Connection reset by peer.",
    "[/x/gloo/transport/tcp/pair.cc:538] Connection closed by peer [192.0.2.2]:40226",
    "[/x/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 60000ms for recv operation",
    "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)",
]


@pytest.mark.parametrize("text", LOSSES)
def test_a_lost_rank_is_told_in_words(text):
    words = lost_rank(RuntimeError(text))
    assert words is not None
    assert words.startswith("lost contact with another rank")
    assert ("192.0.2.2" in words) == ("192.0.2.2" in text)
    assert "the same command goes on" in words


def test_other_errors_speak_for_themselves():
    assert lost_rank(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert lost_rank(OSError("Connection reset by peer")) is None  # of a download, say


@pytest.mark.skipif(
    not hasattr(torch._C._distributed_c10d, "_dump_fr_trace_file"),
    reason="torch 2.11 reads the setting too but cannot be asked to write without NCCL",
)
def test_the_last_collectives_would_be_written_beside_the_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The name of the setting is torch's; its recorder is asked for what it does on a timeout."""
    monkeypatch.delenv("TORCH_FR_DUMP_TEMP_FILE", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    record_collectives(Path("logs"))
    monkeypatch.chdir("/")
    torch._C._distributed_c10d._dump_fr_trace_file(3)
    assert (tmp_path / "logs" / "collectives_rank_3").stat().st_size > 0
    record_collectives(Path("elsewhere"))  # what the environment says stays
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/logs/collectives_rank_"
