"""What a dry run says about the data: are the shards there, do they fit the world, can one be read.

The checks of a real start are made by the same code, and one sample is read, decoded and augmented
in this process. Training shards that are not there yet are no mistake in a dry run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data.config import DataConfig
from data.errors import DataError, counted, legible
from data.labels import LabelsDisagree, check_learnable
from data.loaders import build_eval_loader, build_train_loader
from data.mixture import TrainSet, resolve_train


class Preview:
    """The data of `config`, as far as they are there.

    num_classes: of the training set, or None.
    samples_per_epoch: likewise.
    evaluates: whether there are held-out images, or will be.
    missing: why the training shards cannot be used yet; empty where they can.

    `labelled` says whether the objective reads labels; `learners` are as of `build_eval_loader`.
    DataError where shards are there and their labels, which are to be read, do not agree.
    """

    def __init__(
        self, config: DataConfig, *, labelled: bool = True, learners: Sequence[str] = ()
    ) -> None:
        self.config = config
        self.learners = learners
        self.train: TrainSet | None = None
        self.num_classes: int | None = None
        self.samples_per_epoch = config.samples_per_epoch
        self.evaluates = config.val is not None
        self.missing = ""
        try:
            train = resolve_train(config, labelled=labelled)
        except LabelsDisagree:
            raise
        except DataError as error:
            self.missing = str(error)
            return
        self.train = train
        self.num_classes, self.samples_per_epoch = train.shards.num_classes, train.samples_per_epoch

    def describe(
        self,
        *,
        world_size: int,
        seed: int,
        global_batch_size: int,
        pairs: bool,
        num_classes: int | None = None,
        **format: Any,
    ) -> list[str]:
        """The shards with who reads them, the first sample of the run, the held-out images.

        `format` is the model's image format and `num_classes` are its classes, as the loaders take
        them. DataError when shards, world and batch do not fit, the sample cannot be read, the
        held-out shards are not there, or labels that are to be read say nothing.
        """
        loader = build_train_loader(
            self.config,
            world_size=world_size,
            seed=seed,
            global_batch_size=global_batch_size,
            micro_batch_size=2 if pairs else 1,
            pairs=pairs,
            rank=0,
            train=self.train,
            **format,
        )
        shards = loader.dataset.reader.shards
        batch = loader.dataset[0]
        size = " x ".join(map(str, batch["image"].shape[1:]))
        labelled = shards.classes.labelled
        label = f"class {int(batch['target'][0])}, " if labelled else ""
        sample = f"{legible(batch['key'][0])}, {label}{size}"
        if batch["bad"]:
            bad = batch["bad"][0]
            sample += f", in place of {legible(bad['key'])}: {bad['reason']}"
        lines = [
            f"{counted(len(shards.names), 'shard')}, {counted(shards.num_samples, 'image')}"
            + (f" of {loader.num_classes} classes" if labelled else "")
            + f", for {world_size} x {max(1, self.config.num_workers)} workers",
            f"first sample read: {sample}",
        ]
        if shards.classes.discord:
            lines.append(f"labels are not read: {shards.classes.discord}")
        if self.evaluates:
            check_learnable(shards.classes, self.learners)
            val = build_eval_loader(
                self.config,
                batch_size=1,
                rank=0,
                world_size=1,
                crop_pct=1.0,
                train=self.train,
                learners=self.learners,
                num_classes=num_classes,
                **format,
            )
            lines.append(f"{val.num_samples:,} held-out images")
        return lines
