"""A world of any size in one process, for rehearsals on fake tensors (see `rehearsal.py`)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator, stage3
from torch.testing._internal.distributed.fake_pg import FakeStore

from routedvit.training.distributed.world import World
from routedvit.training.engine.processes import prepare_deepspeed, stop


@contextmanager
def pretend(world_size: int) -> Iterator[World]:
    """This process as rank 0 of a world whose other ranks do not exist, on DeepSpeed's CPU backend.

    Collectives return at once and leave their buffers alone, so this is for fake tensors, which
    hold no values (see rehearsal.py). What ZeRO-3 compares over ranks to be safe is left out.
    """
    assert not dist.is_initialized(), "this process belongs to a real world"
    before, accelerator = dict(os.environ), get_accelerator()
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    os.environ.update(ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    set_accelerator(_PretendedAccelerator())
    prepare_deepspeed()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    comparing = (partition_parameters, partitioned_param_coordinator, stage3)
    compare = comparing[0].assert_ints_same_as_other_ranks
    for module in comparing:
        module.assert_ints_same_as_other_ranks = lambda ints: None
    try:
        deepspeed.init_distributed(verbose=False)
        yield World(0, 0, world_size, torch.device("cpu"))
    finally:
        for module in comparing:
            module.assert_ints_same_as_other_ranks = compare
        stop()
        set_accelerator(accelerator)
        os.environ.clear()
        os.environ.update(before)


class _PretendedAccelerator(CPU_Accelerator):
    """The CPU as DeepSpeed sees it, for shapes only: it has every number format."""

    def is_fp16_supported(self) -> bool:
        return True
