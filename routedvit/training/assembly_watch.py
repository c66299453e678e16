"""From the config to what looks at a run: evaluators, pictures, counters, what is written down."""

import json
from collections.abc import Callable
from typing import Any

from timm.data import resolve_input_data_config
from torch import nn

from routedvit.training.config.run import ConfigError, RunConfig
from routedvit.training.engine import Engine
from routedvit.training.evaluators import build_evaluators
from routedvit.training.evaluators.held_out_loss import HeldOutLoss
from routedvit.training.interfaces import EvalLoaders, Evaluator, MetricWriter, TrainLoader
from routedvit.training.interfaces import RoutingMonitor as Monitor
from routedvit.training.objectives import MaskedObjective
from routedvit.training.watch.gauges import (
    ForwardCounter,
    forward_flops,
    known_peak,
    measured_flops,
)
from routedvit.training.watch.metrics import flat_hparams
from routedvit.training.watch.reconstruction import ReconstructionMonitor
from routedvit.training.watch.routing_monitor import RoutingMonitor
from routedvit.training.watch.secrets import without_secrets

OPTIONAL = ("knn", "linear_probe", "capacities", "throughput")  # evaluators of the section eval
# Sections that change nothing about how good a run gets.
NO_HPARAMS = ("about", "name", "output_dir", "eval", "checkpoint", "log", "deepspeed")


def build_run_evaluators(
    config: RunConfig,
    objective: nn.Module,
    loaders: EvalLoaders | None,
    samples_per_epoch: int,
    *,
    with_loss: bool = True,
) -> list[Evaluator]:
    """What is evaluated while the run goes on; without classes, the objective's own loss first.

    Args:
        objective: of which only the attribute `model`, the network, counts where it classifies.
        with_loss: False where `objective` is no more than that, and so has no loss.

    Raises:
        ConfigError: an evaluator is switched on that this run cannot have.
    """
    if loaders is None:
        asked = [name for name in OPTIONAL if getattr(config.eval, name) is not None]
        if asked:
            raise ConfigError(
                f"eval.{asked[0]} needs held-out images; name them in data.val.shards, or delete it"
            )
        return []
    model: nn.Module = objective.model  # type: ignore[assignment]

    def steps(epochs: float) -> int:
        return config.epochs_to_steps(epochs, samples_per_epoch)

    classifies = config.objective.classifies
    evaluators = build_evaluators(config.eval, model, loaders, steps=steps, classifies=classifies)
    if not classifies and with_loss:
        every_steps = config.eval.in_steps(steps)
        evaluators.insert(0, HeldOutLoss(objective, loaders.val, every_steps=every_steps))
    return evaluators


def build_monitor(
    config: RunConfig,
    engine: Engine,
    loaders: EvalLoaders,
    loader: TrainLoader,
    writer: MetricWriter,
    tell: Callable[[str], None],
) -> Monitor | None:
    """The pictures of a run, if its model routes and the config wants them."""
    if not config.log.probe_images or not hasattr(engine.model, "routing"):
        return None
    probe = loaders.val.probe(config.log.probe_images)
    watched: dict[str, Any] = {"mean": loader.mean, "std": loader.std, "rank": engine.rank}
    model: Any = engine.model
    patch = model.patch_embed.patch_size
    monitor = RoutingMonitor(probe, writer, **watched, patch=patch, tell=tell)
    if not isinstance(engine.objective, MaskedObjective):
        return monitor
    return ReconstructionMonitor(engine.objective, probe, writer, **watched, also=monitor)


def count_forwards(engine: Engine, config: RunConfig) -> ForwardCounter:
    """The counter of the network's arithmetic. Collective."""
    flops = forward_flops
    if not hasattr(engine.model, "flops"):  # one of timm's own
        made = {"model_kwargs": config.model.kwargs}
        with engine.evaluating() as model:
            measured = measured_flops(model, resolve_input_data_config(model, made)["input_size"])
        flops = lambda model, size: measured  # noqa: E731
    return ForwardCounter(
        engine.model,
        flops,
        world_size=engine.world_size,
        peak_tflops=config.log.peak_tflops or known_peak(engine.device),
    )


def describe_run(config: RunConfig, writer: MetricWriter, step: int) -> None:
    """The resolved config to be read, and what was chosen in it to be compared with other runs'."""
    resolved = without_secrets(config.model_dump(mode="json", exclude_none=True))
    writer.text("config", f"```json\n{json.dumps(resolved, indent=2)}\n```", step)
    chosen = config.model_dump(mode="json", exclude_defaults=True, exclude=set(NO_HPARAMS))
    augment = chosen.pop("data", {}).get("augment", {})
    chosen = without_secrets(chosen)
    writer.hparams(flat_hparams(chosen | {"augment": augment}), ["val/top1", "val/loss"])
