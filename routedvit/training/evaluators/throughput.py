"""Images per second of inference, measured: the number that FLOPs only promise.

The forward alone, on one batch that is already on the device: reading and decoding are a matter of
the loader. The median of several forwards after a few unmeasured ones, summed over the ranks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from routedvit.training.evaluators.counts import sum_over_ranks
from routedvit.training.evaluators.inference import as_input, inference
from routedvit.training.interfaces import EvalLoader, Finding

WARMUP = 3


class Throughput:
    """Yields `inference_images_per_second` of all ranks together.

    Args:
        loader: its first batch is timed.
        every_steps: cadence in optimiser steps; 0 for the last step only.
        forwards: timed forward passes, of which the median counts.
    """

    def __init__(
        self, loader: EvalLoader, *, every_steps: int, forwards: int = 20, name: str = "val"
    ) -> None:
        self.loader = loader
        self.every_steps = every_steps
        self.forwards = forwards
        self.name = name

    def run(self, model: nn.Module) -> Iterator[tuple[str, Finding]]:
        """Collective: every rank runs the same forwards, and the value is equal on all."""
        images = first_images(self.loader, model)
        with inference(model):
            yield "inference_images_per_second", images_per_second(model, images, self.forwards)


def first_images(loader: EvalLoader, model: nn.Module) -> Tensor:
    """The images of the loader's first batch, ready for the model."""
    return as_input(next(iter(loader))["image"], model)


def images_per_second(model: nn.Module, images: Tensor, forwards: int) -> float:
    """Of all ranks together, from the median time of `forwards` calls on `images`. Collective."""
    seconds = []
    for _ in range(WARMUP + forwards):
        _wait(images.device)
        began = time.perf_counter()
        model(images)
        _wait(images.device)
        seconds.append(time.perf_counter() - began)
    rate = len(images) / statistics.median(seconds[WARMUP:])
    return float(sum_over_ranks(torch.tensor(rate, dtype=torch.float64, device=images.device)))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
