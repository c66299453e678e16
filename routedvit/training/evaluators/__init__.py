"""What is measured on the model while it trains and afterwards; each evaluator is a small class.

The interface is `routedvit.training.interfaces.Evaluator`: `run(model)` yields (name, finding), see
`findings.py`. Each has its own cadence. `build_evaluators` chooses those that the config switches
on and that fit the model.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from routedvit.training.config.base import ConfigError
from routedvit.training.config.watch import EvalConfig
from routedvit.training.evaluators.capacity_sweep import CapacitySweep
from routedvit.training.evaluators.classification import Classification
from routedvit.training.evaluators.findings import record
from routedvit.training.evaluators.knn import NearestNeighbours
from routedvit.training.evaluators.linear_probe import LinearProbe
from routedvit.training.evaluators.throughput import Throughput
from routedvit.training.interfaces import EvalLoader, EvalLoaders, Evaluator

__all__ = ["Classification", "build_evaluators", "record"]


def build_evaluators(
    config: EvalConfig,
    model: nn.Module,
    loaders: EvalLoaders,
    *,
    steps: Callable[[float], int],
    classifies: bool = True,
) -> list[Evaluator]:
    """The evaluators that `config` asks for, on the held-out set.

    Args:
        model: tells by its methods what can be measured on it.
        steps: epochs -> optimiser steps.
        classifies: whether training aims at the classes, so that top-1 means something (an
            autoencoder has only its features).

    Raises:
        ConfigError: an evaluator is switched on that this run cannot have.
    """
    loader, train = loaders
    evaluators: list[Evaluator] = []
    if classifies:
        evaluators.append(Classification(loader, every_steps=config.in_steps(steps)))
    if config.knn is not None:
        knn, bank = config.knn, _needed(train, "eval.knn")
        evaluators.append(
            NearestNeighbours(
                bank, loader, every_steps=knn.in_steps(steps),
                neighbours=knn.neighbours, temperature=knn.temperature,
                images_per_class=knn.images_per_class,
            )
        )  # fmt: skip
    if config.linear_probe is not None:
        probe, bank = config.linear_probe, _needed(train, "eval.linear_probe")
        evaluators.append(
            LinearProbe(
                bank, loader, every_steps=probe.in_steps(steps),
                l2=probe.l2, iterations=probe.iterations,
                images_per_class=probe.images_per_class,
            )
        )  # fmt: skip
    if config.capacities is not None:
        if not classifies or not hasattr(model, "set_capacity"):
            raise ConfigError("eval.capacities needs a routed model that classifies; delete it")
        sweep = config.capacities
        evaluators.append(CapacitySweep(loader, sweep.shares, every_steps=sweep.in_steps(steps)))
    if config.throughput is not None:
        speed = config.throughput
        evaluators.append(
            Throughput(loader, every_steps=speed.in_steps(steps), forwards=speed.forwards)
        )
    return evaluators


def _needed(train: EvalLoader | None, field: str) -> EvalLoader:
    if train is None:
        raise ConfigError(f"{field} needs training images to learn from; delete it")
    return train
