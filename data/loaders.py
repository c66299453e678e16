"""What `train.py` calls: training batches in the canonical order, evaluation batches exactly once.

A batch is made whole by one loader process, and torch's DataLoader hands batches over in the order
they were asked for; so neither the number of workers nor the prefetch changes what a step sees.
Everything a batch holds follows from the global positions of its rows (see `data.order`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch

from data.batches import Batch, EvalBatches, Size, TrainBatches
from data.config import DataConfig, NormalizeConfig
from data.crop_first import from_encoded
from data.decode import MODE_OF_CHANNELS
from data.errors import BadSample, DataError
from data.labels import check_learnable, check_same_classes
from data.ledger import Ledger
from data.mixture import Order, TrainSet, order_of, resolve_train
from data.order import check_world
from data.reader import ShardReader
from data.shards import ShardSet, resolve
from data.transforms import eval_transform, train_transform
from data.workers import batches_of
from data.working_set import warn_of_small_cache


def build_train_loader(
    config: DataConfig,
    *,
    input_size: Size,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolation: str,
    seed: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    ledger_dir: Path | None = None,
    pairs: bool = False,
    train: TrainSet | None = None,
) -> TrainLoader:
    """The training batches of one rank.

    `input_size` is (C, H, W) with C 1 or 3; `mean`, `std` and `interpolation` are the model's.
    Bad samples are named in `ledger_dir`. With `pairs` the rows 2i and 2i + 1 of a micro-batch hold
    neighbouring positions 2j and 2j + 1 on any world, for what mixes images. DataError when shards,
    world and batch do not fit. `train` is what `resolve_train(config)` gave, if somebody has asked
    already: of a hundred thousand shards that takes seconds.
    """
    train = train or resolve_train(config)
    shards, order = train.shards, order_of(train, config, seed)
    _check_batches(
        config,
        shards,
        order,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        pairs=pairs,
    )
    warn_of_small_cache(config, train, streams=order.streams, rank=rank, world_size=world_size)
    mean, std = normalization(config, shards, mean, std, channels=input_size[0])
    transform = train_transform(
        config.augment, size=input_size[1:], mean=mean, std=std, interpolation=interpolation
    )
    dataset = TrainBatches(
        ShardReader(shards, config.verify, config.remote),
        order,
        from_encoded(transform, config.decode),
        turn=2 if pairs else 1,
        input_size=input_size,
        max_pixels=config.max_pixels,
        quarantine=config.max_bad_shards > 0,
        batch_size=micro_batch_size,
        world_size=world_size,
    )
    ledger = Ledger(
        ledger_dir, "train", rank, config.max_bad_samples, config.max_bad_shards, config.log_samples
    )
    return TrainLoader(config, dataset, ledger, train, rank=rank, mean=mean, std=std)


def _check_batches(
    config: DataConfig,
    shards: ShardSet,
    order: Order,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    world_size: int,
    pairs: bool,
) -> None:
    """DataError when shards, order, world and batch do not fit."""
    if config.replacement and shards.remote:
        raise DataError(
            "data.replacement draws each sample among all shards, and some of data.train are URLs: "
            "nearly every sample would fetch a shard; copy them to a disk, or set it to false"
        )
    check_world(order.streams, global_batch_size, world_size, pairs)
    if global_batch_size % (micro_batch_size * world_size):
        raise DataError(
            f"a global batch of {global_batch_size} is no multiple of micro-batch "
            f"{micro_batch_size} x {world_size} ranks; change one of the three"
        )
    if pairs and micro_batch_size % 2:
        raise DataError(
            f"mixup and cutmix pair the images of a micro-batch, and {micro_batch_size} is odd; "
            "choose an even train.micro_batch_size"
        )
    if pairs and order.streams == 1 and config.augment.repeats > 1:
        raise DataError(
            "with one stream data.augment.repeats puts copies of an image side by side, and mixup "
            "and cutmix would pair it with itself; set data.streams to 2 or more"
        )


def build_eval_loader(
    config: DataConfig,
    *,
    input_size: Size,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolation: str,
    batch_size: int,
    rank: int,
    world_size: int,
    crop_pct: float,
    ledger_dir: Path | None = None,
    split: Literal["val", "train"] = "val",
    limit: int | None = None,
    train: TrainSet | None = None,
    learners: Sequence[str] = (),
    num_classes: int | None = None,
) -> EvalLoader:
    """The evaluation batches of one rank, normalised as in training. DataError without data.val.

    `split` 'train' reads the training images the way held-out ones are read, not augmented; with a
    `limit` only so many samples, at even distances, come. `train` as of `build_train_loader`.
    `learners` are keys of the evaluators that learn from labels and `num_classes` those of the
    model, 0 without a classifier (None: of the training set): without either no label is compared.
    """
    trained_on = (train or resolve_train(config)).shards
    shards = trained_on
    if split == "val":
        if config.val is None:
            raise DataError("data.val is not set; name shards to evaluate on in data.val.shards")
        compared = num_classes != 0 or bool(learners)
        shards = resolve(
            config.val.shards, "data.val.shards", config.remote, config.val.manifest, compared
        )
        if compared:
            check_same_classes(trained_on.classes, shards.classes, learners, num_classes)
    else:
        check_learnable(trained_on.classes, learners)
    mean, std = normalization(config, trained_on, mean, std, channels=input_size[0])
    dataset = EvalBatches(
        ShardReader(shards, config.verify, config.remote),
        from_encoded(
            eval_transform(
                size=input_size[1:],
                mean=mean,
                std=std,
                interpolation=interpolation,
                crop_pct=crop_pct,
            ),
            config.decode,
        ),
        input_size=input_size,
        max_pixels=config.max_pixels,
        quarantine=config.max_bad_shards > 0,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        limit=limit,
    )
    name = "val" if split == "val" else "train_features"  # training keeps a ledger of its own
    ledger = Ledger(ledger_dir, name, rank, config.max_bad_samples, config.max_bad_shards)
    return EvalLoader(config, dataset, ledger)


def normalization(
    config: DataConfig,
    shards: ShardSet,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    channels: int,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel, from where `data.normalize` says; `mean`, `std` are the model's."""
    if channels not in MODE_OF_CHANNELS:
        raise DataError(f"the model takes {channels} channels; images give 1 (grey) or 3 (colour)")
    source: str = "data.normalize"
    if isinstance(config.normalize, NormalizeConfig):
        mean, std = tuple(config.normalize.mean), tuple(config.normalize.std)
    elif config.normalize == "dataset":
        source = "the manifest of data.train"
        mean, std = tuple(shards.mean), tuple(shards.std)
        if len(mean) == 1:  # grey images become three equal channels
            mean, std = mean * channels, std * channels
    else:
        source = "the model"
    if len(mean) != channels or len(std) != channels:
        raise DataError(
            f"{source} gives {len(mean)} mean and {len(std)} std values and the model takes "
            f"{channels} channels; give data.normalize as {{mean: [...], std: [...]}}"
        )
    if min(std) <= 0:
        raise DataError(f"{source} gives a std of 0; give data.normalize as {{mean, std}}")
    return mean, std


class TrainLoader:
    """Endless micro-batches of one rank. `mean` and `std` are those the images are given in."""

    def __init__(
        self,
        config: DataConfig,
        dataset: TrainBatches,
        ledger: Ledger,
        train: TrainSet,
        *,
        rank: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        self.config = config
        self.dataset = dataset
        self.ledger = ledger
        self.rank = rank
        self.mean = mean
        self.std = std
        self.samples_per_epoch = train.samples_per_epoch
        self.num_classes = train.shards.num_classes
        self.label_names = train.shards.label_names
        self.fingerprint = train.shards.digest()

    def batches(self, start: int) -> Iterator[Batch]:
        """Micro-batches from the global position `start` on, without end.

        Each is a dict: image [b, C, H, W], float32, or uint8 beside `scale` and `shift` [C, 1, 1],
        of which image * scale - shift is the normalised image; target int64 [b], key list[str],
        position int64 [b] (global), epoch int64 [b] (of the sample's source). DataError past the
        limit of bad samples, or on damage.
        """
        world, size, turn = self.dataset.world_size, self.dataset.batch_size, self.dataset.turn
        if start % turn:
            raise DataError(
                f"the run stands at sample {start}, in the middle of a pair for mixup or cutmix; "
                "its earlier batches were odd: go on without mixing, or start anew"
            )
        first = start + (self.rank * turn - start) % (world * turn)
        sampler = _Positions(first, world * size)
        return batches_of(self.dataset, sampler, self.config, self.ledger)


class EvalLoader:
    """Every sample of the set once over the world; equally many batches on every rank."""

    def __init__(self, config: DataConfig, dataset: EvalBatches, ledger: Ledger) -> None:
        self.config = config
        self.dataset = dataset
        self.ledger = ledger
        self.num_samples = dataset.num_samples
        self.num_classes = dataset.reader.shards.num_classes
        self.fingerprint = dataset.reader.shards.digest()
        self.label_names = dataset.reader.shards.label_names

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Batch]:
        """Dicts: image float32 [b, C, H, W], target int64 [b], key list[str], valid bool [b].

        Rows with valid=False are padding or unusable samples (`unusable` of them): zeros, to be
        left out of metrics.
        """
        return batches_of(self.dataset, range(len(self)), self.config, self.ledger)

    def probe(self, n: int) -> torch.Tensor:
        """The first n usable images of the set, float32 [n, C, H, W]; the same on every rank."""
        images: list[torch.Tensor] = []
        for number in range(self.num_samples):
            if len(images) == n:
                break
            try:
                images.append(self.dataset.load(*self.dataset.place(number))[1])
            except BadSample:
                continue
        return torch.stack(images)


class _Positions:
    """first, first + stride, ... without end; iterable again."""

    def __init__(self, first: int, stride: int) -> None:
        self.first = first
        self.stride = stride

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.first, self.stride)
