"""Config sections that decide what is learned: loss, optimiser, and what changes by step."""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from routedvit.training.config.base import Section


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

    @model_validator(mode="after")
    def _all_is_read(self) -> "LossConfig":
        if not (self.mixup or self.cutmix):
            self.refuse_idle("loss.mixup or loss.cutmix above 0", "mix_prob")
        if not (self.mixup and self.cutmix):
            self.refuse_idle("both loss.mixup and loss.cutmix above 0", "mix_switch_prob")
        return self


class SupervisedConfig(Section):
    """Learn the labels, by the loss of the section `loss`."""

    classifies: ClassVar[bool] = True  # whether the model has a classifier and top-1 a meaning
    reads_labels: ClassVar[bool] = True

    name: Literal["supervised"] = "supervised"
    """Learn the labels, by the loss of the section `loss`."""


class MaskedConfig(Section):
    """Masked autoencoding (MAE, 2111.06377): tell the pixels of hidden patches. Needs no labels."""

    classifies: ClassVar[bool] = False
    reads_labels: ClassVar[bool] = False

    name: Literal["mae"]
    """Hide most patches and learn to tell their pixels (MAE, 2111.06377); needs no labels and reads
    nothing of the section `loss`."""
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Share of the patches that is hidden; the encoder computes the others only."""
    decoder_dim: int = Field(512, gt=0, multiple_of=4)
    """Width of the decoder, which is not exported."""
    decoder_depth: int = Field(8, gt=0)
    """Blocks of the decoder."""
    decoder_heads: int = Field(16, gt=0)
    """Attention heads of the decoder; must divide decoder_dim."""
    norm_pixels: bool = True
    """Predict pixels normalised by the mean and deviation of their own patch."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "MaskedConfig":
        if self.decoder_dim % self.decoder_heads:
            raise ValueError(
                f"decoder_heads = {self.decoder_heads} must divide decoder_dim = {self.decoder_dim}"
            )
        return self


class TeacherConfig(Section):
    """A trained timm model to learn from."""

    name: str
    """Name for timm.create_model, such as 'regnety_160.deit_in1k' or 'local-dir:runs/x/weights'."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for timm.create_model."""
    checkpoint: str | None = None
    """File with its weights (or set pretrained)."""
    pretrained: bool = False
    """Use timm's own weights, downloaded once, or those of a 'local-dir:' name."""


class DistillConfig(Section):
    """Learn from a trained teacher besides the labels."""

    classifies: ClassVar[bool] = True

    name: Literal["distill"]
    """Learn from a trained teacher besides the labels, whose loss is that of the section `loss`."""
    teacher: TeacherConfig
    kind: Literal["soft", "hard"] = "soft"
    """'soft': the teacher's probabilities (1503.02531); 'hard': its first choice (2012.12877)."""
    alpha: float = Field(0.5, ge=0, le=1)
    """Weight of the teacher; the labels have the rest."""
    temperature: float = Field(1.0, gt=0)
    """What both logits are divided by before their soft probabilities are compared."""

    @property
    def reads_labels(self) -> bool:
        """Whether the labels have any weight."""
        return self.alpha < 1

    @model_validator(mode="after")
    def _all_is_read(self) -> "DistillConfig":
        if self.kind == "hard":
            self.refuse_idle('kind = "soft"', "temperature")
        return self


class OptimConfig(Section):
    """The optimiser, by timm's names and defaults."""

    name: str = "adamw"
    """One of timm.optim.list_optimizers(). Under ZeRO those that work element by element."""
    lr: float = Field(gt=0)
    """Peak learning rate for the global batch, or for lr_batch_size where that is given."""
    lr_batch_size: int | None = Field(None, gt=0)
    """Global batch that lr is meant for; for another one it is scaled. null: lr as it is."""
    lr_scaling: Literal["linear", "sqrt"] | None = None
    """How lr follows the batch: linear (1706.02677), the default, or its root (2205.10287)."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay; norms, biases, positions and routers are exempt."""
    weight_decay_end: float | None = Field(None, ge=0)
    """Weight decay at the end of the run, by a cosine (DINO, 2104.14294); null: constant."""
    betas: tuple[float, ...] | None = None
    """Default: the optimiser's own; as many as it takes."""
    eps: float | None = Field(None, gt=0)
    """Default: the optimiser's own."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """Factor on the learning rate per block, counted from the head down."""
    options: dict[str, Any] = Field(default_factory=dict)
    """More arguments of the optimiser, by timm's names, such as {"momentum": 0.95}."""

    @model_validator(mode="after")
    def _decay_to_change(self) -> "OptimConfig":
        if self.weight_decay_end is not None and not self.weight_decay:
            raise ValueError(
                "weight_decay_end needs a weight_decay above 0 to begin with: without one no "
                "parameter is known to decay; set it to a small number, or delete weight_decay_end"
            )
        return self

    @model_validator(mode="after")
    def _all_is_read(self) -> "OptimConfig":
        if self.lr_batch_size is None:
            self.refuse_idle("optim.lr_batch_size, the batch that lr is meant for", "lr_scaling")
        return self

    def arguments(self, batch_size: int) -> dict[str, Any]:
        """Those of `build_optimizer` for a global batch of `batch_size` images."""
        ratio = batch_size / (self.lr_batch_size or batch_size)
        arguments = self.model_dump(exclude={"lr_batch_size", "lr_scaling", "weight_decay_end"})
        return arguments | {"lr": self.lr * ratio ** (0.5 if self.lr_scaling == "sqrt" else 1.0)}


class ScheduleConfig(Section):
    """Learning rate by optimiser step."""

    name: Literal["cosine", "linear", "wsd", "rsqrt", "constant"] = "cosine"
    """Shape after the warm-up. wsd: constant, then a decay (2405.18392); rsqrt: falls with the
    inverse square root of the step, then a decay (2106.04560)."""
    warmup_epochs: float = Field(0.0, ge=0)
    """Length of the linear warm-up."""
    warmup_lr: float = Field(1e-6, ge=0)
    """Learning rate at the first step of the warm-up."""
    min_lr: float = Field(1e-5, ge=0)
    """Learning rate at the end of the run; unused by constant."""
    decay: float = Field(0.2, gt=0, le=1)
    """wsd, rsqrt: share of the steps after the warm-up in which the rate falls to min_lr."""
    decay_shape: Literal["1-sqrt", "linear", "cosine"] | None = None
    """wsd, rsqrt: how it falls. Default: 1-sqrt for wsd, linear for rsqrt."""
    timescale_epochs: float | None = Field(None, gt=0)
    """rsqrt: when the rate has fallen to 1/sqrt(2), counted from the end of the warm-up.
    Default: the length of the warm-up."""

    @model_validator(mode="after")
    def _all_is_read(self) -> "ScheduleConfig":
        if self.name not in ("wsd", "rsqrt"):
            self.refuse_idle('schedule.name = "wsd" or "rsqrt"', "decay", "decay_shape")
        if self.name != "rsqrt":
            self.refuse_idle('schedule.name = "rsqrt"', "timescale_epochs")
        if not self.warmup_epochs:
            self.refuse_idle("schedule.warmup_epochs above 0", "warmup_lr")
        return self


class EmaConfig(Section):
    """Exponential moving average of the weights; it is evaluated and exported beside them."""

    decay: float | None = Field(None, gt=0, lt=1)
    """Share of the old average kept per step, such as 0.9999; null: no average."""
    warmup: bool = False
    """Begin with a short memory: the decay of step t is 1 - (1 + t / gamma)^-power, at most
    `decay`."""
    warmup_gamma: float = Field(1.0, gt=0)
    """gamma of the warm-up."""
    warmup_power: float = Field(2 / 3, gt=0)
    """power of the warm-up: 2/3 reaches 0.999 after 31,600 steps, 3/4 after 10,000."""

    @model_validator(mode="after")
    def _all_is_read(self) -> "EmaConfig":
        if self.decay is None:
            self.refuse_idle("ema.decay, such as 0.9999", "warmup", "warmup_gamma", "warmup_power")
        if not self.warmup:
            self.refuse_idle("ema.warmup = true", "warmup_gamma", "warmup_power")
        return self


class CapacityConfig(Section):
    """Capacity of the routers by step, as a factor on what the model was built with.

    The capacity of each router is its own times the factor, at most the whole image. Evaluation,
    pictures and exports see factor 1. Each factor has shapes of its own: torch.compile compiles
    a block once per factor.
    """

    schedule: Literal["none", "anneal", "sample"] = "none"
    """anneal: from `start` to `end`; sample: each step draws one factor, the same on all ranks, so
    that one model serves many budgets."""
    start: float = Field(1.0, gt=0)
    """Factor at the first step (anneal) or one end of the range drawn from (sample)."""
    end: float = Field(1.0, gt=0)
    """Factor at the end (anneal) or the other end of the range (sample)."""
    until: float = Field(1.0, gt=0, le=1)
    """anneal: share of the run after which `end` holds."""
    shape: Literal["linear", "cosine"] = "linear"
    """anneal: how it goes from `start` to `end`."""
    levels: int = Field(5, ge=2)
    """How many evenly spaced factors there are from `start` to `end`. torch.compile makes a version
    of every block for each."""
    factors: list[float] | None = Field(None, min_length=1)
    """sample: draw from these instead of a range."""

    @model_validator(mode="after")
    def _something_changes(self) -> "CapacityConfig":
        drawn = self.factors if self.schedule == "sample" and self.factors else None
        if drawn and min(drawn) <= 0:
            raise ValueError(f"factors = {drawn}: each must be greater than 0")
        if self.factors and self.schedule != "sample":
            raise ValueError("capacity.factors is read by schedule = 'sample' only; delete it")
        if self.schedule != "none" and not drawn and self.start == self.end:
            raise ValueError(
                f"capacity.schedule = '{self.schedule}' needs start and end that differ"
            )
        return self

    @model_validator(mode="after")
    def _all_is_read(self) -> "CapacityConfig":
        if self.schedule == "none":
            self.refuse_idle('capacity.schedule = "anneal" or "sample"', "start", "end", "levels")
        if self.schedule != "anneal":
            self.refuse_idle('capacity.schedule = "anneal"', "until", "shape")
        if self.factors:
            self.refuse_idle("capacity.factors = null", "start", "end", "levels")
        return self


class ResolutionStage(Section):
    """A part of the run with smaller images."""

    until: float = Field(gt=0, lt=1)
    """Share of the run at which the stage ends."""
    size: int = Field(gt=0)
    """Side of the images in pixels, a multiple of the patch size."""


class ResolutionConfig(Section):
    """Progressive resolution: the loader's images are shrunk on the device in early steps."""

    stages: list[ResolutionStage] = Field(default_factory=list)
    """In order, such as [{"until": 0.5, "size": 128}, {"until": 0.8, "size": 160}]; then full size.
    Needs model.kwargs.dynamic_img_size = true."""
