"""Top-1, top-5 and mean loss on a labelled set: every sample counted once on any world size.

Means of per-rank or per-batch means are wrong as soon as the last batch is short or padded. So each
rank sums over its valid rows in fp64, the sums are reduced once, and the number of samples seen
must equal the number the loader announced. Cost: one forward per batch and one all-reduce of four
numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from routedvit.training.evaluators.inference import as_input, inference
from routedvit.training.interfaces import EvalLoader


class Classification:
    """Yields `top1` and `top5` in percent, and `loss`, the mean softmax cross-entropy.

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

    def run(self, model: nn.Module) -> Iterator[tuple[str, float]]:
        """Collective: the values are equal on all ranks.

        Raises:
            RuntimeError: the batches of all ranks hold more or fewer samples than the set.
        """
        sums = torch.zeros(4, dtype=torch.float64)
        with inference(model):
            for batch in self.loader:
                logits = model(as_input(batch["image"], model))
                sums = sums.to(logits.device)
                sums += batch_sums(logits, batch["target"], batch["valid"])
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
        top1, top5, loss, count = sums.tolist()
        if count != self.loader.num_samples:
            raise RuntimeError(
                f"{self.name}: {count:.0f} samples were evaluated, the set has "
                f"{self.loader.num_samples}. The shards differ from their manifest, or ranks read "
                "different lists."
            )
        yield "top1", 100 * top1 / count
        yield "top5", 100 * top5 / count
        yield "loss", loss / count


def batch_sums(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """float64 [4]: top-1 hits, top-5 hits, cross-entropy and count, summed over the valid rows.

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
    return torch.stack([part.sum(dtype=torch.float64) for part in parts])
