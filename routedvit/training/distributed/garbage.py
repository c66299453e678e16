"""Python's garbage collector runs on all ranks at the same step, or not at all.

Left alone it runs on each rank when its own count of objects says so. A step takes as long as its
slowest rank, so with 64 ranks nearly every step has somebody's pause in it; together the pauses
cost one. What was built before the first step is frozen: it lives as long as the run, and walking
over it is most of a collection. As torchtitan does it (torchtitan/tools/utils.py).

Reference counts free all that is not in a cycle, as ever, and an evaluation collects at will.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

EVERY_STEPS = 100
MANY = 50_000  # objects; a step leaves a few thousand, a compilation 200,000

_pauses = 0  # how many are in force


@contextmanager
def collected_by_step() -> Iterator[None]:
    """No collection within the block but `collect_at`'s, and those in `collected_at_will`."""
    global _pauses
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    _pauses += 1
    try:
        yield
    finally:
        _pauses -= 1
        gc.unfreeze()
        if enabled:
            gc.enable()


def collect_at(step: int) -> None:
    """Collect if it is time; steps are the same on all ranks.

    What torch.compile has made lives as long as the run too, and is frozen once it is there: each
    collection would take a sixth of a second more. Not what few objects are left at other times,
    for a frozen one that becomes part of a cycle is never freed.
    """
    if _pauses and step % EVERY_STEPS == 0:
        gc.collect()
        if len(gc.get_objects()) > MANY:
            gc.freeze()


@contextmanager
def collected_at_will() -> Iterator[None]:
    """Around long work on tensors within such a block: a cycle may hold much memory of a GPU."""
    if not _pauses:
        yield
        return
    gc.enable()
    try:
        yield
    finally:
        gc.disable()


def _collect_again() -> None:
    if _pauses:
        gc.enable()


# Loader processes are forked while it is off; they live for the run and count no steps.
os.register_at_fork(after_in_child=_collect_again)
