"""What a call of `Trainer.fit` is told, and how it ended."""

import dataclasses
import json
from pathlib import Path

from routedvit.training.checkpoints.manifest import replace_text

STATUS = "status.json"


@dataclasses.dataclass(frozen=True)
class TrainerSettings:
    """Lengths and cadences of a run, in optimiser steps."""

    total_steps: int
    batch_size: int  # global: images per optimiser step
    seed: int
    log_every: int
    checkpoint_every: int
    routing_every: int
    save_in_background: bool = False
    evaluate_raw: bool = True
    evaluate_ema: bool = False  # on the averaged weights, under names that end in _ema
    gradients_every: int = 0  # gradient norms and step-time histogram; 0: never


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a call of `fit` ended."""

    step: int
    finished: bool  # False: a signal stopped the run; start it again to go on
    best: dict[str, float]
    images_per_second: float  # of the whole world, without the first step; 0 up to one step
    skipped_steps: int
    checkpoint: Path
    steps: int = 0  # done by this call; 0: the run had come to its end before
    seconds: float = 0.0  # of this call, everything included
    data_wait_share: float = 0.0  # of the time in steps
    spent: dict[str, float] = dataclasses.field(default_factory=dict)  # see `Spent.total`


def write_status(folder: Path, status: str, step: int) -> None:
    """Leave `status.json` in the run folder. Rank 0.

    The launcher's exit code cannot tell a run that was stopped and saved from a crash (DeepSpeed's
    is 1 for both); 'running' without a process is a run that was killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / STATUS, json.dumps({"status": status, "step": step}) + "\n")


def has_finished(folder: Path) -> bool:
    """Whether the newest start of the run in `folder` came to its end."""
    try:
        status = json.loads((folder / STATUS).read_text(encoding="utf-8"))["status"]
        return bool(status == "finished")
    except (OSError, ValueError, KeyError, TypeError):
        return False
