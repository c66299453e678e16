"""The words around a run on the console: what begins, how it ended, what to type next."""

from collections.abc import Mapping

from routedvit.training.config.base import counted
from routedvit.training.config.run import RunConfig
from routedvit.training.run_folder import RunFolder
from routedvit.training.trainer import Trainer
from routedvit.training.trainer_settings import Summary
from routedvit.training.watch.progress import duration, summary


def opening(config: RunConfig, trainer: Trainer) -> str:
    """Two lines: the model and its data, the machines and the steps."""
    engine, loader = trainer.engine, trainer.loader
    micro_batch = config.train.batch_size // (engine.world_size * engine.accumulation)
    share = f"{engine.world_size} x {micro_batch}"
    if engine.accumulation > 1:
        share += f" x {engine.accumulation} accumulated"
    done, total = trainer.state.step, trainer.settings.total_steps
    steps = counted(total, "step")
    if done:
        steps += f", {done:,} of them done"
    classes = f" of {loader.num_classes} classes" if loader.num_classes > 1 else ""
    return (
        f"{config.model.name}, {engine.num_parameters:,} parameters, on "
        f"{loader.samples_per_epoch:,} images{classes}\n"
        f"{engine.world_size} x {engine.device.type}, ZeRO-{engine.zero_stage}, "
        f"{config.precision.dtype}, batch {config.train.batch_size} = {share}, {steps}"
    )


def closing(result: Summary, folder: RunFolder, batch_size: int, copy: str | None = None) -> str:
    """The summary block of a finished run, with the place of its `copy`."""
    rows = []
    for name, value in result.best.items():
        rows.append((f"best {name}", f"{value:.4f}" if name.endswith("loss") else f"{value:.2f} %"))
    if result.steps:
        rows.append(("time", duration(result.seconds)))
    if result.images_per_second:
        wait = f"{result.data_wait_share:.1%} of it waiting for data"
        rows.append(("throughput", f"{result.images_per_second:,.0f} images/s, {wait}"))
    if result.steps and result.spent["starts"] > 1:
        rows.append(("over all starts", over_all_starts(result.spent, batch_size)))
    if result.skipped_steps:
        rows.append(("skipped steps", str(result.skipped_steps)))
    rows += [
        ("checkpoint", str(result.checkpoint)),
        ("weights", str(folder.weights)),
        *([("averaged weights", str(folder.ema_weights))] if folder.ema_weights.exists() else []),
        *([("copy", copy)] if copy is not None else []),
        ("TensorBoard", str(folder.path)),
    ]
    title = "finished" if result.steps else "already finished (--fresh starts over)"
    return summary(
        f"{title}: {counted(result.step, 'step')}",
        rows,
        f"tensorboard --logdir {folder.path.parent}",
    )


def over_all_starts(spent: Mapping[str, float], batch_size: int) -> str:
    """'3 starts, 1:02:03, 8.3 device-hours, 1,234 images/s with all that is no step'."""
    rate = spent["steps"] * batch_size / spent["seconds"]
    return (
        f"{spent['starts']:.0f} starts, {duration(spent['seconds'])}, "
        f"{spent['device_seconds'] / 3600:,.1f} device-hours, "
        f"{rate:,.0f} images/s with all that is no step"
    )
