"""The `data` section of a run config: which shards, how they are read, how images are augmented.

Every field carries its description: `configs/schema.json` and `train.py --keys` are made from them.
Checks that need the shards themselves (do they exist, do the streams fit the world) are in
`data.loaders`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    TypeAdapter,
    WrapValidator,
    model_validator,
)

# as routedvit.training.config.base: numbers are finite, and never made from strings
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)

Interpolation = Literal["bilinear", "bicubic", "nearest", "lanczos", "random"]
Fraction = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    model_config = _STRICT | ConfigDict(extra="forbid", validate_default=True)


def _one_of(form: Any, this: Any, other: Any) -> WrapValidator:
    """Of a union only the member that was meant is tried, so that its mistakes are the ones told.

    That is `this` for a value of type `form`, `other` for any other.
    """
    chosen, rest = _adapter(this), _adapter(other)

    def validate(value: Any, _: Any) -> Any:
        return (chosen if isinstance(value, form) else rest).validate_python(value)

    return WrapValidator(validate)


def _adapter(member: Any) -> TypeAdapter[Any]:
    section = isinstance(member, type) and issubclass(member, _Section)  # has a config of its own
    return TypeAdapter(member, config=None if section else _STRICT)


class SourceConfig(_Section):
    """One set of shards."""

    shards: Annotated[str | list[str], _one_of(list, list[str], str)] = Field(
        description="Where the shards are: a manifest.json, its folder, a glob or a brace pattern "
        "such as shards/train-{000000..000015}.tar, each also as an http(s), s3 or gs URL, or a "
        "list of these."
    )
    manifest: str | None = Field(
        default=None,
        description="The manifest.json of these shards, a path or a URL, where it cannot lie "
        "beside them; their index files are looked for beside it. Empty: beside the shards.",
    )


class TrainSource(SourceConfig):
    """One set of shards to train on, and how much of it."""

    weight: float | None = Field(
        default=None,
        gt=0,
        description="Share of this source in a list of sources, relative to the other weights; "
        "empty: its number of samples times `repeat`.",
    )
    repeat: int = Field(
        default=1, ge=1, description="How often an epoch of the whole goes through this source."
    )

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> TrainSource:
        if self.weight is not None and self.repeat > 1:
            raise ValueError(
                f"weight is {self.weight} and repeat {self.repeat}; both say how often samples of "
                "this source come: give one of them"
            )
        return self


_Several = Annotated[list[TrainSource], Field(min_length=1)]


_Statistics = Literal["dataset", "model"]


class NormalizeConfig(_Section):
    """Channel statistics given by hand, in units of the pixel range 0 to 1."""

    mean: list[Fraction] = Field(description="Mean per channel, 0 to 1.")
    std: list[Annotated[float, Field(gt=0)]] = Field(description="Standard deviation per channel.")

    @model_validator(mode="after")
    def _same_length(self) -> NormalizeConfig:
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"mean has {len(self.mean)} values and std {len(self.std)}; give one per channel"
            )
        return self


Strength = Annotated[float, Field(ge=0)]
_Three = Annotated[tuple[Strength, Strength, Strength], Strict(False)]  # also a list, all JSON has


# Which keys of `augment` a mode reads; the others belong to all.
_READ_BY = {
    "timm": (
        "scale", "ratio", "hflip", "vflip", "color_jitter", "grayscale_prob", "gaussian_blur_prob",
        "auto_augment", "re_prob", "re_mode", "re_count",
    ),
    "light": ("rotate", "translate", "zoom", "shear"),
}  # fmt: skip


class AugmentConfig(_Section):
    """Augmentation of training images; the numbers mean what they mean in timm."""

    mode: Literal["timm", "light", "none"] = Field(
        default="timm",
        description="'timm': timm.data.create_transform (random resized crop and the keys below); "
        "'light': a small random rotation, shift and scaling of the whole image, for small grey "
        "images such as digits; 'none': resize and centre crop.",
    )
    scale: tuple[float, float] = Field(
        default=(0.08, 1.0), description="timm: area of the random crop, as a share of the image."
    )
    ratio: tuple[float, float] = Field(
        default=(3 / 4, 4 / 3), description="timm: aspect ratio of the random crop."
    )
    hflip: Fraction = Field(
        default=0.5, description="timm: probability of a left-right flip (0 for digits)."
    )
    vflip: Fraction = Field(default=0.0, description="timm: probability of an up-down flip.")
    color_jitter: Annotated[Strength | _Three, _one_of(list | tuple, _Three, Strength)] = Field(
        default=0.4,
        description="timm: strength of brightness, contrast and saturation jitter; unused while "
        "auto_augment is set (3-Augment excepted), as in timm.",
    )
    grayscale_prob: Fraction = Field(
        default=0.0, description="timm: probability of dropping colour."
    )
    gaussian_blur_prob: Fraction = Field(default=0.0, description="timm: probability of a blur.")
    auto_augment: str | None = Field(
        default=None,
        description="timm policy string, such as 'rand-m9-mstd0.5-inc1', '3a', 'original'.",
    )
    interpolation: Interpolation | None = Field(
        default=None, description="Interpolation in training; empty: the one of the model."
    )
    re_prob: Fraction = Field(default=0.0, description="timm: probability of random erasing.")
    re_mode: Literal["const", "rand", "pixel"] = Field(
        default="pixel", description="timm: what erased areas are filled with."
    )
    re_count: int = Field(default=1, ge=1, description="timm: most areas erased in one image.")
    repeats: int = Field(
        default=1,
        ge=1,
        description="Repeated augmentation: each sample comes so many times in a row, augmented "
        "differently. The schedule's epochs keep their length and see that much fewer samples.",
    )
    rotate: float = Field(default=10.0, ge=0, description="light: largest rotation, in degrees.")
    translate: Fraction = Field(
        default=0.08, description="light: largest shift, as a share of width and height."
    )
    zoom: tuple[float, float] = Field(
        default=(0.9, 1.1), description="light: range of the random scaling."
    )
    shear: float = Field(default=5.0, ge=0, description="light: largest shear, in degrees.")

    @model_validator(mode="after")
    def _ranges_ascend(self) -> AugmentConfig:
        for name in ("scale", "ratio", "zoom"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(
                    f"{name} is [{low}, {high}]; give [low, high] with 0 < low <= high"
                )
        return self

    @model_validator(mode="after")
    def _all_is_read(self) -> AugmentConfig:
        for mode, keys in _READ_BY.items():
            if mode != self.mode:
                self._refuse_idle(f"mode = '{mode}', not '{self.mode}'", *keys)
        if not self.re_prob:
            self._refuse_idle("re_prob above 0", "re_mode", "re_count")
        return self

    def _refuse_idle(self, needs: str, *keys: str) -> None:
        """As `routedvit.training.config.base.Section.refuse_idle`: a default may be said."""
        for key in keys:
            value = getattr(self, key)
            default = type(self).model_fields[key].get_default()
            if value != default:
                raise ValueError(
                    f"{key} = {json.dumps(value)} would do nothing: it needs {needs}; set that, or "
                    f"delete {key} (its default is {json.dumps(default)})"
                )


class RemoteConfig(_Section):
    """How shards that are URLs come here; credentials come from the environment alone."""

    cache_dir: str | None = Field(
        default=None,
        description="Folder on this node's disk that fetched shards are kept in; empty: the "
        "variable ROUTEDVIT_CACHE, else routedvit/shards in SLURM_TMPDIR, else "
        "~/.cache/routedvit/shards.",
    )
    cache_gb: float = Field(
        default=100.0, gt=0, description="Size of the cache; the shards longest unused make room."
    )
    prefetch: int = Field(
        default=2, ge=0, description="Shards per stream that are fetched before they are needed."
    )
    read_timeout: float = Field(
        default=30.0, gt=0, description="Seconds without a byte after which a read has failed."
    )
    give_up_after: float = Field(
        default=300.0,
        gt=0,
        description="Seconds, retries included, that the next 8 MiB of a shard may take.",
    )


# Keys that may change when a run is resumed: they alter how fast samples come, never which. Where
# the shards are is one: a token is renewed, a set is copied. That they are the same ones is seen
# from their names and SHA-256, see ShardSet.digest. A * stands for the number of a source.
FREE_ON_RESUME = (
    "train.shards",
    "train.manifest",
    "train.*.shards",
    "train.*.manifest",
    "val.shards",
    "val.manifest",
    "num_workers",
    "prefetch_factor",
    "max_bad_samples",
    "max_bad_shards",
    "verify",
    "log_samples",
    "remote",
)


class DataConfig(_Section):
    """The `data` section of the run config."""

    train: Annotated[TrainSource | _Several, _one_of(list, _Several, TrainSource)] = Field(
        description="The shards to train on, or a list of such sections that are mixed by weight."
    )
    val: SourceConfig | None = Field(
        default=None, description="The shards to evaluate on; empty: no evaluation."
    )
    samples_per_epoch: int | None = Field(
        default=None,
        ge=1,
        description="Length of an epoch for the schedule; empty: the samples of all sources, each "
        "times its `repeat`. Sources go through epochs of their own.",
    )
    replacement: bool = Field(
        default=False,
        description="Draw each training sample among all of its source, so that some come twice "
        "and some not, instead of each once per epoch. Reads all shards at once.",
    )
    num_workers: int = Field(
        default=4, ge=0, description="Loader processes per rank; 0 decodes in the training process."
    )
    prefetch_factor: int = Field(
        default=2,
        ge=1,
        description="Micro-batches that each loader process keeps ready; unused without any.",
    )
    streams: int | None = Field(
        default=None,
        ge=1,
        description="Canonical streams the epoch is dealt onto. Part of the sample order; the "
        "number of ranks must divide it. Empty: the largest power of two up to 64 that is not "
        "above the number of shards.",
    )
    shuffle_buffer: int = Field(
        default=4096,
        ge=0,
        description="How far a sample may move within its stream. Part of the sample order.",
    )
    shard_start: Literal["random"] | None = Field(
        default="random",
        description="At which sample an epoch enters a shard, to read it round to that again: "
        "'random', drawn for each epoch and shard; empty: the first, so that epochs begin alike "
        "where streams are of few shards. Part of the sample order: a run goes on as it began, "
        "one from before there was this key as if it were empty.",
    )
    normalize: Annotated[
        _Statistics | NormalizeConfig,
        _one_of(dict | NormalizeConfig, NormalizeConfig, _Statistics),
    ] = Field(
        default="dataset",
        description="Mean and std of the pixels: 'dataset' (of the training manifest), 'model' "
        "(those of the model's timm config), or {mean: [...], std: [...]}.",
    )
    crop_pct: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Share of the resized image that the evaluation crop keeps; empty: the one of "
        "the model's timm config.",
    )
    augment: AugmentConfig = Field(
        default_factory=AugmentConfig, description="Augmentation of the training images."
    )
    decode: Literal["fast", "exact"] = Field(
        default="fast",
        description="How training images become crops: 'fast' decodes a JPEG no larger than its "
        "crop needs and resizes with torch; 'exact' is timm's path on Pillow images. The draws are "
        "the same, the pixels nearly.",
    )
    max_bad_samples: int = Field(
        default=100,
        ge=0,
        description="Different unusable samples that one rank replaces before the run stops.",
    )
    max_bad_shards: int = Field(
        default=0,
        ge=0,
        description="Damaged or missing shards whose samples one rank replaces before the run "
        "stops; 0 stops at the first. A shard that cannot be reached (network, disk, rights) "
        "always stops it: another rank might read it, and all must agree.",
    )
    max_pixels: int = Field(
        default=50_000_000,
        ge=1,
        description="Images with more pixels are refused from their header, before decoding.",
    )
    verify: Literal["off", "size", "sha256"] = Field(
        default="size",
        description="What is compared with the manifest before a shard's first sample: nothing, "
        "its size, or its SHA-256 (each shard once per rank; 'size' compares that too where no "
        "index file is, some 3 % of the time). The tar structure always is checked. "
        "Unless it is 'off', a sample of a shard with an index file is compared with its CRC each "
        "time it is read.",
    )
    log_samples: bool = Field(
        default=False,
        description="Write the position and key of every training sample into the run folder's "
        "logs, some 30 bytes each; `python -m data.audit` proves from them that none was lost or "
        "came twice.",
    )
    remote: RemoteConfig = Field(
        default_factory=RemoteConfig, description="How shards that are URLs are fetched and kept."
    )
