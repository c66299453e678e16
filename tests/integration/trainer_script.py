"""Launched by test_trainer_run.py: runs of the Trainer in one start of two ranks.

One goes straight to the end; one gets SIGTERM on rank 1 in the middle; one goes on from there. One
meets images that are not finite and goes back; one does too and is stopped after that, by SIGUSR1.
One gets its data late on rank 1.
Usage: trainer_script.py OUT. Writes OUT/report.json.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import toy

from routedvit.training import engine as deepspeed_engine
from routedvit.training.checkpoints.checkpoint import Checkpoints
from routedvit.training.checkpoints.fence import OwnershipLost
from routedvit.training.checkpoints.ownership import Owner, take
from routedvit.training.checkpoints.publishing import publish_written
from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.config.native import resolve_native_config
from routedvit.training.distributed.collective import on_rank_zero
from routedvit.training.distributed.signals import StopSignals
from routedvit.training.distributed.world import World
from routedvit.training.engine import Engine
from routedvit.training.evaluators import Classification
from routedvit.training.guard import Guard
from routedvit.training.trainer import Trainer
from routedvit.training.trainer_settings import Summary, TrainerSettings

STEPS, SIGNAL_AT = 10, 5


class Recorder:
    """Writer, progress and routing monitor in one, that remember what they were told."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, int]] = []
        self.messages: list[str] = []
        self.updates: list[int] = []
        self.watched: list[int] = []
        self.rewound: list[int] = []

    def scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, step))

    def text(self, name: str, text: str, step: int) -> None:
        self.scalars.append((name, step))

    def rewind(self, step: int) -> None:
        self.rewound.append(step)

    def run(self, model: torch.nn.Module, step: int) -> None:
        model.routing(toy.batch(range(2))["image"])  # type: ignore[operator]
        self.watched.append(step)

    def start(self, step: int, total: int) -> None:
        self.updates.append(step)

    def update(self, step: int, loss: float, lr: float, images_per_second: float) -> None:
        self.updates.append(step)

    def message(self, text: str) -> None:
        self.messages.append(text)

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Loader(toy.Loader):
    """Remembers what it gave, damages some images of rank 0 and sends its process a signal.

    Args:
        damaged: global batches, counted from 0, in which an image is not finite.
        signal_at: the signal, its rank, and the global batch whose data it comes with.
        late: seconds by which each micro-batch of rank 1 is late.
    """

    def __init__(
        self,
        world: World,
        damaged: range = range(0),
        signal_at: tuple[signal.Signals, int, int] | None = None,
        late: float = 0.0,
    ) -> None:
        super().__init__(world.rank, world.size)
        self.damaged, self.signal_at, self.late = damaged, signal_at, late
        self.given: list[str] = []

    def batches(self, start: int) -> Iterator[dict[str, Any]]:
        for rows in super().batches(start):
            number = int(rows["position"][0]) // toy.BATCH
            if self.signal_at and self.signal_at[1:] == (self.rank, number):
                os.kill(os.getpid(), self.signal_at[0])
                self.signal_at = None
            if number in self.damaged and self.rank == 0:
                rows["image"][0, 0, 0, 0] = torch.nan
            if self.rank == 1:
                time.sleep(self.late)
            self.given += rows["key"]
            yield rows


class Overtaken(toy.Loader):
    """Another start of the run begins while this one has taken some batches."""

    def __init__(self, world: World, folder: Path) -> None:
        super().__init__(world.rank, world.size)
        self.folder = folder

    def batches(self, start: int) -> Iterator[dict[str, Any]]:
        for number, rows in enumerate(super().batches(start)):
            if number == 12 and self.rank == 0:  # of step 7, of two micro-batches each
                take(self.folder)
            yield rows


class Crashing(toy.Loader):
    """Fails on all ranks with the batch after the one that comes with the first checkpoint."""

    def batches(self, start: int) -> Iterator[dict[str, Any]]:
        for number, rows in enumerate(super().batches(start)):
            if number == 8:  # of step 5
                raise RuntimeError("a driver fails")
            yield rows


def fit(
    world: World,
    folder: Path,
    seed: int,
    loader: toy.Loader,
    signals: StopSignals,
    owner: Owner | None = None,
    evaluate_every: int = 4,
) -> tuple[Summary, Any, Recorder]:
    """One run of the Trainer in `folder`; dropout makes the random state matter."""
    objective = toy.objective(seed, proj_drop_rate=0.2)
    native = resolve_native_config(
        {"zero_optimization": {"stage": 2}},
        batch_size=toy.BATCH,
        micro_batch_size=toy.MICRO,
        world_size=world.size,
        grad_clip=None,
        dtype="fp32",
        num_parameters=100_000,
    )
    engine = Engine(world, objective, toy.optimizer(objective.model, 2), native)
    checkpoints = Checkpoints(folder / "checkpoints", engine, keep=2, owner=owner)
    state = checkpoints.load_newest() or RunState()
    recorder = Recorder()
    trainer = Trainer(
        engine,
        loader,
        evaluators=[
            Classification(toy.Validation(world.rank, world.size), every_steps=evaluate_every)
        ],
        writer=recorder,
        monitor=recorder,
        progress=recorder,
        checkpoints=checkpoints,
        guard=Guard(engine, folder / "bad_steps.jsonl", max_bad_steps=3, tell=recorder.message),
        schedules=toy.schedule(engine.optimizer, STEPS),  # after the load, as in train.py
        settings=TrainerSettings(
            total_steps=STEPS,
            batch_size=toy.BATCH,
            seed=0,
            log_every=3,
            checkpoint_every=4,
            save_in_background=True,
            routing_every=4,
        ),
        state=state,
        signals=signals,
    )
    summary = trainer.fit()
    weights = {name: value.detach().clone() for name, value in engine.full_parameters()}
    return summary, weights, recorder


def overtaken(world: World, folder: Path) -> dict[str, Any]:
    """How a start ends on each rank once a newer one has taken its folder."""
    owner = on_rank_zero(lambda: folder.mkdir() or take(folder))
    ends: list[str | None] = [None] * world.size
    with StopSignals() as signals:
        try:
            fit(world, folder, 0, Overtaken(world, folder), signals, owner)
            end = "finished"
        except OwnershipLost as error:
            end = str(error)
    torch.distributed.all_gather_object(ends, end)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    return {"ends": ends, "checkpoints": names}


def crashed(world: World, folder: Path) -> tuple[dict[str, Any], Any]:
    """A start that crashes while a checkpoint is written in the background, and the next one."""
    with StopSignals() as signals:
        with suppress(RuntimeError):
            fit(world, folder, 0, Crashing(world.rank, world.size), signals, evaluate_every=0)
        torch.distributed.barrier()
        seen = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
        published = on_rank_zero(lambda: publish_written(folder / "checkpoints"))
        loader = Loader(world)
        _, weights, _ = fit(world, folder, 80, loader, signals, evaluate_every=0)
    kept = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    report = {"seen": seen, "published": published, "first": loader.given[0], "kept": kept}
    return report, weights


def main(out: Path) -> None:
    world = deepspeed_engine.start()
    report: dict[str, Any] = {}
    bad = range(5, 8)  # the data of steps 6, 7 and 8
    runs = {
        "straight": ("a", 0, Loader(world)),
        "stopped": ("b", 0, Loader(world, signal_at=(signal.SIGTERM, 1, SIGNAL_AT - 1))),
        "resumed": ("b", 77, Loader(world)),
        "again": ("b", 78, Loader(world)),
        "unevaluated": ("b", 78, Loader(world)),
        "damaged": ("c", 0, Loader(world, bad)),
        "damaged_and_stopped": ("d", 0, Loader(world, bad, (signal.SIGUSR1, 0, 9))),
        "damaged_and_resumed": ("d", 79, Loader(world, bad)),
        "late": ("f", 0, Loader(world, late=0.3)),
    }
    weights = {}
    for name, (folder, seed, loader) in runs.items():
        if name == "unevaluated" and world.rank == 0:  # as if killed in its last evaluation
            (out / "b" / "checkpoints" / f"step_{STEPS:08d}" / "evaluation.json").unlink()
        with StopSignals() as signals:
            summary, weights[name], recorder = fit(world, out / folder, seed, loader, signals)
        report[name] = {
            "summary": dataclasses.asdict(summary) | {"checkpoint": summary.checkpoint.name},
            "scalars": recorder.scalars,
            "messages": recorder.messages,
            "updates": recorder.updates,
            "watched": recorder.watched,
            "given": loader.given,
            "status": json.loads((out / folder / "status.json").read_text())
            if world.rank == 0
            else {},
        }
    report["resume_is_bit_identical"] = all(
        torch.equal(weights["straight"][name], weights["resumed"][name])
        for name in weights["straight"]
    )
    report["resume_after_going_back_is_bit_identical"] = all(
        torch.equal(weights["damaged"][name], weights["damaged_and_resumed"][name])
        for name in weights["damaged"]
    )
    report["overtaken"] = overtaken(world, out / "e")
    report["crashed"], weights["crashed"] = crashed(world, out / "g")
    report["crashed"]["is_bit_identical"] = all(
        torch.equal(weights["straight"][name], weights["crashed"][name])
        for name in weights["straight"]
    )
    ledger = (out / "c" / "bad_steps.jsonl").read_text().splitlines()
    report["ledger"] = [json.loads(line) for line in ledger]
    if world.rank == 0:
        (out / "report.json").write_text(json.dumps(report))
    deepspeed_engine.stop()


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
