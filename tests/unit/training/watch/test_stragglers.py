"""The rank that the others wait for is named, once, when it has been slow for long."""

from __future__ import annotations

from typing import Any

import pytest

from routedvit.training.watch.stragglers import LOOKS, RankTimes, Stragglers

EVEN = [RankTimes(f"rank {i} on node{i // 2}", 0.1, 0.01) for i in range(4)]


class Recorder:
    """World, writer and console in one."""

    rank, world_size = 0, 4

    def __init__(self) -> None:
        self.ranks: list[RankTimes] = EVEN
        self.scalars: dict[str, float] = {}
        self.said: list[str] = []

    def gather(self, value: RankTimes) -> list[RankTimes]:
        return self.ranks

    def scalar(self, name: str, value: float, step: int) -> None:
        self.scalars[name] = value

    def look(self, stragglers: Stragglers, times: int, **changed: Any) -> None:
        self.ranks = [*EVEN[:2], EVEN[2]._replace(**changed), EVEN[3]]
        for step in range(times):
            stragglers.look(step, 0.1, 0.01)


@pytest.fixture
def seen() -> tuple[Recorder, Stragglers]:
    recorder = Recorder()
    stragglers = Stragglers(recorder, recorder, recorder.said.append)  # type: ignore[arg-type]
    recorder.look(stragglers, 1)
    return recorder, stragglers


def test_a_slow_rank_is_named_once_until_it_has_recovered(seen):
    recorder, stragglers = seen
    recorder.look(stragglers, LOOKS - 1, forward=0.2)
    recorder.look(stragglers, 1)
    assert not recorder.said
    recorder.look(stragglers, 3 * LOOKS, forward=0.2)
    assert len(recorder.said) == 1
    assert "rank 2 on node1 takes 2.00 times as long" in recorder.said[0]
    assert recorder.scalars["speed/slowest_forward_over_median"] == pytest.approx(2)
    for said, enough in (
        (2, 2 * LOOKS),
        (3, 4 * LOOKS),
    ):  # a busy machine is not told of all the time
        recorder.look(stragglers, 1)
        recorder.look(stragglers, enough - 1, forward=0.2)
        assert len(recorder.said) == said - 1
        recorder.look(stragglers, 2, forward=0.2)
        assert len(recorder.said) == said


def test_a_starved_rank_is_named_though_the_others_never_wait_for_data(seen):
    recorder, stragglers = seen
    recorder.look(stragglers, LOOKS, waiting=0.4)
    assert len(recorder.said) == 1
    assert "rank 2 on node1 waits for data 40% of its time, the median rank 1%" in recorder.said[0]
    assert recorder.scalars["speed/data_wait_share_most"] == 0.4


def test_even_ranks_and_ranks_that_all_starve_are_left_in_peace(seen):
    recorder, stragglers = seen
    recorder.look(stragglers, LOOKS, forward=0.11, waiting=0.05)
    recorder.ranks = [rank._replace(waiting=0.6) for rank in EVEN]
    for step in range(LOOKS):
        stragglers.look(step, 0.1, 0.6)
    assert not recorder.said


def test_the_first_look_and_a_world_of_one_say_nothing():
    recorder = Recorder()
    stragglers = Stragglers(recorder, recorder, recorder.said.append)  # type: ignore[arg-type]
    recorder.look(stragglers, 1, forward=9.0)
    recorder.world_size = 1
    stragglers.look(1, 0.1, 0.9)
    assert not recorder.scalars
