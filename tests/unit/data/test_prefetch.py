"""Shards come side by side, each once, and none that is here is asked for again."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from data.cache import ShardCache
from data.locks import locked
from data.prefetch import Prefetcher
from data.shards import resolve
from tests.unit.data.test_loaders import eval_loader, train_loader


@pytest.fixture
def shards(make_set, server, remote):
    make_set([2] * 6)
    return resolve(f"{server.url}/train", remote=remote)


def pairs(shards):
    return list(zip(shards.names, shards.entries, strict=True))


def settled(prefetcher):
    deadline = time.monotonic() + 5
    while prefetcher._asked:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_another_process_fetches_holds_up_nothing(shards, remote, server):
    """All loader processes of a rank ask in the same order."""
    cache = ShardCache(remote)
    cache.folder.mkdir()
    prefetcher = Prefetcher(cache)
    first = cache.path(shards.entries[0])
    with locked(first.with_suffix(".lock")):
        prefetcher.want(pairs(shards))
        settled(prefetcher)
        here = [cache.touch(entry) for entry in shards.entries]
        assert here == [False] + [True] * 5
    prefetcher.want(pairs(shards))
    settled(prefetcher)
    assert cache.touch(shards.entries[0])
    names = [name for name, _ in server.requests if name.endswith(".tar")]
    assert sorted(names) == sorted(set(names))


def test_several_come_at_a_time(shards, remote, server):
    for number in range(4):
        server.faults[f"{number:03d}.tar"] = ["slow"]  # 0.8 s each
    prefetcher = Prefetcher(ShardCache(remote.model_copy(update={"read_timeout": 5.0})))
    began = time.monotonic()
    prefetcher.want(pairs(shards)[:4])
    settled(prefetcher)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(("fault", "requests"), [("404", 1), ("swapped", 2)])
def test_what_a_store_has_damaged_is_not_fetched_at_every_batch(
    shards, remote, server, monkeypatch, fault, requests
):
    server.faults["000.tar"] = [fault] * 99
    monkeypatch.setattr("data.prefetch.THREADS", 1)
    cache = ShardCache(remote)
    prefetcher = Prefetcher(cache)
    for number in (1, 2, 3):
        prefetcher.want([pairs(shards)[0], pairs(shards)[number]])
        deadline = time.monotonic() + 5
        while not cache.touch(shards.entries[number]):  # then it is done with the one before
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert [name for name, _ in server.requests].count("000.tar") == requests


def test_what_is_here_is_not_queued_again(shards, remote):
    cache = ShardCache(remote)
    for name, entry in pairs(shards):
        cache.open(name, entry).close()
    prefetcher = Prefetcher(cache)
    prefetcher.want(pairs(shards))
    assert not prefetcher._asked


def test_a_prefetch_does_not_wait_for_room(shards, remote, server):
    """Whoever needs a shard now may; the thread has others to bring."""
    size = shards.entries[0].bytes
    cache = ShardCache(remote.model_copy(update={"cache_gb": 1.5 * size / 1e9}))
    cache.folder.mkdir()
    reserved = cache.room.claimed(cache.folder / f"x.{size}.part", size)
    prefetcher = Prefetcher(cache)
    prefetcher.want(pairs(shards))
    settled(prefetcher)
    with reserved:
        assert not any(cache.touch(entry) for entry in shards.entries)
    assert not list(cache.folder.glob("*.lock"))
    assert threading.active_count() > 1


def test_repeated_images_are_prefetched_as_many_shards_ahead(indexed, make_config, server, remote):
    """A shard lasts longer where each image is given several times."""
    indexed([6, 6])
    augment = {"mode": "light", "repeats": 2}
    config = make_config(f"{server.url}/train", remote=remote, streams=2, augment=augment)
    dataset = train_loader(config, batch=4, micro=2).dataset
    asked, locate = [], dataset.order.locate
    dataset.order.locate = lambda positions: asked.append(positions.tolist()) or locate(positions)
    dataset._prefetch(np.array([0, 1]), np.array([0, 1]))
    assert asked == [[24, 25], [48, 49]]


def test_what_the_first_batch_needs_comes_side_by_side_before_what_comes_later(
    indexed, make_config, server, remote
):
    """At a start nothing is here, and a batch is in as many shards as there are streams."""
    indexed([2] * 8)
    config = make_config(f"{server.url}/train", remote=remote, streams=4)
    dataset = train_loader(config, batch=4, micro=4).dataset
    needed = dataset.order.locate(np.arange(4)).shard
    asked = []
    dataset.prefetcher.want = lambda shards: asked.append([name for name, _ in shards])
    dataset[0]
    assert asked[0] == [dataset.reader.shards.names[shard] for shard in np.unique(needed)]
    assert len(asked) == 1 + remote.prefetch


@pytest.mark.parametrize(
    ("limit", "shards"),
    [(None, [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5], [5]]), (3, [[0, 2, 4], [4]])],
)
def test_an_evaluation_fetches_the_shards_that_come_next(
    make_set, make_config, server, remote, limit, shards
):
    """Of a part of the set those alone that it reads."""
    make_set([2] * 6)
    config = make_config(f"{server.url}/train", remote=remote)
    dataset = eval_loader(config, batch_size=2, split="train", limit=limit).dataset
    asked = []
    dataset.prefetcher.want = lambda shards: asked.append([int(e.name[:3]) for _, e in shards])
    for number in range(len(dataset)):
        dataset[number]
    assert asked == shards
