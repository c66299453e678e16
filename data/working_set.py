"""How much of a remote set a node reads at a time, and a warning where the cache has less.

A stream draws its samples from a window of `shuffle_buffer`, so it is in so many shards at once, in
one more at either end and in those that are prefetched. A cache that holds all of these fetches
each shard once an epoch. One that lacks a few fetches most of them again and again, as what is
longest unused is what comes next; nothing but the network would tell.
"""

from __future__ import annotations

import logging
import math
import os

import torch

from data.cache import GIGABYTE
from data.config import DataConfig
from data.mixture import TrainSet
from data.shards import ShardSet

log = logging.getLogger(__name__)


def working_set(shards: ShardSet, *, streams: int, shuffle_buffer: int, prefetch: int) -> int:
    """Bytes of the shards that `streams` of a set are in at a time, at most those of all."""
    whole = sum(entry.bytes for entry in shards.entries)
    count = len(shards.entries)
    each = math.ceil(shuffle_buffer * count / shards.num_samples) + 2 + prefetch
    return min(whole, streams * each * whole // count)


def warn_of_small_cache(
    config: DataConfig, train: TrainSet, *, streams: int, rank: int, world_size: int
) -> None:
    """Say so, once a node, when data.remote.cache_gb is too small for the streams of its ranks.

    `streams` are those of the world; each one goes through all sources of a mixture.
    """
    ranks = ranks_of_node(world_size)
    if rank % ranks:
        return
    here = math.ceil(streams * ranks / world_size)
    options = {
        "streams": len(train.shards.names) if config.replacement else here,  # drawn from all
        "shuffle_buffer": config.shuffle_buffer,
        "prefetch": config.remote.prefetch,
    }
    needed = sum(working_set(part, **options) for part in train.parts if part.remote) / GIGABYTE
    if needed > config.remote.cache_gb:
        log.warning(
            "data.remote.cache_gb is %g and the %d streams of this node read from some %.2g GB of "
            "shards at a time, so most would be fetched many times an epoch; raise "
            "data.remote.cache_gb, lower data.remote.prefetch, or write smaller shards; before the "
            "first step also data.shuffle_buffer and data.streams can be lowered",
            config.remote.cache_gb, here, needed,
        )  # fmt: skip


def ranks_of_node(world_size: int) -> int:
    """Ranks on this machine: as the launcher says, else one a GPU, else all of them."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):  # torchrun, deepspeed
        if os.environ.get(name, "").isdigit():
            return min(world_size, max(1, int(os.environ[name])))
    return min(world_size, torch.cuda.device_count() or world_size)
