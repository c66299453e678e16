"""What a run needs to go on besides weights and optimiser state, as the JSON of a checkpoint.

    run_state.json     written with the checkpoint, in its manifest
    evaluation.json    what was measured at its step; added later, so in no manifest

A checkpoint is saved before it is evaluated, since an evaluation may crash or outlast what a
scheduler waits, and is never changed. Without the second file, or if it is damaged, its step counts
as not evaluated, and the next start of the run makes up for that.
"""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

from routedvit.training.checkpoints.manifest import EVALUATION, replace_text

RUN_STATE = "run_state.json"
EVALUATED = ("metrics", "best", "evaluated")  # the fields in EVALUATION


@dataclasses.dataclass
class RunState:
    """Everything needed to go on besides weights and optimiser state; kept as JSON.

    Random numbers and the order of the data need no state: both follow from the seed and `step`
    (see `trainer.seed_step` and `interfaces.TrainLoader`).
    """

    step: int = 0  # finished optimiser steps
    samples_seen: int = 0  # over the whole world: the position in the data
    best: dict[str, float] = dataclasses.field(default_factory=dict)  # best value per metric
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # evaluated at this step
    evaluated: list[str] = dataclasses.field(default_factory=list)  # evaluators that did so
    skipped_steps: int = 0  # steps whose loss or gradient was not finite
    guard: dict[str, Any] = dataclasses.field(default_factory=dict)  # see `Guard.state`
    spent: dict[str, float] = dataclasses.field(default_factory=dict)  # see `Spent.total`
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: str = ""  # the training shards, in a line; empty in checkpoints that did not say
    held_out: str = ""  # likewise those that metrics are measured on; empty if there are none
    image_format: dict[str, Any] = dataclasses.field(default_factory=dict)  # likewise; timm's keys
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    warm_start: dict[str, Any] | None = None  # what weights the run began from
    world_size: int = 0
    zero_stage: int = 0


def read_run_state(folder: Path) -> RunState:
    """The run state of a checkpoint, with what was evaluated since it was saved."""
    state = json.loads((folder / RUN_STATE).read_text(encoding="utf-8"))
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        later = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
        state |= {field: later[field] for field in EVALUATED}
    return RunState(**state)


def write_evaluation(folder: Path, state: RunState) -> None:
    """Add to a checkpoint what was measured at its step."""
    replace_text(folder / EVALUATION, json.dumps({f: getattr(state, f) for f in EVALUATED}) + "\n")
