"""Frozen features: what the classifier sees of an image, for evaluators that learn on top of it.

They are read where they enter the classifier, while the model runs as it always does, so that they
are timm's `forward_head(forward_features(x), pre_logits=True)` for any timm model, and are right
under ZeRO-3, where a parameter of the network itself exists only while the network is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from routedvit.training.evaluators.inference import as_input, inference
from routedvit.training.interfaces import EvalLoader


class Features(NamedTuple):
    """One batch of them: float32 [B, D], targets int64 [B], and bool [B], False on padding rows."""

    features: Tensor
    target: Tensor
    valid: Tensor


def feature_batches(model: nn.Module, loader: EvalLoader) -> Iterator[Features]:
    """The features of this rank's share of the set, batch by batch. Collective.

    Raises:
        TypeError: the model has no classifier to read them from.
    """
    if not hasattr(model, "get_classifier"):
        raise TypeError(
            f"{type(model).__name__} has no get_classifier(), so features are not known"
        )
    classifier: Any = model.get_classifier()  # type: ignore[operator]
    classifier = classifier[0] if isinstance(classifier, tuple) else classifier
    seen: list[Tensor] = []
    hook = classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        with inference(model):
            for batch in loader:
                model(as_input(batch["image"], model))
                features = seen.pop().float()
                seen.clear()
                device = features.device
                yield Features(features, batch["target"].to(device), batch["valid"].to(device))
    finally:
        hook.remove()


def training_features(model: nn.Module, loader: EvalLoader, per_class: int | None) -> Features:
    """What this rank has to learn from; `per_class` images of each class, if not None. Collective.

    All images go through the model, since their classes are known only then.
    """
    features = collect(feature_batches(model, loader))
    return features if per_class is None else first_of_each_class(features, per_class)


def collect(batches: Iterator[Features]) -> Features:
    """All batches in a row, padding included: the same number of rows on every rank."""
    return Features(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


def first_of_each_class(own: Features, number: int) -> Features:
    """`own`, valid where an image is among the first `number` of its class in the order of the set.

    The same images on any world size. Collective.
    """
    target, valid, rank, world_size = own.target, own.valid, 0, 1
    if distributed.is_available() and distributed.is_initialized():
        target, valid = interleaved(target), interleaved(valid)
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
    usable = valid.nonzero().flatten()
    by_class = usable[target[usable].argsort(stable=True)]
    labels = target[by_class]
    before = torch.arange(len(labels), device=labels.device) - torch.searchsorted(labels, labels)
    chosen = torch.zeros_like(valid)
    chosen[by_class[before < number]] = True
    return own._replace(valid=chosen[rank::world_size])


def gather(own: Features) -> Features:
    """The rows of all ranks without padding, in the order of the set. Collective.

    Rank r of R holds samples r, r + R, ... (`interfaces.EvalLoader`), so dealing the rows out again
    gives one order on any world size.
    """
    if distributed.is_available() and distributed.is_initialized():
        own = Features(*map(interleaved, own))
    return Features(own.features[own.valid], own.target[own.valid], own.valid[own.valid])


def interleaved(rows: Tensor) -> Tensor:
    """The rows of all ranks in the order of the set, padding included. Collective."""
    sent = rows.to(torch.uint8) if rows.dtype == torch.bool else rows.contiguous()
    parts = [torch.empty_like(sent) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, sent)
    return torch.stack(parts, dim=1).flatten(0, 1).to(rows.dtype)
