"""Index files: what a walk finds without the walk, and damage that stays with its sample."""

from __future__ import annotations

import itertools
import json
import os

import pytest

from data import check
from data.config import RemoteConfig
from data.errors import BadShard
from data.index_file import SUFFIX, content_for, unpack
from data.manifest import read_manifest
from data.reader import ShardReader
from data.shards import resolve
from data.tar_index import read_index
from tests.unit.data.making import pair, vouch, write_tar
from tests.unit.data.serving import FaultyServer
from tests.unit.data.test_loaders import train_loader


def epoch(config, **more):
    loader = train_loader(config, batch=4, **more)
    batches = itertools.islice(loader.batches(0), loader.samples_per_epoch // 4)
    return [
        (key, image)
        for rows in batches
        for key, image in zip(rows["key"], rows["image"], strict=True)
    ]


def same(left, right):
    return all(a == b and x.equal(y) for (a, x), (b, y) in zip(left, right, strict=True))


def test_an_index_file_says_what_the_walk_says(tmp_path):
    members = [*pair("a", 0, 2), ("a.json", b"{}"), *pair("sub/é", 1, 1)]
    members += [("c.pkl", b"x"), *pair("c", 2, 0), ("d.png", b"x"), ("d.cls", b"cat")]
    write_tar(tmp_path / "0.tar", members)
    walked, kept = read_index(tmp_path / "0.tar"), unpack(content_for(tmp_path / "0.tar"))
    for name in ("keys", "offsets", "sizes", "labels"):
        assert getattr(kept, name).tolist() == getattr(walked, name).tolist()
    assert (kept.faults, kept.ignored) == (walked.faults, walked.ignored)
    assert sorted(kept.faults) == [2, 3]


def test_a_large_image_is_hashed_in_parts(tmp_path, monkeypatch):
    write_tar(tmp_path / "0.tar", [*pair("a", 0, 2), *pair("b", 1, 1)])
    at_once = content_for(tmp_path / "0.tar")
    monkeypatch.setattr("data.index_file.CHUNK", 7)
    assert content_for(tmp_path / "0.tar") == at_once


def test_an_index_keeps_nothing_of_the_file_it_came_from(tmp_path):
    """Else its keys stay in memory as text, beside the ones that are used, in each process."""
    write_tar(tmp_path / "0.tar", [*pair("a", 0, 2), *pair("b", 1, 1)])
    index = unpack(content_for(tmp_path / "0.tar"))
    for name in ("keys", "offsets", "sizes", "labels", "checks"):
        owner = getattr(index, name)
        while owner.base is not None:
            owner = owner.base
            assert not isinstance(owner, bytes)


def test_nothing_is_walked_where_an_index_file_is(indexed, make_config, monkeypatch):
    folder = indexed([6, 6])
    walked = epoch(make_config(folder, streams=2))
    monkeypatch.setattr("data.reader.index_of", None)
    assert same(epoch(make_config(folder, streams=2)), walked)


@pytest.mark.parametrize("harm", ["missing", "damaged"])
def test_without_a_good_index_file_the_shard_is_walked(indexed, make_config, caplog, harm):
    folder = indexed([6, 6])
    whole = epoch(make_config(folder))
    index = folder / f"001.tar{SUFFIX}"
    if harm == "missing":
        index.unlink()
    else:
        index.write_bytes(index.read_bytes().replace(b"train/0007", b"train/0008"))
    assert same(epoch(make_config(folder)), whole)
    assert len(caplog.records) == 1
    assert "001.tar.index" in caplog.text


@pytest.mark.parametrize("place", ["header", "pixels", "block"])
def test_damage_costs_the_sample_it_is_in_and_no_other(indexed, make_config, tmp_path, place):
    """Size and hash of the file are not asked: a disk may fail after they were compared."""
    folder = indexed([6, 6])
    config = make_config(folder, streams=1)
    whole = dict(epoch(config))
    path = folder / "001.tar"
    content = bytearray(path.read_bytes())
    offset = int(read_index(path).offsets[2])
    if place == "block":
        content[offset - 512 : offset] = bytes(512)
    else:
        content[offset + (-300 if place == "header" else 40)] ^= 1
    path.write_bytes(content)
    damaged = epoch(config, ledger_dir=tmp_path)
    (line,) = map(json.loads, (tmp_path / "bad_samples.train.rank0.jsonl").read_text().splitlines())
    assert line["key"] == "train/0008"
    assert "not those that were written" in line["reason"]
    keys = [key for key, _ in damaged]
    assert "train/0008" not in keys
    assert len(set(keys)) == 11
    assert set(keys) < set(whole)


def test_a_swapped_shard_of_equal_size_gives_no_sample(indexed):
    """Else its images would come with the labels of the shard that was there before."""
    folder = indexed([6, 6])
    os.replace(folder / "000.tar", folder / "001.tar")
    (folder / "000.tar").write_bytes((folder / "001.tar").read_bytes())
    shards = resolve(str(folder))
    assert shards.entries[0].bytes == shards.entries[1].bytes
    reader = ShardReader(shards)
    for sample in range(6):
        assert reader.read(0, sample).key == f"train/{sample:04d}"
        with pytest.raises(Exception, match="not those that were written"):
            reader.read(1, sample)


def test_without_index_files_a_swapped_shard_of_equal_size_is_refused(make_set):
    folder = make_set([6, 6])
    os.replace(folder / "000.tar", folder / "001.tar")
    (folder / "000.tar").write_bytes((folder / "001.tar").read_bytes())
    shards = resolve(str(folder))
    assert shards.entries[0].bytes == shards.entries[1].bytes
    reader = ShardReader(shards)
    assert reader.read(0, 5).key == "train/0005"
    with pytest.raises(BadShard, match=r"001\.tar: offset 0: its SHA-256"):
        reader.read(1, 5)


@pytest.mark.parametrize("claimed", [5, 7])
def test_a_manifest_with_another_count_than_the_index_is_named(indexed, claimed):
    """And not an IndexError at the sample that is not there, or one that never comes."""
    folder = indexed([6])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["samples"] = manifest["shards"][0]["samples"] = claimed
    (folder / "manifest.json").write_text(json.dumps(manifest))
    reader = ShardReader(resolve(str(folder)))
    for ask in (reader.key, reader.read):
        with pytest.raises(BadShard, match=rf"6 samples found and the manifest says {claimed}"):
            ask(0, claimed - 1)


def test_remote_index_files_are_fetched_and_verified(indexed, make_config, tmp_path, monkeypatch):
    folder = indexed([5, 4, 6, 3])
    local = epoch(make_config(folder, streams=2))
    monkeypatch.setattr("data.reader.index_of", None)
    monkeypatch.setattr("data.remote.MAX_PAUSE", 0.05)
    remote = RemoteConfig(cache_dir=str(tmp_path / "cache"), give_up_after=8).model_dump()
    with FaultyServer(tmp_path) as server:
        server.faults["001.tar.index"] = ["swapped", "truncate"]
        config = make_config(f"{server.url}/train", streams=2, remote=remote)
        assert same(epoch(config), local)
        server.shutdown()


@pytest.mark.parametrize("answer", ["404", "403"])
def test_index_files_that_a_store_does_not_give_are_done_without(
    indexed, make_config, server, remote, caplog, answer
):
    """S3 says 403 of what is not there to whoever may read objects and not list them."""
    folder = indexed([5, 4])
    local = epoch(make_config(folder, streams=2))
    for number in range(2):
        server.faults[f"00{number}.tar.index"] = [answer] * 9
    config = make_config(f"{server.url}/train", streams=2, remote=remote)
    assert same(epoch(config), local)
    assert "headers of shards are read instead" in caplog.text


def test_check_says_what_is_wrong_with_index_files(indexed, capsys):
    folder = indexed([3, 3, 3])
    assert check.main([str(folder)]) == 0
    (folder / f"000.tar{SUFFIX}").unlink()
    with open(folder / f"001.tar{SUFFIX}", "ab") as file:
        file.write(b"x")
    assert check.main([str(folder)]) == 1
    report = capsys.readouterr().out
    assert "000.tar.index: missing" in report
    assert "001.tar.index: not the file that the manifest knows" in report
    assert "2 findings" in report


def test_manifests_without_index_files_still_serve(make_set, make_config):
    folder = make_set([4, 4])
    assert all(entry.index is None for entry in read_manifest(folder / "manifest.json").shards)
    vouch(folder, {"000.tar": 4, "001.tar": 4})
    assert len(epoch(make_config(folder))) == 8
