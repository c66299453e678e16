"""A Trainer around the fake engine, and stand-ins for what it reads, asks and tells."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from routedvit.training.checkpoints.checkpoint import Checkpoints
from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.distributed.signals import StopSignals
from routedvit.training.guard import Guard
from routedvit.training.recipe.optim import build_schedule
from routedvit.training.recipe.schedules import Schedules
from routedvit.training.trainer import Trainer
from routedvit.training.trainer_settings import TrainerSettings
from tests.unit.training.fake_engine import FakeEngine


class Loader:
    samples_per_epoch, num_classes = 40, 2

    def batches(self, start: int) -> Iterator[dict[str, Any]]:
        while True:
            keys = [f"key{position}" for position in range(start, start + 4)]
            yield {"position": start, "key": keys, "epoch": torch.tensor([start // 40])}
            start += 4


class Sink:
    """Writer and progress that remember."""

    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}
        self.messages: list[str] = []

    def scalar(self, name: str, value: float, step: int) -> None:
        self.scalars[name, step] = value

    def message(self, text: str) -> None:
        self.messages.append(text)

    def start(self, step: int, total: int) -> None: ...
    def update(self, step: int, loss: float, lr: float, images_per_second: float) -> None: ...
    def rewind(self, step: int) -> None:
        self.scalars = {key: value for key, value in self.scalars.items() if key[1] <= step}

    def flush(self) -> None: ...
    def close(self) -> None: ...


class Evaluator:
    """Says its values one by one and crashes when there are no more."""

    name = "val"

    def __init__(self, values: list[float], every_steps: int) -> None:
        self.values, self.every_steps = iter(values), every_steps

    def run(self, model: torch.nn.Module) -> Iterator[tuple[str, float]]:
        value = next(self.values, None)
        if value is None:
            raise RuntimeError("out of memory")
        yield "top1", value


def trainer(
    folder: Path, engine: FakeEngine, sink: Sink, state: RunState, **changes: Any
) -> Trainer:
    settings = {
        "total_steps": 6, "batch_size": 4, "seed": 0,
        "log_every": 2, "checkpoint_every": 4, "routing_every": 4,
    }  # fmt: skip
    keep = changes.pop("keep", 2)
    signals = changes.pop("signals", None) or StopSignals()
    dials = changes.pop("dials", [])
    patience, export = changes.pop("patience", None), changes.pop("export", None)
    guard = {"max_bad_steps": 3, "max_rollbacks": 2} | changes.pop("guard", {})
    return Trainer(
        engine,
        Loader(),
        evaluators=changes.pop("evaluators", []),
        writer=sink,
        monitor=None,
        progress=sink,
        checkpoints=Checkpoints(folder / "checkpoints", engine, keep=keep),
        guard=Guard(engine, folder / "bad_steps.jsonl", **guard, tell=sink.message),
        schedules=Schedules(
            build_schedule(
                engine.optimizer,
                name="cosine",
                total_steps=6,
                warmup_steps=2,
                warmup_lr=0,
                min_lr=0,
            ),
            dials,
        ),
        settings=TrainerSettings(**(settings | changes)),
        state=state,
        signals=signals,
        export=export,
        patience=patience,
    )
