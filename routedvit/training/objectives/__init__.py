"""What is minimised: modules that hold the network and return (loss, metrics).

The loss is computed inside the module that DeepSpeed wraps, because under ZeRO-3 weights exist only
inside that module's forward. An objective is any nn.Module with

    model                                   the network: what is evaluated and exported
    forward(image, target, position)        -> (scalar loss, {name: scalar}), which the engine
                                            averages over the world; equal names on every rank
    best_metric                             which held-out number says how good the network is

`position` int64 [B] counts samples over the whole run: what an objective draws at random from it
does not change with the number of ranks. Every trainable parameter must take part in every step:
ZeRO-3 would apply the last gradient of an idle one again.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from routedvit.training.config.recipe import DistillConfig, MaskedConfig
from routedvit.training.config.run import RunConfig
from routedvit.training.objectives.distillation import DistillationObjective
from routedvit.training.objectives.masked import MaskedObjective
from routedvit.training.objectives.supervised import SupervisedObjective, build_loss, build_mixup
from routedvit.training.objectives.teacher import Teacher, build_teacher

__all__ = [
    "DistillationObjective",
    "MaskedObjective",
    "SupervisedObjective",
    "build_loss",
    "build_mixup",
    "build_objective",
]


def build_objective(
    config: RunConfig,
    model: nn.Module,
    *,
    micro_batch_size: int,
    device: torch.device,
    mean: Sequence[float],
    std: Sequence[float],
    teacher: Callable[..., Teacher] = build_teacher,
) -> nn.Module:
    """What `config.objective` asks for, around `model`.

    Args:
        micro_batch_size: images per rank and forward pass.
        device: where a teacher runs.
        mean, std: what the images are normalised with, per channel.
        teacher: makes the teacher; a dry run has its own.

    Raises:
        ConfigError: the model, its classes or the teacher do not fit the objective.
    """
    own = config.objective
    if isinstance(own, MaskedConfig):
        return MaskedObjective(model, **own.model_dump(exclude={"name"}), seed=config.seed)
    num_classes: int = config.model.kwargs["num_classes"]
    mixup = build_mixup(
        config.loss.mixup,
        config.loss.cutmix,
        prob=config.loss.mix_prob,
        switch_prob=config.loss.mix_switch_prob,
        seed=config.seed,
        label_smoothing=config.loss.label_smoothing,
        num_classes=num_classes,
        batch_size=micro_batch_size,
    )
    loss = build_loss(config.loss.name, config.loss.label_smoothing, mixed=mixup is not None)
    if not isinstance(own, DistillConfig):
        return SupervisedObjective(model, loss, mixup)
    trained = teacher(
        own.teacher,
        num_classes=num_classes,
        mean=mean,
        std=std,
        device=device,
        dtype=config.precision.dtype,
    )
    options = own.model_dump(exclude={"name", "teacher"})
    return DistillationObjective(model, loss, mixup, teacher=trained, **options)
