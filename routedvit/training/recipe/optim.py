"""Optimiser and learning-rate schedule, both timm's, and the guard that ZeRO asks for.

timm groups the parameters: no decay for biases, norms and what the model names in
`no_weight_decay()`; with layer decay one learning-rate scale per layer from `group_matcher()`. ZeRO
keeps the groups but hands the optimiser flat 1-D shards of them. An update that looks at one
element at a time cannot tell; one that needs a parameter's norm, mean or matrix shape (LAMB, LARS,
Adafactor, the cautious variants) computes something else without a word, so it is refused.

Muon orthogonalises whole matrices, so it is for ZeRO stage 0 alone: on flat shards timm's would
fall back to AdamW everywhere. (DeepSpeed has a Muon of its own that works sharded. It gives every
tensor of two or more dimensions to Muon, patch embedding, positions and the classifier included,
and knows no layer decay.) Here Muon takes the matrices inside the blocks; the router vectors, the
patch embedding, the head, positions, tokens, norms and biases stay with its AdamW. Its step is
scaled to the size of AdamW's (2502.16982), so that one learning rate serves both.
"""

from typing import Any

import timm.optim
import torch
from timm.scheduler import CosineLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.wsd_lr import WSDLRScheduler
from torch import nn

from routedvit.training.config.mistakes import nearest
from routedvit.training.config.run import ConfigError

# Optimisers of torch and timm whose update of an element depends on that element's history only.
# A test compares the list with what all of timm's do to flat pieces that are stepped as ZeRO does.
ELEMENTWISE = (
    "AdaBelief", "Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "AdamWLegacy", "Adan", "Adopt",
    "LaProp", "Lion", "MADGRAD", "NAdam", "NAdamLegacy", "NAdamW", "RAdam", "RAdamLegacy",
    "RMSprop", "RMSpropTF", "SGD", "SGDW",
)  # fmt: skip

# Right on flat pieces, but not from this ZeRO stage on, and why.
REFUSED_FROM = {
    "Adagrad": (1, "DeepSpeed replaces it by one without parameter groups"),
    "Adan": (3, "it counts its steps per group, and stage 3 steps once for each group"),
}

# torch's own that have a fused kernel: one pass over a flat shard. The default makes temporaries as
# large as the shard: 0.3 s a step instead of 0.03 s for colt5_vit_s on two cores.
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)

# Parameters that Muon leaves to its AdamW beside those in `no_weight_decay()` and all vectors.
NOT_FOR_MUON = (
    "*patch_embed*", "*router*", "*pos_embed*", "*_token", "*null_kv", "head.*", "*.head.*",
)  # fmt: skip


def build_optimizer(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    weight_decay: float,
    betas: tuple[float, ...] | None = None,
    eps: float | None = None,
    layer_decay: float | None = None,
    options: dict[str, Any] | None = None,
    zero_stage: int = 0,
) -> torch.optim.Optimizer:
    """timm's optimiser `name` over the parameter groups of `model`; None means its own default.

    `options` are further arguments of that optimiser.

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
    arguments = {key: value for key, value in given.items() if value is not None}
    for key, taken in (("betas", info.has_betas), ("eps", info.has_eps)):
        if key in arguments and not taken:  # timm drops it without a word
            raise ConfigError(f"optim.{key}: optim.name = {name!r} takes none; delete it")
    if betas is not None and len(betas) != info.num_betas:
        raise ConfigError(f"optim.betas: optim.name = {name!r} takes {info.num_betas}")
    if info.opt_class is timm.optim.Muon:
        arguments |= {"fallback_list": NOT_FOR_MUON, "fallback_no_weight_decay": True}
    if info.opt_class in FUSED and not (options or {}).keys() & {"foreach", "differentiable"}:
        arguments["fused"] = True
    arguments |= {"weight_decay": weight_decay, "layer_decay": layer_decay}
    try:
        optimizer = timm.optim.create_optimizer_v2(
            model, name, lr=lr, **(arguments | (options or {}))
        )
    except (TypeError, ValueError, ImportError, AssertionError) as error:
        raise ConfigError(f"optim.name = {name!r}: {error}") from None
    check_stage(optimizer, name, zero_stage)
    return optimizer


def check_stage(optimizer: torch.optim.Optimizer, name: str, zero_stage: int) -> None:
    """Refuse what would compute something else than on whole parameters.

    Raises:
        ConfigError: says why.
    """
    mend = "use another one such as 'adamw' or 'lion', or deepspeed.zero_optimization.stage = 0"
    if zero_stage > 0 and not is_elementwise(optimizer):
        raise ConfigError(
            f"optim.name = {name!r} looks at whole parameters, and ZeRO stage {zero_stage} shows "
            f"it flat pieces of them; {mend}"
        )
    stage, why = REFUSED_FROM.get(type(optimizer).__name__, (4, ""))
    if zero_stage >= stage:
        raise ConfigError(f"optim.name = {name!r} is wrong under ZeRO stage {stage}: {why}; {mend}")


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
    decay: float = 0.2,
    decay_shape: str | None = None,
    timescale_steps: float | None = None,
) -> Scheduler:
    """A timm schedule by step: `step_update(t)` sets the rates for step t (0-based) from t alone.

    After the warm-up, over the S steps left: 'cosine' and 'linear' fall to `min_lr`; 'wsd' stays
    and falls in the last `decay` * S steps; 'rsqrt' is lr / sqrt(1 + s / timescale_steps) at step s
    after the warm-up, times such a fall; 'constant' stays. `min_lr` is reached one step past the
    last.

    Raises:
        ConfigError: the warm-up is as long as the run, or a length that the shape needs is 0.
    """
    if warmup_steps >= total_steps:
        raise ConfigError(
            f"schedule.warmup_epochs makes {warmup_steps} steps of a run of {total_steps}; "
            "shorten it or train longer"
        )
    steps = total_steps - warmup_steps
    warmup: dict[str, Any] = {
        "warmup_t": warmup_steps,
        "warmup_lr_init": warmup_lr,
        "t_in_epochs": False,
    }
    if name == "constant":
        return StepLRScheduler(optimizer, decay_t=total_steps, decay_rate=1.0, **warmup)
    warmup["lr_min"] = min_lr
    if name == "linear":
        return PolyLRScheduler(optimizer, steps, power=1.0, warmup_prefix=True, **warmup)
    if name == "cosine":
        return CosineLRScheduler(optimizer, steps, warmup_prefix=True, **warmup)
    timescale_steps = timescale_steps or warmup_steps
    if name == "rsqrt" and not timescale_steps:
        raise ConfigError("schedule.timescale_epochs is missing: rsqrt without a warm-up needs it")
    return WSDLRScheduler(
        optimizer,
        steps,
        max(1, round(decay * steps)),
        stable_fn="rsqrt" if name == "rsqrt" else "constant",
        stable_timescale=timescale_steps,
        decay_fn=decay_shape or ("linear" if name == "rsqrt" else "1-sqrt"),
        **warmup,
    )


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The schedule's present value: a group's rate without its layer's scale."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) / float(group.get("lr_scale", 1.0))
