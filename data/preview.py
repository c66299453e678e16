"""What a dry run says about the data: are the shards there, do they fit the world, can one be read.

The checks of a real start are made by the same code, and one sample is read, decoded and augmented
in this process. Shards that are not there yet are no mistake in a dry run.
"""

from __future__ import annotations

from typing import Any

from data.config import DataConfig
from data.errors import DataError
from data.loaders import build_train_loader
from data.mixture import resolve_train


class Preview:
    """The training data of `config`, as far as it is there.

    num_classes: of the data set, or None.
    missing: why the shards cannot be used yet; empty where they can.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.num_classes: int | None = None
        self.missing = ""
        try:
            self.num_classes = resolve_train(config).shards.num_classes
        except DataError as error:
            self.missing = str(error)

    def describe(self, *, world_size: int, **options: Any) -> list[str]:
        """The shards with who reads them, and the first sample of the run.

        `options` is what `build_train_loader` needs besides. DataError when shards, world and batch
        do not fit, or the sample cannot be read.
        """
        loader = build_train_loader(
            self.config, world_size=world_size, micro_batch_size=1, rank=0, **options
        )
        shards = loader.dataset.reader.shards
        batch = loader.dataset[0]
        size = " x ".join(map(str, batch["image"].shape[1:]))
        sample = f"{batch['key'][0]}, class {int(batch['target'][0])}, {size}"
        if batch["bad"]:
            sample += f", in place of {batch['bad'][0]['key']}: {batch['bad'][0]['reason']}"
        return [
            f"{len(shards.names)} shards, {shards.num_samples:,} images of {loader.num_classes} "
            f"classes, for {world_size} x {max(1, self.config.num_workers)} workers",
            f"first sample read: {sample}",
        ]
