"""Linear probe: multinomial logistic regression on frozen, standardised features.

The problem is convex and solved by full-batch L-BFGS from zero in fp64: no learning rate, no
shuffling, no augmentation, so the result is a property of the features and the same on any world
size. Each rank keeps the features of its share; loss and gradient are summed over the ranks. Cost:
one forward over training and held-out images, then some 120 products of [images, D] by [D, classes]
and back.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from routedvit.training.evaluators.classification import batch_sums
from routedvit.training.evaluators.counts import sum_over_ranks
from routedvit.training.evaluators.features import feature_batches, training_features
from routedvit.training.interfaces import EvalLoader, Finding


class LinearProbe:
    """Yields `linear_probe_top1`, `linear_probe_top5` and `linear_probe_train_top1` in percent.

    Args:
        train: the images it learns from, read without augmentation.
        loader: the images it is tested on.
        every_steps: cadence in optimiser steps; 0 for the last step only.
        l2: half of this times the squared weights is added to the mean loss.
        iterations: most iterations of L-BFGS.
        images_per_class: few-shot: it learns from the first so many images of each class only.
    """

    def __init__(
        self,
        train: EvalLoader,
        loader: EvalLoader,
        *,
        every_steps: int,
        l2: float = 1e-4,
        iterations: int = 100,
        images_per_class: int | None = None,
        name: str = "val",
    ) -> None:
        self.train = train
        self.loader = loader
        self.every_steps = every_steps
        self.l2 = l2
        self.iterations = iterations
        self.images_per_class = images_per_class
        self.name = name

    def run(self, model: nn.Module) -> Iterator[tuple[str, Finding]]:
        """Collective: the values are equal on all ranks."""
        features, target, valid = training_features(model, self.train, self.images_per_class)
        features, target = features[valid].double(), target[valid]
        count = sum_over_ranks(features.new_tensor([len(features)]))
        mean = sum_over_ranks(features.sum(0)) / count
        std = (sum_over_ranks((features - mean).square().sum(0)) / count).sqrt().clamp_min(1e-6)
        num_classes = int(_max_over_ranks(target)) + 1

        def inputs(rows: Tensor) -> Tensor:
            return _with_one((rows.double() - mean) / std)

        weight = fit(inputs(features), target, num_classes, l2=self.l2, iterations=self.iterations)
        sums = features.new_zeros(4 + 2 * num_classes)
        for rows, labels, mask in feature_batches(model, self.loader):
            known = mask & (labels < num_classes)  # a class without training images is never right
            sums += batch_sums(inputs(rows) @ weight.T, labels, known)
            sums[3] += (mask & ~known).sum()
        own = batch_sums(inputs(features) @ weight.T, target, torch.ones_like(target).bool())
        top1, top5, _, tested = sum_over_ranks(sums)[:4].tolist()
        train_top1 = sum_over_ranks(own)[0].item()
        yield "linear_probe_top1", 100 * top1 / tested
        yield "linear_probe_top5", 100 * top5 / tested
        yield "linear_probe_train_top1", 100 * train_top1 / count.item()


def fit(inputs: Tensor, target: Tensor, num_classes: int, *, l2: float, iterations: int) -> Tensor:
    """Weights float64 [num_classes, D] that minimise mean cross-entropy + l2 / 2 * |weights|^2.

    Args:
        inputs: float64 [N, D] of this rank; the last column is 1 and its weights, the biases, are
            not penalised.
        target: int64 [N].
    """
    weight = inputs.new_zeros(num_classes, inputs.shape[1])
    penalty = torch.full_like(weight, l2)
    penalty[:, -1] = 0
    count = sum_over_ranks(inputs.new_tensor([len(inputs)]))
    rows = torch.arange(len(inputs), device=inputs.device)

    def objective() -> Tensor:
        log_p = (inputs @ weight.T).log_softmax(1)
        error = log_p.exp()
        error[rows, target] -= 1
        parts = torch.cat([(error.T @ inputs).flatten(), -log_p[rows, target].sum()[None]])
        *_, loss = parts = sum_over_ranks(parts) / count
        weight.grad = parts[:-1].view_as(weight) + penalty * weight
        return loss + (penalty * weight.square()).sum() / 2

    solver = torch.optim.LBFGS(
        [weight], max_iter=iterations, tolerance_grad=1e-7, tolerance_change=1e-12,
        history_size=10, line_search_fn="strong_wolfe",
    )  # fmt: skip
    solver.step(objective)
    return weight


def _with_one(rows: Tensor) -> Tensor:
    return torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)


def _max_over_ranks(values: Tensor) -> Tensor:
    """The largest value on any rank; 0 where there is none."""
    largest = torch.cat([values, values.new_zeros(1)]).max()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return largest
