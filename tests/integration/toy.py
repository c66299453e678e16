"""The toy run that launched scripts and the plain PyTorch reference share: model, data, recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import timm
import torch
from torch import nn

import routedvit  # noqa: F401  (registers the models)
from routedvit.training.objectives import SupervisedObjective, build_loss
from routedvit.training.recipe.optim import build_optimizer, build_schedule
from routedvit.training.recipe.schedules import Dial, Schedules

MODEL = "colt5_vit_test"
KWARGS: dict[str, Any] = {"num_classes": 5, "img_size": 64, "depth": 2}
BATCH, MICRO, STEPS = 8, 2, 4
GRAD_CLIP = 1.0
CLASSES, SAMPLES = 5, 64


def model(seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(MODEL, **{**KWARGS, **kwargs})


def objective(seed: int = 0, **kwargs: Any) -> SupervisedObjective:
    return SupervisedObjective(model(seed, **kwargs), build_loss("softmax", 0.1))


def optimizer(network: nn.Module, zero_stage: int = 0) -> torch.optim.Optimizer:
    """AdamW with groups that differ in decay and in learning rate."""
    return build_optimizer(
        network, name="adamw", lr=2e-3, weight_decay=1.0, layer_decay=0.5, zero_stage=zero_stage
    )


def schedule(optimizer: torch.optim.Optimizer, total_steps: int = STEPS, *dials: Dial) -> Schedules:
    rate = build_schedule(
        optimizer, name="cosine", total_steps=total_steps, warmup_steps=1, warmup_lr=1e-3, min_lr=0
    )
    return Schedules(rate, dials)


def sample(position: int) -> tuple[torch.Tensor, int]:
    """Image and label at a global position: each class lights another patch."""
    position %= SAMPLES
    label = position % CLASSES
    image = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(position))
    image[:, :16, 16 * (label % 4) : 16 * (label % 4) + 16] += 2.0 + label
    return image, label


def batch(positions: range) -> dict[str, Any]:
    images, labels = zip(*map(sample, positions), strict=True)
    return {
        "image": torch.stack(images),
        "target": torch.tensor(labels),
        "position": torch.tensor(list(positions)),
        "key": [f"key{position}" for position in positions],
        "epoch": torch.tensor([position // SAMPLES for position in positions]),
    }


class Loader:
    """A TrainLoader over `sample`: each global batch is dealt to ranks in contiguous shares."""

    samples_per_epoch = SAMPLES
    num_classes = CLASSES

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def batches(self, start: int) -> Iterator[dict[str, Any]]:
        share = BATCH // self.world_size
        while True:
            first = start + self.rank * share
            for micro in range(first, first + share, MICRO):
                yield batch(range(micro, micro + MICRO))
            start += BATCH


class Validation:
    """An EvalLoader over the toy samples, each once over the world, in two batches per rank."""

    num_samples = SAMPLES

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        share = SAMPLES // self.world_size
        for half in range(2):
            first = self.rank * share + half * share // 2
            rows = batch(range(first, first + share // 2))
            yield rows | {"valid": torch.ones(len(rows["target"]), dtype=torch.bool)}

    def probe(self, n: int) -> torch.Tensor:
        return batch(range(n))["image"]


def plain_run(steps: int = STEPS) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """(losses, gradient norms, weights) of an ordinary loop in one process."""
    network = model()
    loss_function = build_loss("softmax", 0.1)
    adamw = optimizer(network)
    rates = schedule(adamw)
    losses, norms = [], []
    for step in range(steps):
        rates.rate.step_update(step)
        rows = batch(range(step * BATCH, (step + 1) * BATCH))
        loss = loss_function(network(rows["image"]), rows["target"])
        adamw.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(network.parameters(), GRAD_CLIP)))
        adamw.step()
        losses.append(float(loss.detach()))
    return losses, norms, {name: p.detach() for name, p in network.named_parameters()}
