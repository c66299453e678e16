"""Run by test_stage_parity.py: every routing option under every ZeRO stage, two ranks, one start.

Usage: parity_script.py OUT. Writes OUT/report.json: per option and stage, the largest difference of
losses and weights from plain PyTorch in one process, the norm of all differences over the norm of
all movements, and how far the weights moved at all.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import timm
import torch
import toy
from torch import nn
from worlds import in_world

from routedvit.training.config.native import resolve_native_config, split_batch
from routedvit.training.distributed.world import World
from routedvit.training.engine import Engine
from routedvit.training.objectives import SupervisedObjective, build_loss

STEPS = 3
OPTIONS: dict[str, dict[str, Any]] = {
    "learned": {},
    "random": {"router": "random"},
    "static": {"router": "static"},
    "all_heavy": {"router": "all_heavy"},
    "all_light": {"router": "all_light"},
    "two kv routes": {"kv_routes": 2},
    "gate on values, null kv": {"kv_gate": "values", "null_kv": True},
    "null token, routed raw": {"null_token": True, "route_raw": True},
    "norms of their own": {"separate_norms": True},
    "straight through, cosine": {"router_kwargs": {"straight_through": True, "cosine": True}},
    "coordinate descent": {"router_kwargs": {"solver": "coordinate_descent"}},
    "first block dense, class token": {"dense_blocks": 1, "depth": 2, "class_token": True},
    "rotary, swiglu": {"rope": True, "mlp_layer": "swiglu", "pos_embed": "none"},
    "no light paths": {"light_heads": 0, "light_mlp_ratio": 0},
    "all tokens": {"q_capacity": 1.0, "kv_capacity": 1.0, "ffn_capacity": 1.0},
}
# At capacity 1 no router is asked, so its weights have a gradient in some steps and none in others.
CAPACITIES: dict[str, tuple[float, ...]] = {
    "all tokens in one step": (0.25, 1.0, 0.25),
    "all tokens but in one step": (1.0, 0.25, 1.0),
}


def network(options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(toy.MODEL, **{**toy.KWARGS, "depth": 1, **options})


def prepare(model: Any, option: str, step: int) -> None:
    """Sets the capacity of this step, where the option has one for each."""
    if capacities := CAPACITIES.get(option):
        model.set_capacity(capacities[step])


def plain(option: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of an ordinary loop over the micro-batches of both ranks."""
    model = network(OPTIONS.get(option, {}))
    loss_function, adamw = build_loss("softmax", 0.1), toy.optimizer(model)
    losses = []
    for step in range(STEPS):
        prepare(model, option, step)
        total = 0.0
        for first in range(step * toy.BATCH, (step + 1) * toy.BATCH, toy.MICRO):
            rows = toy.batch(range(first, first + toy.MICRO))
            torch.manual_seed(first)  # of the random router
            loss = loss_function(model(rows["image"]), rows["target"]) * toy.MICRO / toy.BATCH
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), toy.GRAD_CLIP)
        adamw.step()
        adamw.zero_grad()
        losses.append(total)
    return losses, {name: p.detach() for name, p in model.named_parameters()}


class Seeded(SupervisedObjective):
    """Draws what it draws from the position of its first image."""

    def forward(self, image: Any, target: Any, position: torch.Tensor) -> Any:
        torch.manual_seed(int(position[0]))
        return super().forward(image, target, position)


def sharded(world: World, option: str, stage: int) -> tuple[list[float], Any]:
    """The same through the engine."""
    objective = Seeded(network(OPTIONS.get(option, {})), build_loss("softmax", 0.1))
    micro, _ = split_batch(toy.BATCH, toy.MICRO, world.size)
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # every weight is gathered and let go
    native = resolve_native_config(
        {"zero_optimization": zero},
        batch_size=toy.BATCH,
        micro_batch_size=micro,
        world_size=world.size,
        grad_clip=toy.GRAD_CLIP,
        dtype="fp32",
        num_parameters=100_000,
    )
    engine = Engine(world, objective, toy.optimizer(objective.model, stage), native)
    batches = toy.Loader(world.rank, world.size).batches(start=0)
    losses = []
    for step in range(STEPS):
        prepare(objective.model, option, step)
        micros = [next(batches) for _ in range(engine.accumulation)]
        losses.append(engine.train_step(micros).loss)
    return losses, {name: value.detach().clone() for name, value in engine.full_parameters()}


def norm(values: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([value.flatten() for value in values.values()]).norm())


def compare(world: World, out: Path) -> None:
    report = []
    for option in [*OPTIONS, *CAPACITIES]:
        losses, weights = plain(option)
        begin = network(OPTIONS.get(option, {})).state_dict()
        for stage in range(4):
            own_losses, own = sharded(world, option, stage)
            apart = {key: own[key] - weights[key] for key in weights}
            moved = {key: weights[key] - begin[key] for key in weights}
            report.append(
                {
                    "option": option,
                    "stage": stage,
                    "loss": max(abs(a - b) for a, b in zip(own_losses, losses, strict=True)),
                    "weights": max(float(value.abs().max()) for value in apart.values()),
                    "relative": norm(apart) / norm(moved),
                    "moved": max(float(value.abs().max()) for value in moved.values()),
                }
            )
    if world.rank == 0:
        (out / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    in_world(2, lambda world: compare(world, Path(sys.argv[-1])))
