"""A GPU that is full, in words: what a run may change, and who tells how much that gives.

All three keys may change on a resume, so nothing that was trained is lost. The allocator's own
table goes into the rank's log: what is allocated, what is only reserved (fragmentation), and how
often it had to try again.
"""

import re
import sys

import torch
import torch.distributed as dist


def out_of_memory(error: BaseException) -> str | None:
    """What to tell when a GPU is full; None if `error` is about something else."""
    if not isinstance(error, torch.OutOfMemoryError):
        return None
    if torch.cuda.is_initialized():
        print(torch.cuda.memory_summary(abbreviated=True), file=sys.stderr)  # the rank's log
    wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return (
        f"the GPU is full{f' (no room for {wanted[1]} more)' if wanted else ''}: lower "
        'train.micro_batch_size, set train.grad_checkpointing = "block" or raise '
        "deepspeed.zero_optimization.stage, and the same command goes on from the newest "
        "checkpoint; `python train.py` with the same --config and --set and --dry-run --find-batch "
        f"--world-size {ranks} names the largest micro-batch that fits"
    )
