"""What is measured on the model while it trains; each evaluator is a small class with its cadence.

The interface is `routedvit.training.interfaces.Evaluator`: `run(model)` yields (metric, value).
"""

from __future__ import annotations

from routedvit.training.evaluators.classification import Classification
from routedvit.training.interfaces import EvalLoader, Evaluator

__all__ = ["Classification", "build_evaluators"]


def build_evaluators(loader: EvalLoader, *, every_steps: int) -> list[Evaluator]:
    """The evaluators of a supervised run on `loader`'s held-out set.

    `every_steps` is the cadence in optimiser steps: `RunConfig.epochs_to_steps` of
    `eval.every_epochs`.
    """
    return [Classification(loader, every_steps=every_steps)]
