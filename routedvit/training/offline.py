"""`train.py --evaluate`: the evaluators of a run on weights that lie on disk.

    python train.py --config C --evaluate latest                 the run's newest checkpoint
    deepspeed train.py --config C --evaluate runs/NAME/checkpoints/step_00010000
    python train.py --config C --evaluate runs/NAME/weights      exported, or a .safetensors file

The classes are those that run during training, on any number of processes, whatever ranks and ZeRO
stage wrote the checkpoint: the weights are put together whole, so the network must fit on one
device, and no optimiser is built. Prints a table, writes `evaluation/NAME.json` into the run folder
and the same tables as training does. Nothing else in the folder is touched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.models import load_state_dict
from torch import Tensor, nn

from routedvit.training.collective import on_rank_zero
from routedvit.training.config import ConfigError, RunConfig
from routedvit.training.console import Console
from routedvit.training.evaluators import build_evaluators, record
from routedvit.training.export import WEIGHTS
from routedvit.training.full_weights import full_weights, has_state
from routedvit.training.interfaces import EvalLoaders
from routedvit.training.manifest import first_fault, read_manifest
from routedvit.training.metrics import FanOutWriter
from routedvit.training.run_folder import RunFolder
from routedvit.training.shelf import LATEST
from routedvit.training.world import World

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NETWORK = "model."  # what an objective calls its network
AVERAGE = "ema"  # the optimiser's state that holds averaged weights


def evaluate_offline(
    config: RunConfig,
    model: nn.Module,
    world: World,
    loaders: EvalLoaders | None,
    *,
    checkpoint: str,
    folder: RunFolder,
    console: Console,
) -> int:
    """Evaluate `model` with the weights of `checkpoint`; returns the exit code. Collective.

    Raises:
        ConfigError: there is no such checkpoint, it is damaged or of another model, or the config
            has nothing to evaluate on.
    """
    if loaders is None:
        raise ConfigError("--evaluate needs images: name shards in data.val.shards")
    path = on_rank_zero(lambda: find(checkpoint, folder))
    console.log_to(folder.logs / f"evaluate_rank_{world.rank}.log")
    console.print(f"evaluating {path} on {world.size} x {world.device.type}")
    evaluators = build_evaluators(config.eval, model, loaders, steps=lambda epochs: 0)
    out = folder.path / "evaluation" if world.rank == 0 else None
    numbers: dict[str, float] = {}
    for suffix, weights in weights_in(path):
        load(model, weights, path)
        model.to(world.device, DTYPES[config.precision.dtype]).eval()
        for evaluator in evaluators:
            findings = evaluator.run(model)
            prefix = evaluator.name + suffix
            numbers |= record(findings, prefix, 0, writer=FanOutWriter(), folder=out)
    console.print(table(numbers))
    if out is not None:
        report = out / f"{path.stem if path.is_file() else path.name}.json"
        report.parent.mkdir(parents=True, exist_ok=True)
        content = {"weights": str(path), "config": config.name, "metrics": numbers}
        report.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        console.print(f"written to {report}")
    return 0


def find(checkpoint: str, folder: RunFolder) -> Path:
    """The folder of a checkpoint, or a file of weights, that the command line names.

    Raises:
        ConfigError: it does not exist, or the checkpoint is damaged.
    """
    path = Path(checkpoint)
    if checkpoint == LATEST:
        pointer = folder.checkpoints / LATEST
        try:
            path = folder.checkpoints / pointer.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            raise ConfigError(
                f"--evaluate latest: there is no checkpoint in {folder.checkpoints}"
            ) from None
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--evaluate latest: {pointer} cannot be read ({error}); name a folder "
                f"{folder.checkpoints}/step_... instead"
            ) from error
    if (path / WEIGHTS).exists():
        path = path / WEIGHTS
    if path.is_file():
        return path
    if not path.is_dir():
        raise ConfigError(
            f"--evaluate {checkpoint}: no such file or folder; give a folder "
            f"checkpoints/step_..., exported weights ({WEIGHTS}) or 'latest'"
        )
    try:
        fault = first_fault(path, read_manifest(path))
    except (OSError, ValueError) as error:
        fault = str(error)
    if fault is not None:
        raise ConfigError(f"--evaluate {checkpoint}: not a whole checkpoint: {fault}")
    return path


def weights_in(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(suffix of the metrics, state dict): raw weights, and averages if there are any, '_ema'."""
    if path.is_file():
        yield "", load_state_dict(str(path))
        return
    yield "", of_network(full_weights(path))
    if has_state(path, AVERAGE):
        yield "_ema", of_network(full_weights(path, AVERAGE))


def of_network(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of an objective's weights that is the network's, under its own names."""
    return {
        name.removeprefix(NETWORK): value
        for name, value in weights.items()
        if name.startswith(NETWORK)
    }


def load(model: nn.Module, weights: dict[str, Any], path: Path) -> None:
    """Strictly into the model. ConfigError: they are another model's."""
    model.float()
    try:
        model.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise ConfigError(f"{path} does not fit the model of the config: {first_line}") from None


def table(numbers: dict[str, float]) -> str:
    """One aligned line per number."""
    width = max(map(len, numbers), default=0)
    return "\n".join(f"  {name:<{width}}  {value:12.4f}" for name, value in numbers.items())
