"""Config sections around the training: evaluation, checkpoints, guards, what is logged."""

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from routedvit.training.config.base import Section, explained

METRIC = r"^\w[^/]*/.+$"
NO_METRIC = "is no evaluated value; write it as evaluator/metric, such as val/top1"


class Cadence(Section):
    """When something is evaluated, besides after the last step, in epochs or in steps."""

    default_epochs: ClassVar[float] = 0.0

    every_epochs: float | None = Field(None, ge=0)
    """Cadence in epochs; 0, the default: after the last step only."""
    every_steps: int | None = Field(None, ge=0)
    """Cadence in optimiser steps, in place of every_epochs; 0: after the last step only."""

    @model_validator(mode="after")
    def _one_cadence(self) -> Self:
        if self.every_epochs is not None and self.every_steps is not None:
            raise ValueError(
                f"every_epochs = {self.every_epochs:g} and every_steps = {self.every_steps} both "
                "say how often to evaluate; set one of them to null"
            )
        return self

    def in_steps(self, steps: Callable[[float], int]) -> int:
        """Optimiser steps between evaluations, 0 for the last step only.

        Args:
            steps: epochs -> optimiser steps.
        """
        if self.every_steps is not None:
            return self.every_steps
        epochs = self.default_epochs if self.every_epochs is None else self.every_epochs
        return steps(epochs) if epochs else 0


class KnnConfig(Cadence):
    """Weighted nearest neighbours on frozen features (DINO, 2104.14294)."""

    neighbours: int = Field(20, gt=0)
    """How many training images vote."""
    temperature: float = Field(0.07, gt=0)
    """A vote weighs exp(cosine similarity / temperature)."""
    images_per_class: int | None = Field(None, gt=0)
    """Few-shot: learn from the first so many of train_images of each class only; null: all."""


class LinearProbeConfig(Cadence):
    """Logistic regression on frozen, standardised features."""

    l2: float = Field(1e-4, ge=0)
    """Half of this times the squared weights is added to the mean loss."""
    iterations: int = Field(100, gt=0)
    """Most iterations of L-BFGS."""
    images_per_class: int | None = Field(None, gt=0)
    """Few-shot: learn from the first so many of train_images of each class only; null: all."""


class CapacitiesConfig(Cadence):
    """Accuracy of one model at several capacities."""

    shares: list[Annotated[float, Field(gt=0, le=1)]] = Field([0.125, 0.25, 0.5, 1.0], min_length=1)
    """Shares of the patches that go heavy, of every router."""


class ThroughputConfig(Cadence):
    """Speed of inference."""

    forwards: int = Field(20, gt=0)
    """Timed forward passes; the median counts."""


class EvalConfig(Cadence):
    """Evaluation on data.val: top-1, top-5 and accuracy per class, and what else is switched on."""

    default_epochs: ClassVar[float] = 1.0

    every_epochs: float | None = Field(None, ge=0)
    """Cadence in epochs; 0: after the last step only. Default: 1."""
    batch_size: int | None = Field(None, gt=0)
    """Images per rank and forward pass. Default: the micro-batch."""
    weights: Literal["both", "raw", "ema"] = "both"
    """Which weights are evaluated where ema.decay keeps an average; its metrics end in _ema."""
    knn: KnnConfig | None = None
    """Nearest neighbours on frozen features; {} switches it on with the defaults below."""
    linear_probe: LinearProbeConfig | None = None
    """Linear probe on frozen features; {} switches it on with the defaults below."""
    capacities: CapacitiesConfig | None = None
    """Accuracy against capacity; {} switches it on with the defaults below."""
    throughput: ThroughputConfig | None = None
    """Images per second of inference; {} switches it on with the defaults below."""
    train_images: int | None = Field(50_000, gt=0)
    """Training images that knn and linear_probe learn from, evenly spaced over the set; null: all.
    Their features are held in memory, those of knn whole on every rank."""

    @model_validator(mode="after")
    def _all_is_read(self) -> Self:
        if self.knn is None and self.linear_probe is None:
            self.refuse_idle("eval.knn or eval.linear_probe", "train_images")
        return self


class CheckpointConfig(Section):
    """When to save and what to keep."""

    every_steps: int = Field(500, gt=0)
    """Steps between checkpoints; the last step always saves."""
    in_background: bool = True
    """Write them while training goes on, from a copy of each rank's share of the state in the
    memory of the host. Before an evaluation, at the last step and at a wish to stop training waits
    for the disk all the same; false: always."""
    keep: int = Field(2, gt=0)
    """How many of the newest checkpoints to keep."""
    mirror: str | None = None
    """Where a copy of the run folder is kept up to date while training goes on, such as
    s3://bucket/runs; it is the folder there that is called as the run's. A start whose run folder
    has no checkpoint, on a new machine, goes on from the copy."""
    keep_every: int | None = Field(None, gt=0)
    """Keep every checkpoint whose step is a multiple of this for good, or the one that was saved in
    its place where that step was bad."""
    keep_best: int = Field(0, ge=0)
    """How many checkpoints to keep for their best_metric; an evaluation that belongs among them
    saves one at once."""
    best_metric: Annotated[str | None, explained(METRIC, NO_METRIC)] = Field(None, pattern=METRIC)
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
    forgive_after: int = Field(1000, gt=0)
    """Good steps after which earlier returns no longer count."""
    spike_sigmas: float | None = Field(None, gt=0)
    """A loss so many standard deviations above the running median makes a step bad too, though it
    is applied; 6 is conservative. null: no watch for spikes."""
    spike_window: int = Field(128, ge=16)
    """Good steps over which median and deviation run."""
    max_spikes: int | None = Field(None, gt=0)
    """Spikes in a row after which the run goes back; null: as many as max_bad_steps."""

    @model_validator(mode="after")
    def _all_is_read(self) -> Self:
        if self.spike_sigmas is None:
            self.refuse_idle("guard.spike_sigmas, such as 6", "spike_window", "max_spikes")
        return self


class WandbConfig(Section):
    """Weights & Biases; needs `pip install wandb` and `wandb login`."""

    project: str
    """Name of the project."""
    entity: str | None = None
    """User or team. Default: wandb's own."""


class LogConfig(Section):
    """What is written while the run goes on."""

    every_steps: int = Field(10, gt=0)
    """Steps between progress lines and scalars."""
    tensorboard: bool = True
    """Write TensorBoard logs into the run folder."""
    csv: bool = False
    """Write scalars to metrics.csv in the run folder."""
    wandb: WandbConfig | None = None
    """Write to Weights & Biases too."""
    gradients_every_steps: int = Field(200, ge=0)
    """Steps between gradient norms per block and path, and step-time histograms; 0: none."""
    routing_every_steps: int = Field(200, gt=0)
    """Steps between routing statistics and pictures on the probe images. Of 8 images and 12 blocks
    the pictures take some 5 MB each time, 7 GB in 300,000 steps: choose 2,000 for a long run."""
    probe_images: int = Field(8, ge=0)
    """How many fixed validation images show the routing; 0: none."""
    peak_tflops: float | None = Field(None, gt=0)
    """Peak of one device in TFLOP/s, for the FLOP utilisation. Default: dense bf16, where known."""
    profile_steps: tuple[int, int] | None = None
    """First and last step of a profile of rank 0, written into the folder `profile` of the run."""

    @model_validator(mode="after")
    def _a_window(self) -> "LogConfig":
        if self.profile_steps and not 0 < self.profile_steps[0] <= self.profile_steps[1]:
            raise ValueError(
                f"profile_steps = {list(self.profile_steps)}: give [first, last] with 0 < first"
            )
        return self
