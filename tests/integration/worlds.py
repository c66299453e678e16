"""Worlds of several sizes, one after the other, forked from one process that has imported all.

Importing torch, timm and deepspeed takes most of the time of a small launched test.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable

from routedvit.training import engine
from routedvit.training.distributed.world import World


def fork_world(size: int, main: Callable[[int], int]) -> list[int]:
    """Exit codes of main(rank) on `size` ranks, placed as by a launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    children = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            os.environ.update(place | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            _end(main, rank)
        children.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def in_world(size: int, action: Callable[[World], None]) -> None:
    """Run `action` on `size` connected ranks; raises if one of them failed."""

    def main(rank: int) -> int:
        action(engine.start())
        engine.stop()
        return 0

    codes = fork_world(size, main)
    if any(codes):
        raise RuntimeError(f"ranks ended with {codes}")


def _end(main: Callable[[int], int], rank: int) -> None:
    """The life of one rank."""
    code = 1
    try:
        code = main(rank)
        engine.stop()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
