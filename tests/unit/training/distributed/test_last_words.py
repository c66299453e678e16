"""What one rank says before it ends is heard by all, and a store that is gone harms nobody."""

from __future__ import annotations

import multiprocessing
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from routedvit.training.distributed import last_words
from routedvit.training.distributed.last_words import LastWords
from routedvit.training.distributed.patience import Patience


def store(port: int = 0) -> dist.Store:
    """One end of a store; the one that opens it has no port yet."""
    return dist.TCPStore("127.0.0.1", port, None, port == 0, timedelta(seconds=20), False)


def wait_for(words: LastWords, seconds: float = 5) -> str | None:
    end = time.monotonic() + seconds
    while words.heard is None and time.monotonic() < end:
        time.sleep(0.02)
    return words.heard


def test_what_one_says_all_hear() -> None:
    first = store()
    rank_0 = LastWords(dist.PrefixStore("world", first), listen_seconds=0.02)
    rank_1 = LastWords(dist.PrefixStore("world", store(first.port)), listen_seconds=0.02)
    time.sleep(0.1)
    assert rank_0.heard is None
    rank_1.say("rank 1 failed: no gcc")
    assert wait_for(rank_0) == wait_for(rank_1) == "rank 1 failed: no gcc"
    rank_0.say("rank 0 failed: rank 1 failed")
    assert LastWords(store(first.port), listen_seconds=0.02).heard is None  # another start's
    late = LastWords(dist.PrefixStore("world", store(first.port)), listen_seconds=0.02)
    assert wait_for(late) == "rank 1 failed: no gcc"  # the first word is the last


def test_a_wait_for_something_else_does_not_keep_the_words() -> None:
    """Under NCCL a rank sits in the store itself while it waits for the first collective."""
    first = store()
    words = LastWords(first, listen_seconds=0.02)

    def waits() -> None:
        own = store(first.port)
        LastWords(own, listen_seconds=0.02)
        own.set("ready", "")
        own.wait(["never"], timedelta(seconds=20))

    process = multiprocessing.get_context("fork").Process(target=waits)
    process.start()
    first.wait(["ready"], timedelta(seconds=20))
    words.say("x")
    assert wait_for(words) == "x"
    process.kill()


def host_that_dies(pipe: multiprocessing.connection.Connection) -> None:
    first = store()
    pipe.send(first.port)
    time.sleep(60)


def test_a_store_that_is_gone_is_silent_and_quick(monkeypatch) -> None:
    here, there = multiprocessing.Pipe()
    host = multiprocessing.get_context("spawn").Process(target=host_that_dies, args=(there,))
    host.start()
    words = LastWords(store(here.recv()), listen_seconds=0.02)
    host.kill()
    host.join()
    time.sleep(0.2)
    began = time.monotonic()
    words.say("nobody hears")
    assert time.monotonic() - began < last_words.SPEAK_SECONDS + 1
    assert words.heard is None


def rank(number: int, port: int, folder: Path) -> None:
    """One of two: the second fails before a collective that the first waits in, unseen by gloo."""
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=number, world_size=2)
    words = last_words.last_words()
    told = (folder / f"{number}").open("w")
    sys.stderr = (folder / "log").open("w")
    try:
        with Patience(
            number, last_words=words, fault_seconds=0.2, poll_seconds=0.02, grace_seconds=0,
            tell=lambda line: print(line, file=told, flush=True),
        ):  # fmt: skip
            if number == 1:
                raise FileNotFoundError("teacher.safetensors")
            dist.barrier()
    finally:
        time.sleep(20)  # connected, as a process of another machine is that waits to end


def test_a_rank_in_a_collective_hears_what_another_failed_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank, args=(n, port, tmp_path)) for n in range(2)]
    for process in ranks:
        process.start()
    ranks[0].join(15)
    ranks[1].kill()
    assert ranks[0].exitcode == 1
    told = (tmp_path / "0").read_text()
    assert told.startswith("rank 1 on ")
    assert " failed: FileNotFoundError: teacher.safetensors" in told
