"""Run by test_reshard.py: saves in worlds of 2 and 4 ranks, loads in worlds of 1, 2 and 4.

Usage: reshard_script.py WHICH OUT, WHICH being 'some' or 'all' of the cases. Writes
OUT/report.json: one entry per load.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import toy
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from worlds import in_world

from routedvit.training.checkpoints.checkpoint import Checkpoints
from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.config.native import resolve_native_config, split_batch
from routedvit.training.distributed.world import World
from routedvit.training.engine import Engine
from routedvit.training.recipe.weight_average import WeightAverage
from routedvit.training.trainer import seed_step

SAVED_AT, STEPS = 2, 4
PER_ELEMENT = ("exp_avg", "exp_avg_sq", "ema")

# Who saves: name -> (ranks, stage, dtype).
SOURCES = {
    "zero0": (2, 0, "fp32"),
    "zero1": (2, 1, "fp32"),
    "zero2": (2, 2, "fp32"),
    "zero3": (2, 3, "fp32"),
    "zero1-bf16": (2, 1, "bf16"),
    "zero2-bf16": (2, 2, "bf16"),
    "zero3-bf16": (2, 3, "bf16"),
    "zero3-by-4": (4, 3, "fp32"),
    "zero2-by-4": (4, 2, "fp32"),
}
# Who loads: ranks -> (source, stage).
SOME = {
    1: [("zero2", 2), ("zero3", 3), ("zero2", 3), ("zero3-by-4", 1)],
    4: [("zero2", 2), ("zero3", 3)],
    2: [("zero0", 2), ("zero2-bf16", 3), ("zero3", 3)],
}
REST = {
    1: [
        ("zero3", 1), ("zero0", 2), ("zero2", 0), ("zero1", 3), ("zero3-by-4", 0),
        ("zero2-by-4", 3), ("zero1-bf16", 3), ("zero3-bf16", 1),
    ],
    4: [
        ("zero2", 3), ("zero3", 1), ("zero0", 2), ("zero1", 0), ("zero2-bf16", 1),
        ("zero3-bf16", 2),
    ],
    2: [
        ("zero0", 0), ("zero1", 1), ("zero2", 2), ("zero0", 3), ("zero3", 0), ("zero3-by-4", 2),
        ("zero1-bf16", 1), ("zero2-bf16", 2), ("zero3-bf16", 3),
    ],
}  # fmt: skip
CASES = {"some": SOME, "all": {ranks: SOME[ranks] + REST[ranks] for ranks in SOME}}


def make(world: World, stage: int, dtype: str, seed: int = 0) -> tuple[Engine, Any]:
    """An engine and its schedule; stage 3 with and without parameters that stay whole."""
    objective = toy.objective(seed, depth=1)
    micro, _ = split_batch(toy.BATCH, toy.MICRO, world.size)
    zero = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 1000 * (world.size == 2)
    native = resolve_native_config(
        {"zero_optimization": zero},
        batch_size=toy.BATCH,
        micro_batch_size=micro,
        world_size=world.size,
        grad_clip=toy.GRAD_CLIP,
        dtype=dtype,
        num_parameters=100_000,
    )
    engine = Engine(world, objective, toy.optimizer(objective.model, stage), native)
    average = WeightAverage(engine.optimizer, decay=0.5)
    return engine, toy.schedule(engine.optimizer, STEPS, average)


def run(engine: Engine, schedule: Any, steps: range) -> list[float]:
    batches = toy.Loader(engine.rank, engine.world_size).batches(start=steps.start * toy.BATCH)
    losses = []
    for step in steps:
        seed_step(0, step, engine.rank)
        micro_batches = [next(batches) for _ in range(engine.accumulation)]
        with schedule.at(step):
            losses.append(engine.train_step(micro_batches).loss)
    return losses


def full_state(engine: Engine) -> dict[str, torch.Tensor]:
    """All of the whole model: weights, moments, averages, steps, by DeepSpeed's own getters."""
    state = {}
    if engine.zero_stage in (1, 2):  # 0.19.8 links the states of the first group only
        zero = engine._engine.optimizer
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.objective.named_parameters():
        if engine.zero_stage == 0:
            own = engine.optimizer.state[parameter]
            state[name] = parameter.detach().clone()
            state |= {f"{name}/{key}": own[key].clone() for key in PER_ELEMENT}
        else:
            state[name] = safe_get_full_fp32_param(parameter).clone()
            for key in PER_ELEMENT:
                state[f"{name}/{key}"] = safe_get_full_optimizer_state(parameter, key).clone()
    holders = {piece.holder for piece in engine._layout.pieces()}
    (steps,) = {float(engine._layout.optimizer.state[holder]["step"]) for holder in holders}
    return state | {"step": torch.tensor(steps)}


def working_weights_are_the_masters(engine: Engine) -> bool:
    """Whether the weights that compute are the master weights, rounded to their own type."""
    same = True
    masters = dict(engine.full_parameters())
    for name, parameter in engine.model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_stage == 3):
            same &= torch.equal(parameter.detach(), masters[name].to(parameter.dtype))
    return same


def save(world: World, out: Path, names: set[str]) -> None:
    """Two steps, a checkpoint, and the two steps that an uninterrupted run would make."""
    make(world, 3, "fp32")  # replaces F.linear for the whole process: let it be so everywhere
    for name in sorted(names):
        ranks, stage, dtype = SOURCES[name]
        if ranks == world.size:
            engine, schedule = make(world, stage, dtype)
            run(engine, schedule, range(SAVED_AT))
            state = full_state(engine)
            Checkpoints(out / name, engine, keep=1).save(RunState(step=SAVED_AT))
            losses = run(engine, schedule, range(SAVED_AT, STEPS))
            end = full_state(engine)
            if world.rank == 0:
                torch.save({"state": state, "losses": losses, "end": end}, out / f"{name}.pt")


def load(world: World, out: Path, cases: list[tuple[str, int]]) -> None:
    """Each load into an engine that began differently."""
    entries = []
    make(world, 3, "fp32")
    for name, stage in cases:
        expected = torch.load(out / f"{name}.pt")
        engine, schedule = make(world, stage, SOURCES[name][2], seed=99)
        if stage == 3:  # an engine that has run already, as in a rollback
            run(engine, schedule, range(1))
        state = Checkpoints(out / name, engine, keep=1).load_newest()
        assert state is not None
        found = full_state(engine)
        consistent = working_weights_are_the_masters(engine)
        losses = run(engine, schedule, range(SAVED_AT, STEPS))
        end = full_state(engine)
        weights = [key for key in end if "/" not in key and key != "step"]
        entries.append(
            {
                "case": f"{name} -> {world.size} ranks, zero{stage}",
                "same_layout": SOURCES[name][:2] == (world.size, stage),
                "dtype": SOURCES[name][2],
                "not_equal": [k for k in found if not torch.equal(found[k], expected["state"][k])],
                "consistent": consistent,
                "losses": losses,
                "expected_losses": expected["losses"],
                "largest_difference": max(
                    float((end[key] - expected["end"][key]).abs().max()) for key in weights
                ),
            }
        )
    if world.rank == 0:
        (out / f"loads_{world.size}.json").write_text(json.dumps(entries))


def main(which: str, out: Path) -> None:
    loads = CASES[which]
    names = {name for cases in loads.values() for name, _ in cases}
    for ranks in (2, 4):
        in_world(ranks, lambda world: save(world, out, names))
    entries = []
    for ranks, cases in loads.items():
        in_world(ranks, lambda world, cases=cases: load(world, out, cases))
        entries += json.loads((out / f"loads_{ranks}.json").read_text())
    (out / "report.json").write_text(json.dumps(entries))


if __name__ == "__main__":
    main(sys.argv[-2], Path(sys.argv[-1]))
