"""Fetches the shards that come next while the ones at hand are being read.

A few threads per loader process, begun when it first asks. They only fill the cache: whoever needs
the shard opens it through the same cache and meets, and reports, what went wrong. All loader
processes of a rank want the same shards in the same order, so one that finds a shard being fetched
by another goes on to the next; else they would walk in step, as fast as one.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Iterable

from data.cache import ShardCache
from data.errors import BadShard, DataError
from data.manifest import ShardEntry
from data.remote import is_url

log = logging.getLogger(__name__)
THREADS = 4  # transfers at a time, per loader process


class Prefetcher:
    """Hands shards that are not here to threads of this process, each once while it is asked."""

    def __init__(self, cache: ShardCache) -> None:
        self.cache = cache
        self._process = 0
        self._asked: set[str] = set()
        self._waiting: queue.SimpleQueue[tuple[str, ShardEntry]] = queue.SimpleQueue()

    def want(self, shards: Iterable[tuple[str, ShardEntry]]) -> None:
        """Fetch these shards soon; returns at once. Local ones cost nothing, those here a touch."""
        if self._process != os.getpid():  # threads do not survive a fork
            self._begin()
        for name, entry in shards:
            if not is_url(name) or name in self._asked or self._is_here(entry):
                continue
            self._asked.add(name)
            self._waiting.put((name, entry))

    def _is_here(self, entry: ShardEntry) -> bool:
        try:
            return self.cache.touch(entry)
        except OSError:  # a disk that fails is told by the read that needs it
            return True

    def _begin(self) -> None:
        self._process, self._asked, self._waiting = os.getpid(), set(), queue.SimpleQueue()
        for _ in range(THREADS):
            threading.Thread(
                target=self._work, args=(self._waiting, self._asked), daemon=True
            ).start()

    def _work(self, waiting: queue.SimpleQueue[tuple[str, ShardEntry]], asked: set[str]) -> None:
        while True:
            name, entry = waiting.get()
            try:
                self.cache.fetch(name, entry)
            except BadShard as error:
                log.debug("prefetch: %s", error)
                continue  # it stays asked for: to fetch it again would bring the same again
            except (DataError, OSError) as error:
                log.debug("prefetch: %s", error)
            asked.discard(name)  # it may be evicted and wanted again in a later epoch
