"""Shards behind URLs: every fault of a server is outwaited or named, and no wait is endless."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data import check
from data.cache import ShardCache
from data.clients import client
from data.config import RemoteConfig
from data.errors import BadShard, DataError, Refused, Unreachable
from data.manifest import MANIFEST_NAME
from data.reader import ShardReader
from data.remote import persist, shown
from data.shards import resolve
from tests.unit.data.test_loaders import train_loader

ROOT = Path(__file__).resolve().parents[3]


def fetched(server, remote, name="000.tar"):
    """The bytes that the cache hands out for one shard of the served folder."""
    shards = resolve(f"{server.url}/train", remote=remote)
    number = [Path(url).name for url in shards.names].index(name)
    with ShardCache(remote).open(shards.names[number], shards.entries[number]) as file:
        return file.read()


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("fault", ["none", "reset", "stall", "truncate", "short", "long", "503"])
def test_what_passes_is_outwaited_and_the_bytes_are_right(make_set, server, remote, fault, ranges):
    content = (make_set([6]) / "000.tar").read_bytes()
    server.ranges = ranges
    server.faults["000.tar"] = [fault, fault]
    assert fetched(server, remote) == content
    if fault in ("stall", "short") and ranges:  # the rest may fail before a byte is handed on
        size = len(content) // 2
        assert ("000.tar", f"bytes={size}-") in server.requests


@pytest.mark.parametrize(("fault", "kind"), [("404", BadShard), ("401", Refused), ("403", Refused)])
def test_what_no_wait_mends_is_said_at_once(make_set, server, remote, fault, kind):
    make_set([6])
    server.faults["000.tar"] = [fault] * 9
    with pytest.raises(kind, match=r"000\.tar: .*; correct the URL") as caught:
        fetched(server, remote)
    assert getattr(caught.value, "exit_code", 2) == 2  # final to a scheduler
    assert [name for name, _ in server.requests].count("000.tar") == 1


@pytest.mark.parametrize("fault", ["stall", "503", "reset"])
def test_a_server_that_never_recovers_is_given_up_in_time(make_set, server, remote, fault):
    make_set([6])
    server.ranges = False
    server.faults["000.tar"] = [fault] * 999
    began = time.monotonic()
    with pytest.raises(Unreachable, match=r"000\.tar: given up (after|at) .*give_up_after"):
        fetched(server, remote.model_copy(update={"give_up_after": 1.0}))
    assert time.monotonic() - began < 4


def test_a_server_that_drips_is_given_up_in_time(make_set, server, remote):
    """Each byte comes in time, and none of its reads fails."""
    make_set([6])
    server.faults["000.tar"] = ["drip5000"]
    began = time.monotonic()
    with pytest.raises(Unreachable, match=r"000\.tar: given up at byte \d+, .*give_up_after"):
        fetched(server, remote.model_copy(update={"give_up_after": 0.5}))
    assert time.monotonic() - began < 4


def test_a_transfer_that_comes_along_may_fail_late(make_set, server, remote, monkeypatch):
    """What was reached before a failure is worth the whole time anew; here 50 bytes in 0.5 s."""
    content = (make_set([6]) / "000.tar").read_bytes()
    monkeypatch.setattr("data.remote.STEP", 50)
    server.faults["000.tar"] = ["drip60", "drip60", "drip60", "truncate"]
    began = time.monotonic()
    assert fetched(server, remote.model_copy(update={"give_up_after": 1.2})) == content
    assert time.monotonic() - began > 1.2


def test_bytes_that_come_again_are_no_progress(make_set, server, remote, monkeypatch):
    """A server without ranges that always fails at the same byte would else be tried for ever."""
    make_set([6])
    server.ranges = False
    monkeypatch.setattr("data.remote.STEP", 10)
    server.faults["000.tar"] = ["drip20"] * 99
    began = time.monotonic()
    with pytest.raises(Unreachable, match=r"000\.tar: given up"):
        fetched(server, remote.model_copy(update={"give_up_after": 1.0}))
    assert time.monotonic() - began < 4


@pytest.mark.parametrize("scheme", ["http", "s3", "gs"])
def test_every_client_is_told_how_long_a_read_may_take(monkeypatch, remote, scheme):
    told = []
    monkeypatch.setattr("data.clients._clients", {})
    monkeypatch.setattr("fsspec.filesystem", lambda name, **options: told.append(str(options)))
    client(scheme, remote)
    assert re.search(r"(sock_read=|'read_timeout': )0\.5", told[0])


def closed_url() -> str:
    """Where nobody listens."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{closed.getsockname()[1]}/train"


def test_a_server_that_is_not_there_is_given_up_in_time(remote):
    with pytest.raises(DataError, match=r"manifest\.json: given up after .*give_up_after"):
        resolve(closed_url(), remote=remote.model_copy(update={"give_up_after": 0.5}))


def test_a_server_that_was_never_there_gets_little_patience_and_a_line(remote, monkeypatch, caplog):
    monkeypatch.setattr("data.remote.FIRST_PATIENCE", 0.5)
    caplog.set_level(logging.INFO)
    began = time.monotonic()
    with pytest.raises(Unreachable, match=r"manifest\.json: given up .*nothing was ever read"):
        resolve(closed_url(), remote=remote)
    assert time.monotonic() - began < 4
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 1
    assert re.search(
        r"/train/manifest\.json: Cannot connect .*; attempt 2 follows, and more for [01] s", told[0]
    )
    assert "attempt 3 follows" in caplog.text


@pytest.mark.parametrize("contact", ["read before", "vouched by a manifest"])
def test_a_server_that_went_away_gets_all_the_patience(remote, monkeypatch, contact):
    monkeypatch.setattr("data.remote.FIRST_PATIENCE", 0.0)
    url, answers = closed_url(), iter([None, None])
    if contact == "read before":
        monkeypatch.setattr("data.remote._met", set())
        persist(lambda progress: None, url, remote)

    def back_at_the_third(progress: object) -> None:
        for _ in answers:
            raise ConnectionRefusedError

    persist(back_at_the_third, url, remote, vouched=contact != "read before")
    assert next(answers, "used up") == "used up"


def test_a_swapped_shard_is_fetched_again_and_then_refused(make_set, server, remote):
    content = (make_set([6]) / "000.tar").read_bytes()
    server.faults["000.tar"] = ["swapped"]
    assert fetched(server, remote) == content
    os.remove(next((Path(remote.cache_dir)).glob("*.tar")))
    server.faults["000.tar"] = ["swapped"] * 2
    with pytest.raises(BadShard, match=r"000\.tar: offset 0: its SHA-256"):
        fetched(server, remote)
    assert not list(Path(remote.cache_dir).glob("*.tar"))


def test_all_who_want_a_shard_share_one_fetch(make_set, server, remote):
    make_set([6])
    threads = [threading.Thread(target=fetched, args=(server, remote)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [name for name, _ in server.requests].count("000.tar") == 1


def test_equal_names_in_two_folders_do_not_share_an_entry(make_set, server, remote):
    folders = [make_set([3], "train"), make_set([4], "other")]
    for folder in folders:
        shards = resolve(f"{server.url}/{folder.name}", remote=remote)
        with ShardCache(remote).open(shards.names[0], shards.entries[0]) as file:
            assert file.read() == (folder / "000.tar").read_bytes()


def test_the_cache_stays_below_its_limit_and_drops_the_longest_unused(make_set, server, remote):
    folder = make_set([3, 3, 3])
    size = (folder / "000.tar").stat().st_size
    small = remote.model_copy(update={"cache_gb": 2.5 * size / 1e9})
    for name in ("000.tar", "001.tar", "000.tar", "002.tar", "000.tar"):
        assert fetched(server, small, name) == (folder / name).read_bytes()
        assert sum(path.stat().st_size for path in Path(small.cache_dir).iterdir()) < 2.5 * size
    names = [name for name, _ in server.requests if name != MANIFEST_NAME]
    assert names == ["000.tar", "001.tar", "002.tar"]
    with pytest.raises(DataError, match="give the cache more room"):
        fetched(server, remote.model_copy(update={"cache_gb": 1e-9}), "001.tar")


def cached(remote, suffix):
    (path,) = Path(remote.cache_dir).glob(suffix)
    return path


@pytest.mark.parametrize("damage", ["byte", "cut", "gone"])
def test_a_damaged_copy_is_fetched_again(make_set, server, remote, caplog, damage):
    """And the shard at the URL, which is whole, is not blamed."""
    folder = make_set([6])
    shards = resolve(f"{server.url}/train", remote=remote)
    assert ShardReader(shards, remote=remote).read(0, 2).key == "train/0002"
    copy = cached(remote, "*.tar")
    if damage == "gone":
        copy.unlink()
    else:
        content = bytearray(copy.read_bytes())
        content[len(content) // 2] ^= 1
        copy.write_bytes(content if damage == "byte" else content[:2048])
    assert ShardReader(shards, remote=remote).read(0, 2).key == "train/0002"
    assert cached(remote, "*.tar").read_bytes() == (folder / "000.tar").read_bytes()
    assert [name for name, _ in server.requests].count("000.tar") == 2
    assert ("dropped and fetched again" in caplog.text) == (damage != "gone")


def test_a_damaged_copy_is_fetched_again_once_only(make_set, server, remote):
    """A manifest that counts wrongly makes every copy look damaged."""
    folder = make_set([6])
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    manifest["samples"] = manifest["shards"][0]["samples"] = 7
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    reader = ShardReader(resolve(f"{server.url}/train", remote=remote), remote=remote)
    for _ in range(2):
        with pytest.raises(BadShard, match="6 samples found and the manifest says 7"):
            reader.read(0, 0)
    assert [name for name, _ in server.requests].count("000.tar") == 2


def test_few_remote_shards_are_open_at_a_time(make_set, server, remote, monkeypatch):
    """What is open takes disk after the cache has dropped it, so it counts towards the limit."""
    monkeypatch.setattr("data.reader.MAX_OPEN_REMOTE", 2)
    monkeypatch.setattr("data.reader.MAX_INDICES", 2)
    make_set([2, 2, 2, 2])
    reader = ShardReader(resolve(f"{server.url}/train", remote=remote), remote=remote)
    for sample in (0, 1):
        for shard in range(4):
            assert reader.read(shard, sample).key == f"train/{2 * shard + sample:04d}"
            links = Path("/proc/self/fd").iterdir()
            files = [os.readlink(link) for link in links if link.is_symlink()]
            assert sum(remote.cache_dir in file for file in files) <= 2
    assert len(reader._indices) == 2


FETCH = """
import sys
from data.cache import ShardCache
from data.config import RemoteConfig
from data.shards import resolve
remote = RemoteConfig.model_validate_json(sys.argv[2])
shards = resolve(sys.argv[1], remote=remote)
cache = ShardCache(remote)
print("ready", flush=True)
for number in map(int, sys.stdin.readline().split()):
    with cache.open(shards.names[number], shards.entries[number]) as file:
        print(len(file.read()) == shards.entries[number].bytes, flush=True)
"""


def test_two_processes_share_a_cache_that_is_too_small_for_both(make_set, server, remote):
    """The room that one fetches into is not given to the other, nor its half shard removed."""
    size = (make_set([3, 3, 3]) / "000.tar").stat().st_size
    server.faults["000.tar"] = ["slow"]
    small = remote.model_copy(update={"cache_gb": 1.5 * size / 1e9})
    command = [sys.executable, "-c", FETCH, f"{server.url}/train", small.model_dump_json()]
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process, order in zip(processes, ("0 1 2 0 1 2", "1 2 0 1 2 0"), strict=True):
        process.stdin.write(order + "\n")
        process.stdin.flush()
        while ("000.tar", None) not in server.requests:
            time.sleep(0.01)
    while any(process.poll() is None for process in processes):
        names = [path for path in os.listdir(small.cache_dir) if not path.startswith("lock")]
        assert len([name for name in names if name.endswith(".tar")]) <= 1
        time.sleep(0.01)
    for process in processes:
        said, error = process.communicate()
        assert (process.returncode, said.split()) == (0, ["True"] * 6), error


def test_a_fetch_that_was_killed_keeps_no_room(make_set, server, remote):
    folder = make_set([3, 3])
    size = (folder / "000.tar").stat().st_size
    small = remote.model_copy(update={"cache_gb": 1.5 * size / 1e9})
    server.faults["000.tar"] = ["stall"]
    command = [sys.executable, "-c", FETCH, f"{server.url}/train", small.model_dump_json()]
    with subprocess.Popen(
        command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdin.write("0\n")
        process.stdin.flush()
        while not list(Path(small.cache_dir).glob("*.part")):
            time.sleep(0.01)
        process.kill()
    assert fetched(server, small, "001.tar") == (folder / "001.tar").read_bytes()


def test_a_cache_that_fails_is_no_fault_of_the_shard(make_set, server, remote, monkeypatch):
    """A shard may be quarantined on one rank only if it is bad for all; a full disk is not that."""
    make_set([6])

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("data.transfer.write", full)
    with pytest.raises(Unreachable, match=r"cache_dir: .* fails \(No space left .*; make room"):
        fetched(server, remote)
    assert [name for name, _ in server.requests].count("000.tar") == 1
    monkeypatch.setattr("data.cache.os.replace", lambda *_: os.stat("/nowhere"))
    monkeypatch.setattr("data.transfer.write", lambda file, chunk: file.write(chunk))
    with pytest.raises(Unreachable, match=r"cache_dir: .* fails"):
        fetched(server, remote)


@pytest.mark.parametrize(
    "pattern", ["", "/manifest.json", "/{000..002}.tar", "/*.tar", "/00[0-2].tar", "/?token=1"]
)
def test_urls_are_written_like_paths(make_set, server, remote, pattern):
    make_set([4, 2, 3])
    found = resolve(f"{server.url}/train{pattern}", remote=remote)
    assert [url.partition("?")[0] for url in found.names] == [
        f"{server.url}/train/00{number}.tar" for number in range(3)
    ]
    assert found.sizes == [4, 2, 3]


@pytest.mark.parametrize("folder", ["train", "train/"])
def test_a_folder_with_a_token_keeps_it_for_all_of_its_files(
    indexed, make_config, server, remote, folder
):
    """And what is said about them shows it to nobody."""
    indexed([4, 2, 3])
    server.query = "sig=abc&se=1"
    url = f"{server.url}/{folder}?{server.query}"
    reader = ShardReader(resolve(url, remote=remote), remote=remote)
    assert [reader.read(shard, 0).key for shard in range(3)] == [
        f"train/{number:04d}" for number in (0, 4, 6)
    ]
    assert {name for name, _ in server.requests} >= {"000.tar", "000.tar.index", MANIFEST_NAME}
    with pytest.raises(DataError, match=r"manifest\.json: the server answers 403") as caught:
        resolve(url.replace("sig=a", "sig=secret"), remote=remote)
    assert "secret" not in str(caught.value)


def test_a_glob_with_a_token_is_told_of_what_takes_one(make_set, server, remote):
    make_set([4])
    with pytest.raises(DataError, match=r"/\*\.tar'; servers list files without a query: name the"):
        resolve(f"{server.url}/train/*.tar?sig=secret", remote=remote)
    with pytest.raises(DataError, match=r"/x\*\.tar'; correct the pattern"):
        resolve(f"{server.url}/train/x*.tar", remote=remote)


@pytest.mark.parametrize(
    "pattern", ["", "*.tar", "shard%20*.tar", "shard%20{%23,%25,é}.tar", "shard {%23,%25,é}.tar"]
)
def test_names_that_a_url_escapes_are_those_of_the_manifest(indexed, server, remote, pattern):
    folder = indexed([1, 1, 1])
    for number, name in enumerate(("shard #.tar", "shard %.tar", "shard é.tar")):
        (folder / f"00{number}.tar").rename(folder / name)
    assert check.main(["--write-manifest", f"{folder}/*.tar"]) == 0
    shards = resolve(f"{server.url}/train/{pattern}", remote=remote)
    reader = ShardReader(shards, remote=remote)
    keys = [reader.read(number, 0).key for number in range(3)]
    assert keys == ["train/0000", "train/0001", "train/0002"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("https://h/a/0.tar?sig=secret", "https://h/a/0.tar"),
        ("https://user:secret@h:8/a/0.tar", "https://h:8/a/0.tar"),
        ("s3://b/0.tar", "s3://b/0.tar"),
        ("/data/0.tar?x", "/data/0.tar?x"),
    ],
)
def test_messages_show_no_secret_of_a_url(name, words):
    assert shown(name) == words


@pytest.mark.parametrize("workers", [0, 2])
def test_a_remote_set_gives_the_batches_of_the_local_one(
    make_set, make_config, server, remote, workers
):
    folder = make_set([5, 4, 6, 3])
    server.faults["002.tar"] = ["truncate"]
    fields = {"streams": 2, "num_workers": workers}
    local = train_loader(make_config(folder, **fields)).batches(0)
    far = make_config(f"{server.url}/train", remote=remote.model_dump(), **fields)
    for ours, theirs in itertools.islice(
        zip(local, train_loader(far).batches(0), strict=False), 10
    ):
        assert ours["key"] == theirs["key"]
        assert ours["image"].equal(theirs["image"])


def test_the_next_shard_is_fetched_before_it_is_needed(make_set, make_config, server, remote):
    make_set([16, 16, 16])
    config = make_config(f"{server.url}/train", streams=1, remote=remote.model_dump())
    next(train_loader(config, batch=4).batches(0))
    deadline = time.monotonic() + 5
    while len(list(Path(remote.cache_dir).glob("*.tar"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_outage_may_last_as_long_as_the_user_has_patience(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    failures = iter(range(1100))

    def attempt(_):
        if next(failures, None) is not None:
            raise OSError("down")

    persist(attempt, "http://x/0.tar", RemoteConfig(give_up_after=1e6), vouched=True)
    assert next(failures, None) is None
