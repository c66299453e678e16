"""`train.py --evaluate`: the evaluators of a run on weights that lie on disk.

    python train.py --config C --evaluate latest                 the run's newest checkpoint
    deepspeed train.py --config C --evaluate runs/NAME/checkpoints/step_00010000
    python train.py --config C --evaluate runs/NAME/weights      exported, or a .safetensors file

The evaluators are those that run during training, in the same precision, on any number of
processes, whatever ranks and ZeRO stage wrote the checkpoint. On as many processes the numbers are
those that the run logged, bit for bit. The weights are put together whole, so the network must fit
on one device, and no optimiser or teacher is built.

Prints a table and writes report.json and the evaluators' tables into `evaluated/WHAT/` of the run
folder, `evaluated/WHAT.1/` the next time. Nothing else in the folder is touched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from torch import nn

from routedvit.training.assembly_watch import build_run_evaluators
from routedvit.training.checkpoints.stored_weights import find, load, title, weights_in
from routedvit.training.config.run import ConfigError, PrecisionConfig, RunConfig
from routedvit.training.distributed.collective import on_rank_zero
from routedvit.training.distributed.world import World
from routedvit.training.evaluators import record
from routedvit.training.interfaces import EvalLoaders, Evaluator
from routedvit.training.objectives import build_objective
from routedvit.training.precision import DTYPES
from routedvit.training.run_folder import RunFolder, first_free, refuse_whole_run
from routedvit.training.watch.console import Console
from routedvit.training.watch.metrics import FanOutWriter
from routedvit.training.watch.secrets import command_line, without_secrets

T = TypeVar("T")


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
            has nothing to evaluate, or nothing to evaluate it on.
    """
    if loaders is None:
        raise ConfigError("--evaluate needs images: name shards in data.val.shards")
    path = on_rank_zero(lambda: find_one(checkpoint, folder))
    console.log_to(folder.evaluated / "logs" / f"rank_{world.rank}.log", command_line())
    console.print(f"evaluating {path} on {world.size} x {world.device.type}")
    objective, whole = stored_objective(config, model, path)
    evaluators = build_run_evaluators(config, objective, loaders, 1, with_loss=whole)
    if not whole:
        console.print(what_is_missing(config, path, evaluators))
    numbers: dict[str, float] = {}
    out: Path | None = None
    for suffix, weights in still_there(weights_in(path, config.eval.weights), path):
        load(objective, weights, path)
        out = out or on_rank_zero(lambda: first_free(folder.evaluated / title(path, folder)))
        place(objective, config.precision, world)
        tables = out if world.rank == 0 else None
        found = measure(evaluators, model, suffix, config.precision, world, tables)
        console.print(table(found))
        numbers |= found
        if world.rank == 0:  # now: the averages may be gone before they are read
            write_report(out, config, path, world, loaders.val.num_samples, numbers)
    if out is not None:
        console.print(f"written to {out}")
    return 0


def find_one(checkpoint: str, folder: RunFolder) -> Path:
    """As `find`; a run's folder is no checkpoint, which of them is meant?"""
    refuse_whole_run(folder, Path(checkpoint), "--evaluate")
    return find(checkpoint, folder)


def still_there(weights: Iterator[T], path: Path) -> Iterator[T]:
    """The same, read while the run may go on and delete what it no longer keeps.

    Raises:
        ConfigError: it did.
    """
    try:
        yield from weights
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{path} can no longer be read ({error}); if its run goes on and has deleted it "
            "(checkpoint.keep), name a newer one, or copy one elsewhere first"
        ) from error


def stored_objective(config: RunConfig, model: nn.Module, path: Path) -> tuple[nn.Module, bool]:
    """What the weights of `path` belong to, with the network as `model`, and whether that is all
    an evaluation needs: exported weights are the network's alone, without an autoencoder's decoder.
    """
    if config.objective.classifies or path.is_file():
        return nn.ModuleDict({"model": model}), config.objective.classifies
    # an objective without classes mixes nothing and has no teacher: the rest does not matter to it
    cpu = torch.device("cpu")
    return build_objective(config, model, micro_batch_size=1, device=cpu, mean=(), std=()), True


def what_is_missing(config: RunConfig, path: Path, evaluators: list[Evaluator]) -> str:
    """What cannot be evaluated on a network without the rest of its objective.

    Raises:
        ConfigError: that is all there is.
    """
    text = (
        f"{path} holds the network alone, without what objective.name = '{config.objective.name}' "
        "trains beside it, so its held-out loss cannot be evaluated; give a checkpoint for that"
    )
    if not evaluators:
        raise ConfigError(f"{text}, or switch on eval.knn or eval.linear_probe")
    return text


def place(module: nn.Module, precision: PrecisionConfig, world: World) -> None:
    """Onto the device, in the type that training keeps its weights in."""
    dtype = torch.float32 if precision.autocast else DTYPES[precision.dtype]
    module.to(world.device, dtype).eval()


def measure(
    evaluators: list[Evaluator],
    model: nn.Module,
    suffix: str,
    precision: PrecisionConfig,
    world: World,
    folder: Path | None,
) -> dict[str, float]:
    """What all evaluators say about the present weights, by 'val/metric'. Collective."""
    numbers: dict[str, float] = {}
    # a context for each set of weights: autocast remembers those that it has cast
    with torch.autocast(world.device.type, torch.bfloat16, enabled=precision.autocast):
        for evaluator in evaluators:
            prefix = evaluator.name + suffix
            findings = evaluator.run(model)
            numbers |= record(findings, prefix, 0, writer=FanOutWriter(), folder=folder)
    return numbers


def write_report(
    folder: Path,
    config: RunConfig,
    path: Path,
    world: World,
    num_samples: int,
    numbers: dict[str, float],
) -> None:
    """report.json: which weights, evaluated how, and what came out."""
    content = {
        "weights": str(path.resolve()),
        "processes": world.size,
        "images": num_samples,
        "metrics": numbers,
        "config": without_secrets(config.model_dump(mode="json")),
    }
    report = folder / "report.json"
    report.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def table(numbers: dict[str, float]) -> str:
    """One aligned line per number."""
    width = max(map(len, numbers), default=0)
    return "\n".join(f"  {name:<{width}}  {value:12.4f}" for name, value in numbers.items())
