"""Config sections that decide what is learned: loss, optimiser, schedule."""

from typing import Literal

from pydantic import Field

from routedvit.training.config_base import Section


class LossConfig(Section):
    """The supervised loss."""

    name: Literal["softmax", "bce"] = "softmax"
    """Softmax or binary cross-entropy."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Probability mass moved from the label to all classes."""
    mixup: float = Field(0.0, ge=0)
    """Mixup's alpha (1710.09412); 0 turns it off. Pairs are neighbours in the sample order."""
    cutmix: float = Field(0.0, ge=0)
    """CutMix's alpha (1905.04899); 0 turns it off. With mixup too, each pair draws one."""
    mix_prob: float = Field(1.0, ge=0, le=1)
    """Share of the pairs of images that mixup or CutMix mixes."""
    mix_switch_prob: float = Field(0.5, ge=0, le=1)
    """Share of CutMix among mixed pairs, where mixup is on too."""


class OptimConfig(Section):
    """The optimiser, by timm's names and defaults."""

    name: str = "adamw"
    """One of timm.optim.list_optimizers()."""
    lr: float = Field(gt=0)
    """Peak learning rate for the global batch; it is not rescaled."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay; norms, biases, positions and routers are exempt."""
    betas: tuple[float, float] | None = None
    """Default: the optimiser's own."""
    eps: float | None = Field(None, gt=0)
    """Default: the optimiser's own."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """Factor on the learning rate per block, counted from the head down."""


class ScheduleConfig(Section):
    """Learning rate by optimiser step."""

    name: Literal["cosine", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup_epochs: float = Field(0.0, ge=0)
    """Length of the linear warm-up."""
    warmup_lr: float = Field(1e-6, ge=0)
    """Learning rate at the first step of the warm-up."""
    min_lr: float = Field(1e-5, ge=0)
    """Learning rate at the end of the run."""
