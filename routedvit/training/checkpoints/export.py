"""Final weights as timm reads them: `model.safetensors` (fp32) and `config.json` in one folder.

    timm.create_model('colt5_vit_b', checkpoint_path='runs/NAME/weights/model.safetensors', ...)
    timm.create_model('local-dir:runs/NAME/weights', pretrained=True)  # arguments from config.json

The weights are gathered one parameter at a time, so a rank other than 0 never holds more than one
of them whole, and loaded strictly into a fresh model on rank 0's CPU, which is what is saved: a
missing weight or a wrong argument fails here and not months later. Each file takes the place of an
earlier one when it is whole and on the disk. Cost: fp32 weights twice in the memory of rank 0's
machine.
"""

import shutil
from pathlib import Path
from typing import Any

import timm
import timm.models
from safetensors import SafetensorError
from torch import Tensor

from routedvit.training.checkpoints.manifest import sync
from routedvit.training.checkpoints.permissions import as_umask_says
from routedvit.training.config.base import ConfigError
from routedvit.training.engine import Engine

WEIGHTS = "model.safetensors"
FIRST_WEIGHTS = ("pretrained", "checkpoint_path")  # arguments that say what training began from


def export_model(
    engine: Engine,
    folder: Path,
    *,
    name: str,
    kwargs: dict[str, Any],
    data_config: dict[str, Any] | None = None,
) -> Path:
    """Write the network of `engine` into `folder` and return the weights' path. Collective.

    Args:
        name, kwargs: what the model was made with, `timm.create_model(name, **kwargs)`.
        data_config: timm's preprocessing keys that belong to the weights, such as input_size, mean,
            std, interpolation, crop_pct.

    Raises:
        RuntimeError: the model made from `name` and `kwargs` has other weights than the engine's.
        ConfigError: on every rank, if the disk does not take them.
    """
    weights: dict[str, Tensor] = {}
    fault: str | None = None
    for key, parameter in engine.full_parameters():
        if engine.rank == 0:
            weights[key] = parameter.cpu().clone()
    if engine.rank == 0:
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # of a start that was killed
        buffers = {key: buffer.cpu() for key, buffer in engine.model.named_buffers()}
        try:
            write_model(
                temporary, weights, buffers, name=name, kwargs=kwargs, data_config=data_config
            )
            move_files(temporary, folder)
        except (OSError, SafetensorError) as error:
            fault = str(error)
    if fault := engine.broadcast(fault):
        raise ConfigError(
            f"the trained weights could not be written into {folder} ({fault}); make room on that "
            "disk or see to its rights; the same command then writes them"
        )
    return folder / WEIGHTS


def export_run(
    engine: Engine,
    made: dict[str, Any],
    weights: Path,
    averaged: Path | None,
) -> None:
    """Write the trained network, and where `averaged` says its average. Collective.

    Args:
        engine: holds both.
        made: what `export_model` is told of the network.
        weights, averaged: the folders.
    """
    export_model(engine, weights, **made)
    if averaged is not None:
        with engine.ema_weights():
            export_model(engine, averaged, **made)


def move_files(source: Path, folder: Path) -> None:
    """Move the files of `source` into `folder`, whole and synced, over those of the same names."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        sync(file)
        file.replace(folder / file.name)
    sync(folder)
    shutil.rmtree(source)


def write_model(
    folder: Path,
    weights: dict[str, Tensor],
    buffers: dict[str, Tensor],
    *,
    name: str,
    kwargs: dict[str, Any],
    data_config: dict[str, Any] | None,
) -> None:
    """Write whole weights into `folder`, with those of the buffers that such a model saves.

    Raises:
        RuntimeError: the model made from `name` and `kwargs` has other weights.
    """
    kwargs = {key: value for key, value in kwargs.items() if key not in FIRST_WEIGHTS}
    model = timm.create_model(name, **kwargs)
    persistent = model.state_dict().keys() - weights.keys()
    model.load_state_dict(weights | {key: buffers[key] for key in persistent & buffers.keys()})
    timm.models.save_for_hf(
        model, str(folder), model_args=kwargs, safe_serialization=True, data_config=data_config
    )
    as_umask_says(folder / WEIGHTS)
