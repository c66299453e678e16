"""What a dry run says about the data: are the shards there, do they fit the world, can one be read.

The checks of a real start are made by the same code, and one sample is read, decoded and augmented
in this process. Training shards that are not there yet are no mistake in a dry run.
"""

from __future__ import annotations

from typing import Any

from data.config import DataConfig
from data.errors import DataError, legible
from data.loaders import build_eval_loader, build_train_loader
from data.mixture import resolve_train


class Preview:
    """The data of `config`, as far as they are there.

    num_classes: of the training set, or None.
    samples_per_epoch: likewise.
    evaluates: whether there are held-out images, or will be.
    missing: why the training shards cannot be used yet; empty where they can.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.num_classes: int | None = None
        self.samples_per_epoch = config.samples_per_epoch
        self.evaluates = config.val is not None
        self.missing = ""
        try:
            train = resolve_train(config)
        except DataError as error:
            self.missing = str(error)
            return
        self.num_classes, self.samples_per_epoch = train.shards.num_classes, train.samples_per_epoch

    def describe(
        self, *, world_size: int, seed: int, global_batch_size: int, pairs: bool, **format: Any
    ) -> list[str]:
        """The shards with who reads them, the first sample of the run, the held-out images.

        `format` is the model's image format, as the loaders take it. DataError when shards, world
        and batch do not fit, the sample cannot be read, or the held-out shards are not there.
        """
        loader = build_train_loader(
            self.config,
            world_size=world_size,
            seed=seed,
            global_batch_size=global_batch_size,
            micro_batch_size=2 if pairs else 1,
            pairs=pairs,
            rank=0,
            **format,
        )
        shards = loader.dataset.reader.shards
        batch = loader.dataset[0]
        size = " x ".join(map(str, batch["image"].shape[1:]))
        sample = f"{legible(batch['key'][0])}, class {int(batch['target'][0])}, {size}"
        if batch["bad"]:
            bad = batch["bad"][0]
            sample += f", in place of {legible(bad['key'])}: {bad['reason']}"
        lines = [
            f"{len(shards.names)} shards, {shards.num_samples:,} images of {loader.num_classes} "
            f"classes, for {world_size} x {max(1, self.config.num_workers)} workers",
            f"first sample read: {sample}",
        ]
        if self.evaluates:
            val = build_eval_loader(
                self.config, batch_size=1, rank=0, world_size=1, crop_pct=1.0, **format
            )
            lines.append(f"{val.num_samples:,} held-out images")
        return lines
