"""What a user can read with plain fsspec can be trained from: credentials, headers, proxies."""

from __future__ import annotations

import re

import fsspec
import pytest

from data.clients import client
from data.errors import Unreachable
from data.shards import resolve
from tests.unit.data.test_remote import fetched


@pytest.fixture
def configured(monkeypatch):
    """configured(http={...}): as FSSPEC_HTTP and the like are read; clients are made anew."""
    monkeypatch.setattr("data.clients._clients", {})
    monkeypatch.setattr("fsspec.config.conf", fsspec.config.conf)

    def configure(**schemes):
        for scheme, options in schemes.items():
            monkeypatch.setitem(fsspec.config.conf, scheme, options)

    return configure


HEADERS = {"Authorization": "Bearer tested", "Accept-Encoding": "gzip"}


@pytest.mark.parametrize("options", [{"headers": HEADERS}, {"client_kwargs": {"headers": HEADERS}}])
def test_a_private_store_is_read_with_what_fsspec_is_configured_with(
    make_set, server, remote, configured, options
):
    folder = make_set([6])
    server.credentials = "Bearer tested"
    with pytest.raises(Unreachable, match="answers 401"):
        resolve(f"{server.url}/train", remote=remote)
    configured(http=options)
    fresh = remote.model_copy(update={"read_timeout": 0.6})  # a client of its own
    server.faults["000.tar"] = ["truncate"]  # the rest is asked for with the headers too
    assert fetched(server, fresh) == (folder / "000.tar").read_bytes()


def test_a_proxy_is_used(make_set, server, remote, configured, monkeypatch):
    make_set([4, 2])
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, server.url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert resolve("http://shards.invalid/train", remote=remote).sizes == [4, 2]


@pytest.mark.parametrize("scheme", ["http", "s3", "gs"])
def test_configured_options_are_kept_beside_the_bounds_on_waits(
    configured, monkeypatch, remote, scheme
):
    told = []
    configured(
        http={"client_kwargs": {"read_bufsize": 7}, "encoded": True},
        s3={"config_kwargs": {"max_pool_connections": 7, "read_timeout": 99}, "anon": True},
        gs={"session_kwargs": {"read_bufsize": 7}, "token": "anon"},
    )
    monkeypatch.setattr("fsspec.filesystem", lambda name, **options: told.append(str(options)))
    client(scheme, remote)
    assert re.search(r"'(read_bufsize|max_pool_connections)': 7", told[0])
    assert re.search(r"'(encoded|anon|token)': (True|'anon')", told[0])
    assert re.search(r"(sock_read=|'read_timeout': )0\.5", told[0])
    assert "99" not in told[0]
    assert ("'trust_env': True" in told[0]) == (scheme != "s3")
