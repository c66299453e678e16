"""The fsspec client of each scheme: what the environment configures, plus a bound on every wait.

A user who can read a store with plain fsspec can train from it: FSSPEC_HTTP, FSSPEC_S3, FSSPEC_GS
and the files in ~/.config/fsspec are merged with what we set, key by key, and proxies and .netrc
are heeded as by curl. Only the bounds on waits are ours alone: without them no fault of a server
would ever be noticed.
"""

from __future__ import annotations

import os
from typing import Any

import aiohttp
import fsspec
from fsspec.config import apply_config

from data.config import RemoteConfig
from data.errors import DataError

_EXTRA = {"s3": "s3fs", "gs": "gcsfs"}
_clients: dict[tuple[int, str, float], Any] = {}


def client(scheme: str, remote: RemoteConfig) -> Any:
    """The file system of this process: connections and event loops do not survive a fork.

    DataError when its package is missing.
    """
    name = (os.getpid(), scheme, remote.read_timeout)
    if name not in _clients:
        try:
            configured = apply_config(fsspec.get_filesystem_class(scheme), {})
            options = _options(scheme, configured, remote.read_timeout)
            _clients[name] = fsspec.filesystem(scheme, **options)
        except ImportError:
            raise DataError(
                f"{scheme}:// needs the package {_EXTRA[scheme]}; pip install {_EXTRA[scheme]}"
            ) from None
    return _clients[name]


def _options(scheme: str, configured: dict[str, Any], wait: float) -> dict[str, Any]:
    """What the environment configures for a client, with no read longer than `wait` seconds."""
    ours: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    patience = aiohttp.ClientTimeout(total=None, sock_connect=wait, sock_read=wait)
    if scheme == "s3":  # botocore looks for proxies by itself
        once = {"connect_timeout": wait, "read_timeout": wait, "retries": {"max_attempts": 1}}
        ours["config_kwargs"] = configured.get("config_kwargs", {}) | once
    elif scheme == "gs":
        ours["session_kwargs"] = {"trust_env": True} | configured.get("session_kwargs", {})
        ours["requests_timeout"] = patience  # gcsfs hands it to aiohttp with each request
    else:
        given = {"trust_env": True} | configured.get("client_kwargs", {})
        ours["client_kwargs"] = given | {"timeout": patience}
    return configured | ours
