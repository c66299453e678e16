"""Launched by test_objectives.py: each objective on two ranks, under ZeRO-3 and in bf16.

Usage: objectives_script.py OUT. Writes OUT/report.json, OUT/*.safetensors and OUT/weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
from safetensors.torch import save_file
from torch import nn

from routedvit.training import engine as deepspeed_engine
from routedvit.training.checkpoints.export import export_model
from routedvit.training.config.native import resolve_native_config
from routedvit.training.distributed.world import World
from routedvit.training.engine import Engine
from routedvit.training.evaluators.held_out_loss import HeldOutLoss
from routedvit.training.objectives import DistillationObjective, MaskedObjective, build_loss
from routedvit.training.objectives.teacher import Teacher
from routedvit.training.recipe.optim import add_parameters_beside_the_model
from routedvit.training.watch.reconstruction import ReconstructionMonitor
from tests.integration import toy

STEPS = 3
WEIGHT_DECAY = 1.0  # of toy.optimizer


def masked() -> MaskedObjective:
    encoder = {**toy.KWARGS, "num_classes": 0, "global_pool": "token"}
    torch.manual_seed(0)
    model = timm.create_model(toy.MODEL, **encoder)
    return MaskedObjective(model, decoder_dim=32, decoder_depth=2, decoder_heads=2, seed=3)


def distillation() -> DistillationObjective:
    torch.manual_seed(9)
    network = timm.create_model("test_vit", num_classes=toy.CLASSES, img_size=32, patch_size=8)
    teacher = Teacher(network, mean=[0.4] * 3, std=[0.3] * 3, device=torch.device("cpu"))
    loss = build_loss("softmax")
    return DistillationObjective(toy.model(), loss, teacher=teacher, alpha=0.7, temperature=2.0)


OBJECTIVES = {"mae": masked, "distill": distillation}


def optimizer(objective: nn.Module, stage: int = 0) -> torch.optim.Optimizer:
    adamw = toy.optimizer(objective.model, stage)  # type: ignore[arg-type]
    add_parameters_beside_the_model(adamw, objective, WEIGHT_DECAY)
    return adamw


class Validation(toy.Validation):
    """Held-out samples with keys; the last rows of some batches are padding."""

    num_samples = toy.SAMPLES - 2 * 3

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for rows in super().__iter__():
            keys = [f"toy/{position}" for position in rows["position"].tolist()]
            yield rows | {"key": keys, "valid": rows["position"] % 32 < 29}


def held_out(objective: nn.Module, rank: int = 0, world_size: int = 1) -> dict[str, float]:
    evaluator = HeldOutLoss(objective, Validation(rank, world_size), every_steps=1)
    return dict(evaluator.run(objective.model))  # type: ignore[arg-type]


class Pictures:
    """A writer that counts."""

    names: ClassVar[list[str]] = []

    def image(self, name: str, image: torch.Tensor, step: int) -> None:
        self.names.append(name)


def run(world: World, name: str, stage: int, dtype: str, out: Path) -> dict[str, Any]:
    objective = OBJECTIVES[name]()
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # every weight is gathered and let go
    native = resolve_native_config(
        {"zero_optimization": zero},
        batch_size=toy.BATCH,
        micro_batch_size=toy.MICRO,
        world_size=world.size,
        grad_clip=toy.GRAD_CLIP,
        dtype=dtype,
        num_parameters=100_000,
    )
    engine = Engine(world, objective, optimizer(objective, stage), native)
    report: dict[str, Any] = {"losses": [], "norms": [], "metrics": []}
    batches = toy.Loader(world.rank, world.size).batches(0)
    for step in range(STEPS):
        result = engine.train_step([next(batches) for _ in range(engine.accumulation)])
        report["losses"].append(result.loss)
        report["norms"].append(float(result.grad_norm))
        report["metrics"].append(result.metrics)
        if name == "mae" and step < STEPS - 1:  # looking in between must change nothing
            with engine.evaluating() as model:
                held_out(objective, world.rank, world.size)
                probe = toy.batch(range(2))["image"]
                watched = {"mean": [0.5] * 3, "std": [0.5] * 3, "rank": world.rank}
                ReconstructionMonitor(objective, probe, Pictures(), **watched).run(model, step)
    if name == "mae":
        with engine.evaluating():
            report["held_out"] = held_out(objective, world.rank, world.size)
    saved = out / f"state_{name}_{stage}"
    saved.mkdir(exist_ok=True)
    engine.take_state().write(saved)
    weights = {name: value.clone() for name, value in engine.full_parameters()}
    kwargs = {**toy.KWARGS, "num_classes": 0, "global_pool": "token"}
    if name == "mae" and stage == 3:
        export_model(engine, out / "weights", name=toy.MODEL, kwargs=kwargs)
    if world.rank == 0:
        save_file({n: w.contiguous() for n, w in weights.items()}, out / f"{name}.safetensors")
    return report


def main(out: Path) -> None:
    world = deepspeed_engine.start()
    report = {
        "bf16": run(world, "mae", 2, "bf16", out),
        "mae": run(world, "mae", 3, "fp32", out),
        "distill": run(world, "distill", 3, "fp32", out),
        "pictures": Pictures.names,
    }
    if world.rank == 0:
        (out / "report.json").write_text(json.dumps(report))
    deepspeed_engine.stop()


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
