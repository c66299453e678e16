"""From the sections of a run config to the objects that train: the meaning of each key."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from timm.data import resolve_input_data_config
from torch import nn

from routedvit.training.assembly_watch import (
    build_monitor,
    count_forwards,
    describe_run,
)
from routedvit.training.checkpoints.checkpoint import Checkpoints
from routedvit.training.checkpoints.retention import Retention
from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.compiling import (
    check_right_under_zero3,
    compile_blocks,
    leaf_modules,
)
from routedvit.training.config.native import resolve_native_config, split_batch, zero_stage
from routedvit.training.config.run import ConfigError, RunConfig
from routedvit.training.distributed.patience import Patience
from routedvit.training.distributed.signals import StopSignals
from routedvit.training.distributed.world import World
from routedvit.training.engine import Engine
from routedvit.training.guard import Guard
from routedvit.training.interfaces import EvalLoaders, Evaluator, TrainLoader
from routedvit.training.interfaces import RoutingMonitor as Monitor
from routedvit.training.model import set_checkpointing
from routedvit.training.objectives import build_objective
from routedvit.training.recipe import capacity
from routedvit.training.recipe.optim import (
    add_parameters_beside_the_model,
    build_optimizer,
    build_schedule,
)
from routedvit.training.recipe.resolution import ResolutionDial, check_resampling
from routedvit.training.recipe.schedules import Dial, Schedules
from routedvit.training.recipe.weight_average import WeightAverage
from routedvit.training.recipe.weight_decay import WeightDecayDial
from routedvit.training.trainer import Trainer
from routedvit.training.trainer_settings import TrainerSettings
from routedvit.training.watch.console import Console
from routedvit.training.watch.metrics import build_writer
from routedvit.training.watch.profiler import ProfilerWindow
from routedvit.training.watch.progress import build_progress


def build_engine(
    config: RunConfig, model: nn.Module, world: World, loader: TrainLoader
) -> tuple[Engine, Schedules]:
    """The model under its loss, optimiser and ZeRO, and all that changes by step.

    Collective.
    """
    micro_batch_size, _ = split_batch(
        config.train.batch_size, config.train.micro_batch_size, world.size
    )
    objective = build_objective(
        config,
        model,
        micro_batch_size=micro_batch_size,
        device=world.device,
        mean=loader.mean,
        std=loader.std,
    )
    set_checkpointing(model, *config.train.checkpointing)
    if config.train.compile:
        sizes = 1 + len(config.resolution.stages)
        compile_blocks(model, world.device, shapes=sizes * len(capacity.scheduled(config.capacity)))
    engine, average = wrap_objective(config, objective, world)
    return engine, build_schedules(config, engine, average, loader.samples_per_epoch)


def native_config(config: RunConfig, world_size: int, num_parameters: int) -> dict[str, Any]:
    """What DeepSpeed is given for a run; see `resolve_native_config`."""
    micro_batch_size, _ = split_batch(
        config.train.batch_size, config.train.micro_batch_size, world_size
    )
    return resolve_native_config(
        config.deepspeed,
        batch_size=config.train.batch_size,
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        grad_clip=config.train.grad_clip,
        dtype=config.precision.dtype,
        autocast=config.precision.autocast,
        num_parameters=num_parameters,
    )


def wrap_objective(
    config: RunConfig, objective: nn.Module, world: World
) -> tuple[Engine, WeightAverage | None]:
    """An objective under its optimiser and ZeRO, and the average of its weights. Collective."""
    model: nn.Module = objective.model  # type: ignore[assignment]
    if world.size > 1:
        check_statistics(objective)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    native = native_config(config, world.size, num_parameters)
    if config.train.compile and zero_stage(native) == 3:
        check_right_under_zero3()
        native["zero_optimization"].setdefault("leaf_module", leaf_modules(model))
    arguments = config.optim.arguments(config.train.batch_size)
    optimizer = build_optimizer(model, **arguments, zero_stage=zero_stage(native))
    add_parameters_beside_the_model(optimizer, objective, config.optim.weight_decay)
    average = None
    if config.ema.decay is not None:
        average = WeightAverage(optimizer, **config.ema.model_dump())
    return Engine(world, objective, optimizer, native), average


def check_statistics(objective: nn.Module) -> None:
    """Refuse running statistics, which each rank would gather from its own images and keep.

    Raises:
        ConfigError: names the layer.
    """
    for name, module in objective.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            raise ConfigError(
                f"model.name: {name.removeprefix('model.')} is a {type(module).__name__}, whose "
                "running statistics would differ between ranks; choose a model without batch "
                "norm, or train on one rank"
            )


def build_schedules(
    config: RunConfig, engine: Engine, average: WeightAverage | None, samples_per_epoch: int
) -> Schedules:
    """Learning rate, weight decay and average, capacity and image size by step, as asked for.

    Raises:
        ConfigError: one of them is impossible with this model.
    """
    total_steps = config.total_steps(samples_per_epoch)
    steps_per_epoch = samples_per_epoch / config.train.batch_size
    schedule = config.schedule.model_dump(exclude={"warmup_epochs", "timescale_epochs"})
    rate = build_schedule(
        engine.optimizer,
        total_steps=total_steps,
        warmup_steps=round(config.schedule.warmup_epochs * steps_per_epoch),
        timescale_steps=(config.schedule.timescale_epochs or 0) * steps_per_epoch,
        **schedule,
    )
    dials: list[Dial] = [average] if average is not None else []
    if config.optim.weight_decay_end is not None:
        dials.append(WeightDecayDial(engine.optimizer, config.optim.weight_decay_end, total_steps))
    recipe = config.capacity
    if recipe.schedule != "none":
        factors = capacity.scheduled(recipe)
        if recipe.schedule == "anneal":
            steps = max(1, round(recipe.until * total_steps))
            factor = capacity.anneal(factors, steps, recipe.shape)
        else:
            factor = capacity.sample(factors, config.seed)
        dials.append(capacity.CapacityDial(engine.model, factor))
    if config.resolution.stages:
        if config.precision.deterministic:
            check_resampling(engine.model, engine.device)
        stages = [(round(s.until * total_steps), s.size) for s in config.resolution.stages]
        made = {"model_kwargs": config.model.kwargs}
        _, height, width = resolve_input_data_config(engine.model, made)["input_size"]
        dials.append(ResolutionDial(engine.objective, stages, (height, width)))
    return Schedules(rate, dials)


def build_retention(
    config: RunConfig, objective: nn.Module, evaluators: Sequence[Evaluator]
) -> Retention:
    """Which checkpoints stay.

    Raises:
        ConfigError: the best are to stay, by what no evaluator says, or only averages are to be
            evaluated and none are kept.
    """
    section = config.checkpoint
    if config.eval.weights == "ema" and config.ema.decay is None:  # those on disk may have some
        raise ConfigError(
            'eval.weights = "ema" would do nothing: it needs ema.decay, such as 0.9999; set that, '
            'or delete eval.weights (its default is "both")'
        )
    metric: str = section.best_metric or objective.best_metric  # type: ignore[assignment]
    if section.best_metric is None and not _evaluates_raw(config):
        metric = metric.replace("/", "_ema/")
    names = {evaluator.name for evaluator in evaluators if _evaluates_raw(config)}
    if _evaluates_average(config):
        names |= {f"{evaluator.name}_ema" for evaluator in evaluators}
    if (section.keep_best or section.best_metric) and metric.split("/")[0] not in names:
        raise ConfigError(
            f"checkpoint.best_metric = {metric!r}: no evaluator has that name; there are: "
            f"{', '.join(sorted(names)) or 'none (set data.val.shards)'}"
        )
    return Retention(
        keep=section.keep,
        keep_every=section.keep_every,
        keep_best=section.keep_best,
        metric=metric,
        mode=section.best_mode or ("min" if metric.endswith("loss") else "max"),
    )


def build_trainer(
    config: RunConfig,
    engine: Engine,
    schedules: Schedules,
    loader: TrainLoader,
    eval_loaders: EvalLoaders | None,
    *,
    evaluators: Sequence[Evaluator],
    checkpoints: Checkpoints,
    state: RunState,
    folder: Path,
    console: Console,
    signals: StopSignals,
    patience: Patience | None = None,
    export: Callable[[], None] | None = None,
) -> Trainer:
    """The loop and everything it calls; `state` says where it begins, `folder` is the run's."""
    samples = loader.samples_per_epoch
    progress = build_progress(engine.rank, console.stream)
    writer = build_writer(
        folder, config.log, rank=engine.rank, resume_step=state.step, report=progress.message
    )
    describe_run(config, writer, state.step)
    monitor: Monitor | None = None
    if eval_loaders is not None:
        monitor = build_monitor(config, engine, eval_loaders, loader, writer, progress.message)
    profiler = None
    if config.log.profile_steps and engine.rank == 0:
        profiler = ProfilerWindow(
            *config.log.profile_steps, folder / "profile", tell=progress.message
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
        schedules=schedules,
        signals=signals,
        settings=TrainerSettings(
            total_steps=config.total_steps(samples),
            batch_size=config.train.batch_size,
            seed=config.seed,
            log_every=config.log.every_steps,
            checkpoint_every=config.checkpoint.every_steps,
            routing_every=config.log.routing_every_steps,
            save_in_background=config.checkpoint.in_background,
            evaluate_raw=_evaluates_raw(config),
            evaluate_ema=_evaluates_average(config),
            gradients_every=config.log.gradients_every_steps,
        ),
        state=state,
        forwards=count_forwards(engine, config),
        profiler=profiler,
        patience=patience,
        export=export,
    )


def _evaluates_raw(config: RunConfig) -> bool:
    return config.ema.decay is None or config.eval.weights != "ema"


def _evaluates_average(config: RunConfig) -> bool:
    return config.ema.decay is not None and config.eval.weights != "raw"
