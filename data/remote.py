"""Bytes from http(s), s3 and gs: bounded waits, retries, and never a shell.

fsspec brings the clients (`data.clients`); what is added here is what training needs of them. A
read that brings nothing for `read_timeout` seconds is over. A failed transfer goes on at the byte
it had reached, after a pause that grows and is jittered (a thousand ranks must not knock at once).
It is given up when the next 8 MiB, or the rest, take more than `give_up_after` seconds, failures or
none: so a server that drips is noticed, and a long transfer that comes along well may fail late.
Answers that no wait mends (404, 403) end it at once. Where nothing was ever read from (manifests
come first) a mistake in the URL is likelier than an outage: connections that fail are given up
after 20 s, and missing credentials or a host without an address at once (`data.refusals`). Of all
failures only "there is no such thing" and "it has another size" hold for every rank alike; the rest
are Unreachable.

Credentials and endpoints come from where the clients look for them: AWS_*,
GOOGLE_APPLICATION_CREDENTIALS, FSSPEC_*, ~/.netrc. A config is saved and shown, so it had better
hold no secrets; where a URL carries a token all the same, messages leave it out.
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import aiohttp

from data.clients import client
from data.config import RemoteConfig
from data.errors import DataError, Unreachable
from data.refusals import permanent, said, unconnected

log = logging.getLogger(__name__)

SCHEMES = ("http", "https", "s3", "gs")
HIDDEN = "***"  # in place of what the record of a run leaves out of a URL
CHUNK = 1 << 20
STEP = 8 * CHUNK  # what counts as progress; also one request to s3 and gs, slow to begin an answer
MAX_PAUSE = 30.0  # seconds between two attempts, at most
FIRST_PATIENCE = 20.0  # seconds that connections may fail where nothing was ever read
FIRST_PAUSE = 4.0  # between two of them, at most
_CONTENT_RANGE = re.compile(r"bytes .*/(\d+)")  # of a 206, and of a 416 that knows the size
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|pipe:")
_met: set[tuple[str, str]] = set()  # scheme and host, or bucket, that something was read from


class WrongSize(OSError):
    """The server says that the whole file has `size` bytes, and other ones are expected."""

    def __init__(self, size: int, expected: int) -> None:
        super().__init__(f"{size} bytes, the manifest says {expected}")
        self.size = size


class Progress:
    """How far a transfer has got, over all its attempts, and since when it has not got further."""

    def __init__(self, url: str, limit: float) -> None:
        self.url = url
        self.limit = limit
        self.restart()

    def restart(self) -> None:
        """Begin anew, for good reason: what was fetched is of no use."""
        self.mark, self.since = 0, time.monotonic()

    def reached(self, position: int) -> None:
        """So many bytes of the file have come in this attempt. Unreachable when that is too few."""
        if position >= self.mark + STEP:  # bytes that came before are no progress
            self.mark, self.since = position, time.monotonic()
        elif self.ends_within(0):
            raise Unreachable(
                f"{shown(self.url)}: given up at byte {position}, since the last {STEP >> 20} MiB "
                f"took more than {self.limit:g} s; mend the server or raise "
                "data.remote.give_up_after, then start the same command again"
            )

    def rest(self) -> float:
        """Seconds left for the next STEP."""
        return self.since + self.limit - time.monotonic()

    def ends_within(self, seconds: float) -> bool:
        """Whether they are over by then."""
        return self.rest() < seconds


def is_url(name: str) -> bool:
    """Whether `name` is meant as a URL (of any scheme) and not as a path."""
    return _URL.match(name) is not None


def check_url(url: str, field: str) -> None:
    """DataError unless the URL is one that we fetch; '::' would chain other file systems on."""
    if urlsplit(url).scheme not in SCHEMES or "::" in url:
        raise DataError(
            f"{field}: {shown(url)!r} is neither a path nor a URL we read ({', '.join(SCHEMES)}); "
            "copy the shards to a disk or a store that speaks one of them"
        )
    if HIDDEN in url:
        key = re.split(r"\.\d", field)[0]  # --set gives a list of sources as a whole
        raise DataError(
            f"{field}: {url!r} is from the record of a run, which leaves out user, password and "
            f"query; give the URL again (--set {key}=...)"
        )


def shown(name: str) -> str:
    """A path or URL as messages show it: without a query, user or password, which may be secret."""
    if not is_url(name) or "::" in name:
        return name
    parts = urlsplit(name)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=""))


def file_name(name: str) -> str:
    """The last part of a path or URL, without a URL's query, as the manifest calls the file."""
    if not is_url(name):
        return name.rpartition("/")[2]
    parts = urlsplit(name)
    last = parts.path.rpartition("/")[2]
    return unquote(last) if _is_escaped(parts.scheme) else last


def sibling(place: str, name: str) -> str:
    """The path or URL of `name` in the same folder, with the same query (a token, for instance)."""
    if not is_url(place):
        return str(Path(place).with_name(name))
    parts = urlsplit(place)
    folder = parts.path.rpartition("/")[0]
    last = quote(name) if _is_escaped(parts.scheme) else name
    return urlunsplit(parts._replace(path=f"{folder}/{last}"))


def _is_escaped(scheme: str) -> bool:
    """Whether URLs write a space as %20; those of s3 and gs hold names as they are."""
    return scheme in ("http", "https")


def as_folder(url: str) -> str:
    """The URL with a slash after its path, before its query."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=parts.path.rstrip("/") + "/"))


def read_bytes(url: str, remote: RemoteConfig, limit: int) -> bytes:
    """A small file, whole. DataError when it cannot be had or is longer than `limit` bytes."""
    content = bytearray()

    def attempt(progress: Progress) -> None:
        content.clear()
        for chunk in stream(url, 0, remote, progress):
            content.extend(chunk)
            if len(content) > limit:
                raise DataError(f"{shown(url)}: longer than {limit} bytes, so no file of ours")

    persist(attempt, url, remote)
    return bytes(content)


def find(pattern: str, remote: RemoteConfig) -> list[str]:
    """The URLs that a glob names, where the file system can list; sorted."""
    found: list[str] = []

    def attempt(progress: Progress) -> None:
        filesystem = client(urlsplit(pattern).scheme, remote)
        names = filesystem.glob(pattern, timeout=progress.rest())
        found[:] = sorted(map(filesystem.unstrip_protocol, names))

    persist(attempt, pattern, remote)
    fixed = re.split(r"[*\[]", pattern)[0]
    return [url for url in found if url.startswith(fixed)]  # a listing may point anywhere


def persist(
    attempt: Callable[[Progress], None], url: str, remote: RemoteConfig, vouched: bool = False
) -> None:
    """Call `attempt` until it returns. BadShard where there is nothing, Refused for what no wait
    mends, Unreachable when time is up.

    `vouched`: a manifest told of it, so it is no first contact, though it may be for this process.
    """
    place = urlsplit(url).scheme, urlsplit(url).netloc
    progress, failures, began = Progress(url, remote.give_up_after), 0, time.monotonic()
    jitter = random.Random()  # not the global generator: that one is the augmentation's
    while True:
        try:
            attempt(progress)
        except DataError:
            raise
        except Exception as error:  # each client library has exceptions of its own
            met = vouched or place in _met
            if meant := permanent(error, first=not met):
                raise type(meant)(f"{shown(url)}: {meant}") from error
            failures += 1
            pause = min(MAX_PAUSE, 0.5 * 2 ** min(failures, 10)) * jitter.uniform(0.5, 1)
            rest, mend = progress.rest(), "mend the server or raise data.remote.give_up_after"
            if not met and unconnected(error):
                pause = min(pause, FIRST_PAUSE)
                first_rest = began + FIRST_PATIENCE - time.monotonic()
                if first_rest < rest:
                    rest, mend = first_rest, "nothing was ever read from there: correct the URL"
            if rest < pause:
                raise Unreachable(
                    f"{shown(url)}: given up after {failures} attempts ({said(error)}); {mend}, "
                    "then start the same command again"
                ) from error
            log.log(
                logging.WARNING if failures == 1 and place not in _met else logging.INFO,
                "%s: %s; attempt %d follows, and more for %.0f s",
                *(shown(url), said(error), failures + 1, rest),
            )
        else:
            _met.add(place)
            return
        time.sleep(pause)


def stream(
    url: str, start: int, remote: RemoteConfig, progress: Progress, expected: int | None = None
) -> Iterator[bytes]:
    """The bytes of `url` from `start` on, in chunks.

    Raises whatever the client raises, Unreachable when they come too slowly, and WrongSize when the
    server says that there are not `expected` bytes in all.
    """
    if urlsplit(url).scheme in ("s3", "gs"):
        yield from _blocks(url, start, remote, progress, expected)
        return
    filesystem = client(urlsplit(url).scheme, remote)
    # headers of a request replace those that the environment configured
    headers = filesystem.kwargs.get("headers", {}) | {"Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={start}-"} if start else {}
    with _opened(filesystem, url, headers, start, expected) as file:
        skip = start if file.r.status != 206 else 0  # a server without ranges sends all again
        position = start - skip
        while chunk := file.read(CHUNK):
            position += len(chunk)
            progress.reached(position)
            skip, chunk = max(0, skip - len(chunk)), chunk[skip:]
            if chunk:
                yield chunk


def _opened(
    filesystem: Any, url: str, headers: dict[str, str], start: int, expected: int | None
) -> Any:
    """The answer, open to be read; WrongSize where it tells one that is not `expected`."""
    try:
        # block_size 0 streams one answer; a size spares the extra request that would ask for it
        file = filesystem.open(url, "rb", block_size=0, size=1, headers=headers)
    except aiohttp.ClientResponseError as error:
        if error.status != 416 or not start or expected is None:
            raise
        # nothing lies at `start` or beyond: some servers say only that
        total = _total(error.headers)
        raise WrongSize(start if total is None else total, expected) from error
    total = _total(file.r.headers)
    if expected is not None and total is not None and total != expected:
        file.close()
        raise WrongSize(total, expected)
    return file


def _total(headers: Any) -> int | None:
    """The size of the whole file, where an answer about a part of it tells."""
    found = _CONTENT_RANGE.fullmatch((headers or {}).get("Content-Range", ""))
    return int(found[1]) if found else None


def _blocks(
    url: str, start: int, remote: RemoteConfig, progress: Progress, expected: int | None
) -> Iterator[bytes]:
    """As `stream`, from clients that keep an answer until it is whole: nobody would see it drip,
    so each request has a deadline.
    """
    filesystem = client(urlsplit(url).scheme, remote)
    size = filesystem.info(url, timeout=progress.rest())["size"]
    if expected is not None and size != expected:
        raise WrongSize(size, expected)
    for begin in range(start, size, STEP):
        end = min(begin + STEP, size)
        block = filesystem.cat_file(url, start=begin, end=end, timeout=progress.rest())
        progress.reached(end)
        yield block
