"""Pretrain a routed ViT: config -> model + loaders + evaluators + engine -> fit -> export.

    deepspeed train.py --config configs/vit_b.json          all GPUs of this machine
    python train.py --config configs/quickstart.json        one process
    torchrun --nproc-per-node 8 train.py --config ...       the same, unchanged

Starting a run again resumes it, or says that it is finished. Exit codes: 0 finished; 2 a mistake,
whose message tells the mend; 75 stopped by a signal and saved, start again to go on; 1 a crash.
"""

import argparse
import os
import signal
import sys
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from timm.data import resolve_input_data_config
from torch import nn

from data.config import FREE_ON_RESUME, DataConfig
from data.errors import DataError
from data.loaders import TrainLoader, build_eval_loader, build_train_loader
from data.mixture import TrainSet, resolve_train
from data.preview import Preview
from routedvit.models.warm_start import WarmStart, warm_start
from routedvit.training import engine as engines
from routedvit.training.arguments import parse_arguments
from routedvit.training.assembly import build_engine, build_retention, build_trainer
from routedvit.training.assembly_watch import build_run_evaluators
from routedvit.training.checkpoints.copying import RunCopy
from routedvit.training.checkpoints.export import export_run
from routedvit.training.checkpoints.retention import Retention
from routedvit.training.config import run as training
from routedvit.training.config.file import describe_keys, json_schema, load_config
from routedvit.training.config.native import split_batch
from routedvit.training.determinism import be_deterministic
from routedvit.training.distributed.agreement import check_same_run
from routedvit.training.distributed.collective import must_agree, together
from routedvit.training.distributed.connection import lost_rank, record_collectives
from routedvit.training.distributed.last_words import last_words
from routedvit.training.distributed.parting import leave
from routedvit.training.distributed.patience import Patience
from routedvit.training.distributed.signals import REQUEUE_EXIT_CODE, StopSignals
from routedvit.training.distributed.world import World, rank_of
from routedvit.training.dry_run import rehearse, resolve_machine
from routedvit.training.engine.processes import seconds_to_wait
from routedvit.training.export_checkpoint import export_checkpoint
from routedvit.training.interfaces import EvalLoaders, Evaluator
from routedvit.training.model import check_labels, create_model
from routedvit.training.offline import evaluate_offline
from routedvit.training.opening import keep_order, open_run, wish_of
from routedvit.training.out_of_memory import out_of_memory
from routedvit.training.recipe.schedules import Schedules
from routedvit.training.repeated import Wish
from routedvit.training.run_folder import RunFolder
from routedvit.training.watch.console import Console
from routedvit.training.watch.report import closing, opening
from routedvit.training.watch.secrets import without_secrets

MISTAKES = (training.ConfigError, DataError)  # which the user can mend
# Code outside the package; all machines must have the same.
SOURCES = (Path(__file__), Path(__file__).parent / "data")


class RunConfig(training.RunConfig):
    """One run, from data to checkpoint. DeepSpeed's own keys go into `deepspeed`, verbatim."""

    data: DataConfig


def main() -> int:
    """The command line; returns the exit code."""
    args = parse_arguments(__doc__)
    if args.keys:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no crash
        print(describe_keys(RunConfig))
        return 0
    if args.write_schema:
        Path(args.write_schema).write_text(json_schema(RunConfig), encoding="utf-8")
        return 0
    with Console(
        rank_of(os.environ), user_errors=MISTAKES, explain=in_words, leave=leave
    ) as console:
        config = load_config(RunConfig, args.config, args.set)
        if args.dry_run or args.find_batch:
            machine = resolve_machine(args.world_size, args.gpu_memory)
            labelled = config.objective.reads_labels
            preview = Preview(config.data, labelled=labelled, learners=learners_of(config))
            for text in rehearse(config, preview, machine, search=args.find_batch):
                console.print(text)
            return 0
        if args.export:
            if rank_of(os.environ) == 0:
                export_checkpoint(args.export, RunFolder(Path(config.folder)), console.print)
            return 0
        signals = StopSignals()
        with nullcontext() if args.evaluate else signals:  # an evaluation has nothing to save
            return run(config, args, console, signals)


def in_words(error: BaseException) -> str | None:
    """A crash that is nobody's mistake; None where only its traceback can tell."""
    return lost_rank(error) or out_of_memory(error)


def run(config: RunConfig, args: argparse.Namespace, console: Console, signals: StopSignals) -> int:
    """Everything between a valid config and the exit code, the same on every rank."""
    folder = RunFolder(Path(config.folder))
    record_collectives(folder.logs)
    if config.precision.deterministic:
        be_deterministic()
    with signals.at_once(console.print):
        world = engines.start(tf32=config.precision.tf32, tell=console.show)
    patience = Patience(
        world.rank,
        limit=seconds_to_wait(),
        stop_wanted=lambda: signals.wanted and not args.evaluate,
        last_words=last_words(),
        tell=console.show,
    )
    with patience:
        return run_in(world, config, args, folder, console, signals, patience)


def run_in(
    world: World,
    config: RunConfig,
    args: argparse.Namespace,
    folder: RunFolder,
    console: Console,
    signals: StopSignals,
    patience: Patience,
) -> int:
    """As `run`, once the ranks have met. What one of them cannot build, all hear of."""
    built = partial(together, mistakes=MISTAKES)
    record = without_secrets(config.model_dump(mode="json"))
    labelled = config.objective.reads_labels
    train = built(lambda: resolve_train(config.data, labelled=labelled))
    check_same_run(record, train.shards.digest(), SOURCES)
    # without labels there is no classifier
    num_classes = train.shards.num_classes * config.objective.classifies
    config.model.kwargs.setdefault("num_classes", num_classes)
    model = built(lambda: create_model(config.model, num_classes=num_classes, seed=config.seed))
    if args.evaluate:
        logs = folder.evaluated / "logs"
        held_out = built(lambda: build_eval_loaders(config, model, world, logs, train))
        return evaluate_offline(
            config, model, world, held_out, checkpoint=args.evaluate, folder=folder, console=console
        )
    check_labels(config.objective, train.shards.num_classes)
    asked = Wish(args.resume, args.fresh)
    copy = RunCopy(config.checkpoint.mirror, folder, console.print)
    copy.fetch()
    wish = wish_of(asked, folder, console.print)
    copy.check(fresh=wish.fresh, resumes=wish.resume is not None)
    keep_order(config.data, folder, wish, console.print)
    started = built(lambda: begin_from(model, config.model.warm_start, folder, wish))
    parts = build_parts(config, model, world, folder.logs, train)
    checkpoints, state = open_run(
        without_secrets(config.model_dump(mode="json")), parts.engine, folder, console,
        asked=asked, wish=wish, retention=parts.retention, read=parts.read,
        free=tuple(f"data.{key}" for key in FREE_ON_RESUME), copy=copy,
    )  # fmt: skip
    state.image_format = parts.image_format
    if started:
        console.print(str(started))
        state.warm_start = asdict(started)
    trainer = build_trainer(
        config, parts.engine, parts.schedules, parts.loader, parts.eval_loaders,
        evaluators=parts.evaluators, checkpoints=checkpoints, state=state, folder=folder.path,
        console=console, signals=signals, patience=patience,
        export=partial(
            export_run, parts.engine,
            {**config.model.created_from(), "data_config": parts.image_format},
            folder.weights, folder.ema_weights if config.ema.decay is not None else None,
        ),
    )  # fmt: skip
    console.print(opening(config, trainer))
    result = trainer.fit()
    if not result.finished:
        saved = " and saved" if result.step else ""
        again = "the same command without --fresh" if args.fresh else "the same command"
        console.print(f"stopped at step {result.step}{saved}; {again} goes on")
        return REQUEUE_EXIT_CODE
    console.print(closing(result, folder, config.train.batch_size, copy.place))
    return 0


class Parts(NamedTuple):
    """What a run is made of, before it has a folder."""

    loader: TrainLoader
    eval_loaders: EvalLoaders | None
    image_format: dict[str, Any]  # timm's keys
    engine: engines.Engine
    schedules: Schedules
    evaluators: list[Evaluator]
    retention: Retention
    read: tuple[str, str]  # names training and held-out shards by their content


def build_parts(
    config: RunConfig, model: nn.Module, world: World, logs: Path, train: TrainSet
) -> Parts:
    """All that can be refused of a run. Collective."""
    loader, eval_loaders, image_format = together(
        lambda: build_loaders(config, model, world, logs, train), MISTAKES
    )
    read = loader.fingerprint, eval_loaders.val.fingerprint if eval_loaders else ""
    must_agree("shards", read, "copy the same sets with their manifests to every machine")
    engine, schedules = build_engine(config, model, world, loader)
    samples = loader.samples_per_epoch
    evaluators = build_run_evaluators(config, engine.objective, eval_loaders, samples)
    retention = build_retention(config, engine.objective, evaluators)
    return Parts(loader, eval_loaders, image_format, engine, schedules, evaluators, retention, read)


def begin_from(
    model: nn.Module, source: str | None, folder: RunFolder, wish: Wish
) -> WarmStart | None:
    """Load the weights that a run begins from, if it does and does not go on from a checkpoint.

    What is wrong with them is the user's to mend.
    """
    if not source or wish.resume or (folder.has_checkpoint() and not wish.fresh):
        return None
    try:
        return warm_start(model, source)
    except ValueError as error:
        raise training.ConfigError(f"model.warm_start: {error}") from error


def build_loaders(
    config: RunConfig, model: nn.Module, world: World, logs: Path, train: TrainSet
) -> tuple[TrainLoader, EvalLoaders | None, dict[str, Any]]:
    """Training and held-out batches in the format of the model, and that format (timm's keys)."""
    # With dynamic_img_size timm falls back on a size of its own unless it is told the model's.
    format = resolve_input_data_config(model, {"model_kwargs": config.model.kwargs})
    batch_size = config.train.batch_size
    micro_batch_size, _ = split_batch(batch_size, config.train.micro_batch_size, world.size)
    loader = build_train_loader(
        config.data,
        seed=config.seed,
        global_batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        pairs=bool(config.loss.mixup or config.loss.cutmix),
        train=train,
        **reading(format, world, logs),
    )
    crop_pct = config.data.crop_pct or format["crop_pct"]
    eval_loaders = build_eval_loaders(config, model, world, logs, train)
    format |= {"mean": loader.mean, "std": loader.std, "crop_pct": crop_pct}
    return loader, eval_loaders, format


def build_eval_loaders(
    config: RunConfig, model: nn.Module, world: World, logs: Path, train: TrainSet
) -> EvalLoaders | None:
    """Held-out images, and training images for evaluators that learn; None without data.val."""
    if config.data.val is None:
        return None
    format = resolve_input_data_config(model, {"model_kwargs": config.model.kwargs})
    micro_batch_size = config.train.micro_batch_size or -(-config.train.batch_size // world.size)
    common: dict[str, Any] = reading(format, world, logs) | {
        "batch_size": config.eval.batch_size or micro_batch_size,
        "crop_pct": config.data.crop_pct or format["crop_pct"],
        "train": train,
        "learners": learners_of(config),
        "num_classes": config.model.kwargs["num_classes"],
    }
    to_learn_from = None
    if common["learners"]:
        limit = config.eval.train_images
        to_learn_from = build_eval_loader(config.data, split="train", limit=limit, **common)
    return EvalLoaders(build_eval_loader(config.data, **common), to_learn_from)


def learners_of(config: RunConfig) -> tuple[str, ...]:
    """The keys of the evaluators that learn from the labels of training images."""
    return tuple(f"eval.{name}" for name in ("knn", "linear_probe") if getattr(config.eval, name))


def reading(format: dict[str, Any], world: World, logs: Path) -> dict[str, Any]:
    """What all loaders take: the model's format, this rank's place, where bad samples are named."""
    return {
        **{key: format[key] for key in ("input_size", "mean", "std", "interpolation")},
        "rank": world.rank,
        "world_size": world.size,
        "ledger_dir": logs,
    }


if __name__ == "__main__":
    sys.exit(main())
