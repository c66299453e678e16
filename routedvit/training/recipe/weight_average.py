"""The exponential moving average of the weights (EMA), as one more entry of the optimiser's state.

The average lies beside Adam's moments: a tensor of the same shape, kept by the same optimiser. So
every ZeRO stage shards it, every checkpoint holds it, and what converts an Adam moment to another
world size converts it. It is updated by a hook behind the optimiser's step: on the fp32 master
weights where the network is bf16, group by group where ZeRO steps so, and not at all in a step that
is skipped. It begins as a copy of the weights after the first step, as timm's does.

Cost: one fp32 number per weight, sharded like the moments, and one pass over them per step; no
communication. Buffers are not averaged: they are those of the weights.

Reference: timm.utils.ModelEmaV3, whose decay and warm-up are used.
"""

from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

KEY = "ema"  # in the optimiser's state, beside 'exp_avg'


class WeightAverage:
    """Keeps the average of all that `optimizer` trains; `turn` says which step comes.

    Args:
        optimizer: the torch optimiser, before or after DeepSpeed took it over.
        decay: share of the old average that is kept in a step.
        warmup: begin with a short memory: the decay of step t is 1 - (1 + t / gamma)^-power, at
            most `decay`.
        warmup_gamma, warmup_power: of that formula.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        decay: float,
        warmup: bool = False,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
    ) -> None:
        self._timm = ModelEmaV3(  # for its schedule alone: it averages nothing
            nn.Linear(1, 1),
            decay=decay,
            use_warmup=warmup,
            warmup_gamma=warmup_gamma,
            warmup_power=warmup_power,
        )
        self.decay = 0.0
        optimizer.register_step_post_hook(self._update)
        optimizer.weight_average = self  # type: ignore[attr-defined]

    def turn(self, step: int) -> None:
        """Choose the decay of step `step` (0-based) from its number alone."""
        self.decay = self._timm.get_decay(step + 1)  # timm counts finished updates

    def rest(self) -> None: ...

    def scalars(self) -> dict[str, float]:
        return {"train/ema_decay": self.decay}

    def setting(self) -> str:
        return ""

    @torch.no_grad()
    def _update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """After a step of the groups that the optimiser holds now: ZeRO shows them one by one."""
        weights = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        averages = []
        for weight in weights:
            # Never before the optimiser's own entries: it takes an empty state for a first step.
            state = optimizer.state[weight]
            if KEY not in state:
                state[KEY] = weight.detach().clone()
            averages.append(state[KEY])
        if averages:
            torch._foreach_lerp_(averages, weights, weight=1.0 - self.decay)


def drop_unless_kept(optimizer: torch.optim.Optimizer) -> None:
    """Forget averages that came with another run's checkpoint and that nobody updates here."""
    if not hasattr(optimizer, "weight_average"):
        for state in optimizer.state.values():
            state.pop(KEY, None)


@torch.no_grad()
def exchange(optimizer: torch.optim.Optimizer) -> None:
    """Put the averages in the place of the (master) weights and the other way round.

    Doing it twice changes no bit. Without averages nothing happens.
    """
    for weight, state in optimizer.state.items():
        if KEY in state:
            weights = weight.detach().clone()
            weight.copy_(state[KEY])
            state[KEY].copy_(weights)
