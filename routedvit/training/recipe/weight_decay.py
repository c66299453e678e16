"""Weight decay by step: a cosine from where it begins to where it ends (DINO, 2104.14294).

Self-supervised recipes begin with little decay and end with ten times as much. Groups that are
exempt (norms, biases, positions, routers) stay exempt.
"""

import math

import torch


class WeightDecayDial:
    """Sets the weight decay of each group of `optimizer` that decays.

    Built before a checkpoint is loaded: afterwards the groups hold the decay of some step.

    Args:
        optimizer: the torch optimiser, before or after DeepSpeed took it over.
        end: weight decay one step past the last.
        total_steps: of the run.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, end: float, total_steps: int) -> None:
        self.optimizer, self.end, self.total_steps = optimizer, end, total_steps
        self.starts = [float(group["weight_decay"]) for group in optimizer.param_groups]

    def turn(self, step: int) -> None:
        """Set it for step `step` (0-based); it stays so until the next, as the learning rate."""
        left = 0.5 + 0.5 * math.cos(math.pi * step / self.total_steps)
        # a load replaces the groups, so they are asked for anew
        for start, group in zip(self.starts, self.optimizer.param_groups, strict=True):
            if start:
                group["weight_decay"] = self.end + (start - self.end) * left

    def rest(self) -> None: ...

    def scalars(self) -> dict[str, float]:
        """None: every logged step has the optimiser's `train/weight_decay` already."""
        return {}

    def setting(self) -> str:
        return ""
