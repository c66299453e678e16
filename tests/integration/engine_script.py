"""Launched by test_engine_stages.py: all that needs two ranks, in one start per ZeRO stage.

Usage: engine_script.py STAGE OUT. Writes OUT/report.json and OUT/*.safetensors for the test.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import toy
from safetensors.torch import save_file

from routedvit.training import engine as deepspeed_engine
from routedvit.training.checkpoints.checkpoint import Checkpoints
from routedvit.training.checkpoints.export import export_model
from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.config.native import resolve_native_config, split_batch
from routedvit.training.distributed.world import World
from routedvit.training.engine import Engine, StepResult
from routedvit.training.engine.state import TakenState
from routedvit.training.evaluators.features import collect, feature_batches, gather
from routedvit.training.trainer import seed_step
from routedvit.training.watch.gauges import forward_flops
from routedvit.training.watch.gradients import gradient_norms


def make(world: World, stage: int, seed: int = 0) -> tuple[Engine, Any]:
    """A fresh engine and its schedule."""
    objective = toy.objective(seed)
    objective.model.set_grad_checkpointing(stage >= 2)  # must not change a number
    micro, _ = split_batch(toy.BATCH, toy.MICRO, world.size)
    zero = (
        {"stage": stage, "stage3_param_persistence_threshold": 0}
        if stage == 3
        else {"stage": stage}
    )
    native = resolve_native_config(
        {"zero_optimization": zero},
        batch_size=toy.BATCH,
        micro_batch_size=micro,
        world_size=world.size,
        grad_clip=toy.GRAD_CLIP,
        dtype="fp32",
        num_parameters=100_000,
    )
    optimizer = toy.optimizer(objective.model, stage)
    engine = Engine(world, objective, optimizer, native)
    return engine, toy.schedule(optimizer)


@contextmanager
def on_a_slow_disk() -> Iterator[threading.Event]:
    """Nothing is written before the event is set."""
    disk, write = threading.Event(), TakenState.write

    def late(state: TakenState, folder: Path) -> None:
        assert disk.wait(300)
        write(state, folder)

    with patch.object(TakenState, "write", late):
        yield disk


def run(
    engine: Engine,
    schedule: Any,
    steps: range,
    poison_rank: int = -1,
    norms: list[dict[str, float]] | None = None,
) -> list[StepResult]:
    """Steps on the toy data; `poison_rank` gets one image that is not finite.

    `norms` is given the gradient norms per place of each step.
    """

    def take() -> None:
        assert norms is not None
        norms.append(gradient_norms(engine.full_gradients()))

    batches = toy.Loader(engine.rank, engine.world_size).batches(start=steps.start * toy.BATCH)
    results = []
    for step in steps:
        micro_batches = [next(batches) for _ in range(engine.accumulation)]
        if engine.rank == poison_rank:
            micro_batches[0]["image"][0, 0, 0, 0] = torch.nan
        seed_step(0, step, engine.rank)
        flags = {"stop": engine.rank == 1 and step == 2, "writing": engine.rank == 1 and step == 1}
        before_step = take if norms is not None else None
        with schedule.at(step):
            results.append(engine.train_step(micro_batches, before_step=before_step, **flags))
    return results


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone().contiguous() for name, value in engine.full_parameters()}


def main(stage: int, out: Path) -> None:
    world = deepspeed_engine.start()
    report: dict[str, Any] = {}
    engine, schedule = make(world, stage)

    # A step that is not finite on one rank is skipped on all, and harms nothing after it.
    before = weights(engine)
    (skipped,) = run(engine, schedule, range(1), poison_rank=1)
    after = weights(engine)
    report["skipped"] = skipped.skipped
    report["skipped_left_weights"] = all(torch.equal(before[name], after[name]) for name in before)

    norms: list[dict[str, float]] = []
    straight = run(engine, schedule, range(toy.STEPS), norms=norms)
    report["norms"] = norms
    report["steps"] = [
        result._replace(
            grad_norm=float(result.grad_norm), own_loss=float(result.own_loss)
        )._asdict()
        for result in straight
    ]
    final = weights(engine)
    with engine.evaluating() as model:
        logits = model(toy.batch(range(8))["image"]).float()
        report["routers"] = sorted(model.routing(toy.batch(range(2))["image"]))
        loader = toy.Validation(world.rank, world.size)
        # the toy set deals contiguous halves to the ranks, and gathering interleaves them
        features = gather(collect(feature_batches(model, loader))).features[:16:2]
        report["flops"] = forward_flops(model, (64, 64))
    export_model(engine, out / "weights", name=toy.MODEL, kwargs=toy.KWARGS)
    straight_checkpoint = Checkpoints(out / "straight", engine, keep=2)
    straight_checkpoint.save(RunState(step=toy.STEPS))

    # The same steps, but stopped in the middle and gone on by an engine that began differently.
    engine, schedule = make(world, stage)
    run(engine, schedule, range(1), poison_rank=1)
    run(engine, schedule, range(2))
    checkpoints = Checkpoints(out / "resumed", engine, keep=2)
    checkpoints.save(RunState(step=1))  # an older one, to fall back on
    middle = RunState(step=2, samples_seen=2 * toy.BATCH, best={"val/top1": 12.5})
    with on_a_slow_disk() as disk:
        checkpoints.save(middle, in_background=True)
        run(engine, schedule, range(2, toy.STEPS))  # what is written must not follow
        report["seen_too_early"] = checkpoints.path_of(2).exists()
        disk.set()
        checkpoints.settle()

    engine, schedule = make(world, stage, seed=99)
    checkpoints = Checkpoints(out / "resumed", engine, keep=2)
    state = checkpoints.load_newest()
    assert state is not None
    report["state"] = dataclasses.asdict(state)
    run(engine, schedule, range(2, toy.STEPS))
    resumed = weights(engine)
    report["resume_is_bit_identical"] = all(torch.equal(final[n], resumed[n]) for n in final)
    checkpoints.save(RunState(step=toy.STEPS))
    report["kept"] = sorted(path.name for path in (out / "resumed").glob("step_*"))

    # One flipped bit in the newest checkpoint: it is named, and the one before is used.
    if world.rank == 0:
        victim = max((out / "resumed" / f"step_{toy.STEPS:08d}").rglob("rank_*.safetensors"))
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    engine.barrier()
    told: list[str] = []
    engine, _ = make(world, stage, seed=98)
    state = Checkpoints(out / "resumed", engine, keep=2, tell=told.append).load_newest()
    report["fallback"] = [state.step if state else None, told]

    if world.rank == 0:
        save_file(
            {name: value.contiguous() for name, value in final.items()}, out / "final.safetensors"
        )
        outputs = {"logits": logits.contiguous(), "features": features.contiguous()}
        save_file(outputs, out / "logits.safetensors")
        (out / "report.json").write_text(json.dumps(report))
    deepspeed_engine.stop()


if __name__ == "__main__":
    main(int(sys.argv[-2]), Path(sys.argv[-1]))
