"""Config sections that decide what is learned: loss, optimiser, schedule."""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

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


class SupervisedConfig(Section):
    """Learn the labels, by the loss of the section `loss`."""

    classifies: ClassVar[bool] = True  # whether the model has a classifier and top-1 a meaning

    name: Literal["supervised"] = "supervised"
    """Learn the labels, by the loss of the section `loss`."""


class MaskedConfig(Section):
    """Masked autoencoding (MAE, 2111.06377): tell the pixels of hidden patches. Needs no labels."""

    classifies: ClassVar[bool] = False

    name: Literal["mae"]
    """Hide most patches and learn to tell their pixels (MAE, 2111.06377); needs no labels."""
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
