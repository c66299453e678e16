"""Several sets of shards as one endless stream, in given shares, from the position alone.

Each stream of `data.order` picks a source at every turn. Turns come in blocks of 1024; in a block
source i gets its share of them (what rounding leaves over is carried to the next block, so shares
are exact in the long run), in an order shuffled by (seed, stream, block). All streams give a source
equally many turns per block, so turn t of source i in stream s is that source's own position
t * streams + s: its own epochs are exact, every sample once in each, and a rank keeps whole streams
of every source. Nothing is remembered, so the cursor still is one integer.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import numpy as np

from data.config import DataConfig, TrainSource
from data.errors import DataError
from data.labels import joined
from data.order import PLACES, Place, SampleOrder, default_streams, uniform
from data.recent import Recent
from data.shards import ShardSet, pooled, resolve

TURNS = 1024  # of a block; part of the order
_MIXTURE, _DRAWS = 3, 4  # what a random stream is for, as in data.order


class Order(Protocol):
    """What a loader asks of an order of samples."""

    streams: int
    seed: int
    repeats: int  # of each sample, in neighbouring turns

    def locate(self, positions: np.ndarray) -> Place: ...
    def substitutes(self, position: int) -> Place: ...


@dataclass(frozen=True)
class TrainSet:
    """The shards of all sources in a row, and what each source has of them."""

    shards: ShardSet
    parts: list[ShardSet]
    weights: list[float]
    samples_per_epoch: int


def resolve_train(config: DataConfig, *, labelled: bool = True) -> TrainSet:
    """What `data.train` names. DataError when it cannot be used.

    Where labels are read (`labelled`) those of all sources must agree. Which samples there are, and
    their order, does not depend on that.
    """
    sources = config.train if isinstance(config.train, list) else [config.train]
    several = isinstance(config.train, list)
    parts = [
        resolve(source.shards, _field(number, several), config.remote, source.manifest, labelled)
        for number, source in enumerate(sources)
    ]
    weights = [_weight(source, part) for source, part in zip(sources, parts, strict=True)]
    classes = [(_field(number, several), part.classes) for number, part in enumerate(parts)]
    mean, std = pooled([(p.mean, p.std, w) for p, w in zip(parts, weights, strict=True)])
    shards = ShardSet(
        names=[name for part in parts for name in part.names],
        entries=[entry for part in parts for entry in part.entries],
        classes=joined(classes, "data.train", labelled),
        mean=mean,
        std=std,
        manifests=[home for part in parts for home in part.manifests],
        label_places=[place for part in parts for place in part.label_places],
        source_sizes=tuple(len(part.entries) for part in parts),
    )
    whole = sum(p.num_samples * s.repeat for p, s in zip(parts, sources, strict=True))
    return TrainSet(shards, parts, weights, config.samples_per_epoch or whole)


def _field(number: int, several: bool) -> str:
    return f"data.train.{number}.shards" if several else "data.train.shards"


def _weight(source: TrainSource, part: ShardSet) -> float:
    return part.num_samples * source.repeat if source.weight is None else source.weight


def order_of(train: TrainSet, config: DataConfig, seed: int) -> Order:
    """The order in which `config` reads its sources."""
    kind = DrawnOrder if config.replacement else SampleOrder
    options: dict[str, Any] = {"seed": seed, "shuffle_buffer": config.shuffle_buffer}
    options["streams"] = config.streams or default_streams(len(train.shards.names))
    options["random_starts"] = config.shard_start == "random"
    repeats = config.augment.repeats
    if len(train.parts) == 1:
        return kind(train.shards.sizes, repeats=repeats, **options)
    orders = [
        kind(part.sizes, **(options | {"seed": seed + number}))
        for number, part in enumerate(train.parts)
    ]
    return Mixture(orders, train.weights, seed=seed, repeats=repeats)


class DrawnOrder(SampleOrder):
    """Sampling with replacement: each position draws among all samples; epochs are a length only.

    Shards are read all over, so this is for local disks.
    """

    def _make_block(self, epoch: int, stream: int, block: int) -> np.ndarray:
        draws = uniform((_DRAWS, self.seed, epoch, stream, block), PLACES) * self.num_samples
        # `_resolve` counts from where the stream's span begins
        return draws.astype(np.int64) - self._epoch(epoch).span_begins[stream]


class Mixture:
    """Sources taken in the shares of `weights`; all orders have the same number of streams."""

    def __init__(
        self, orders: list[SampleOrder], weights: list[float], *, seed: int, repeats: int = 1
    ) -> None:
        self.orders = orders
        self.seed = seed
        self.repeats = repeats
        self.streams = orders[0].streams
        shares = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
        if min(shares) * TURNS < 2:
            raise DataError(
                f"data.train.{shares.index(min(shares))}: its share of the samples is "
                f"{float(min(shares)):.2g}; give each source at least {2 / TURNS:.2g}, or drop it"
            )
        self._borders = [sum(shares[:number], Fraction()) for number in range(len(shares) + 1)]
        self._first_shard = np.cumsum([0, *(len(order.sizes) for order in orders)])
        self._patterns: Recent[tuple[np.ndarray, np.ndarray]] = Recent(2 * self.streams + 2)

    def locate(self, positions: np.ndarray) -> Place:
        """The samples at `positions` (int64 [n]); `epoch` is that of the sample's own source."""
        source, own = self._own(positions)
        rows = [np.empty_like(positions) for _ in Place._fields]
        for number in np.unique(source).tolist():
            chosen = source == number
            place = self._shifted(self.orders[number].locate(own[chosen]), number)
            for row, values in zip(rows, place, strict=True):
                row[chosen] = values
        return Place(*rows)

    def substitutes(self, position: int) -> Place:
        """What stands in for the sample at `position`: of the same source, as in SampleOrder."""
        source, own = self._own(np.array([position]))
        number = int(source[0])
        return self._shifted(self.orders[number].substitutes(int(own[0])), number)

    def _shifted(self, place: Place, source: int) -> Place:
        return place._replace(shard=place.shard + self._first_shard[source])

    def _own(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each position, and its own position in that source."""
        self._patterns.begin_call()
        turn = positions // self.streams // self.repeats
        stream, block = positions % self.streams, turn // TURNS
        source, own = np.empty_like(positions), np.empty_like(positions)
        for s, b in set(zip(stream.tolist(), block.tolist(), strict=True)):
            rows = (stream == s) & (block == b)
            sources, turns = self._pattern(s, b)
            slots = turn[rows] - b * TURNS
            source[rows] = sources[slots]
            own[rows] = turns[slots] * self.streams + s
        return source, own

    def _pattern(self, stream: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each turn of a block: the source, and how many turns that source had before."""
        return self._patterns.get((stream, block), lambda: self._make_pattern(stream, block))

    def _make_pattern(self, stream: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        before, after = self._turns_before(block), self._turns_before(block + 1)
        sources = np.repeat(np.arange(len(before)), after - before)
        turns = np.empty(TURNS, dtype=np.int64)
        order = np.argsort(uniform((_MIXTURE, self.seed, stream, block), TURNS), kind="stable")
        sources = sources[order]
        for number in range(len(before)):
            turns[sources == number] = np.arange(before[number], after[number])
        return sources, turns

    def _turns_before(self, block: int) -> np.ndarray:
        """The turns that each source has had in a stream before `block`; they sum to all turns."""
        ends = [int(block * TURNS * border) for border in self._borders]
        return np.diff(ends)
