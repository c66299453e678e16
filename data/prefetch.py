"""Fetches the shards that come next while the ones at hand are being read.

One thread per loader process, begun when it first asks. It only fills the cache:
whoever needs the shard opens it through the same cache and meets, and reports, what went wrong.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Iterable

from data.cache import ShardCache
from data.errors import DataError
from data.manifest import ShardEntry
from data.remote import is_url

log = logging.getLogger(__name__)


class Prefetcher:
    """Hands shards to a thread of this process, each once while it is remembered."""

    def __init__(self, cache: ShardCache) -> None:
        self.cache = cache
        self._process = 0
        self._asked: set[str] = set()
        self._waiting: queue.SimpleQueue[tuple[str, ShardEntry]] = queue.SimpleQueue()

    def want(self, shards: Iterable[tuple[str, ShardEntry]]) -> None:
        """Fetch these shards soon; returns at once. Local ones cost nothing."""
        if self._process != os.getpid():  # threads do not survive a fork
            self._begin()
        for name, entry in shards:
            if name in self._asked or not is_url(name):
                continue
            self._asked.add(name)
            self._waiting.put((name, entry))

    def _begin(self) -> None:
        self._process, self._asked, self._waiting = os.getpid(), set(), queue.SimpleQueue()
        threading.Thread(target=self._work, args=(self._waiting,), daemon=True).start()

    def _work(self, waiting: queue.SimpleQueue[tuple[str, ShardEntry]]) -> None:
        while True:
            name, entry = waiting.get()
            try:
                self.cache.open(name, entry).close()
            except (DataError, OSError) as error:
                log.debug("prefetch: %s", error)
            self._asked.discard(name)  # it may be evicted and wanted again in a later epoch
