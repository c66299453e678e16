"""What the trainer needs from its neighbours, as Protocols: loaders, evaluators, writers, progress.

The trainer is given objects and imports none of their packages, so data, evaluators and sinks can
change without it. A class need not inherit from anything here; having the members is enough.

"Collective" means: called on every rank at the same step, in the same order, and allowed to
communicate. Everything else is local, and what writes to disk or screen does so on rank 0 only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

Batch = dict[str, Any]


class TrainLoader(Protocol):
    """Endless training micro-batches of one rank, addressed by a global sample position."""

    @property
    def samples_per_epoch(self) -> int:
        """Samples in one epoch, over the whole world."""

    @property
    def num_classes(self) -> int:
        """Classes of the data set, from its manifest."""

    @property
    def mean(self) -> tuple[float, ...]:
        """What the images are normalised with, per channel, in units of the range 0 to 1."""

    @property
    def std(self) -> tuple[float, ...]: ...

    def batches(self, start: int) -> Iterator[Batch]:
        """Micro-batches from global position `start` on (samples the WHOLE world has consumed).

        Each is a dict: `image` [b, C, H, W], float32 or the bytes of `images.as_floats`, `target`
        int64 [b], `key` list[str] of b, `position` int64 [b] (global sample positions), `epoch`
        int64 [b]. The order is a pure function of (seed, position), so
        `batches(start=samples_seen)` is a resume.
        """


class EvalLoader(Protocol):
    """Every sample of a set exactly once over the world, in equally many rows on every rank.

    Rank r of R holds the samples r, r + R, ... An attribute `label_names`, if there is one, names
    the classes.
    """

    @property
    def num_samples(self) -> int:
        """Samples in the set, over the whole world, padding excluded."""

    @property
    def fingerprint(self) -> str:
        """Equal on ranks that read the same shards."""

    def __iter__(self) -> Iterator[Batch]:
        """Dicts of `image`, `target`, `key`, and `valid` bool [b], False on padding rows.

        `unusable` counts rows that are not valid because the sample cannot be read; absent: none.
        """

    def probe(self, n: int) -> torch.Tensor:
        """float32 [n, C, H, W]: the first n images of the set, the same on every rank."""


class EvalLoaders(NamedTuple):
    """What evaluators read."""

    val: EvalLoader
    train: EvalLoader | None  # training images, not augmented; None if nothing learns from them


class Table(NamedTuple):
    """Rows under column names; the first `shown` of them are worth a look.

    Cells are str, int or float.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    shown: int = 20


Finding = float | torch.Tensor | Table
"""A number, a picture uint8 [3, H, W], or a table."""


class Evaluator(Protocol):
    """Something measured on the model at its own cadence.

    `name` prefixes its findings (`name/metric`); `every_steps` is its cadence in optimiser steps,
    0 for the last step only.
    """

    @property
    def name(self) -> str: ...

    @property
    def every_steps(self) -> int: ...

    def run(self, model: nn.Module) -> Iterator[tuple[str, Finding]]:
        """Yields (name, finding), numbers equal on all ranks. Collective.

        `model` comes in eval mode with gradients off. Under ZeRO-3 its parameters exist only
        inside its forward, so an evaluator calls the model and never reads the weights.
        """


class RoutingMonitor(Protocol):
    """Writes routing statistics and pictures of one step to the metric writer."""

    def run(self, model: nn.Module, step: int) -> None:
        """Collective: routes the probe images through `model` (in eval mode, no gradients)."""


class MetricWriter(Protocol):
    """A sink for numbers, pictures and text (TensorBoard, CSV, ...). Rank 0 holds the real one."""

    def scalar(self, name: str, value: float, step: int) -> None: ...

    def image(self, name: str, image: torch.Tensor, step: int) -> None:
        """`image`: uint8 [3, H, W]."""

    def text(self, name: str, text: str, step: int) -> None:
        """`text`: Markdown."""

    def histogram(self, name: str, values: Sequence[float], step: int) -> None: ...

    def hparams(self, values: dict[str, Any], metrics: Sequence[str]) -> None:
        """What the run was started with, once, and the scalars that tell how good it was."""

    def rewind(self, step: int) -> None:
        """The run has gone back to `step`: what was written of later steps is not to be shown."""

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Progress(Protocol):
    """What a person sees while it runs. Rank 0 holds the real one."""

    def start(self, step: int, total: int) -> None:
        """The loop begins after `step` finished steps and ends at `total`."""

    def update(self, step: int, loss: float, lr: float, images_per_second: float) -> None:
        """`step` steps are finished; `loss` is the world's mean, the rate is of the whole world."""

    def message(self, text: str) -> None:
        """One line that must not tear the progress line."""

    def close(self) -> None: ...
