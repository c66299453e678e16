"""From the sections of a run config to the objects that train: the meaning of each key."""

from pathlib import Path

from timm.scheduler.scheduler import Scheduler
from torch import nn

from routedvit.training.checkpoint import Checkpoints, RunState
from routedvit.training.compiling import compile_blocks, leaf_modules
from routedvit.training.config import RunConfig
from routedvit.training.console import Console
from routedvit.training.engine import Engine
from routedvit.training.evaluators import build_evaluators
from routedvit.training.interfaces import EvalLoader, TrainLoader
from routedvit.training.metrics import build_writer
from routedvit.training.model import set_checkpointing
from routedvit.training.native_config import resolve_native_config, split_batch, zero_stage
from routedvit.training.objectives import SupervisedObjective, build_loss, build_mixup
from routedvit.training.optim import build_optimizer, build_schedule
from routedvit.training.progress import build_progress
from routedvit.training.routing_monitor import RoutingMonitor
from routedvit.training.trainer import Trainer, TrainerSettings
from routedvit.training.world import World


def build_engine(
    config: RunConfig, model: nn.Module, world: World, samples_per_epoch: int
) -> tuple[Engine, Scheduler]:
    """The model under its loss, optimiser and ZeRO, and the schedule of its learning rate.

    Collective.
    """
    objective = build_objective(config, model, world.size)
    if config.train.compile:
        compile_blocks(model, world.device)
    engine = wrap_objective(config, objective, world)
    warmup = config.schedule.warmup_epochs * samples_per_epoch / config.train.batch_size
    schedule = build_schedule(
        engine.optimizer,
        total_steps=config.total_steps(samples_per_epoch),
        warmup_steps=round(warmup),
        **config.schedule.model_dump(exclude={"warmup_epochs"}),
    )
    return engine, schedule


def build_objective(config: RunConfig, model: nn.Module, world_size: int) -> nn.Module:
    """The model, with the checkpointing that `train` asks for, and what it learns from."""
    micro_batch_size, _ = split_batch(
        config.train.batch_size, config.train.micro_batch_size, world_size
    )
    set_checkpointing(model, *config.train.checkpointing)
    mixup = build_mixup(
        config.loss.mixup,
        config.loss.cutmix,
        label_smoothing=config.loss.label_smoothing,
        num_classes=config.model.kwargs["num_classes"],
        batch_size=micro_batch_size,
    )
    loss = build_loss(config.loss.name, config.loss.label_smoothing, mixed=mixup is not None)
    return SupervisedObjective(model, loss, mixup)


def wrap_objective(config: RunConfig, objective: nn.Module, world: World) -> Engine:
    """An objective under its optimiser and ZeRO. Collective."""
    model: nn.Module = objective.model  # type: ignore[assignment]
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
        autocast=config.precision.autocast,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
    if config.train.compile and zero_stage(native) == 3:
        native["zero_optimization"].setdefault("leaf_module", leaf_modules(model))
    optimizer = build_optimizer(model, **config.optim.model_dump(), zero_stage=zero_stage(native))
    return Engine(world, objective, optimizer, native)


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
    evaluators, monitor = [], None
    if eval_loader is not None:
        every_steps = config.epochs_to_steps(config.eval.every_epochs, samples)
        evaluators = build_evaluators(eval_loader, every_steps=every_steps)
        if config.log.probe_images and hasattr(engine.model, "routing"):
            monitor = RoutingMonitor(
                eval_loader.probe(config.log.probe_images),
                writer,
                mean=loader.mean,
                std=loader.std,
                rank=engine.rank,
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
        ),
        state=state,
    )
