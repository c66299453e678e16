"""Creates the model that the run config names, through timm's registry alone.

Training knows no model class: whatever is registered once `train.py` has imported `routedvit` can
be trained, timm's dense models included.
"""

import difflib
import inspect
import pickle
from pathlib import Path
from typing import Any

import timm
import timm.models
import torch
from safetensors import SafetensorError
from torch import nn

from routedvit.training.config.base import one_line
from routedvit.training.config.recipe import DistillConfig, MaskedConfig, SupervisedConfig
from routedvit.training.config.run import ConfigError, ModelConfig

Objective = SupervisedConfig | MaskedConfig | DistillConfig

# What constructors raise at an argument that they cannot use, and what reading weights raises.
UNFIT = (TypeError, ValueError, AssertionError, KeyError, ZeroDivisionError, RuntimeError)
UNREADABLE = (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError)


def create_model(config: ModelConfig, *, num_classes: int, seed: int) -> nn.Module:
    """Build `config.name` with seeded weights.

    Raises:
        ConfigError: timm knows no such model or weights, or the model refuses an argument.
    """
    check_name(config.name)
    check_num_classes(config, num_classes)
    source = weights_key(config)
    torch.manual_seed(seed)  # the same weights on every rank and after every restart
    try:
        return timm.create_model(config.name, **{"num_classes": num_classes, **config.kwargs})
    except (*UNFIT, *UNREADABLE) as error:
        if source and isinstance(error, UNREADABLE):
            raise ConfigError(
                f"{source}: {config.name} cannot take these weights: {_reason(error)}; leave it "
                "out, or give weights of this very model"
            ) from error
        raise ConfigError(f"model.kwargs: {config.name} refuses them: {_reason(error)}") from error


def check_name(name: str) -> None:
    """Refuse a model that timm does not know, and a tag after the dot that names no weights."""
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
        hint = f"nearest: {', '.join(close)}" if close else "timm.list_models() has the names"
        raise ConfigError(f"model.name: timm knows no model {name!r}; {hint}")
    model, _, tag = name.partition(".")
    try:
        timm.models.get_pretrained_cfg(name, allow_unregistered=not tag)
    except RuntimeError as error:
        tagged = timm.list_pretrained(f"{model}.*")
        hint = f", or give one of: {', '.join(tagged[:5])}" if tagged else ""
        raise ConfigError(
            f"model.name: timm knows no weights {tag!r} of {model}; write {model!r}{hint}"
        ) from error


def check_labels(objective: Objective, num_classes: int) -> None:
    """Refuse labels of one class where they are to be learned: their loss is zero by itself."""
    if num_classes == 1 and objective.reads_labels:
        raise ConfigError(
            "objective.name: the data set has one class, so there is nothing to learn from its "
            "labels; images without labels are for objective.name = 'mae', or 'distill' with "
            "alpha = 1"
        )


def check_num_classes(config: ModelConfig, num_classes: int) -> None:
    """Refuse a model of fewer classes than the data set's `num_classes`."""
    given = config.kwargs.get("num_classes", num_classes)
    if isinstance(given, bool) or not isinstance(given, int):
        raise ConfigError(
            f"model.kwargs.num_classes is {given!r}, which is no whole number; leave it out to "
            "take the data set's"
        )
    if given < num_classes:
        raise ConfigError(
            f"model.kwargs.num_classes is {given}, but the data set has {num_classes} classes; "
            "leave it out to take the data set's"
        )


def weights_key(config: ModelConfig) -> str:
    """The key of `model.kwargs` by which timm reads weights; empty where it reads none."""
    path = config.kwargs.get("checkpoint_path")
    if path and not Path(str(path)).is_file():
        raise ConfigError(
            f"model.kwargs.checkpoint_path = {path!r} does not exist; give a file of weights, or "
            "leave it out"
        )
    if path:
        return f"model.kwargs.checkpoint_path = {path!r}"
    return "model.kwargs.pretrained" if config.kwargs.get("pretrained") else ""


def _reason(error: Exception) -> str:
    """An error in a line; some say only with their type what is wrong."""
    text = one_line(error)
    bare = isinstance(error, (KeyError, ZeroDivisionError)) or not text
    return f"{type(error).__name__} {text}".strip() if bare else text


def set_checkpointing(model: nn.Module, policy: str, every: int = 1) -> None:
    """Recompute activations in backward: 'none', 'heavy' or 'block', in each `every`-th block.

    Raises:
        ConfigError: the model is not a routed one and knows whole blocks only.
    """
    switch: Any = model.set_grad_checkpointing
    if not knows_checkpointing(model, policy, every):
        raise ConfigError(
            f"train.grad_checkpointing = {policy}/{every}: {type(model).__name__} does not route "
            "and can recompute all blocks or none; use true or false"
        )
    if _has_policies(model):
        switch(policy != "none", policy=policy, every=every)
    else:
        switch(policy != "none")


def knows_checkpointing(model: nn.Module, policy: str, every: int = 1) -> bool:
    """Whether `set_checkpointing` can: models that do not route recompute all blocks or none."""
    return _has_policies(model) or (policy in ("none", "block") and every == 1)


def _has_policies(model: nn.Module) -> bool:
    switch: Any = model.set_grad_checkpointing
    return "policy" in inspect.signature(switch).parameters
