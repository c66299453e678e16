"""Cycles are freed at steps that all ranks share, and as ever outside of training."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Iterator

import pytest

from routedvit.training.distributed.garbage import (
    EVERY_STEPS,
    MANY,
    collect_at,
    collected_at_will,
    collected_by_step,
)


class Node:
    """Refers to itself."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def _nothing_stays_off() -> Iterator[None]:
    assert gc.isenabled()
    yield
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_cycle_lives_until_the_step_comes_round() -> None:
    with collected_by_step():
        node = weakref.ref(Node())
        [Node() for _ in range(100_000)]  # would make the collector run
        collect_at(EVERY_STEPS - 1)
        assert node() is not None
        collect_at(EVERY_STEPS)
        assert node() is None


def test_what_a_compilation_leaves_is_walked_over_once() -> None:
    with collected_by_step():
        compiled = [[number] for number in range(MANY)]
        collect_at(EVERY_STEPS)
        assert len(gc.get_objects()) < MANY < gc.get_freeze_count()
        frozen, few = gc.get_freeze_count(), weakref.ref(node := Node())
        collect_at(2 * EVERY_STEPS)
        assert gc.get_freeze_count() <= frozen
        del node, compiled
        collect_at(3 * EVERY_STEPS)
        assert few() is None


def test_an_evaluation_collects_at_will() -> None:
    with collected_by_step():
        with collected_at_will():
            assert gc.isenabled()
        assert not gc.isenabled()
    with collected_at_will():
        assert gc.isenabled()


def test_an_error_gives_the_collector_back() -> None:
    with pytest.raises(ZeroDivisionError), collected_by_step():
        1 / 0  # noqa: B018


def test_forked_loader_processes_collect_for_themselves() -> None:
    with collected_by_step():
        pid = os.fork()
        if pid == 0:
            os._exit(0 if gc.isenabled() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert not gc.isenabled()
