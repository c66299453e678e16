"""Processes that meet and part, with DeepSpeed prepared.

Nothing is compiled and little is loaded:

- its shared-memory all-reduce for CPUs (used by inference only) would be built with g++ at the
  first start, half a minute on two cores; telling it that no op is compatible avoids the build and
  the probing of every other op (nvcc, git, ninja);
- it imports its Muon optimiser in every run, whose torch.compile decorators load all of Inductor:
  1 s of a warm start, 8 s where no bytecode is cached. They are imported undecorated;
- optimisers come from torch and timm, so no fused op is built.

Reference: DeepSpeed 0.19.8, deepspeed/__init__.py and deepspeed/comm.
"""

import atexit
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from routedvit.training.distributed.connection import connecting
from routedvit.training.distributed.parting import connected_by_nccl
from routedvit.training.distributed.patience import bound_of_a_wait
from routedvit.training.distributed.world import ACCELERATOR_GIVEN, World, join_environment
from routedvit.training.host_memory import keep_freed_memory

# Both are read while deepspeed is imported. The NVML check keeps CUDA uninitialised for forks.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.comm import comm
from deepspeed.constants import default_pg_timeout
from deepspeed.runtime import compiler as deepspeed_compiler
from deepspeed.runtime import torch_autocast
from deepspeed.utils import groups

NO_GROUPS = dict(vars(groups))


def start(*, tf32: bool = True, tell: Callable[[str], None] = print) -> World:
    """Connect this process to the others, whoever launched it. Collective; call it first.

    See `connection.connecting` for what it raises and when it calls `tell`.
    """
    world = join_environment()
    if world.device.type == "cpu" and not ACCELERATOR_GIVEN and world.rank == 0:
        tell("torch finds no GPU, so this runs on the CPU (DS_ACCELERATOR=cpu says that it should)")
    prepare_deepspeed()
    if world.device.type == "cpu":
        keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    with connecting(world, tell):
        deepspeed.init_distributed(verbose=False)
    # gloo's threads abort a process that ends while still connected. An end that is this rank's
    # alone must not come here under NCCL: see distributed/parting.py.
    atexit.register(stop)
    return world


def stop() -> None:
    """Disconnect, so that another world may follow; calling it twice is fine.

    Under NCCL it waits for the other ranks of this machine to do the same.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        # DeepSpeed's globals keep the groups and so gloo's threads alive. One of them may still be
        # freeing the tensors of the last collective, for which it needs the interpreter's lock;
        # were the interpreter to end first, the thread would abort the process (seen in 1 end of
        # 8 under ZeRO-3). It needs microseconds once the lock is free.
        time.sleep(0.2)
    vars(groups).update(NO_GROUPS)  # DeepSpeed would go on with those of the world that ended
    comm.cdb = None
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False


def prepare_deepspeed() -> None:
    """Before it joins a world."""
    deepspeed.ops.__compatible_ops__ = {}
    _import_muon_undecorated()


def _import_muon_undecorated() -> None:
    decorator = deepspeed_compiler.compile
    deepspeed_compiler.compile = lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        deepspeed_compiler.compile = decorator


def seconds_to_wait() -> float | None:
    """After how long this process gives up a wait for others that nothing else would tell of.

    None where a wait in vain raises by itself, as it does under gloo.
    """
    return bound_of_a_wait(default_pg_timeout.total_seconds()) if connected_by_nccl() else None


def bound_all_waits() -> None:
    """Give every process group DEEPSPEED_TIMEOUT (minutes; 10 unless set).

    DeepSpeed reduces gradients in groups of its own, made with torch's timeout: a machine that lost
    its power left the others waiting for half an hour.
    """
    # public since torch 2.15
    set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
    for group in list(distributed_c10d._world.pg_map):
        set_timeout(default_pg_timeout, group)
