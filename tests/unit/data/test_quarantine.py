"""A damaged shard, where some are tolerated: named, its samples replaced, each accounted for."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest

from data.errors import DataError
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
