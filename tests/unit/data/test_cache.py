"""What is on this node waits for nobody, is found under any URL, and lies where the node says."""

from __future__ import annotations

import fcntl
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from data.cache import ShardCache, folder_of
from data.config import RemoteConfig
from data.locks import locked
from data.shards import resolve


def test_a_shard_that_is_here_is_opened_while_others_are_fetched(make_set, server, remote):
    """Whatever locks those hold."""
    folder = make_set([6])
    shards = resolve(f"{server.url}/train", remote=remote)
    cache = ShardCache(remote)
    cache.open(shards.names[0], shards.entries[0]).close()
    opened = []

    def reopen():
        with cache.open(shards.names[0], shards.entries[0]) as file:
            opened.append(file.read())

    with ExitStack() as held:
        stem = cache.path(shards.entries[0]).stem
        for lock in {*Path(remote.cache_dir).glob("lock-*"), cache.folder / f"{stem}.lock"}:
            fcntl.flock(held.enter_context(open(lock, "w")), fcntl.LOCK_EX)
        reader = threading.Thread(target=reopen, daemon=True)
        reader.start()
        reader.join(5)
        assert opened == [(folder / "000.tar").read_bytes()]


def test_locks_leave_no_files(make_set, server, remote):
    make_set([3, 3, 3])
    shards = resolve(f"{server.url}/train", remote=remote)
    for name, entry in zip(shards.names, shards.entries, strict=True):
        ShardCache(remote).open(name, entry).close()
    names = {path.name for path in Path(remote.cache_dir).iterdir() if path.suffix != ".tar"}
    assert names == {"lock-room"}


def test_a_lock_that_is_removed_keeps_one_at_a_time(tmp_path):
    inside, most = [0], [0]

    def work():
        for _ in range(200):
            with locked(tmp_path / "x.lock", remove=True):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert not list(tmp_path.iterdir())


def test_a_new_token_or_another_bucket_fetches_nothing_again(make_set, server, remote):
    folder = make_set([6])
    (folder.parent / "copy").symlink_to(folder)
    for pattern in ("train?sig=old", "train?sig=new", "copy"):
        shards = resolve(f"{server.url}/{pattern}", remote=remote)
        with ShardCache(remote).open(shards.names[0], shards.entries[0]) as file:
            assert file.read() == (folder / "000.tar").read_bytes()
    assert [name for name, _ in server.requests].count("000.tar") == 1


@pytest.mark.parametrize(
    ("given", "variables", "folder"),
    [
        (None, {}, "/home/x/.cache/routedvit/shards"),
        (None, {"TMPDIR": "/memory"}, "/home/x/.cache/routedvit/shards"),
        (None, {"SLURM_TMPDIR": "/job"}, "/job/routedvit/shards"),
        (None, {"SLURM_TMPDIR": "/job", "ROUTEDVIT_CACHE": "/disk"}, "/disk"),
        ("~/mine", {"SLURM_TMPDIR": "/job", "ROUTEDVIT_CACHE": "/disk"}, "/home/x/mine"),
    ],
)
def test_the_cache_lies_on_the_disk_that_the_node_names(monkeypatch, given, variables, folder):
    for name in ("ROUTEDVIT_CACHE", "SLURM_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/home/x"} | variables).items():
        monkeypatch.setenv(name, value)
    assert folder_of(RemoteConfig(cache_dir=given)) == Path(folder)


def test_no_lock_is_asked_of_a_file_that_is_open_for_reading_alone(
    make_set, server, remote, monkeypatch
):
    """NFS refuses an exclusive lock there (EBADF)."""
    make_set([3, 3])
    shards = resolve(f"{server.url}/train", remote=remote)
    cache = ShardCache(remote)
    cache.folder.mkdir()
    (cache.folder / "abandoned.5.part").write_bytes(b"x")
    flock, modes = fcntl.flock, []

    def as_nfs(file, operation):
        descriptor = file if isinstance(file, int) else file.fileno()
        modes.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & 3)
        flock(file, operation)

    monkeypatch.setattr("fcntl.flock", as_nfs)
    cache.open(shards.names[0], shards.entries[0]).close()
    assert modes
    assert 0 not in modes  # O_RDONLY


def test_a_copy_that_another_process_fetched_meanwhile_is_not_dropped(make_set, server, remote):
    shards = resolve(str(make_set([2])))
    name, entry = f"{server.url}/train/000.tar", shards.entries[0]
    cache = ShardCache(remote)
    with cache.open(name, entry) as rotten:
        cache.path(entry).unlink()
        cache.open(name, entry).close()
        cache.drop(entry, rotten)
        assert cache.path(entry).exists()
    with cache.open(name, entry) as good:
        cache.drop(entry, good)
    assert not cache.path(entry).exists()
