"""Weights that lie on disk, for an evaluation: found, checked, and put into the run's modules.

They come from a checkpoint, which holds all that the objective trains (a masked autoencoder's
decoder too) and averages if the run keeps them, or from a file that holds the network alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from timm.models import load_state_dict
from torch import Tensor, nn

from routedvit.training.checkpoints.export import WEIGHTS
from routedvit.training.checkpoints.full_weights import full_weights, has_state
from routedvit.training.checkpoints.manifest import first_fault, read_manifest
from routedvit.training.checkpoints.shelf import LATEST, names_in
from routedvit.training.config.base import one_line
from routedvit.training.config.run import ConfigError
from routedvit.training.run_folder import RunFolder

NETWORK = "model."  # what an objective calls its network
AVERAGE = "ema"  # the optimiser's state that holds averaged weights


def find(checkpoint: str, folder: RunFolder, option: str = "--evaluate") -> Path:
    """The folder of a checkpoint, or a file of weights, that `option` of the command line names.

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
                f"{option} latest: there is no checkpoint in {folder.checkpoints}"
            ) from None
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{option} latest: {pointer} cannot be read ({error}); name a folder "
                f"{folder.checkpoints}/step_... instead"
            ) from error
    elif (folder.checkpoints / checkpoint).is_dir():
        path = folder.checkpoints / checkpoint
    if (path / WEIGHTS).exists():
        path = path / WEIGHTS
    if path.is_file():
        return path
    if not path.is_dir():
        raise ConfigError(
            f"{option} {checkpoint}: no such file or folder; {folder.checkpoints} holds "
            f"{', '.join(names_in(folder.checkpoints)) or 'no checkpoint'}"
        )
    try:
        fault = first_fault(path, read_manifest(path))
    except (OSError, ValueError) as error:
        fault = str(error)
    if fault is not None:
        raise ConfigError(f"{option} {checkpoint}: not a whole checkpoint: {fault}")
    return path


def title(path: Path, folder: RunFolder) -> str:
    """A name for what `find` returned: 'step_00000500', 'weights_ema', 'other_run.weights'.

    What lies outside of `folder` has the name of the folder it lies in before its own.
    """
    path = path.resolve()
    own = path.parent if path.name == WEIGHTS else path
    home = own.parent.parent if own.parent.name == folder.checkpoints.name else own.parent
    name = own.stem if own.is_file() else own.name
    # checkpoints/ may be a link to another disk
    is_own = home == folder.path.resolve() or own.parent == folder.checkpoints.resolve()
    return name if is_own else f"{home.name}.{name}"


def weights_in(path: Path, wanted: str = "both") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(suffix of the metrics, weights under an objective's names), '_ema' for averages.

    Args:
        wanted: 'both', 'raw' or 'ema', as far as there are averages.
    """
    if path.is_file():
        weights: dict[str, Tensor] = load_state_dict(str(path))
        yield "", {NETWORK + name: value for name, value in weights.items()}
        return
    averaged = has_state(path, AVERAGE)
    if wanted != "ema" or not averaged:
        yield "", full_weights(path)
    if wanted != "raw" and averaged:
        yield "_ema", full_weights(path, AVERAGE)


def load(objective: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Strictly, in fp32, into the objective, or whatever has a network as `model`.

    Raises:
        ConfigError: they are another model's.
    """
    objective.float()
    try:
        objective.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        first, *more = (one_line(line, limit=None) for line in str(error).splitlines())
        reason = more[0] if more else first
        raise ConfigError(f"{path} does not fit the model of the config: {reason}") from None
