"""Optimiser and learning-rate schedule, both timm's, and the guard that ZeRO asks for.

timm groups the parameters: no decay for biases, norms and what the model names in
`no_weight_decay()`; with layer decay one learning-rate scale per layer from `group_matcher()`. ZeRO
keeps the groups but hands the optimiser flat 1-D shards of them. An update that looks at one
element at a time cannot tell; one that needs a parameter's norm, mean or matrix shape (LAMB, LARS,
Adafactor, Muon, the cautious variants) computes something else without a word, so it is refused.
"""

from typing import Any

import timm.optim
import torch
from timm.scheduler import CosineLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from routedvit.training.config import ConfigError
from routedvit.training.config_file import nearest

# Optimisers of torch and timm whose update of an element depends on that element's history only.
ELEMENTWISE = (
    "AdaBelief", "Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "AdamWLegacy", "Adan", "Adopt",
    "LaProp", "Lion", "MADGRAD", "NAdam", "NAdamLegacy", "NAdamW", "RAdam", "RAdamLegacy",
    "RMSprop", "RMSpropTF", "SGD", "SGDW",
)  # fmt: skip


def build_optimizer(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    layer_decay: float | None = None,
    zero_stage: int = 0,
) -> torch.optim.Optimizer:
    """timm's optimiser `name` over the parameter groups of `model`; None means its own default.

    Raises:
        ConfigError: unknown name, an option it does not take, or wrong under `zero_stage`.
    """
    known = [str(known) for known in timm.optim.list_optimizers()]
    if name not in known:
        raise ConfigError(f"optim.name = {name!r} is unknown{nearest(name, known)}")
    info = timm.optim.get_optimizer_info(name)
    if info.second_order:
        raise ConfigError(f"optim.name = {name!r} needs second derivatives; use 'adamw'")
    given: dict[str, Any] = {"betas": betas, "eps": eps}
    options = {key: value for key, value in given.items() if value is not None}
    for key, taken in (("betas", info.has_betas), ("eps", info.has_eps)):
        if key in options and not taken:  # timm drops it without a word
            raise ConfigError(f"optim.{key}: optim.name = {name!r} takes none; delete it")
    try:
        optimizer = timm.optim.create_optimizer_v2(
            model, name, lr=lr, weight_decay=weight_decay, layer_decay=layer_decay, **options
        )
    except (TypeError, ImportError, AssertionError) as error:
        raise ConfigError(f"optim.name = {name!r}: {error}") from None
    if zero_stage > 0 and not is_elementwise(optimizer):
        raise ConfigError(
            f"optim.name = {name!r} looks at whole parameters, and ZeRO stage {zero_stage} shows "
            "it flat pieces of them; use an element-wise one such as 'adamw' or 'lion', or "
            "deepspeed.zero_optimization.stage = 0"
        )
    return optimizer


def add_parameters_beside_the_model(
    optimizer: torch.optim.Optimizer, objective: nn.Module, weight_decay: float
) -> None:
    """Groups for what an objective trains besides its network, such as the decoder of MAE.

    They have no layer decay; biases, norms and what `objective.no_weight_decay()` names have no
    weight decay.
    """
    beside = {
        name: parameter
        for name, parameter in objective.named_parameters()
        if not name.startswith("model.")
    }
    if not beside:
        return
    exempt = objective.no_weight_decay()  # type: ignore[operator]
    for decays, decay in ((True, weight_decay), (False, 0.0)):
        chosen = [p for name, p in beside.items() if (p.ndim > 1 and name not in exempt) == decays]
        if chosen:
            optimizer.add_param_group({"params": chosen, "weight_decay": decay})


def is_elementwise(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimiser gives the same update on flat shards as on whole parameters."""
    # Cautious variants rescale by the mean agreement over the parameter.
    return type(optimizer).__name__ in ELEMENTWISE and not optimizer.defaults.get("caution")


def build_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    name: str,
    total_steps: int,
    warmup_steps: int,
    warmup_lr: float,
    min_lr: float,
) -> Scheduler:
    """A timm schedule by step: `step_update(t)` sets the rates for step t (0-based) from t alone.

    'cosine' falls to `min_lr` over the steps after the warm-up, 'constant' stays.

    Raises:
        ConfigError: the warm-up is as long as the run.
    """
    if warmup_steps >= total_steps:
        raise ConfigError(
            f"schedule.warmup_epochs makes {warmup_steps} steps of a run of {total_steps}; "
            "shorten it or train longer"
        )
    warmup: dict[str, Any] = {
        "warmup_t": warmup_steps,
        "warmup_lr_init": warmup_lr,
        "t_in_epochs": False,
    }
    if name == "constant":
        return StepLRScheduler(optimizer, decay_t=total_steps, decay_rate=1.0, **warmup)
    return CosineLRScheduler(
        optimizer, total_steps - warmup_steps, lr_min=min_lr, warmup_prefix=True, **warmup
    )


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The schedule's present value: a group's rate without its layer's scale."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) / float(group.get("lr_scale", 1.0))
