"""Shards in buckets: s3 against moto, gs against an emulator of its JSON API, over HTTP."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import s3fs

from data.cache import ShardCache
from data.errors import BadShard, DataError, Refused, Unreachable
from data.shards import resolve


@pytest.fixture(autouse=True)
def fresh_clients(monkeypatch):
    """Clients keep the endpoint that the environment named when they were made."""
    monkeypatch.setattr("data.clients._clients", {})
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def running(port: int, *command: str) -> Iterator[None]:
    """A server in a process of its own, once it listens."""
    with subprocess.Popen([sys.executable, "-m", *command], stderr=subprocess.DEVNULL) as process:
        try:
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert process.poll() is None
                time.sleep(0.1)
            yield
        finally:
            process.terminate()


def check_bucket(url: str, folder: Path, remote) -> None:
    """Whatever way shards are named, they are found, fetched and verified."""
    patient = remote.model_copy(update={"read_timeout": 10.0, "give_up_after": 20.0})
    for pattern in ("", "/*.tar", "/{000..001}.tar"):
        shards = resolve(f"{url}{pattern}", remote=patient)
        assert shards.sizes == [4, 2]
    for name, entry in zip(shards.names, shards.entries, strict=True):
        with ShardCache(patient).open(name, entry) as file:
            assert file.read() == (folder / entry.name).read_bytes()
    with pytest.raises(DataError, match="not there"):
        resolve(f"{url}/nowhere", remote=patient)


def test_shards_in_s3_are_listed_fetched_and_verified(make_set, remote, monkeypatch):
    folder, port = make_set([4, 2]), free_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    with running(port, "moto.server", "-p", str(port)):
        bucket = s3fs.S3FileSystem(skip_instance_cache=True)
        bucket.mkdir("shards")
        bucket.put(str(folder), "shards/train", recursive=True)
        check_bucket("s3://shards/train", folder, remote)
        with pytest.raises(DataError, match="not there; correct the URL"):
            resolve("s3://nowhere/train", remote=remote)


def test_missing_credentials_are_said_at_once(remote, monkeypatch, tmp_path):
    monkeypatch.setattr("data.remote._met", set())
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    began = time.monotonic()
    with pytest.raises(Refused, match=r"manifest\.json: .*credentials; set AWS_ACCESS_KEY_ID"):
        resolve("s3://bucket/x/train", remote=remote)
    assert time.monotonic() - began < 4


def test_shards_in_gs_are_listed_fetched_and_verified(make_set, remote, monkeypatch):
    folder, port = make_set([4, 2]), free_port()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    # what kind of bucket it is would be asked over gRPC, which the emulator does not speak
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    gcsfs = pytest.importorskip("gcsfs")
    emulator = ("gcp_storage_emulator", "start", "--port", str(port), "--in-memory")
    with running(port, *emulator, "--default-bucket", "shards"):
        bucket = gcsfs.GCSFileSystem(skip_instance_cache=True)
        for path in folder.iterdir():
            bucket.pipe(f"shards/train/{path.name}", path.read_bytes())
        check_bucket("gs://shards/train", folder, remote)


def test_a_store_that_drips_is_given_up_in_time(make_set, server, remote, monkeypatch):
    """Its client hands over nothing before a block is whole."""
    shards = resolve(str(make_set([6])))
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    with ShardCache(remote).open("s3://train/000.tar", shards.entries[0]) as file:
        assert file.read() == Path(shards.names[0]).read_bytes()
    next(Path(remote.cache_dir).glob("*.tar")).unlink()
    server.faults["000.tar"] = ["drip5000"]
    hasty = remote.model_copy(update={"give_up_after": 0.5})
    began = time.monotonic()
    with pytest.raises(Unreachable, match=r"000\.tar: given up .*took too long.*give_up_after"):
        ShardCache(hasty).open("s3://train/000.tar", shards.entries[0])
    assert time.monotonic() - began < 2


def test_a_truncated_object_is_a_damaged_shard(make_set, server, remote, monkeypatch):
    shards = resolve(str(make_set([6])))
    path = Path(shards.names[0])
    path.write_bytes(path.read_bytes()[:3000])
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    began = time.monotonic()
    with pytest.raises(BadShard, match=r"s3://train/000\.tar: .*3000 bytes, the manifest says"):
        ShardCache(remote).open("s3://train/000.tar", shards.entries[0])
    assert time.monotonic() - began < 4
