"""A frozen network that a student learns from: any timm model, fed what it was trained on.

It is kept out of the student's module tree, in a plain object. As a submodule it would be cast and
partitioned by DeepSpeed, switched to train mode with the rest, counted and saved in every
checkpoint. Each rank holds it whole: fp32 weights under autocast to the run's precision, which a
network with batch statistics stands too.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_input_data_config
from torch import Tensor, nn
from torch.nn import functional as F

from routedvit.training.config.base import one_line
from routedvit.training.config.recipe import TeacherConfig
from routedvit.training.config.run import ConfigError
from routedvit.training.precision import DTYPES

__all__ = ["Teacher", "build_teacher"]


class Teacher:
    """Images as the student gets them -> the teacher's logits.

    Args:
        network: timm model; it is frozen, put into eval mode and moved to `device`.
        mean, std: what the student's images are normalised with, per channel.
        dtype: 'fp32', 'bf16' or 'fp16', the type of its matrix products.
        model_kwargs: what the network was made with; an image size among them is what it is fed.

    Raises:
        ConfigError: it takes fewer channels than the images have.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        dtype: str = "fp32",
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.network = network.eval().requires_grad_(False).to(device)
        self.dtype = DTYPES[dtype]
        given = {"model_kwargs": dict(model_kwargs or {})}
        own: dict[str, Any] = resolve_input_data_config(network, given)
        channels, *size = own["input_size"]
        if channels not in (len(mean), 3):
            raise ConfigError(
                f"objective.teacher takes {channels} channels, the images have {len(mean)}; give "
                "objective.teacher.kwargs.in_chans"
            )
        self.channels, self.size = channels, tuple(size)

        def values(numbers: Sequence[float]) -> Tensor:
            return torch.tensor(numbers, device=device).view(1, -1, 1, 1)

        # (x * std + mean - own mean) / own std, as one multiply-add
        self.factor = values(std) / values(own["std"])
        self.offset = (values(mean) - values(own["mean"])) / values(own["std"])

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """float32 logits [B, num_classes] of image [B, C, H, W]."""
        image = torch.addcmul(self.offset, image.float(), self.factor)
        if image.shape[1] < self.channels:
            image = image.expand(-1, self.channels, -1, -1)
        if image.shape[-2:] != self.size:
            image = F.interpolate(image, self.size, mode="bicubic", antialias=True)
        mixed = self.dtype != torch.float32
        with torch.autocast(image.device.type, self.dtype, enabled=mixed):
            return self.network(image).float()


def build_teacher(
    config: TeacherConfig,
    *,
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    dtype: str,
    trained: bool = True,
) -> Teacher:
    """The trained network that `config` names, for a student of `num_classes`.

    With `trained` false its weights are neither looked for nor read: only its shapes count then,
    and the classes that timm says its weights know.

    Raises:
        ConfigError: no weights are named, they cannot be read or do not fit the network, or it
            knows other classes.
    """
    if config.pretrained == (config.checkpoint is not None):
        raise ConfigError(
            "objective.teacher needs weights: give one of objective.teacher.checkpoint (a file) "
            "and objective.teacher.pretrained = true (timm's own, or of a 'local-dir:' name)"
        )
    if trained and config.checkpoint is not None and not Path(config.checkpoint).is_file():
        raise ConfigError(f"objective.teacher.checkpoint: {config.checkpoint} does not exist")
    kwargs = dict(config.kwargs)
    if config.checkpoint is not None:  # with `pretrained`, timm would give it a new classifier
        kwargs = {"num_classes": num_classes, **kwargs}
        kwargs |= {"checkpoint_path": config.checkpoint} if trained else {}
        kwargs = {"pretrained_cfg_overlay": trained_on(Path(config.checkpoint)), **kwargs}
    try:
        network = timm.create_model(config.name, pretrained=config.pretrained and trained, **kwargs)
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        raise ConfigError(f"objective.teacher {config.name!r}: {one_line(error)}") from error
    except KeyError as error:  # a run folder has a config.json too, which names no architecture
        raise ConfigError(
            f"objective.teacher {config.name!r}: its config.json is not that of a model "
            f"(no {error}); of a run name the folder of its weights, {config.name}/weights"
        ) from error
    if network.num_classes != num_classes:
        raise ConfigError(
            f"objective.teacher {config.name!r} knows {network.num_classes} classes, the student "
            f"{num_classes}; choose a teacher trained on the same classes"
        )
    return Teacher(
        network, mean=mean, std=std, device=device, dtype=dtype, model_kwargs=config.kwargs
    )


def trained_on(checkpoint: Path) -> dict[str, Any]:
    """What timm's `config.json` beside a file of weights says of the images they were trained on.

    Empty, with a warning, where there is none: the architecture's own are used then.
    """
    beside = checkpoint.with_name("config.json")
    try:
        known = json.loads(beside.read_text(encoding="utf-8"))["pretrained_cfg"]
    except (OSError, ValueError, KeyError, TypeError):
        warnings.warn(
            f"objective.teacher.checkpoint: {beside} does not say what the images of these weights "
            "were normalised with; timm's mean and std for the architecture are used, unless "
            "objective.teacher.kwargs.pretrained_cfg_overlay gives others",
            stacklevel=2,
        )
        return {}
    return {key: known[key] for key in ("input_size", "mean", "std") if key in known}
