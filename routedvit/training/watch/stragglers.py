"""Names the rank that all others wait for: a slow GPU, a slow disk, a busy node.

A step takes as long as its slowest rank, and every rank's clock shows that same time, for the
others wait in a collective. What differs is what a rank does alone: waiting for its loader, and the
forward pass. At each logged step all ranks compare the two. Under ZeRO-3 a forward gathers weights
from all ranks and takes as long everywhere; there only loaders are told apart.
"""

import statistics
from collections.abc import Callable
from typing import NamedTuple, Protocol

from routedvit.training.distributed.connection import place
from routedvit.training.interfaces import MetricWriter

SLOW = 1.25  # times the median forward
STARVED = 0.1  # more of its time than the median rank waits for data
# In a row, before anything is said: a slow moment is nobody's fault. Where it passes and comes
# again, twice as many each time: a busy machine would else be told of all the time.
LOOKS = 3


class RankTimes(NamedTuple):
    """What one rank spent alone since the last look."""

    where: str  # the rank and its machine
    forward: float  # mean seconds
    waiting: float  # share of its time in which it waited for data


class World(Protocol):
    """The part of the engine that is needed."""

    rank: int
    world_size: int

    def gather(self, value: RankTimes) -> list[RankTimes]: ...


class Stragglers:
    """Compares the ranks, writes two scalars, and says in a line who has been slow for long.

    Args:
        world: gathers over all ranks.
        writer: the null writer on ranks other than 0.
        tell: takes a line; does nothing on ranks other than 0.
    """

    def __init__(self, world: World, writer: MetricWriter, tell: Callable[[str], None]) -> None:
        self._world = world
        self._writer = writer
        self._tell = tell
        self._in_a_row: dict[tuple[str, int], int] = {}  # looks, by what and rank
        self._enough: dict[tuple[str, int], int] = {}  # of them
        self._looks = 0

    def look(self, step: int, forward: float, waiting: float) -> None:
        """`forward` and `waiting` of this rank since the last look, see `RankTimes`. Collective."""
        self._looks += 1
        if self._world.world_size == 1 or self._looks == 1:  # the first steps compile and start up
            return
        ranks = self._world.gather(RankTimes(place(self._world.rank), forward, waiting))
        usual = statistics.median(rank.forward for rank in ranks)
        usual_wait = statistics.median_low(rank.waiting for rank in ranks)
        slowness = [rank.forward / usual if usual else 1.0 for rank in ranks]
        self._writer.scalar("speed/slowest_forward_over_median", max(slowness), step)
        most = max(rank.waiting for rank in ranks)
        self._writer.scalar("speed/data_wait_share_most", most, step)
        for number, (rank, slow) in enumerate(zip(ranks, slowness, strict=True)):
            if self._lasts("slow", number, slow > SLOW):
                self._tell(
                    f"warning: {rank.where} takes {slow:.2f} times as long for a forward pass as "
                    "the median rank, and every step waits for it: look at its clocks and "
                    "temperature, and at what else runs there"
                )
            if self._lasts("starved", number, rank.waiting > usual_wait + STARVED):
                self._tell(
                    f"warning: {rank.where} waits for data {rank.waiting:.0%} of its time, the "
                    f"median rank {usual_wait:.0%}, and every step waits for it: look at its "
                    "processors, its disk or its network"
                )

    def _lasts(self, what: str, number: int, found: bool) -> bool:
        """Whether this has just been found often enough in a row."""
        key = what, number
        before, enough = self._in_a_row.get(key, 0), self._enough.get(key, LOOKS)
        if not found and before >= enough:
            self._enough[key] = 2 * enough
        self._in_a_row[key] = before + 1 if found else 0
        return found and before + 1 == enough
