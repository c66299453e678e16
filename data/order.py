"""The sample order: a pure function of (seed, position), whatever machines read it.

A *position* counts the samples that the whole world has consumed since step 0; step t of global
batch G covers positions [t G, (t + 1) G). Epoch e covers [e N, (e + 1) N) and holds each of the N
samples once. The order is made of S *canonical streams*: position p belongs to stream p mod S, in
every epoch. In an epoch

1. the shard list is permuted by (seed, epoch) and laid end to end, each shard entered at a random
   sample and read round to it again;
2. it is cut into S contiguous spans, one per stream, as long as the stream has positions in the
   epoch (lengths differ by at most one; a shard on a border is shared by two streams);
3. each stream shuffles its span in a window: order = argsort(i + U_i * buffer), U_i in [0, 1), so a
   sample moves fewer than `buffer` places.

The random samples of 1 are for streams of few shards. Entered at its first sample, a stream that is
one shard begins alike in every epoch: of 64 shards of 10,000 samples the first tenths of two epochs
had 46 % of their samples in common, of 128 shards 32 %; by chance, and now, it is 10 %. Runs begun
before go on without (`random_starts` False, `data.shard_start` null). Which shard a position is in
is the same in both; that its samples do not ascend costs nothing, as shards are fetched whole and
read at any offset.

S comes from the config or the data, never from the world. Rank r of R takes p = r (mod R), or,
where mixup needs the neighbours 2j and 2j + 1 together, j = r (mod R); with R or 2 R dividing S a
rank owns whole streams. The cursor of a run is the one integer p, so resume is a seek.

Repeated augmentation (Hoffer et al., arXiv:1901.09335) shows each sample in K turns of its stream
that follow each other, and so in the same batch if that is large enough. An epoch then takes K N
positions.

Cost: nothing is precomputed. A block of 4096 places is ordered from its 4096 + 2 * buffer
neighbours when the first of them is asked for, about a millisecond; memory is two blocks of 32 KiB
per stream, more where the last calls asked for more: what is fetched ahead lies in other blocks.

`python -m data.order` prints which samples a step of a run saw; see `data.order_cli`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from data.errors import DataError
from data.recent import Recent

PLACES = 4096  # of a block; part of the order, as the random numbers are drawn per block
DEFAULT_MAX_STREAMS = 64
_SHARDS, _WINDOW, _STARTS = 1, 2, 5  # what random numbers are for; others have 3, 4 and 6


def uniform(entropy: Sequence[int], count: int) -> np.ndarray:
    """`count` float64 in [0, 1) that depend on `entropy` alone, on every machine and numpy."""
    # Raw Philox words: numpy promises those never to change, unlike Generator's methods.
    words = np.random.Philox(np.random.SeedSequence(list(entropy))).random_raw(count)
    return (words >> np.uint64(11)) * 2.0**-53


def default_streams(num_shards: int) -> int:
    """The largest power of two that is neither above 64 nor above the number of shards."""
    return min(DEFAULT_MAX_STREAMS, 1 << (num_shards.bit_length() - 1))


class Place(NamedTuple):
    """Where samples lie: int64 arrays of equal length, one row per position asked for."""

    epoch: np.ndarray
    shard: np.ndarray
    sample: np.ndarray


@dataclass(frozen=True)
class _Epoch:
    """The layout of one epoch."""

    shards: np.ndarray  # [shards]: the permuted list
    shard_begins: np.ndarray  # [shards + 1]: where each begins, laid end to end
    starts: np.ndarray  # [shards]: the sample that lies there
    span_begins: np.ndarray  # [streams + 1]: where each stream's span begins


class SampleOrder:
    """Maps positions to (epoch, shard, sample in shard).

    `shard_sizes` are the sample counts of the shards in the order of the manifest. Without
    `random_starts` each shard is entered at its first sample.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        *,
        seed: int,
        shuffle_buffer: int,
        streams: int | None = None,
        repeats: int = 1,
        random_starts: bool = True,
    ) -> None:
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(self.sizes.sum())
        self.streams = streams or default_streams(len(self.sizes))
        self.seed = seed
        self.buffer = shuffle_buffer
        self.repeats = repeats
        self.random_starts = random_starts
        if self.streams > self.num_samples:
            raise DataError(
                f"data.streams is {self.streams} and the set has {self.num_samples} samples; "
                f"set data.streams to at most {self.num_samples}"
            )
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._blocks: Recent[np.ndarray] = Recent(2 * self.streams + 2)

    def locate(self, positions: np.ndarray) -> Place:
        """The samples at `positions` (int64 [n], any order)."""
        positions = self._without_repeats(positions)
        epoch = positions // self.num_samples
        stream = positions % self.streams
        turn = self._turns_before(positions, stream)
        turn -= self._turns_before(epoch * self.num_samples, stream)
        return self._resolve(epoch, stream, turn)

    def substitutes(self, position: int) -> Place:
        """The samples after `position` in its stream and epoch, nearest first, wrapping round.

        They stand in for a sample that cannot be used: a function of the data alone, so every
        world puts the same sample in its place.
        """
        position = self._without_repeats(position)
        epoch, stream = position // self.num_samples, position % self.streams
        begins = self._epoch(epoch).span_begins
        length = int(begins[stream + 1] - begins[stream])
        first = self._turns_before(position, stream) - self._turns_before(
            epoch * self.num_samples, stream
        )
        turns = (first + np.arange(1, min(length, PLACES), dtype=np.int64)) % length
        return self._resolve(np.full_like(turns, epoch), np.full_like(turns, stream), turns)

    def _without_repeats(self, positions: Any) -> Any:
        """The positions that the same samples have with `repeats` 1; integers or arrays."""
        turns = positions // self.streams
        return turns // self.repeats * self.streams + positions % self.streams

    def _turns_before(self, positions: Any, streams: Any) -> Any:
        """How many positions below `positions` belong to `streams`; integers or arrays."""
        return (positions + self.streams - 1 - streams) // self.streams

    def _resolve(self, epoch: np.ndarray, stream: np.ndarray, turn: np.ndarray) -> Place:
        self._blocks.begin_call()
        shard, sample = np.empty_like(turn), np.empty_like(turn)
        groups = np.stack([epoch, stream, turn // PLACES])
        wanted, group_of = np.unique(groups, axis=1, return_inverse=True)
        for number, (e, s, b) in enumerate(wanted.T.tolist()):
            rows = group_of.reshape(-1) == number
            layout = self._epoch(e)
            laid = layout.span_begins[s] + self._block(e, s, b)[turn[rows] - b * PLACES]
            slot = np.searchsorted(layout.shard_begins, laid, side="right") - 1
            shard[rows] = layout.shards[slot]
            sample[rows] = laid - layout.shard_begins[slot] + layout.starts[slot]
        return Place(epoch, shard, sample % self.sizes[shard])

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            shards = np.argsort(
                uniform((_SHARDS, self.seed, epoch), len(self.sizes)), kind="stable"
            )
            every = np.arange(self.streams)
            begin, end = epoch * self.num_samples, (epoch + 1) * self.num_samples
            lengths = self._turns_before(end, every) - self._turns_before(begin, every)
            self._epochs[epoch] = _Epoch(
                shards,
                np.concatenate([[0], np.cumsum(self.sizes[shards])]),
                self._starts(epoch)[shards],
                np.concatenate([[0], np.cumsum(lengths)]),
            )
            if len(self._epochs) > 4:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _starts(self, epoch: int) -> np.ndarray:
        """The sample at which each shard, in the order of the manifest, is entered."""
        if not self.random_starts:
            return np.zeros_like(self.sizes)
        drawn = uniform((_STARTS, self.seed, epoch), len(self.sizes))
        return (drawn * self.sizes).astype(np.int64)

    def _block(self, epoch: int, stream: int, block: int) -> np.ndarray:
        """Places [block * PLACES, ...) of a stream -> index in its span."""
        name = (epoch, stream, block)
        return self._blocks.get(name, lambda: self._make_block(*name))

    def _make_block(self, epoch: int, stream: int, block: int) -> np.ndarray:
        begins = self._epoch(epoch).span_begins
        length = int(begins[stream + 1] - begins[stream])
        begin, end = block * PLACES, min((block + 1) * PLACES, length)
        # A sample moves fewer than `buffer` places, so only these can land in the block, and all of
        # them that land before it are exactly the ones sorted before `begin - low`.
        low, high = max(0, begin - self.buffer), min(length, end + self.buffer)
        keys = np.arange(low, high) + self._jitter(epoch, stream, low, high) * self.buffer
        order = np.argsort(keys, kind="stable")
        return low + order[begin - low : end - low]

    def _jitter(self, epoch: int, stream: int, low: int, high: int) -> np.ndarray:
        first, last = low // PLACES, (high - 1) // PLACES
        drawn = [
            uniform((_WINDOW, self.seed, epoch, stream, block), PLACES)
            for block in range(first, last + 1)
        ]
        return np.concatenate(drawn)[low - first * PLACES : high - first * PLACES]


def check_world(streams: int, global_batch_size: int, world_size: int, pairs: bool = False) -> None:
    """DataError, with the numbers that would fit, unless world_size divides both.

    With `pairs` ranks take two neighbouring positions in turn, so twice their number has to.
    """

    def fits(ranks: int) -> bool:
        units = ranks * (2 if pairs else 1)
        # one rank reads every stream, so pairs of an odd number of them are no worse
        return global_batch_size % units == 0 and (ranks == 1 or streams % units == 0)

    if fits(world_size):
        return
    fit = ", ".join(str(ranks) for ranks in range(1, streams + 1) if fits(ranks)) or "none"
    what = "ranks, each with pairs of samples for mixup or cutmix," if pairs else "ranks"
    raise DataError(
        f"{world_size} {what} do not divide {streams} streams (data.streams) and a global batch of "
        f"{global_batch_size} evenly; rank counts that fit: {fit}; or choose data.streams and the "
        f"batch as multiples of {world_size * (2 if pairs else 1)} (data.streams is part of the "
        "sample order: choose it before the first step)"
    )


if __name__ == "__main__":
    import sys

    from data.order_cli import main

    sys.exit(main())
