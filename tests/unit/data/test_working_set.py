"""A cache that is too small for what a node reads at a time is told at the start."""

from __future__ import annotations

import numpy as np
import pytest

from data.cache import GIGABYTE
from data.config import DataConfig
from data.labels import Classes
from data.manifest import ShardEntry
from data.mixture import TrainSet
from data.order import SampleOrder
from data.shards import ShardSet
from data.working_set import ranks_of_node, warn_of_small_cache, working_set

SIZE = 10**6  # bytes of a shard


def shards(count, samples, where="https://h"):
    entries = [
        ShardEntry(name=f"{number}.tar", samples=samples, bytes=SIZE, sha256=f"{number:064x}")
        for number in range(count)
    ]
    names = [f"{where}/{entry.name}" for entry in entries]
    return ShardSet(names, entries, classes=Classes(3), mean=[0.5], std=[0.5])


@pytest.mark.parametrize("buffer", [0, 5, 10, 40])
def test_the_estimate_holds_what_the_order_reads_and_little_more(buffer):
    """A shard is held from its first sample in the epoch to its last."""
    order = SampleOrder([10] * 120, seed=3, shuffle_buffer=buffer, streams=4)
    shard = order.locate(np.arange(1200)).shard
    first = np.array([np.flatnonzero(shard == number)[0] for number in range(120)])
    last = np.array([np.flatnonzero(shard == number)[-1] for number in range(120)])
    held = max(((first <= turn) & (turn <= last)).sum() for turn in range(1200))
    options = {"streams": 4, "shuffle_buffer": buffer, "prefetch": 0}
    assert held * SIZE <= working_set(shards(120, 10), **options) <= (held + 9) * SIZE


def test_no_more_than_the_set_is_ever_needed():
    options = {"streams": 64, "shuffle_buffer": 4096, "prefetch": 2}
    assert working_set(shards(8, 10), **options) == 8 * SIZE


def warned(caplog, monkeypatch, cache, rank=0, where="https://h", parts=1, **fields):
    """Whether a cache of so many shards makes rank `rank` of 8, on 2 nodes, warn."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    remote = {"cache_gb": cache * SIZE / GIGABYTE, "prefetch": 2}
    config = DataConfig.model_validate(
        {"train": {"shards": "x"}, "shuffle_buffer": 30, "remote": remote} | fields
    )
    sets = [shards(200, 10, where)] * parts
    train = TrainSet(sets[0], sets, [1.0] * parts, 2000)
    caplog.clear()
    warn_of_small_cache(config, train, streams=16, rank=rank, world_size=8)
    return "data.remote.cache_gb" in caplog.text


def test_a_cache_below_the_working_set_of_its_node_is_told(caplog, monkeypatch):
    # 8 of the 16 streams, each in 3 + 2 shards and 2 ahead
    assert not warned(caplog, monkeypatch, 57)
    assert warned(caplog, monkeypatch, 55)
    assert "8 streams of this node read from some 0.056 GB" in caplog.text
    assert warned(caplog, monkeypatch, 55, rank=4)
    assert not warned(caplog, monkeypatch, 55, rank=5)  # once a node
    assert not warned(caplog, monkeypatch, 55, where="/disk")
    assert warned(caplog, monkeypatch, 57, parts=2)
    assert warned(caplog, monkeypatch, 199, replacement=True)
    assert not warned(caplog, monkeypatch, 201, replacement=True)


@pytest.mark.parametrize(
    ("variables", "gpus", "ranks"),
    [({"LOCAL_WORLD_SIZE": "2"}, 8, 2), ({"LOCAL_SIZE": "4"}, 0, 4), ({}, 8, 8), ({}, 0, 16)],
)
def test_ranks_of_a_node_are_those_of_its_launcher(monkeypatch, variables, gpus, ranks):
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert ranks_of_node(16) == ranks
