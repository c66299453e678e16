"""Launched by test_recipes.py: what changes by step, under every ZeRO stage, in one start.

Two ranks train the toy model with a weight average, sampled capacities and growing images, beside
a plain PyTorch loop with timm's ModelEmaV3. Usage: recipes_script.py OUT. Writes OUT/report.json.
"""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import timm
import torch
import toy
from overflowing import check_overflow
from timm.utils import ModelEmaV3
from torch import nn

from routedvit.training import engine as deepspeed_engine
from routedvit.training.checkpoints.checkpoint import Checkpoints
from routedvit.training.checkpoints.export import export_model
from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.config.native import resolve_native_config
from routedvit.training.distributed.world import World
from routedvit.training.engine import Engine
from routedvit.training.recipe import capacity
from routedvit.training.recipe.resolution import ResolutionDial
from routedvit.training.recipe.schedules import Schedules
from routedvit.training.recipe.weight_average import WeightAverage
from routedvit.training.trainer import seed_step

EMA: dict[str, Any] = {"decay": 0.9, "warmup": True, "warmup_power": 0.75}
FACTORS = [Fraction(1, 2), Fraction(1), Fraction(2)]
STAGES = [(1, 32), (3, 48)]  # (end, pixels): step 0, steps 1 and 2, then 64 pixels
Weights = dict[str, torch.Tensor]


class Still(nn.Module):
    """An objective without slope: every gradient is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.model = toy.model()

    def forward(self, image: torch.Tensor, target: torch.Tensor, position: torch.Tensor) -> Any:
        return 0.0 * self.model(image).float().sum(), {}


def dials(objective: nn.Module, optimizer: torch.optim.Optimizer) -> Schedules:
    factor = capacity.sample(FACTORS, seed=5)
    return toy.schedule(
        optimizer,
        toy.STEPS,
        WeightAverage(optimizer, **EMA),
        capacity.CapacityDial(objective.model, factor),  # type: ignore[arg-type]
        ResolutionDial(objective, STAGES, (64, 64)),
    )


def make(world: World, stage: int, objective: nn.Module, dtype: str = "fp32") -> Engine:
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 100} if stage == 3 else {})
    native = resolve_native_config(
        {"zero_optimization": zero},
        batch_size=toy.BATCH,
        micro_batch_size=toy.MICRO,
        world_size=world.size,
        grad_clip=toy.GRAD_CLIP,
        dtype=dtype,
        num_parameters=100_000,
    )
    optimizer = toy.optimizer(objective.model, stage)  # type: ignore[arg-type]
    return Engine(world, objective, optimizer, native)


def train(engine: Engine, schedules: Schedules, steps: range, poison: bool = False) -> bool:
    """Steps on the toy data; True if the last was skipped."""
    batches = toy.Loader(engine.rank, engine.world_size).batches(start=steps.start * toy.BATCH)
    for step in steps:
        micro_batches = [next(batches) for _ in range(engine.accumulation)]
        if poison and engine.rank == 1:
            micro_batches[0]["image"][0, 0, 0, 0] = torch.nan
        seed_step(0, step, engine.rank)
        with schedules.at(step):
            result = engine.train_step(micro_batches)
    return result.skipped


def plain() -> tuple[Weights, Weights, torch.Tensor]:
    """(weights, their average, the average's logits) of an ordinary loop in one process."""
    objective = toy.objective(dynamic_img_size=True)
    optimizer = toy.optimizer(objective.model)
    factor = capacity.sample(FACTORS, seed=5)
    schedules = toy.schedule(
        optimizer,
        toy.STEPS,
        capacity.CapacityDial(objective.model, factor),
        ResolutionDial(objective, STAGES, (64, 64)),
    )
    names = {"warmup": "use_warmup"}
    average = ModelEmaV3(objective.model, **{names.get(k, k): v for k, v in EMA.items()})
    for step in range(toy.STEPS):
        rows = toy.batch(range(step * toy.BATCH, (step + 1) * toy.BATCH))
        with schedules.at(step):
            loss, _ = objective(rows["image"], rows["target"], rows["position"])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(objective.parameters(), toy.GRAD_CLIP)
            optimizer.step()
        average.update(objective.model, step=step + 1)
    with torch.no_grad():
        logits = average.module(toy.batch(range(8))["image"])
    own = {name: p.detach() for name, p in objective.model.named_parameters()}
    return own, {name: p.detach() for name, p in average.module.named_parameters()}, logits


def weights(engine: Engine) -> Weights:
    return {name: value.detach().clone() for name, value in engine.full_parameters()}


def logits(engine: Engine) -> torch.Tensor:
    with engine.evaluating() as model:
        return model(toy.batch(range(8))["image"]).float()


def averages(engine: Engine) -> Weights:
    with engine.ema_weights():
        return weights(engine)


def distance(one: Weights, other: Weights) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in other)


def equal(one: Weights, other: Weights) -> bool:
    return all(torch.equal(one[name], other[name]) for name in other)


def check_average(world: World, stage: int, out: Path, reference: Any) -> dict[str, Any]:
    """Against the plain loop; swapped in and out; skipped; saved and resumed."""
    report: dict[str, Any] = {}
    objective = toy.objective(dynamic_img_size=True)
    engine = make(world, stage, objective)
    schedules = dials(objective, engine.optimizer)
    train(engine, schedules, range(2))
    before = averages(engine)
    report["skipped"] = train(engine, schedules, range(2, 3), poison=True)
    report["skipped_left_average"] = equal(averages(engine), before)
    checkpoints = Checkpoints(out / f"zero{stage}", engine, keep=2)
    checkpoints.save(RunState(step=2, samples_seen=2 * toy.BATCH))
    train(engine, schedules, range(2, toy.STEPS))

    own, own_logits = weights(engine), logits(engine)
    with engine.ema_weights():
        average, average_logits = weights(engine), logits(engine)
        made = toy.KWARGS | {"dynamic_img_size": True}
        export_model(engine, out / f"weights{stage}", name=toy.MODEL, kwargs=made)
    report["restored"] = equal(weights(engine), own) and torch.equal(logits(engine), own_logits)
    report["swap_is_seen"] = not torch.equal(average_logits, own_logits)
    report["weights"] = distance(own, reference[0])
    report["average"] = distance(average, reference[1])
    report["moved"] = distance(average, own)
    report["logits"] = float((average_logits - reference[2]).abs().max())
    exported = timm.create_model(f"local-dir:{out / f'weights{stage}'}", pretrained=True).eval()
    with torch.no_grad():
        again = exported(toy.batch(range(8))["image"])
    report["exported"] = float((average_logits - again).abs().max())

    objective = toy.objective(99, dynamic_img_size=True)
    engine = make(world, stage, objective)
    schedules = dials(objective, engine.optimizer)
    Checkpoints(out / f"zero{stage}", engine, keep=2).load_newest()
    report["loaded"] = equal(averages(engine), before)
    train(engine, schedules, range(2, toy.STEPS))
    report["resumed"] = equal(weights(engine), own) and equal(averages(engine), average)
    return report


def check_bf16(world: World, stage: int) -> dict[str, Any]:
    """The average follows the fp32 masters, and the bf16 weights come back from it."""
    objective = toy.objective(dynamic_img_size=True)
    engine = make(world, stage, objective, "bf16")
    schedules = dials(objective, engine.optimizer)
    by_hand: Weights = {}
    for step in range(toy.STEPS):
        train(engine, schedules, range(step, step + 1))
        decay = schedules.scalars()["train/ema_decay"]
        now = weights(engine)
        by_hand = {n: by_hand.get(n, v).lerp(v, 1 - decay) for n, v in now.items()}
    own, own_logits = weights(engine), logits(engine)
    with engine.ema_weights():
        average, average_logits = weights(engine), logits(engine)
    return {
        "average": distance(average, by_hand),
        "dtype": str(average["pos_embed"].dtype),
        "restored": equal(weights(engine), own) and torch.equal(logits(engine), own_logits),
        "swap_is_seen": not torch.equal(average_logits, own_logits),
    }


def check_groups(world: World, stage: int) -> dict[str, list[float]]:
    """Without gradients AdamW only decays: by parameter, what is left and what should be."""
    objective = Still()
    engine = make(world, stage, objective)
    before, groups = weights(engine), {}
    plain_model = toy.model()
    names = {id(p): name for name, p in plain_model.named_parameters()}
    optimizer = toy.optimizer(plain_model)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            groups[names[id(parameter)]] = (group["lr_scale"], group["weight_decay"])
    train(engine, toy.schedule(engine.optimizer), range(1, 2))  # the step after the warm-up
    after = weights(engine)
    left = {n: float(after[n].double().norm() / before[n].double().norm()) for n in groups}
    peak = 2e-3  # of toy.optimizer
    return {
        n: [left[n], 1 - peak * scale * decay]
        for n, (scale, decay) in groups.items()
        if before[n].any()  # a bias that is still 0 cannot shrink
    }


def main(out: Path) -> None:
    world = deepspeed_engine.start()
    reference = plain()
    report: dict[str, Any] = {}
    for stage in range(4):
        report[f"average{stage}"] = check_average(world, stage, out, reference)
        report[f"groups{stage}"] = check_groups(world, stage)
        report[f"overflow{stage}"] = check_overflow(make(world, stage, toy.objective()), out)
    for stage in (1, 3):  # stage 1 has an optimiser of its own for bf16
        report[f"bf16_{stage}"] = check_bf16(world, stage)
    if world.rank == 0:
        (out / "report.json").write_text(json.dumps(report))
    deepspeed_engine.stop()


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
