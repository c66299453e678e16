"""How a process leaves the others: with them, or alone.

NCCL takes its communicators down together. `destroy_process_group` waits on every rank of a machine
for all the others, and one that fails alone would wait until their watchdogs give up, after 10
minutes (torchtitan#1342, pytorch#180611), with the launcher none the wiser. So only ends that all
ranks come to disconnect in order; any other leaves at once and takes the connections with it, from
which the launcher and the peers see that it is gone.

gloo disconnects on its own and must: its threads abort a process that ends while still connected.
Nor may the interpreter clear itself away beside a thread that still writes a checkpoint, on a disk
that hangs say: that would abort the process too, and its exit code would be another.
"""

import contextlib
import logging
import os
import sys
from typing import NoReturn

import torch.distributed as dist

from routedvit.training.background import is_any_running
from routedvit.training.distributed.signals import REQUEUE_EXIT_CODE

TOGETHER = (0, REQUEUE_EXIT_CODE)  # finished, or stopped and saved: all ranks or none


def leave(code: int) -> NoReturn:
    """End this process with an exit code; what was printed or logged is on its way by then.

    Whatever else waits for the interpreter's end (exit hooks, other threads) is left out where
    NCCL connects the ranks and they do not end together, or a thread still writes. Loader processes
    notice by themselves.
    """
    if (code not in TOGETHER and connected_by_nccl()) or is_any_running():
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # a full disk must not change the exit code
                stream.flush()
        os._exit(code)
    sys.exit(code)


def connected_by_nccl() -> bool:
    """Whether this process belongs to a world whose collectives are NCCL's."""
    return dist.is_available() and dist.is_initialized() and "nccl" in dist.get_backend()
