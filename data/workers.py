"""Loader processes that leave every decision to the process they serve.

Schedulers and launchers signal whole process trees. A worker that dies of a SIGTERM takes the main
process down before it can save, so workers ignore SIGTERM and SIGINT; they end when the main
process closes them or is gone (torch's workers watch their parent). A DataError travels as a value,
because torch would wrap it in a many-line traceback. The death of a worker is a DataError too,
though torch tells it from a signal handler, in the midst of whatever the main process is doing.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any, NoReturn

import torch
from torch.utils.data import DataLoader, Dataset

from data.config import DataConfig
from data.errors import DataError, LoaderFailed
from data.ledger import Ledger

PATIENCE = 540  # seconds to wait for a batch: below the 10 minutes after which collectives give up

_LIVE: weakref.WeakSet[Any] = weakref.WeakSet()


class _Carried(Dataset[Any]):
    """The dataset, with a DataError turned into a value."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, item: int) -> Any:
        try:
            return self.dataset[item]
        except DataError as error:
            return error


def batches_of(
    dataset: Dataset[Any], sampler: Iterable[int], config: DataConfig, ledger: Ledger
) -> Iterator[dict[str, Any]]:
    """dataset[i] for i in sampler, in that order, made by `config.num_workers` processes.

    Bad samples named in a batch are ledgered when the batch is handed over, not when it is made.
    """
    workers = config.num_workers
    loader = DataLoader(
        _Carried(dataset),
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        prefetch_factor=config.prefetch_factor if workers else None,
        worker_init_fn=_begin_worker,
        timeout=PATIENCE if workers else 0,
        # Forked workers start in milliseconds and share the indices; spawned ones import torch.
        multiprocessing_context="fork" if workers else None,
        pin_memory=torch.cuda.is_available(),
        # A generator of its own: the default would draw from the one that dropout uses.
        generator=torch.Generator(),
    )
    batches = iter(loader)
    if workers:
        _LIVE.add(batches)
        _explain_deaths()
    try:
        while (batch := _next(batches)) is not None:
            if isinstance(batch, DataError):
                raise batch
            ledger.record(batch.pop("bad"))
            ledger.took(batch)
            yield batch
    finally:
        if workers:
            _end_workers(batches)


def _next(batches: Iterator[Any]) -> Any:
    """The next batch, None at the end. A worker that died or hangs is a LoaderFailed."""
    try:
        return next(batches, None)
    except RuntimeError as error:
        _raise_in_words(error)


def _raise_in_words(error: RuntimeError) -> NoReturn:
    """What torch says of its workers as LoaderFailed with the mend; any other error as it is."""
    words, *rest = str(error).strip().splitlines() or [""]
    less = "lower data.num_workers or data.prefetch_factor"
    if words.startswith("Caught "):  # a traceback follows, of what a worker was at
        if "shared memory" not in rest[-1]:
            raise error
        words, mend = rest[-1], f"/dev/shm ran out: {less}, or make it larger"
    elif "DataLoader timed out" in words:
        mend = "a loader process hangs: look at the disk that the shards are on"
    elif "DataLoader worker" in words:
        mend = f"a killed loader process often means that memory or /dev/shm ran out: {less}"
    else:
        raise error
    raise LoaderFailed(f"{words}; {mend}, then start again") from error


def _explain_deaths() -> None:
    """Put words to what torch's handler of SIGCHLD raises; it is there once a loader has begun."""
    torchs = signal.getsignal(signal.SIGCHLD)
    if not callable(torchs) or isinstance(torchs, _Explained):
        return
    if threading.current_thread() is threading.main_thread():  # others may set no handler
        signal.signal(signal.SIGCHLD, _Explained(torchs))


class _Explained:
    """A signal handler whose RuntimeError comes as LoaderFailed."""

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self.handler = handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        try:
            self.handler(number, frame)
        except RuntimeError as error:
            _raise_in_words(error)


def _begin_worker(worker: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    Finalize(None, _end_if_orphaned, args=(os.getppid(),), exitpriority=0)


def _end_if_orphaned(parent: int) -> None:
    """End at once where the main process is gone.

    Else the exit would wait for the queue's thread, and that for ever where the pipe is full: the
    other workers hold its reading end too. (Queues wait at priority -5, after this.)
    """
    if os.getppid() != parent:
        os._exit(1)


def _end_workers(batches: Any) -> None:
    """Tell the workers to finish and wait for them; one that hangs is killed after 5 seconds."""
    _LIVE.discard(batches)
    batches._shutdown_workers()
    for worker in batches._workers:
        if worker.is_alive():
            worker.kill()
            worker.join()


@atexit.register
def _end_all_workers() -> None:
    # multiprocessing's own exit hook would send a SIGTERM, which they ignore, and wait for ever.
    for batches in list(_LIVE):
        _end_workers(batches)
