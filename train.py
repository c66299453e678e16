"""Pretrain a routed ViT: config -> model + loaders + evaluators + engine -> fit -> export.

    deepspeed train.py --config configs/vit_b.json          all GPUs of this machine
    python train.py --config configs/quickstart.json        one process
    torchrun --nproc-per-node 8 train.py --config ...       the same, unchanged

Starting a run again resumes it, or says that it is finished. Exit codes: 0 finished; 2 a mistake,
whose message tells the mend; 75 stopped by a signal and saved, start again to go on; 1 a crash.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from timm.data import resolve_input_data_config
from torch import nn

from data.config import FREE_ON_RESUME, DataConfig
from data.errors import DataError
from data.loaders import EvalLoader, TrainLoader, build_eval_loader, build_train_loader
from data.mixture import resolve_train
from routedvit.training import config as training
from routedvit.training import engine as engines
from routedvit.training.agreement import check_same_run, check_shared_folder
from routedvit.training.assembly import build_engine, build_trainer
from routedvit.training.checkpoint import Checkpoints, RunState
from routedvit.training.collective import on_rank_zero
from routedvit.training.config_file import describe_keys, json_schema, load_config
from routedvit.training.connection import lost_rank
from routedvit.training.console import Console
from routedvit.training.export import export_model
from routedvit.training.model import create_model
from routedvit.training.native_config import split_batch
from routedvit.training.report import closing, opening
from routedvit.training.run_folder import RunFolder, open_folder, versions
from routedvit.training.signals import REQUEUE_EXIT_CODE
from routedvit.training.world import World

# Code outside the package; all machines must have the same.
SOURCES = (Path(__file__), Path(__file__).parent / "data")


class RunConfig(training.RunConfig):
    """One run, from data to checkpoint. DeepSpeed's own keys go into `deepspeed`, verbatim."""

    data: DataConfig


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE", help="the run, such as configs/quickstart.json")
    what.add_argument("--keys", action="store_true", help="list every key a config can have")
    what.add_argument("--write-schema", metavar="FILE", help="write the config's JSON schema")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, optim.lr=0.001"
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="start over; the earlier run is kept under another name",
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args()


def main() -> int:
    """The command line; returns the exit code."""
    args = parse_arguments()
    if args.keys:
        print(describe_keys(RunConfig))
        return 0
    if args.write_schema:
        Path(args.write_schema).write_text(json_schema(RunConfig), encoding="utf-8")
        return 0
    rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
    mistakes = (training.ConfigError, DataError)
    with Console(rank, user_errors=mistakes, explain=lost_rank) as console:
        return run(load_config(RunConfig, args.config, args.set), args.fresh, console)


def run(config: RunConfig, fresh: bool, console: Console) -> int:
    """Everything between a valid config and the exit code, the same on every rank."""
    world = engines.start(tf32=config.precision.tf32, tell=console.show)
    record = config.model_dump(mode="json")
    shards = resolve_train(config.data).shards
    check_same_run(record, shards.digest(), SOURCES)
    folder = RunFolder(Path(config.folder))
    num_classes = shards.num_classes
    config.model.kwargs.setdefault("num_classes", num_classes)
    model = create_model(config.model, num_classes=num_classes, seed=config.seed)
    model.set_grad_checkpointing(config.train.grad_checkpointing)  # type: ignore[operator]
    loader, eval_loader, image_format = build_loaders(config, model, world, folder)
    engine, schedule = build_engine(config, model, world, loader.samples_per_epoch)

    # Only now, since a run that cannot be built must not claim or move a folder.
    record = config.model_dump(mode="json")
    free = tuple(f"data.{key}" for key in FREE_ON_RESUME)
    console.print(on_rank_zero(lambda: open_folder(folder, record, fresh=fresh, free=free)))
    check_shared_folder(folder.path)
    console.log_to(folder.logs / f"rank_{world.rank}.log")
    checkpoints = Checkpoints(
        folder.checkpoints, engine, keep=config.checkpoint.keep, tell=console.print
    )
    state = checkpoints.load_newest() or RunState(config=record, versions=versions())
    trainer = build_trainer(
        config, engine, schedule, loader, eval_loader,
        checkpoints=checkpoints, state=state, tensorboard=folder.path, console=console,
    )  # fmt: skip
    console.print(opening(config, trainer))
    result = trainer.fit()
    if not result.finished:
        console.print(f"stopped at step {result.step} and saved; the same command goes on")
        return REQUEUE_EXIT_CODE
    export_model(engine, folder.weights, **config.model.model_dump(), data_config=image_format)
    console.print(closing(result, folder))
    return 0


def build_loaders(
    config: RunConfig, model: nn.Module, world: World, folder: RunFolder
) -> tuple[TrainLoader, EvalLoader | None, dict[str, Any]]:
    """Training and held-out batches in the format of the model, and that format (timm's keys)."""
    format = resolve_input_data_config(model)
    batch_size = config.train.batch_size
    micro_batch_size, _ = split_batch(batch_size, config.train.micro_batch_size, world.size)
    common: dict[str, Any] = {
        **{key: format[key] for key in ("input_size", "mean", "std", "interpolation")},
        "rank": world.rank,
        "world_size": world.size,
        "ledger_dir": folder.logs,
    }
    loader = build_train_loader(
        config.data,
        seed=config.seed,
        global_batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        **common,
    )
    crop_pct = config.data.crop_pct or format["crop_pct"]
    format |= {"mean": loader.mean, "std": loader.std, "crop_pct": crop_pct}
    if config.data.val is None:
        return loader, None, format
    eval_loader = build_eval_loader(
        config.data,
        batch_size=config.eval.batch_size or micro_batch_size,
        crop_pct=crop_pct,
        **common,
    )
    return loader, eval_loader, format


if __name__ == "__main__":
    sys.exit(main())
