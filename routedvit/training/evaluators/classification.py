"""Top-1, top-5, mean loss and accuracy per class: every sample counted once on any world size.

Means of per-rank or per-batch means are wrong as soon as the last batch is short or padded. So each
rank sums over its valid rows in fp64, the sums are reduced once, and the number of samples seen
must equal the number the loader announced. Cost: one forward per batch and one all-reduce of
4 + 2 * classes numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from routedvit.training.evaluators.counts import check_counts, sum_over_ranks
from routedvit.training.evaluators.inference import as_input, inference
from routedvit.training.interfaces import EvalLoader, Finding, Table


class Totals(NamedTuple):
    """Sums over all samples of the set."""

    top1: float
    top5: float
    loss: float
    samples: float  # usable ones
    unusable: float  # those that cannot be read
    hits: Tensor  # float64 [K]: top-1 hits per class
    sizes: Tensor  # float64 [K]: samples per class


class Classification:
    """Yields `top1` and `top5` in percent, `loss`, the mean softmax cross-entropy, `class_top1`,
    the mean of the classes' own accuracies, and the table `per_class`, worst class first. Images
    that cannot be read count nowhere; if there are any, `unusable` says how many.

    Args:
        loader: see `interfaces.EvalLoader`; it gives every rank the same number of batches, which
            ZeRO-3 needs, since each forward gathers parameters from all ranks.
        every_steps: cadence in optimiser steps; 0 for the last step only.
        name: prefix of the metrics.
    """

    def __init__(self, loader: EvalLoader, *, every_steps: int, name: str = "val") -> None:
        self.loader = loader
        self.every_steps = every_steps
        self.name = name

    def run(self, model: nn.Module) -> Iterator[tuple[str, Finding]]:
        """Collective: the values are equal on all ranks.

        Raises:
            RuntimeError: the batches of all ranks hold more or fewer samples than the set.
        """
        total = self.totals(model)
        yield "top1", 100 * total.top1 / total.samples
        yield "top5", 100 * total.top5 / total.samples
        yield "loss", total.loss / total.samples
        accuracy = 100 * total.hits / total.sizes  # NaN for classes without a sample
        yield "class_top1", float(accuracy.nanmean())
        if total.unusable:
            yield "unusable", total.unusable
        names = getattr(self.loader, "label_names", None)
        yield "per_class", per_class_table(accuracy, total.sizes, names)

    def totals(self, model: nn.Module) -> Totals:
        """The sums over the whole set, on every rank. Collective."""
        sums, unusable = torch.zeros(()), 0
        with inference(model):
            for batch in self.loader:
                logits = model(as_input(batch["image"], model))
                sums = sums + batch_sums(logits, batch["target"], batch["valid"])
                unusable += batch.get("unusable", 0)
        sums = sum_over_ranks(torch.cat([sums, sums.new_tensor([unusable])])).cpu()
        top1, top5, loss, count, lost = [*sums[:4].tolist(), float(sums[-1])]
        check_counts(self.name, count, lost, self.loader.num_samples)
        hits, sizes = sums[4:-1].chunk(2)
        return Totals(top1, top5, loss, count, lost, hits, sizes)


def batch_sums(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """float64 [4 + 2 K]: top-1 hits, top-5 hits, cross-entropy and count, summed over the valid
    rows; then top-1 hits per class and rows per class.

    `logits` [B, K], `target` int64 [B], `valid` bool [B]. With fewer than five classes the second
    is top-K.
    """
    logits = logits.float()
    valid = valid.to(logits.device)
    logits, target = logits[valid], target.to(logits.device)[valid]
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = best == target[:, None]
    loss = F.cross_entropy(logits, target, reduction="none")
    parts = (hits[:, 0], hits.any(1), loss, torch.ones_like(loss))
    totals = torch.stack([part.sum(dtype=torch.float64) for part in parts])
    per_class = totals.new_zeros(2, logits.shape[1])
    per_class[0].index_add_(0, target, hits[:, 0].double())
    per_class[1].index_add_(0, target, torch.ones_like(target, dtype=torch.float64))
    return torch.cat([totals, per_class.flatten()])


def per_class_table(accuracy: Tensor, sizes: Tensor, names: list[str] | None) -> Table:
    """A row per class that has samples: class, its name, samples, top-1 in percent; worst first."""
    present = sizes.nonzero().flatten()
    order = present[accuracy[present].argsort(stable=True)].tolist()
    rows = [
        (c, names[c] if names else str(c), int(sizes[c]), round(float(accuracy[c]), 4))
        for c in order
    ]
    return Table(("class", "name", "samples", "top1"), rows, shown=10)
