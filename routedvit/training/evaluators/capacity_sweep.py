"""Accuracy against capacity: what one set of weights can do with more or less compute.

Each share goes to every router (`set_capacity`), the held-out set is classified and the forward is
timed; afterwards each router has its own capacity again. A model trained at one capacity loses at
others what it never practised (MoNE samples the capacity per step to avoid that): this shows how
much. Cost: one classification per share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from routedvit.training.evaluators.classification import Classification
from routedvit.training.evaluators.inference import inference
from routedvit.training.evaluators.throughput import first_images, images_per_second
from routedvit.training.interfaces import EvalLoader, Finding, Table

FORWARDS = 5  # timed, per share
CAPACITY = ("numerator", "denominator", "fixed_number")  # what a router's capacity consists of
ARGUMENTS = "_model_args"  # what timm makes a model again with: set_capacity replaces it


class CapacitySweep:
    """Yields `capacity_0.25/top1`, `.../top5`, `.../loss`, `.../images_per_second` for each share,
    and the table `capacities`.

    Args:
        loader: see `Classification`.
        shares: of the patches, in (0, 1].
        every_steps: cadence in optimiser steps; 0 for the last step only.
    """

    def __init__(
        self,
        loader: EvalLoader,
        shares: Sequence[float],
        *,
        every_steps: int,
        name: str = "val",
    ) -> None:
        self.classification = Classification(loader, every_steps=every_steps, name=name)
        self.shares = shares
        self.every_steps = every_steps
        self.name = name

    def run(self, model: nn.Module) -> Iterator[tuple[str, Finding]]:
        """Collective: the values are equal on all ranks, the model is left as it was."""
        rows = []
        images = first_images(self.classification.loader, model)
        with capacities_kept(model):
            for share in self.shares:
                model.set_capacity(share)  # type: ignore[operator]
                total = self.classification.totals(model)
                with inference(model):
                    speed = images_per_second(model, images, FORWARDS)
                values = {
                    "top1": 100 * total.top1 / total.samples,
                    "top5": 100 * total.top5 / total.samples,
                    "loss": total.loss / total.samples,
                    "images_per_second": speed,
                }
                rows.append((share, *values.values()))
                for metric, value in values.items():
                    yield f"capacity_{share:g}/{metric}", value
        yield "capacities", Table(("capacity", *values), rows)


@contextmanager
def capacities_kept(model: Any) -> Iterator[None]:
    """Each router of `model` has its own capacity again at the end."""
    before = [
        (router, {key: value for key, value in vars(router).items() if key in CAPACITY})
        for router in model.routers().values()
    ]
    arguments = getattr(model, ARGUMENTS, {})
    try:
        yield
    finally:
        for router, values in before:
            vars(router).update(values)
        setattr(model, ARGUMENTS, arguments)
