"""Config sections around the training: evaluation, checkpoints, what is logged."""

from typing import Literal

from pydantic import Field

from routedvit.training.config_base import Section


class EvalConfig(Section):
    """Evaluation on data.val."""

    every_epochs: float = Field(1.0, gt=0)
    """Cadence; the last step always evaluates."""
    batch_size: int | None = Field(None, gt=0)
    """Images per rank and forward pass. Default: the micro-batch."""
    weights: Literal["both", "raw", "ema"] = "both"
    """Which weights are evaluated where ema.decay keeps an average; its metrics end in _ema."""


class CheckpointConfig(Section):
    """When to save and what to keep."""

    every_steps: int = Field(500, gt=0)
    """Steps between checkpoints; the last step always saves."""
    keep: int = Field(2, gt=0)
    """How many of the newest checkpoints to keep."""


class LogConfig(Section):
    """What is written while the run goes on."""

    every_steps: int = Field(10, gt=0)
    """Steps between progress lines and scalars."""
    tensorboard: bool = True
    """Write TensorBoard logs into the run folder."""
    routing_every_steps: int = Field(200, gt=0)
    """Steps between routing statistics and pictures on the probe images."""
    probe_images: int = Field(8, ge=0)
    """How many fixed validation images show the routing; 0: none."""
