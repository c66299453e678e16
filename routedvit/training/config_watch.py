"""Config sections around the training: evaluation, checkpoints, guards, what is logged."""

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

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
    keep_every: int | None = Field(None, gt=0)
    """Keep every checkpoint whose step is a multiple of this for good."""
    keep_best: int = Field(0, ge=0)
    """How many checkpoints to keep for their best_metric; an evaluation that belongs among them
    saves one at once."""
    best_metric: str | None = Field(None, pattern=r"^\w[^/]*/.+$")
    """Which evaluated value counts as best, as 'evaluator/metric'. Default: what the objective is
    judged by, val/top1 or, of MAE, val/loss; where only averages are evaluated, theirs."""
    best_mode: Literal["max", "min"] | None = None
    """Whether a higher or a lower best_metric is better. Default: min for a loss, else max."""

    @field_validator("keep_every")
    @classmethod
    def _is_saved(cls, value: int | None, info: ValidationInfo) -> int | None:
        every = info.data.get("every_steps")
        if value and every and value % every:
            raise ValueError(
                f"{value} is no multiple of checkpoint.every_steps = {every}, so those steps are "
                f"not saved; use {-(-value // every) * every}"
            )
        return value


class GuardConfig(Section):
    """What happens when training goes wrong.

    A step whose loss or gradient is not finite is skipped on all ranks and its samples are named in
    logs/bad_steps.jsonl. Too many bad steps in a row (PaLM, 2204.02311, section 5.1): the run goes
    back to its last checkpoint before them and on with the data after them.
    """

    max_bad_steps: int = Field(10, gt=0)
    """Bad steps in a row after which the run goes back."""
    max_rollbacks: int = Field(3, ge=0)
    """How often a run may go back; then it ends with an error."""
    spike_sigmas: float | None = Field(None, gt=0)
    """A loss so many standard deviations above the running median makes a step bad too, though it
    is applied; 6 is conservative. null: no watch for spikes."""
    spike_window: int = Field(128, ge=16)
    """Good steps over which median and deviation run."""


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
