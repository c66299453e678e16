"""From the sections of a run config to the objects that train: the meaning of each key."""

import json
from pathlib import Path

from timm.data import resolve_input_data_config
from timm.scheduler.scheduler import Scheduler
from torch import nn

from routedvit.training.checkpoint import Checkpoints, RunState
from routedvit.training.config import ConfigError, RunConfig
from routedvit.training.console import Console
from routedvit.training.engine import Engine
from routedvit.training.evaluators import build_evaluators
from routedvit.training.gauges import ForwardCounter, forward_flops, known_peak, measured_flops
from routedvit.training.guard import Guard
from routedvit.training.interfaces import EvalLoaders, MetricWriter, TrainLoader
from routedvit.training.metrics import build_writer, flat_hparams
from routedvit.training.native_config import resolve_native_config, split_batch, zero_stage
from routedvit.training.objectives import SupervisedObjective, build_loss, build_mixup
from routedvit.training.optim import build_optimizer, build_schedule
from routedvit.training.profiler import ProfilerWindow
from routedvit.training.progress import build_progress
from routedvit.training.retention import Retention
from routedvit.training.routing_monitor import RoutingMonitor
from routedvit.training.trainer import Trainer, TrainerSettings
from routedvit.training.world import World

# Sections that change nothing about how good a run gets.
NO_HPARAMS = ("about", "name", "output_dir", "eval", "checkpoint", "log", "deepspeed")


def build_engine(
    config: RunConfig, model: nn.Module, world: World, samples_per_epoch: int
) -> tuple[Engine, Scheduler]:
    """The model under its loss, optimiser and ZeRO, and the schedule of its learning rate.

    Collective.
    """
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
    mixup = build_mixup(
        config.loss.mixup,
        config.loss.cutmix,
        label_smoothing=config.loss.label_smoothing,
        num_classes=config.model.kwargs["num_classes"],
        batch_size=micro_batch_size,
    )
    loss = build_loss(config.loss.name, config.loss.label_smoothing, mixed=mixup is not None)
    objective = SupervisedObjective(model, loss, mixup)
    optimizer = build_optimizer(model, **config.optim.model_dump(), zero_stage=zero_stage(native))
    warmup = config.schedule.warmup_epochs * samples_per_epoch / config.train.batch_size
    schedule = build_schedule(
        optimizer,
        total_steps=config.total_steps(samples_per_epoch),
        warmup_steps=round(warmup),
        **config.schedule.model_dump(exclude={"warmup_epochs"}),
    )
    return Engine(world, objective, optimizer, native), schedule


def build_checkpoints(
    config: RunConfig, engine: Engine, folder: Path, console: Console
) -> Checkpoints:
    """Where the run saves, and what of it stays."""
    section = config.checkpoint
    retention = Retention(
        keep=section.keep,
        keep_every=section.keep_every,
        keep_best=section.keep_best,
        metric=section.best_metric,
        mode=section.best_mode,
    )
    return Checkpoints(folder, engine, keep=retention, tell=console.print)


def build_trainer(
    config: RunConfig,
    engine: Engine,
    schedule: Scheduler,
    loader: TrainLoader,
    eval_loaders: EvalLoaders | None,
    *,
    checkpoints: Checkpoints,
    state: RunState,
    folder: Path,
    console: Console,
) -> Trainer:
    """The loop and everything it calls; `state` says where it begins, `folder` is the run's."""
    samples = loader.samples_per_epoch
    progress = build_progress(engine.rank, console.stream)
    writer = build_writer(
        folder, config.log, rank=engine.rank, resume_step=state.step, report=progress.message
    )
    describe_run(config, writer, state.step)
    evaluators, monitor = [], None
    if eval_loaders is not None:
        evaluators = build_evaluators(
            config.eval,
            engine.model,
            eval_loaders,
            steps=lambda epochs: config.epochs_to_steps(epochs, samples),
        )
        if config.log.probe_images and hasattr(engine.model, "routing"):
            monitor = RoutingMonitor(
                eval_loaders.val.probe(config.log.probe_images),
                writer,
                mean=loader.mean,
                std=loader.std,
                rank=engine.rank,
                tell=progress.message,
            )
    profiler = None
    if config.log.profile_steps and engine.rank == 0:
        profiler = ProfilerWindow(
            *config.log.profile_steps, folder / "profile", tell=progress.message
        )
    best = config.checkpoint.best_metric
    if config.checkpoint.keep_best and best.split("/")[0] not in {e.name for e in evaluators}:
        names = ", ".join(evaluator.name for evaluator in evaluators) or "none"
        raise ConfigError(
            f"checkpoint.best_metric = {best!r}: no evaluator has that name; there are: {names}"
        )
    return Trainer(
        engine,
        loader,
        evaluators=evaluators,
        writer=writer,
        monitor=monitor,
        progress=progress,
        checkpoints=checkpoints,
        guard=Guard(
            engine,
            checkpoints.folder.parent / "logs" / "bad_steps.jsonl",
            **config.guard.model_dump(),
            tell=progress.message,
        ),
        schedule=schedule,
        settings=TrainerSettings(
            total_steps=config.total_steps(samples),
            batch_size=config.train.batch_size,
            seed=config.seed,
            log_every=config.log.every_steps,
            checkpoint_every=config.checkpoint.every_steps,
            routing_every=config.log.routing_every_steps,
            gradients_every=config.log.gradients_every_steps,
        ),
        state=state,
        forwards=count_forwards(engine, config.log.peak_tflops),
        profiler=profiler,
    )


def count_forwards(engine: Engine, peak_tflops: float | None) -> ForwardCounter:
    """The counter of the network's arithmetic. Collective."""
    flops = forward_flops
    if not hasattr(engine.model, "flops"):  # one of timm's own
        with engine.evaluating() as model:
            measured = measured_flops(model, resolve_input_data_config(model)["input_size"])
        flops = lambda model, size: measured  # noqa: E731
    return ForwardCounter(
        engine.model,
        flops,
        world_size=engine.world_size,
        peak_tflops=peak_tflops or known_peak(engine.device),
    )


def describe_run(config: RunConfig, writer: MetricWriter, step: int) -> None:
    """The resolved config to be read, and what was chosen in it to be compared with other runs'."""
    resolved = config.model_dump(mode="json", exclude_none=True)
    writer.text("config", f"```json\n{json.dumps(resolved, indent=2)}\n```", step)
    chosen = config.model_dump(mode="json", exclude_defaults=True, exclude=set(NO_HPARAMS))
    augment = chosen.pop("data", {}).get("augment", {})
    writer.hparams(flat_hparams(chosen | {"augment": augment}), ["val/top1", "val/loss"])
