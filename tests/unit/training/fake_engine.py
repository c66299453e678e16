"""An Engine of one process without DeepSpeed, for tests of what surrounds it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from routedvit.training.engine import StepResult


class FakeEngine:
    """Holds one number as its state; `results` scripts what train_step returns."""

    rank, world_size, zero_stage, accumulation = 0, 1, 2, 1
    device = torch.device("cpu")

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = model or nn.Linear(2, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.value = 0
        self.skip_from: int | None = None
        self.loss_scale: float | None = None
        self.seen: list[list[int]] = []

    def train_step(self, batches: list[dict[str, Any]], *, stop: bool = False) -> StepResult:
        self.value += 1
        self.seen += [batch["position"] for batch in batches]
        skipped = self.skip_from is not None and self.value >= self.skip_from
        norm = float("inf") if skipped else 1.0
        return StepResult(1.0, {"top1": 50.0}, norm, skipped, stop, self.loss_scale)

    def save_state(self, folder: Path) -> None:
        (folder / "deepspeed").mkdir()
        for rank in range(2):
            path = folder / "deepspeed" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            path.write_text(f"{self.value} of {rank}" * 50)

    def load_state(self, folder: Path) -> None:
        path = folder / "deepspeed" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
        self.value = int(path.read_text().split()[0])

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        yield self.model

    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value

    def barrier(self) -> None: ...
