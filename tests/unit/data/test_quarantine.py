"""A damaged shard, where some are tolerated: named, its samples replaced, each accounted for."""

from __future__ import annotations

import itertools
import json
import traceback
from collections import Counter

import numpy as np
import pytest

from data.config import RemoteConfig
from data.errors import BadShard, DataError, Unreachable
from data.order import SampleOrder
from tests.unit.data.making import vouch
from tests.unit.data.serving import FaultyServer
from tests.unit.data.test_faults import DAMAGE
from tests.unit.data.test_loaders import eval_loader, train_loader


def spoil(folder, name, kind="header bit"):
    path = folder / name
    path.write_bytes(DAMAGE[kind][0](path.read_bytes()))


def epoch(config, *, ranks=1, batch=4, samples=20, **more):
    """position -> key of the first epoch, over all ranks."""
    keys = {}
    for rank in range(ranks):
        loader = train_loader(config, batch=batch, micro=2, rank=rank, world_size=ranks, **more)
        for rows in itertools.islice(loader.batches(0), samples // 2 // ranks):
            keys |= dict(zip(rows["position"].tolist(), rows["key"], strict=True))
    return keys


def ledger(folder, split="train"):
    lines = [path.read_text().splitlines() for path in sorted(folder.glob(f"*.{split}.*"))]
    return [json.loads(line) for line in itertools.chain(*lines)]


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_lost_sample_is_replaced_and_ledgered_by_position(
    make_set, make_config, tmp_path, kind
):
    folder = make_set([5, 5, 5, 5])
    fields = {"streams": 2, "verify": DAMAGE[kind][1]}
    whole = epoch(make_config(folder, **fields))
    spoil(folder, "001.tar", kind)
    config = make_config(folder, max_bad_shards=1, max_bad_samples=0, **fields)
    keys = epoch(config, ledger_dir=tmp_path / "ledger")
    lost = {f"train/{number:04d}" for number in range(5, 10)}
    lines = ledger(tmp_path / "ledger")
    assert sorted(line["position"] for line in lines) == sorted(
        position for position, key in whole.items() if key in lost
    )
    assert {line["key"] for line in lines} == {f"sample {number}" for number in range(5)}
    assert all(line["quarantined"] and line["shard"].endswith("001.tar") for line in lines)
    replaced = {line["position"]: line["replaced_by"] for line in lines}
    assert keys == whole | replaced
    assert not lost & set(keys.values())


@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (2, 1), (1, 2)])
def test_the_replacements_are_the_same_on_every_world(make_set, make_config, ranks, workers):
    folder = make_set([5, 5, 5, 5])
    spoil(folder, "002.tar")
    config = make_config(folder, max_bad_shards=1, streams=4)  # one stream has nothing else
    other = make_config(folder, max_bad_shards=1, streams=4, num_workers=workers)
    assert epoch(other, ranks=ranks) == epoch(config)
    assert set(Counter(epoch(config).values())) == {
        f"train/{number:04d}" for number in (*range(10), *range(15, 20))
    }


@pytest.mark.parametrize(("streams", "ranks", "workers"), [(1, 1, 0), (1, 1, 2), (2, 2, 1)])
def test_one_image_does_not_stand_in_for_a_whole_shard(
    make_set, make_config, streams, ranks, workers
):
    """And which one does is the same on every world, also beside a shard that nobody met yet."""
    folder = make_set([60] * 4)
    fields = {"streams": streams, "shuffle_buffer": 0, "max_bad_shards": 2}
    whole = epoch(make_config(folder, **fields), samples=240)
    spoil(folder, "001.tar")
    (folder / "003.tar").unlink()
    keys = epoch(make_config(folder, **fields), samples=240)
    stand_ins = [keys[position] for position, key in whole.items() if keys[position] != key]
    assert len(stand_ins) == 120
    assert max(Counter(stand_ins).values()) <= 6  # of 120 samples, each drawn once on average
    other = make_config(folder, num_workers=workers, **fields)
    assert epoch(other, ranks=ranks, samples=240) == keys


def test_copies_of_a_lost_sample_have_one_stand_in(make_set, make_config):
    folder = make_set([10] * 4)
    augment = {"mode": "light", "repeats": 2}
    fields = {"streams": 2, "max_bad_shards": 1, "augment": augment}
    spoil(folder, "001.tar")
    keys = epoch(make_config(folder, **fields), samples=80)
    turns = [(keys[p], keys[p + 2]) for p in range(80) if p // 2 % 2 == 0]
    assert [first for first, _ in turns] == [second for _, second in turns]


@pytest.mark.parametrize("limit", [0, 1])
def test_past_the_limit_of_shards_the_run_stops(make_set, make_config, limit):
    folder = make_set([5, 5, 5, 5])
    spoil(folder, "001.tar")
    (folder / "003.tar").unlink()
    words = r"00[13]\.tar" if not limit else r"2 damaged train shards.*max_bad_shards = 1.*00[13]"
    with pytest.raises(DataError, match=words):
        epoch(make_config(folder, max_bad_shards=limit))


def test_evaluation_leaves_the_samples_of_a_quarantined_shard_out(make_set, make_config, tmp_path):
    train, val = make_set([6]), make_set([3, 4], "val")
    spoil(val, "000.tar")
    config = make_config(train, val={"shards": str(val)}, max_bad_shards=1)
    loader = eval_loader(config, ledger_dir=tmp_path / "ledger")
    valid = [ok for batch in loader for ok in batch["valid"].tolist()]
    assert valid == [False] * 3 + [True] * 4 + [False]
    assert [line["index"] for line in ledger(tmp_path / "ledger", "val")] == [0, 1, 2]


def share_of(config, rank, steps, start=0):
    """position -> key, of the first steps of one of two ranks."""
    loader = train_loader(config, batch=4, micro=2, rank=rank, world_size=2)
    return {
        position: key
        for rows in itertools.islice(loader.batches(start * 4), steps)
        for position, key in zip(rows["position"].tolist(), rows["key"], strict=True)
    }


@pytest.mark.parametrize(("fault", "workers"), [("503", 0), ("503", 1), ("403", 0), ("stall", 0)])
def test_what_one_rank_cannot_reach_is_no_quarantine(
    make_set, make_config, tmp_path, monkeypatch, fault, workers
):
    """Every rank gives its share of the order or stops in words; healed, the run goes on exactly.

    Quarantine is allowed here, and would leave rank 1 with other samples than a rank that has
    better luck, or than rank 1 itself after a resume.
    """
    monkeypatch.setattr("data.remote.MAX_PAUSE", 0.05)
    folder = make_set([8, 8, 8, 8])
    whole = epoch(make_config(folder, streams=2, shuffle_buffer=0), ranks=2, samples=32)
    order = SampleOrder([8] * 4, seed=7, shuffle_buffer=0, streams=2)
    place = order.locate(np.arange(32))
    mine, theirs = (set(place.shard[rank::2].tolist()) for rank in (1, 0))
    lost = f"{min(mine - theirs):03d}.tar"
    with FaultyServer(tmp_path) as server:
        remote = RemoteConfig(
            cache_dir=str(tmp_path / "cache"), read_timeout=0.2, give_up_after=0.6, prefetch=0
        )
        fields = {"streams": 2, "shuffle_buffer": 0, "max_bad_shards": 4, "num_workers": workers}
        config = make_config(f"{server.url}/train", remote=remote.model_dump(), **fields)
        server.faults[lost] = [fault] * 999
        assert share_of(config, 0, 8) == {p: k for p, k in whole.items() if p % 2 == 0}
        seen = {}

        def steps():
            while len(seen) < 16:
                seen.update(share_of(config, 1, 1, start=len(seen) // 2))

        with pytest.raises(Unreachable, match=lost):
            steps()
        server.faults[lost] = []
        steps()
        assert seen == {p: k for p, k in whole.items() if p % 2 == 1}
        server.shutdown()


def test_a_disk_that_fails_is_no_quarantine(make_set, make_config, tmp_path):
    folder = make_set([5, 5, 5, 5])
    (folder / "001.tar").unlink()
    (folder / "001.tar").mkdir()  # reading it is an OSError that is not about its absence
    config = make_config(folder, max_bad_shards=4, verify="off")
    with pytest.raises(Unreachable, match=r"001\.tar: it cannot be read"):
        epoch(config, ledger_dir=tmp_path / "ledger")
    assert not ledger(tmp_path / "ledger")


def test_ranks_with_other_shards_can_be_told_apart(make_set, make_config):
    folder = make_set([5, 5])
    config = make_config(folder)
    prints = [train_loader(config, rank=rank, world_size=2, micro=2).fingerprint for rank in (0, 1)]
    spoil(folder, "001.tar")
    vouch(folder, {"000.tar": 5, "001.tar": 5})
    assert prints == [prints[0]] * 2
    assert train_loader(config).fingerprint != prints[0]


def test_a_damaged_shard_keeps_nothing_alive(make_set, make_config):
    """An exception that is raised again and again keeps the frames, and so the batches, of each."""
    folder = make_set([5, 5, 5, 5])
    spoil(folder, "001.tar")
    reader = train_loader(make_config(folder, max_bad_shards=1), batch=4, micro=4).dataset.reader
    frames = []
    for _ in range(3):
        with pytest.raises(BadShard, match=r"001\.tar") as caught:
            reader.read(1, 0)
        frames.append(len(list(traceback.walk_tb(caught.value.__traceback__))))
    assert frames[1] == frames[2]


def test_a_node_whose_copy_rotted_trains_on_what_the_others_train_on(
    indexed, make_config, server, remote
):
    """The shard is fetched again; the store's own damage is a bad sample as before."""
    folder = indexed([6, 6])
    config = make_config(f"{server.url}/train", remote=remote, max_bad_samples=0, streams=2)
    whole = epoch(config, samples=12)
    reader = train_loader(config, batch=4, micro=2).dataset.reader
    entry, index = reader.shards.entries[0], reader._index(0)
    copy = reader.cache.path(entry)
    content = bytearray(copy.read_bytes())
    content[int(index.offsets[2]) + 9] ^= 1
    copy.write_bytes(content)
    server.requests.clear()
    assert epoch(config, samples=12) == whole
    assert [name for name, _ in server.requests if name == "000.tar"] == ["000.tar"]
    assert copy.read_bytes() == (folder / "000.tar").read_bytes()
