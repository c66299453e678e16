"""Launched by test_overflow.py: a gradient that is Inf on one of two ranks, under each ZeRO stage.

The losses stay finite, so that only the gradients can tell. Usage: overflow_script.py OUT. Writes
OUT/report.json: {stage: what was seen}.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import toy
from recipes_script import equal, make, weights

from routedvit.training import engine as deepspeed_engine
from routedvit.training.engine import Engine, StepResult
from routedvit.training.guard import Guard
from routedvit.training.world import World

POISONED = "head.bias"  # under ZeRO the share of one rank: it overflows there and on the other


def step(engine: Engine, guard: Guard, number: int, poison_rank: int = -1) -> StepResult:
    """One step of the global batch `number`; a gradient of `poison_rank` overflows."""
    batches = toy.Loader(engine.rank, engine.world_size).batches(start=number * toy.BATCH)
    micro_batches = [next(batches) for _ in range(engine.accumulation)]
    poisoned = engine.rank == poison_rank
    parameter = engine.model.get_parameter(POISONED)
    hook = parameter.register_hook(
        lambda grad: torch.full_like(grad, math.inf) if poisoned else None
    )
    result = engine.train_step(micro_batches)
    hook.remove()
    guard.watch(result, micro_batches, number)
    return result


def live_digest(engine: Engine) -> str:
    """SHA-256 of the weights that the next forward of this rank computes with."""
    digest = hashlib.sha256()
    parameters = list(engine.model.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=engine.zero_stage == 3):
        for parameter in parameters:
            digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def check(world: World, stage: int, out: Path) -> dict[str, Any]:
    engine = make(world, stage, toy.objective())
    told: list[str] = []
    ledger = out / f"zero{stage}.jsonl"
    guard = Guard(engine, ledger, tell=told.append)
    step(engine, guard, 0)
    before, live = weights(engine), live_digest(engine)
    bad = [step(engine, guard, 1 + rank, poison_rank=rank) for rank in range(2)]
    mine = {
        "skipped": [result.skipped for result in bad],
        "loss_is_finite": [math.isfinite(float(result.own_loss)) for result in bad],
        "bad_steps": list(guard.bad_steps),
        "told": list(told),
        "unchanged": equal(weights(engine), before) and live_digest(engine) == live,
        "digest": live_digest(engine),
    }
    mine["acts_again"] = not step(engine, guard, 3).skipped and live_digest(engine) != live
    mine["digest_after"] = live_digest(engine)
    return {"ranks": engine.gather(mine), "ledger": ledger.read_text().splitlines()}


def main(out: Path) -> None:
    world = deepspeed_engine.start()
    report = {stage: check(world, stage, out) for stage in range(4)}
    if world.rank == 0:
        (out / "report.json").write_text(json.dumps(report))
    deepspeed_engine.stop()


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
