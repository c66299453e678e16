"""Batches as datasets: a position, or a batch number, in; a whole batch out.

One item is one batch, so that one loader process makes it from beginning to end and its rows keep
their order. Bad samples travel in the batch under "bad", as lines for the ledger. Where damaged
shards are tolerated (`max_bad_shards`), each of their samples is a bad sample like any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from data.crop_first import FromEncoded
from data.errors import BadSample, BadShard, DataError, Quarantined, legible
from data.lazy_image import LazyImage
from data.mixture import Order
from data.order import Place, uniform
from data.prefetch import Prefetcher
from data.reader import Sample, ShardReader
from data.remote import shown
from data.transforms import borrowed_generators, sample_seeds, seed_generators

Batch = dict[str, Any]
Size = tuple[int, int, int]
_STAND_INS = 6  # what random numbers are for, as in data.order


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of that shape; in a loader process where the trainer can see it.

    torch copies what lies elsewhere on its way to the trainer, a fifth of the time of a batch.
    """
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    # as in default_collate
    shared = torch.UntypedStorage._new_shared(dtype.itemsize * math.prod(shape))
    return torch.empty(0, dtype=dtype).set_(shared).view(shape)


class _Batches(Dataset[Batch]):
    """What training and evaluation share: shard place -> image as a tensor."""

    def __init__(
        self,
        reader: ShardReader,
        transform: FromEncoded,
        *,
        input_size: Size,
        max_pixels: int,
        batch_size: int,
        world_size: int,
        quarantine: bool = False,
    ) -> None:
        self.reader = reader
        self.transform = transform
        self.input_size = input_size
        self.max_pixels = max_pixels
        self.batch_size = batch_size
        self.world_size = world_size
        self.quarantine = quarantine
        self.prefetcher = Prefetcher(reader.cache)

    def load(self, shard: int, sample: int) -> tuple[Sample, torch.Tensor]:
        """The sample and its image [C, H, W], float32 or, where `transform.levels` says so, uint8.

        BadSample when it cannot be used.
        """
        try:
            found = self.reader.read(shard, sample)
        except BadShard as error:
            if not self.quarantine:
                raise
            raise Quarantined(str(error)) from error
        try:
            image = LazyImage(found.payload, self.input_size[0], self.max_pixels)
            return found, self.transform(image)
        except (BadSample, DataError, MemoryError):  # the latter two say nothing of this sample
            raise
        except Exception as error:  # images fail transforms in ways that nobody foresaw
            first = str(error).partition("\n")[0]
            raise BadSample(f"cannot be transformed ({type(error).__name__}: {first})") from error

    def bad(self, shard: int, sample: int, error: BadSample, **where: Any) -> dict[str, Any]:
        """A line for the ledger."""
        name = self.reader.shards.names[shard]
        line = {"shard": shown(name), "reason": str(error), **where}
        if isinstance(error, Quarantined):  # nobody can say its key
            return line | {"key": f"sample {sample}", "quarantined": True}
        return line | {"key": self.reader.key(shard, sample)}


class TrainBatches(_Batches):
    """Item: the global position of a micro-batch's first row -> the micro-batch.

    Ranks take turns of `turn` positions: 1, or 2 where neighbours are to stay together.
    """

    def __init__(
        self,
        reader: ShardReader,
        order: Order,
        transform: FromEncoded,
        *,
        turn: int = 1,
        **common: Any,
    ) -> None:
        super().__init__(reader, transform, **common)
        self.order = order
        self.turn = turn

    def __getitem__(self, first: int) -> Batch:
        rows = np.arange(self.batch_size, dtype=np.int64)
        positions = first + rows // self.turn * self.turn * self.world_size + rows % self.turn
        place = self.order.locate(positions)
        self._prefetch(positions, place.shard)
        seeds = sample_seeds(self.order.seed, positions).tolist()
        levels = self.transform.levels
        dtype = torch.float32 if levels is None else torch.uint8
        images = _empty(self.batch_size, *self.input_size, dtype=dtype)
        targets, keys, bad = [], [], []
        samples = zip(positions.tolist(), *(column.tolist() for column in place), strict=True)
        with borrowed_generators():
            for row, (position, epoch, shard, sample) in enumerate(samples):
                seed_generators(seeds[row])
                try:
                    found, images[row] = self.load(shard, sample)
                except BadSample as error:
                    bad.append(self.bad(shard, sample, error, position=position))
                    lost = epoch, shard, sample
                    scatter = lost if isinstance(error, Quarantined) else None
                    found, images[row] = self._substitute(position, seeds[row], bad, scatter)
                targets.append(found.label)
                keys.append(found.key)
        batch = {
            "image": images,
            "target": torch.tensor(targets),
            "key": keys,
            "position": torch.from_numpy(positions),
            "epoch": torch.from_numpy(place.epoch),
            "bad": bad,
        }
        return batch if levels is None else batch | {"scale": levels[0], "shift": levels[1]}

    def _prefetch(self, positions: np.ndarray, now: np.ndarray) -> None:
        """Fetch side by side the shards that are needed `now`, at a start those of every stream;
        then what the same streams read one shard's worth of turns later, and so on.
        """
        shards = self.reader.shards
        if not shards.remote or not self.reader.cache.remote.prefetch:
            return
        of_one = -(-shards.num_samples // len(shards.names)) * self.order.repeats
        shard_of_each_stream = self.order.streams * of_one
        for ahead in range(self.reader.cache.remote.prefetch + 1):
            later = positions + ahead * shard_of_each_stream
            coming = self.order.locate(later).shard if ahead else now
            self.prefetcher.want(
                (shards.names[shard], shards.entries[shard]) for shard in np.unique(coming).tolist()
            )

    def _substitute(
        self,
        position: int,
        seed: int,
        bad: list[dict[str, Any]],
        scatter: tuple[int, ...] | None,
    ) -> tuple[Sample, torch.Tensor]:
        """The next good sample of the same stream; bad ones on the way are added to `bad`.

        Behind a whole lost shard that would be one and the same image for each of its samples: so
        `scatter`, the (epoch, shard, sample) that is lost, draws which of the next ones it is. All
        are put in a drawn order, and not the good ones: which are good is learnt on the way.

        Where a quarantined shard is all that the stream has, or this sample is, the next streams
        are asked: they are those of the positions that follow.
        """
        own = self.order.substitutes(position)
        alone = len(own.shard) == 0
        streams = self.order.streams if self.quarantine or alone else 1
        for other in range(position, position + streams):
            place = own if other == position else self.order.substitutes(other)
            if alone and other > position and len(place.shard) == 0:
                place = self.order.locate(np.array([other], dtype=np.int64))
            for shard, sample in self._tried(place, scatter):
                if shard in self.reader.damaged:
                    continue
                seed_generators(seed)
                try:
                    found, image = self.load(shard, sample)
                except BadSample as error:
                    bad.append(self.bad(shard, sample, error, position=position))
                    continue
                bad[-1]["replaced_by"] = found.key
                return found, image
        raise DataError(
            f"no usable sample follows {legible(bad[-1]['key'])} in its stream; the last failed "
            f"with: {bad[-1]['reason']}; check the shards with `python -m data.check`"
        )

    def _tried(self, place: Place, scatter: tuple[int, ...] | None) -> Iterator[tuple[int, int]]:
        """The samples at `place`, nearest first or in an order that `scatter` draws."""
        samples = np.stack([place.shard, place.sample], axis=1)
        if scatter is not None:
            drawn = uniform((_STAND_INS, self.order.seed, *scatter), len(samples))
            samples = samples[np.argsort(drawn, kind="stable")]
        yield from map(tuple, samples.tolist())


class EvalBatches(_Batches):
    """Item: the number of a batch -> the batch. Rank r of R holds samples r, r + R, ...

    With a `limit` below the size of the set, as many samples at even distances stand for it.
    """

    def __init__(
        self,
        reader: ShardReader,
        transform: FromEncoded,
        *,
        rank: int,
        limit: int | None = None,
        **common: Any,
    ):
        assert transform.levels is None  # evaluators take floats
        super().__init__(reader, transform, **common)
        self.rank = rank
        self.begins = np.concatenate([[0], np.cumsum(reader.shards.sizes)])
        whole = reader.shards.num_samples
        self.num_samples = whole if limit is None else min(limit, whole)

    def __len__(self) -> int:
        per_rank = -(-self.num_samples // self.world_size)
        return -(-per_rank // self.batch_size)

    def place(self, number: int) -> tuple[int, int]:
        """Number among the samples that are used -> (shard, sample)."""
        number = number * self.reader.shards.num_samples // self.num_samples
        shard = int(np.searchsorted(self.begins, number, side="right")) - 1
        return shard, number - int(self.begins[shard])

    def _prefetch(self, first: int) -> None:
        """Fetch side by side the shards that come from the sample `first` on."""
        shards, ahead = self.reader.shards, self.reader.cache.remote.prefetch
        if not shards.remote or not ahead:
            return
        of_one = max(1, self.num_samples // len(shards.names))  # with a limit none of some
        numbers = range(first, min(self.num_samples, first + (1 + ahead) * of_one), of_one)
        coming = dict.fromkeys(self.place(number)[0] for number in numbers)
        self.prefetcher.want((shards.names[shard], shards.entries[shard]) for shard in coming)

    def __getitem__(self, number: int) -> Batch:
        self._prefetch(self.rank + self.world_size * number * self.batch_size)
        images = _empty(self.batch_size, *self.input_size).zero_()
        targets = torch.zeros(self.batch_size, dtype=torch.int64)
        valid = torch.zeros(self.batch_size, dtype=torch.bool)
        keys, bad = [""] * self.batch_size, []
        for row in range(self.batch_size):
            index = self.rank + self.world_size * (number * self.batch_size + row)
            if index >= self.num_samples:
                break
            shard, sample = self.place(index)
            try:
                found, images[row] = self.load(shard, sample)
            except BadSample as error:  # a substitute would count twice: leave the row invalid
                bad.append(self.bad(shard, sample, error, index=index))
                continue
            targets[row], keys[row], valid[row] = found.label, found.key, True
        return {
            "image": images,
            "target": targets,
            "key": keys,
            "valid": valid,
            "unusable": len(bad),
            "bad": bad,
        }
