"""From the sections of a run config to the objects that train: the meaning of each key."""

from pathlib import Path
from typing import Any

from timm.scheduler.scheduler import Scheduler
from torch import nn

from routedvit.training.checkpoint import Checkpoints, RunState
from routedvit.training.config import RunConfig
from routedvit.training.console import Console
from routedvit.training.engine import Engine
from routedvit.training.evaluators import build_evaluators
from routedvit.training.evaluators.held_out_loss import HeldOutLoss
from routedvit.training.interfaces import EvalLoader, Evaluator, TrainLoader
from routedvit.training.interfaces import RoutingMonitor as Monitor
from routedvit.training.metrics import build_writer
from routedvit.training.native_config import resolve_native_config, split_batch, zero_stage
from routedvit.training.objectives import MaskedObjective, build_objective
from routedvit.training.optim import (
    add_parameters_beside_the_model,
    build_optimizer,
    build_schedule,
)
from routedvit.training.progress import build_progress
from routedvit.training.reconstruction import ReconstructionMonitor
from routedvit.training.routing_monitor import RoutingMonitor
from routedvit.training.trainer import Trainer, TrainerSettings
from routedvit.training.world import World


def build_engine(
    config: RunConfig, model: nn.Module, world: World, loader: TrainLoader
) -> tuple[Engine, Scheduler]:
    """The model under its loss, optimiser and ZeRO, and the schedule of its learning rate.

    Collective.
    """
    samples_per_epoch = loader.samples_per_epoch
    micro_batch_size, _ = split_batch(
        config.train.batch_size, config.train.micro_batch_size, world.size
    )
    native = resolve_native_config(
        config.deepspeed,
        batch_size=config.train.batch_size,
        micro_batch_size=micro_batch_size,
        world_size=world.size,
        grad_clip=config.train.grad_clip,
        dtype=config.precision.dtype,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
    objective = build_objective(
        config,
        model,
        micro_batch_size=micro_batch_size,
        device=world.device,
        mean=loader.mean,
        std=loader.std,
    )
    optimizer = build_optimizer(model, **config.optim.model_dump(), zero_stage=zero_stage(native))
    add_parameters_beside_the_model(optimizer, objective, config.optim.weight_decay)
    warmup = config.schedule.warmup_epochs * samples_per_epoch / config.train.batch_size
    schedule = build_schedule(
        optimizer,
        total_steps=config.total_steps(samples_per_epoch),
        warmup_steps=round(warmup),
        **config.schedule.model_dump(exclude={"warmup_epochs"}),
    )
    return Engine(world, objective, optimizer, native), schedule


def build_trainer(
    config: RunConfig,
    engine: Engine,
    schedule: Scheduler,
    loader: TrainLoader,
    eval_loader: EvalLoader | None,
    *,
    checkpoints: Checkpoints,
    state: RunState,
    tensorboard: Path,
    console: Console,
) -> Trainer:
    """The loop and everything it calls; `state` says where it begins."""
    samples = loader.samples_per_epoch
    progress = build_progress(engine.rank, console.stream)
    writer = build_writer(
        tensorboard,
        rank=engine.rank,
        tensorboard=config.log.tensorboard,
        resume_step=state.step,
        report=progress.message,
    )
    evaluators: list[Evaluator] = []
    monitor: Monitor | None = None
    if eval_loader is not None:
        every_steps = config.epochs_to_steps(config.eval.every_epochs, samples)
        evaluators = build_evaluators(eval_loader, every_steps=every_steps)
        if not config.objective.classifies:
            evaluators = [HeldOutLoss(engine.objective, eval_loader, every_steps=every_steps)]
        if config.log.probe_images and hasattr(engine.model, "routing"):
            probe = eval_loader.probe(config.log.probe_images)
            watched: dict[str, Any] = {"mean": loader.mean, "std": loader.std, "rank": engine.rank}
            monitor = RoutingMonitor(probe, writer, **watched)
            if isinstance(engine.objective, MaskedObjective):
                monitor = ReconstructionMonitor(
                    engine.objective, probe, writer, **watched, also=monitor
                )
    return Trainer(
        engine,
        loader,
        evaluators=evaluators,
        writer=writer,
        monitor=monitor,
        progress=progress,
        checkpoints=checkpoints,
        schedule=schedule,
        settings=TrainerSettings(
            total_steps=config.total_steps(samples),
            batch_size=config.train.batch_size,
            seed=config.seed,
            log_every=config.log.every_steps,
            checkpoint_every=config.checkpoint.every_steps,
            routing_every=config.log.routing_every_steps,
            best_metric=engine.objective.best_metric,  # type: ignore[arg-type]
            higher_is_better=engine.objective.higher_is_better,  # type: ignore[arg-type]
        ),
        state=state,
    )
