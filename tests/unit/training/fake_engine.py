"""An Engine of one process without DeepSpeed, for tests of what surrounds it."""

from __future__ import annotations

import errno
import itertools
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from routedvit.training.device_clock import DeviceClock
from routedvit.training.engine import StepResult


class FakeState:
    def __init__(self, engine: FakeEngine, held: tuple[int, ...]) -> None:
        self.engine, self.held = engine, held

    def write(self, folder: Path) -> None:
        self.engine.save_state(folder, *self.held)


class FakeEngine:
    """Holds one number as its state; `results` scripts what train_step returns."""

    rank, world_size, zero_stage, accumulation, scales_loss = 0, 1, 2, 1, False
    device = torch.device("cpu")

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = model or nn.Linear(2, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.value = 0
        self.skip_from: int | None = None
        self.losses: dict[int, float] = {}  # by data position, where not 1
        self.full_disks = 0  # saves that fail
        self.disk = threading.Event()  # a save waits for it
        self.disk.set()
        self.loss_scale: float | None = None
        self.seen: list[list[int]] = []
        self.averaged = False
        self.forward_clock = DeviceClock(self.device)

    def ahead(self, batches: Iterator[Any], steps: int) -> Iterator[Any]:
        return itertools.islice(batches, steps)

    def train_step(
        self,
        batches: list[dict[str, Any]],
        *,
        stop: bool = False,
        writing: bool = False,
        before_step: Any = None,
    ) -> StepResult:
        self.value += 1
        self.seen += [batch["position"] for batch in batches]
        loss = self.losses.get(batches[0]["position"], 1.0)
        skipped = self.skip_from is not None and self.value >= self.skip_from
        skipped = skipped or not math.isfinite(loss)
        norm = float("inf") if skipped else 1.0
        return StepResult(loss, {"top1": 50.0}, norm, skipped, stop, writing, loss, self.loss_scale)

    def share_bytes(self) -> int:
        return 1000

    def take_state(self, *, copy: bool = False) -> Any:
        self.taken = FakeState(self, (self.value,) if copy else ())
        return self.taken

    def save_state(self, folder: Path, held: int | None = None) -> None:
        value = self.value if held is None else held
        assert self.disk.wait(20), "nobody waits for ever"
        (folder / "shards").mkdir()
        for rank in range(2):
            if self.full_disks:
                self.full_disks -= 1
                raise OSError(errno.ENOSPC, "No space left on device")
            path = folder / "shards" / f"rank_{rank:05d}_00.safetensors"
            path.write_text(f"{value} of {rank}" * 50)

    def load_state(self, folder: Path) -> None:
        path = folder / "shards" / "rank_00000_00.safetensors"
        self.value = int(path.read_text().split()[0])

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        yield self.model

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        self.averaged = True
        yield
        self.averaged = False

    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value

    def barrier(self) -> None: ...

    def close(self) -> None: ...
