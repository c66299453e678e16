"""The processes of `--jobs`: results in order, and words when the system kills one of them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from data.errors import DataError

Work = TypeVar("Work")
Result = TypeVar("Result")


def each(
    function: Callable[[Work], Result], work: Sequence[Work], jobs: int
) -> Generator[Result, None, None]:
    """What `function` makes of each piece of work, in order, by so many processes.

    One process is this one. DataError when another is killed.
    """
    if jobs == 1:
        yield from map(function, work)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(function, work)
        except BrokenProcessPool:
            raise DataError(
                f"one of the {jobs} processes was killed, as systems do that run out of memory; "
                "lower --jobs, then start the same command again"
            ) from None
