"""A file that is wrong at the server is that shard's fault, not a server to be waited for."""

from __future__ import annotations

import time

import pytest

from data.errors import BadShard
from tests.unit.data.test_quarantine import epoch, ledger
from tests.unit.data.test_remote import fetched


@pytest.mark.parametrize("size", ["half", "none", "more"])
@pytest.mark.parametrize("kind", ["ranges", "ranges without sizes", "no ranges"])
def test_a_shard_of_another_size_at_the_server_is_damaged(make_set, server, remote, size, kind):
    path = make_set([6]) / "000.tar"
    content = path.read_bytes()
    path.write_bytes({"half": content[:3000], "none": b"", "more": content + b"x"}[size])
    server.ranges, server.tells_size = kind != "no ranges", kind == "ranges"
    found = {"half": "3000 bytes", "none": "0 bytes", "more": f"more than {len(content)} bytes"}
    began = time.monotonic()
    with pytest.raises(BadShard, match=rf"{found[size]}, the manifest says {len(content)}; upload"):
        fetched(server, remote)
    assert time.monotonic() - began < 4


def test_a_shard_that_is_still_being_uploaded_is_fetched_again(make_set, server, remote):
    """It was asked for once too early; what came of it is no part of the whole one."""
    path = make_set([6]) / "000.tar"
    content = path.read_bytes()
    path.write_bytes(bytes(3000))
    with pytest.raises(BadShard):
        fetched(server, remote)
    path.write_bytes(content)
    assert fetched(server, remote) == content


def test_a_truncated_shard_is_quarantined_where_that_is_allowed(
    make_set, make_config, server, remote, tmp_path
):
    path = make_set([5, 5, 5, 5]) / "001.tar"
    path.write_bytes(path.read_bytes()[:3000])
    config = make_config(
        f"{server.url}/train", remote=remote.model_dump(), streams=2, max_bad_shards=1
    )
    keys = epoch(config, ledger_dir=tmp_path / "ledger")
    assert not {f"train/{number:04d}" for number in range(5, 10)} & set(keys.values())
    assert "3000 bytes, the manifest says" in ledger(tmp_path / "ledger")[0]["reason"]
