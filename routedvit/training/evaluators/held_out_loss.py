"""The objective's own loss on held-out images, for runs without a classifier (MAE).

What an objective draws at random follows from a sample's position in the run, which held-out
samples have none of. Here it follows from their key, so that every evaluation, on any world size,
masks an image alike and losses of two steps differ by the weights alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
from torch import nn

from routedvit.training.evaluators.counts import check_counts, sum_over_ranks
from routedvit.training.evaluators.inference import inference
from routedvit.training.interfaces import EvalLoader


class HeldOutLoss:
    """Yields `loss` and the objective's metrics, each a mean over the held-out set, and `unusable`,
    the number of images that cannot be read, if there are any.

    Args:
        objective: see `routedvit.training.objectives`; its loss is a mean over images.
        loader: see `interfaces.EvalLoader`.
        every_steps: cadence in optimiser steps; 0 for the last step only.
        name: prefix of the metrics.
    """

    def __init__(
        self, objective: nn.Module, loader: EvalLoader, *, every_steps: int, name: str = "val"
    ) -> None:
        self.objective = objective
        self.loader = loader
        self.every_steps = every_steps
        self.name = name

    def run(self, model: nn.Module) -> Iterator[tuple[str, float]]:
        """Collective: the values are equal on all ranks. `model` is that of the objective.

        Raises:
            RuntimeError: the batches of all ranks hold more or fewer samples than the set.
        """
        device = next(model.parameters()).device
        names: list[str] = []
        sums, unusable = torch.zeros(1, dtype=torch.float64, device=device), 0
        with inference(self.objective):
            for batch in self.loader:
                rows = batch["valid"].nonzero().flatten()
                count = len(rows)
                # a batch of padding runs too: under ZeRO-3 every forward is collective
                rows = rows if count else torch.zeros(1, dtype=torch.int64)
                keys = [batch["key"][row] for row in rows.tolist()]
                loss, metrics = self.objective(
                    batch["image"][rows].to(device),
                    batch["target"][rows].to(device),
                    torch.tensor([zlib.crc32(key.encode()) for key in keys], device=device),
                )
                unusable += batch.get("unusable", 0)
                names = ["loss", *metrics]
                means = torch.stack([loss, *metrics.values()]).double()
                sums = sums + torch.cat([means * count, means.new_tensor([count])])
        sums = sum_over_ranks(torch.cat([sums, sums.new_tensor([unusable])]))
        *totals, seen, lost = sums.tolist()
        check_counts(self.name, seen, lost, self.loader.num_samples)
        for name, total in zip(names, totals, strict=True):
            yield name, total / seen
        if lost:
            yield "unusable", lost
