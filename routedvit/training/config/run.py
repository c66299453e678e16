"""The run config: one pydantic model per section of the JSON that describes a run.

Each section belongs to the code that reads it: `RunConfig` holds the sections of this package, and
the composition root (`train.py`) adds the data section, so training and data never import each
other. Unknown keys are errors (`extra='forbid'`): a typo must not train for a week with a default.
`recipe.py` and `watch.py` hold the larger sections; `file.py` reads files and `--set`,
`mistakes.py` words errors.
"""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from routedvit.training.config.base import ConfigError, Section, explained
from routedvit.training.config.recipe import (
    CapacityConfig,
    DistillConfig,
    EmaConfig,
    LossConfig,
    MaskedConfig,
    OptimConfig,
    ResolutionConfig,
    ScheduleConfig,
    SupervisedConfig,
)
from routedvit.training.config.watch import CheckpointConfig, EvalConfig, GuardConfig, LogConfig

__all__ = ["ConfigError", "RunConfig", "Section"]

NAME = r"^\w[\w.-]*$"
NO_NAME = (
    "cannot name a run and its folder; write letters, digits and '_', and behind the first of them "
    "also '.' and '-'"
)
RECOMPUTED = r"^(heavy|block)(/[1-9]\d*)?$"


class AboutConfig(Section):
    """What a recipe costs and what it should reach: for people, never read by the code."""

    description: str = ""
    """What this run is, in a sentence."""
    hardware: str = ""
    """Hardware the estimate is made for."""
    hours: str = ""
    """Expected wall-clock time on that hardware."""
    expected_top1: str = ""
    """Expected validation top-1; says so if it is an estimate."""
    source: str = ""
    """Paper or repository the recipe comes from."""


class ModelConfig(Section):
    """The model, as timm creates it."""

    name: str
    """Name for timm.create_model, such as 'colt5_vit_b'."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for timm.create_model. num_classes defaults to the data set's."""
    warm_start: str | None = None
    """Weights to begin from: a file or folder, or a name timm has weights for, of a routed model or
    of the dense ViT of the same size. Read once, when the run begins; a resume does not need it."""

    def created_from(self) -> dict[str, Any]:
        """`name` and `kwargs`: what the model is made with, whatever its weights."""
        return self.model_dump(exclude={"warm_start"})


class TrainConfig(Section):
    """Length of the run and arithmetic of its batches."""

    batch_size: int = Field(gt=0)
    """Global batch: images per optimiser step, all ranks together."""
    micro_batch_size: int | None = Field(None, gt=0)
    """Images per rank and forward pass; the rest is gradient accumulation.
    Default: batch_size / number of ranks."""
    epochs: float | None = Field(None, gt=0)
    """Length of the run in epochs (or give steps)."""
    steps: int | None = Field(None, gt=0)
    """Length of the run in optimiser steps (or give epochs)."""
    grad_clip: float | None = Field(1.0, gt=0)
    """Largest global gradient norm; null turns clipping off."""
    grad_checkpointing: bool | Annotated[str, Field(pattern=RECOMPUTED)] = False
    """What backward recomputes to save memory: 'heavy' (the heavy branches), 'block' or true (whole
    blocks, about 30 % more compute), 'block/2' (every second block). Routing is never recomputed;
    --dry-run shows what each costs."""
    compile: bool = False
    """torch.compile of every block: faster after a minute or two; needs a C++ compiler on the CPU,
    Triton on a GPU."""

    @field_validator("grad_checkpointing", mode="before")
    @classmethod
    def _known_policy(cls, value: Any) -> Any:
        # Of a union pydantic would say what is wrong with the first member alone.
        if isinstance(value, bool) or (isinstance(value, str) and re.fullmatch(RECOMPUTED, value)):
            return value
        raise ValueError(
            f"{json.dumps(value)} is no policy; write true, false, heavy, block, or block/2 (or "
            "heavy/2) for every second block"
        )

    @property
    def checkpointing(self) -> tuple[str, int]:
        """`grad_checkpointing` as (policy, every): 'none', 'heavy' or 'block', each n-th block."""
        if isinstance(self.grad_checkpointing, bool):
            return ("block" if self.grad_checkpointing else "none"), 1
        policy, _, every = self.grad_checkpointing.partition("/")
        return policy, int(every or 1)

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if (self.epochs is None) == (self.steps is None):
            both = "" if self.epochs is None else ", null for the other (--set train.epochs=null)"
            raise ValueError(f"give exactly one of train.epochs and train.steps{both}")
        return self


class PrecisionConfig(Section):
    """Number formats of compute; router logits and gates are fp32 always."""

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Compute type; bf16 and fp16 keep fp32 master weights and add gradients up in fp32, of bf16
    over ranks too (deepspeed.communication_data_type, half the bytes with "bf16")."""
    autocast: bool = False
    """Keep fp32 weights and compute matrix products in bf16 under torch.autocast, in place of bf16
    weights with a fp32 copy: no rounding of the initial weights, norms in fp32, works with ZeRO 0;
    more memory, twice the communication."""
    tf32: bool = True
    """Allow TF32 matrix products on GPUs in fp32 runs."""
    deterministic: bool = False
    """On GPUs give the same bits in every run, and so after a resume: attention, convolutions and
    others then sum in a fixed order, more slowly; what has none is an error (the gradients of
    resized images or position embeddings). A CPU gives the same bits in any case."""

    @model_validator(mode="after")
    def _autocast_to_bf16(self) -> "PrecisionConfig":
        if self.autocast and self.dtype != "bf16":
            raise ValueError(
                f"precision.autocast = true needs precision.dtype = bf16, not {self.dtype} (for "
                "fp16 DeepSpeed would clip gradients that are still scaled); set it, or delete "
                "autocast"
            )
        return self


class RunConfig(Section):
    """The sections this package owns; `train.py` adds `data`."""

    name: Annotated[str, explained(NAME, NO_NAME)] = Field(pattern=NAME)
    """Name of the run and of its folder: letters, digits, '_', and behind the first '.' and '-'."""
    about: AboutConfig = Field(default_factory=AboutConfig)
    output_dir: str | None = None
    """Run folder. Default: runs/NAME."""
    seed: int = Field(0, ge=0, lt=1 << 64)  # torch takes no more
    """Seed of weights, sample order and augmentation."""
    model: ModelConfig
    train: TrainConfig
    objective: SupervisedConfig | MaskedConfig | DistillConfig = Field(
        default_factory=SupervisedConfig, discriminator="name"
    )
    loss: LossConfig = Field(default_factory=LossConfig)
    optim: OptimConfig
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    ema: EmaConfig = Field(default_factory=EmaConfig)
    capacity: CapacityConfig = Field(default_factory=CapacityConfig)
    resolution: ResolutionConfig = Field(default_factory=ResolutionConfig)
    precision: PrecisionConfig = Field(default_factory=PrecisionConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    guard: GuardConfig = Field(default_factory=GuardConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Native DeepSpeed keys, verbatim. What the sections above own (batch sizes, clipping,
    precision, optimiser, scheduler) is filled in; a contradiction is an error."""

    @model_validator(mode="after")
    def _images_are_mixed_for_labels(self) -> "RunConfig":
        mixes = [key for key in ("mixup", "cutmix") if getattr(self.loss, key)]
        if mixes and not self.objective.classifies:
            raise ValueError(
                f"loss.{mixes[0]}: objective.name = '{self.objective.name}' reads no labels, and "
                f"nothing of the section loss; set loss.{mixes[0]} to 0"
            )
        return self

    @property
    def folder(self) -> str:
        """Run folder: checkpoints, logs, exported weights."""
        return self.output_dir or f"runs/{self.name}"

    def total_steps(self, samples_per_epoch: int) -> int:
        """Optimiser steps of the whole run, given the size of the training set."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.epochs is not None
        return self.epochs_to_steps(self.train.epochs, samples_per_epoch)

    def epochs_to_steps(self, epochs: float, samples_per_epoch: int) -> int:
        """Optimiser steps in `epochs` passes over `samples_per_epoch` images, at least one."""
        return max(1, round(epochs * samples_per_epoch / self.train.batch_size))
