"""A gradient that is Inf on one of two ranks, beside losses that are finite: what the ranks see."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import toy

from routedvit.training.engine import Engine, StepResult
from routedvit.training.guard import Guard

POISONED = "head.bias"  # under ZeRO the share of one rank: it overflows there and on the other


def check_overflow(engine: Engine, out: Path) -> dict[str, Any]:
    """A good step, one that overflows on each rank alone, a good step; what each rank saw."""
    told: list[str] = []
    ledger = out / f"overflow{engine.zero_stage}.jsonl"
    guard = Guard(engine, ledger, tell=told.append)
    step(engine, guard, 0)
    before = live(engine), masters(engine)
    bad = [step(engine, guard, 1 + rank, poison_rank=rank) for rank in range(2)]
    mine = {
        "skipped": [result.skipped for result in bad],
        "loss_is_finite": [math.isfinite(float(result.own_loss)) for result in bad],
        "bad_steps": list(guard.bad_steps),
        "told": list(told),
        "unchanged": (live(engine), masters(engine)) == before,
        "weights": live(engine),
    }
    mine["acts_again"] = not step(engine, guard, 3).skipped and live(engine) != before[0]
    mine["weights_after"] = live(engine)
    return {"ranks": engine.gather(mine), "ledger": ledger.read_text().splitlines()}


def step(engine: Engine, guard: Guard, number: int, poison_rank: int = -1) -> StepResult:
    """One step of the global batch `number`; a gradient of `poison_rank` overflows."""
    batches = toy.Loader(engine.rank, engine.world_size).batches(start=number * toy.BATCH)
    micro_batches = [next(batches) for _ in range(engine.accumulation)]
    poisoned = engine.rank == poison_rank
    hook = engine.model.get_parameter(POISONED).register_hook(
        lambda grad: torch.full_like(grad, math.inf) if poisoned else None
    )
    result = engine.train_step(micro_batches)
    hook.remove()
    guard.watch(result, micro_batches, number)
    return result


def live(engine: Engine) -> str:
    """SHA-256 of the weights that this rank computes with, each rank of its own copy."""
    parameters = list(engine.model.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=engine.zero_stage == 3):
        return digest(parameters)


def masters(engine: Engine) -> str:
    """SHA-256 of the weights that the optimiser changes."""
    return digest(value for _, value in engine.full_parameters())


def digest(tensors: Iterable[torch.Tensor]) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().contiguous().numpy().tobytes())
    return total.hexdigest()
