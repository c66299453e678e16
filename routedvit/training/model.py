"""Creates the model that the run config names, through timm's registry alone.

Training knows no model class: whatever is registered once `train.py` has imported `routedvit` can
be trained, timm's dense models included.
"""

import difflib
import inspect
from typing import Any

import timm
import torch
from torch import nn

from routedvit.training.config.run import ConfigError, ModelConfig


def create_model(config: ModelConfig, *, num_classes: int, seed: int) -> nn.Module:
    """Build `config.name` with seeded weights.

    Raises:
        ConfigError: timm knows no such model, or the model refuses an argument.
    """
    if not timm.is_model(config.name):
        close = difflib.get_close_matches(config.name, timm.list_models(), n=3, cutoff=0.4)
        hint = f"nearest: {', '.join(close)}" if close else "timm.list_models() has the names"
        raise ConfigError(f"model.name: timm knows no model {config.name!r}; {hint}")
    kwargs = {"num_classes": num_classes, **config.kwargs}
    if kwargs["num_classes"] < num_classes:
        raise ConfigError(
            f"model.kwargs.num_classes is {kwargs['num_classes']}, but the data set has "
            f"{num_classes} classes; leave it out to take the data set's"
        )
    torch.manual_seed(seed)  # the same weights on every rank and after every restart
    try:
        return timm.create_model(config.name, **kwargs)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.kwargs: {config.name} refuses them: {error}") from error


def set_checkpointing(model: nn.Module, policy: str, every: int = 1) -> None:
    """Recompute activations in backward: 'none', 'heavy' or 'block', in each `every`-th block.

    Raises:
        ConfigError: the model is not a routed one and knows whole blocks only.
    """
    switch: Any = model.set_grad_checkpointing
    if "policy" in inspect.signature(switch).parameters:
        switch(policy != "none", policy=policy, every=every)
    elif policy in ("none", "block") and every == 1:
        switch(policy != "none")
    else:
        raise ConfigError(
            f"train.grad_checkpointing = {policy}/{every}: {type(model).__name__} does not route "
            "and can recompute all blocks or none; use true or false"
        )
