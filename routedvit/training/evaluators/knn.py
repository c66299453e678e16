"""k nearest neighbours on frozen features: how good a representation is without training on it.

The weighted vote of DINO (2104.14294, appendix; the repository's eval_knn.py): the k training
images of highest cosine similarity s each add exp(s / temperature) to their class. Every sample is
classified once on any world size. Cost: one forward over training and held-out images, the training
features on every rank (4 D bytes an image), and one [B, train images] product per batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from routedvit.training.evaluators.counts import sum_over_ranks
from routedvit.training.evaluators.features import feature_batches, gather, training_features
from routedvit.training.interfaces import EvalLoader, Finding


class NearestNeighbours:
    """Yields `knn_top1` and `knn_top5` in percent.

    Args:
        train: the images that vote, read without augmentation.
        loader: the images that are classified.
        every_steps: cadence in optimiser steps; 0 for the last step only.
        neighbours, temperature: k and the temperature of the vote.
        images_per_class: few-shot: only the first so many training images of each class vote.
    """

    def __init__(
        self,
        train: EvalLoader,
        loader: EvalLoader,
        *,
        every_steps: int,
        neighbours: int = 20,
        temperature: float = 0.07,
        images_per_class: int | None = None,
        name: str = "val",
    ) -> None:
        self.train = train
        self.loader = loader
        self.every_steps = every_steps
        self.neighbours = neighbours
        self.temperature = temperature
        self.images_per_class = images_per_class
        self.name = name

    def run(self, model: nn.Module) -> Iterator[tuple[str, Finding]]:
        """Collective: the values are equal on all ranks."""
        bank = gather(training_features(model, self.train, self.images_per_class))
        keys = F.normalize(bank.features, dim=1)
        num_classes = int(bank.target.max()) + 1
        sums = torch.zeros(3, dtype=torch.float64, device=keys.device)
        for features, target, valid in feature_batches(model, self.loader):
            votes = vote(
                F.normalize(features, dim=1), keys, bank.target,
                num_classes=num_classes, neighbours=self.neighbours, temperature=self.temperature,
            )  # fmt: skip
            best = votes.topk(min(5, num_classes), dim=1).indices
            hits = (best == target[:, None])[valid]
            sums += torch.stack([hits[:, 0].sum(), hits.any(1).sum(), valid.sum()])
        top1, top5, count = sum_over_ranks(sums).tolist()
        yield "knn_top1", 100 * top1 / count
        yield "knn_top5", 100 * top5 / count


def vote(
    queries: Tensor,
    keys: Tensor,
    target: Tensor,
    *,
    num_classes: int,
    neighbours: int,
    temperature: float,
) -> Tensor:
    """Weight of each class [B, num_classes] for unit `queries` [B, D], from unit `keys` [N, D] of
    the classes `target` int64 [N]."""
    # bf16 has steps of 0.004 below 1, where the nearest all are: ties, and votes off by 5 %
    with torch.autocast(queries.device.type, enabled=False):
        similarity = queries @ keys.T
    similarity, nearest = similarity.topk(min(neighbours, len(keys)), dim=1)
    # the nearest counts 1: at a low temperature its own exponential would be infinite
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    return weights.new_zeros(len(queries), num_classes).scatter_add_(1, target[nearest], weights)
