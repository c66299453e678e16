"""`train.py --export`: any checkpoint as a model that timm loads, without the run.

    python train.py --config C --export latest              of a run that was stopped
    python train.py --config C --export best                by what `checkpoint.keep_best` goes by
    python train.py --config C --export step_00000500       or a folder checkpoints/step_...

Writes `exported/step_00000500/` into the run folder and, where the checkpoint holds averages,
`exported/step_00000500_ema/`, each as a finished run's `weights/` and, for its last checkpoint, bit
for bit the same. The checkpoint says by itself what its network was made with and how its images
were prepared, so neither data nor accelerator is needed, whatever ranks and ZeRO stage wrote it.

One process. Every file is checked against the manifest first. A folder appears by one rename, in
the place of what an earlier export left there; the run itself may go on meanwhile. Cost: fp32
weights twice in memory.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from routedvit.training.checkpoints.export import write_model
from routedvit.training.checkpoints.manifest import sync
from routedvit.training.checkpoints.run_state import RunState, read_run_state
from routedvit.training.checkpoints.shelf import names_in
from routedvit.training.checkpoints.stored_weights import NETWORK, find, title, weights_in
from routedvit.training.config.base import one_line
from routedvit.training.config.run import ConfigError, ModelConfig
from routedvit.training.run_folder import RunFolder, refuse_whole_run

BEST, EXPORTED = "best", "exported"
OPTION = "--export"


def export_checkpoint(checkpoint: str, folder: RunFolder, tell: Callable[[str], None]) -> None:
    """Write the network of `checkpoint`, of this run or another's folder, into this run's folder.

    Args:
        checkpoint: 'latest', 'best', a name such as 'step_00000500', or a folder.
        tell: called with a line about each folder that was written, and how to load it.

    Raises:
        ConfigError: there is no such checkpoint, it is damaged or does not say what its images
            look like, or the disk does not take the weights.
    """
    refuse_whole_run(folder, Path(checkpoint), OPTION)
    path = find(find_best(folder) if checkpoint == BEST else checkpoint, folder, OPTION)
    if path.is_file():
        raise ConfigError(f"{OPTION} {checkpoint}: {path} is exported already")
    try:
        made = made_with(path)
        for suffix, weights in weights_in(path):
            target = folder.path / EXPORTED / f"{title(path, folder)}{suffix}"
            publish(target, weights, made, path)
            what = "averaged weights" if suffix else "weights"
            tell(f"{what} of {path} are in {target}; to load them, after `import routedvit`:")
            tell(f"    timm.create_model('local-dir:{target}', pretrained=True)")
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{OPTION} {checkpoint}: {path} could not be exported ({error}); see to the room on "
            f"the disk of {folder.path} and to its rights, and that a run that goes on has not "
            "deleted this checkpoint (checkpoint.keep)"
        ) from error


def find_best(folder: RunFolder) -> str:
    """Name of the checkpoint with the best value so far; of equal ones the oldest.

    The newest checkpoint knows that value, and by which metric; where both raw and averaged weights
    are evaluated and the config names none, the raw ones count, as in `checkpoint.keep_best`.

    Raises:
        ConfigError: nothing was evaluated, or its step has no checkpoint (any more).
    """
    names = names_in(folder.checkpoints)
    there = f"{folder.checkpoints} holds {', '.join(names) or 'no checkpoint'}"
    states: dict[str, RunState] = {}
    for name in names:
        # A damaged one has no value, as on the shelf.
        with contextlib.suppress(OSError, ValueError, TypeError):
            states[name] = read_run_state(folder.checkpoints / name)
    newest = states[max(states)] if states else RunState()
    best = newest.best
    if not best:
        raise ConfigError(f"{OPTION} {BEST}: nothing was evaluated; {there}")
    metric = newest.config.get("checkpoint", {}).get("best_metric") or usual_metric(newest)
    for name, state in states.items():
        if metric in best and state.metrics.get(metric) == best[metric]:
            return name
    raise ConfigError(
        f"{OPTION} {BEST}: the step with the best {metric} ({best.get(metric)}) has no checkpoint "
        f"(checkpoint.keep_best keeps it); {there}"
    )


def usual_metric(state: RunState) -> str:
    """What its best is judged by where the config names nothing. `eval.weights` may have changed on
    a resume, and values of both kinds be there.
    """
    averages = state.config.get("eval", {}).get("weights") == "ema"
    return next(
        (name for name in state.best if ("_ema/" in name) == averages), next(iter(state.best))
    )


def made_with(path: Path) -> dict[str, Any]:
    """What `write_model` needs besides weights, as the checkpoint records it.

    Raises:
        ConfigError: it was saved by an earlier version, which did not record the images' format.
    """
    state = read_run_state(path)
    if not state.image_format:
        raise ConfigError(
            f"{path} is of an earlier version, which did not note how images were prepared; start "
            "its run again: checkpoints that it saves from now on can be exported"
        )
    model = ModelConfig.model_validate(state.config["model"])
    return {**model.created_from(), "data_config": state.image_format}


def publish(target: Path, weights: dict[str, Tensor], made: dict[str, Any], source: Path) -> None:
    """Write the network among `weights`, under an objective's names, so that `target` is complete
    or not there.

    Raises:
        ConfigError: the network is not the one that `source` says it is.
    """
    own = {
        name.removeprefix(NETWORK): value
        for name, value in weights.items()
        if name.startswith(NETWORK)
    }
    temporary = target.with_name(f".{target.name}.tmp")
    earlier = target.with_name(f".{target.name}.old.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write_model(temporary, own, {}, **made)
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        shutil.rmtree(earlier, ignore_errors=True)
        if target.exists():
            target.rename(earlier)
        temporary.rename(target)
        sync(target.parent)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = one_line(error, limit=None)
        raise ConfigError(f"{source} does not fit the model that it records: {reason}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(earlier, ignore_errors=True)
