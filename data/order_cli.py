"""`python -m data.order`: which samples did a step see? Keys as JSON lines, no image decoded.

    python -m data.order --config runs/vit_b --steps 1200:1201
    python -m data.order --shards shards/mnist/train --seed 0 --steps 100:110 --batch-size 64
    python -m data.order --shards a --weight 3 --shards b --weight 1 ...     # a mixture
    python -m data.order ... --epoch 1 --steps 0:2 --world-size 4 --rank 1 --workers 2

--steps A:B are steps of the run, A included and B not, counted from 0: what the console and
TensorBoard call step 100 is 99:100 here, and 100:101 is what follows the checkpoint step_00000100.
With --epoch E they count from the first step that begins in epoch E (the "step" of a line is the
run's all the same). --config takes sets, weights, seed and batch from a run config or a run folder,
which also tells where the run began and went back to; without it they are given here and must be
those of the run. With --world-size each line names the rank, and with --workers the loader process
that made the row in a run begun at step 0 (`--begin` for one resumed later). A sample that could
not be used has its substitute named in the run's ledger, not here.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from data.arguments import whole
from data.config import DataConfig
from data.errors import DataError
from data.history import history_of
from data.mixture import Mixture, TrainSet, order_of, resolve_train
from data.order import check_world
from data.reader import ShardReader


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The lines to print, in the order of positions."""
    config = data_config(arguments)
    batch, world, turn = arguments.batch_size, arguments.world_size, 2 if arguments.pairs else 1
    train = resolve_train(config, labelled=False)  # no label changes the order
    order = order_of(train, config, arguments.seed)
    check_world(order.streams, batch, world, arguments.pairs)
    if arguments.rank is not None and arguments.rank >= world:
        raise DataError(
            f"--rank is {arguments.rank} and --world-size {world}; ranks are 0 to {world - 1}"
        )
    micro = arguments.micro_batch_size or batch // world
    reader = ShardReader(train.shards, remote=config.remote)
    source_of = np.repeat(np.arange(len(train.parts)), [len(part.names) for part in train.parts])
    history = history_of(run_folder(arguments.config), batch)
    first = 0
    if arguments.epoch:
        first = history.first_step_from(arguments.epoch * epoch_length(train, config))
    for step in range(first + arguments.steps[0], first + arguments.steps[1]):
        begin = history.position(step)
        positions = np.arange(begin, begin + batch, dtype=np.int64)
        place = order.locate(positions)
        for position, epoch, shard, sample in zip(positions.tolist(), *place, strict=True):
            rank = position // turn % world
            if arguments.rank is not None and rank != arguments.rank:
                continue
            line = {"step": step, "position": position, "epoch": int(epoch), "rank": rank}
            if arguments.workers:
                resumed = max(arguments.begin, history.first_step)
                made = (position - history.position(resumed)) // (world * micro)
                line["worker"] = made % arguments.workers
            if isinstance(order, Mixture):
                line["source"] = int(source_of[shard])
            yield line | {
                "key": reader.key(int(shard), int(sample)),
                "label": reader.label(int(shard), int(sample)),
                "shard": train.shards.names[int(shard)],
            }


def run_folder(config: Path | None) -> Path | None:
    """The folder of the run that a --config names, if it names one."""
    if config is None or config.is_dir():
        return config
    return config.parent if config.name == "config.json" else None


def epoch_length(train: TrainSet, config: DataConfig) -> int:
    """Positions in an epoch: that of the samples, or of the run where each source has its own."""
    one = len(train.parts) == 1
    return train.shards.num_samples * config.augment.repeats if one else train.samples_per_epoch


def data_config(arguments: argparse.Namespace) -> DataConfig:
    """The `data` section that is asked about; completes `arguments` from the run config."""
    if (arguments.config is None) == (arguments.shards is None):
        raise DataError("give either --config or --shards: they say which samples there are")
    if arguments.config is not None:
        return _from_run(arguments)
    for name in ("seed", "batch_size"):
        if getattr(arguments, name) is None:
            raise DataError(f"--shards needs --{name.replace('_', '-')} too: that of the run")
    weights = arguments.weight or [None] * len(arguments.shards)
    if len(weights) != len(arguments.shards):
        raise DataError(
            f"{len(arguments.shards)} times --shards and {len(weights)} times --weight; give each "
            "set its weight, or none of them"
        )
    sources = [
        {"shards": shards, "weight": weight}
        for shards, weight in zip(arguments.shards, weights, strict=True)
    ]
    section = {
        "train": sources if len(sources) > 1 else sources[0],
        "streams": arguments.streams,
        "shuffle_buffer": arguments.shuffle_buffer,
        "replacement": arguments.replacement,
        "samples_per_epoch": arguments.samples_per_epoch,
        "augment": {"repeats": arguments.repeats},
    }
    return _validated({key: value for key, value in section.items() if value is not None}, "here")


def _from_run(arguments: argparse.Namespace) -> DataConfig:
    path = arguments.config / "config.json" if arguments.config.is_dir() else arguments.config
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"--config {path}: {error}; name a run config or a run folder") from None
    recorded = isinstance(run, dict) and "config" in run  # with the versions, in a run folder
    if recorded:
        run = run["config"]
    if not isinstance(run, dict) or "data" not in run:
        raise DataError(f"--config {path} has no data section; is it a run config?")
    train, loss = run.get("train", {}), run.get("loss", {})
    arguments.seed = run.get("seed", 0) if arguments.seed is None else arguments.seed
    arguments.batch_size = arguments.batch_size or train.get("batch_size")
    if not isinstance(arguments.batch_size, int) or arguments.batch_size < 1:
        raise DataError(
            f"--config {path}: train.batch_size is {arguments.batch_size}; give the run's global "
            "batch there or as --batch-size"
        )
    arguments.micro_batch_size = arguments.micro_batch_size or train.get("micro_batch_size")
    arguments.pairs = arguments.pairs or bool(loss.get("mixup") or loss.get("cutmix"))
    # Runs from before there was this key have none, and null is what they did.
    absent = {"shard_start": None} if recorded else {}
    return _validated(absent | run["data"], str(path))


def _validated(section: dict[str, Any], where: str) -> DataConfig:
    try:
        return DataConfig.model_validate_json(json.dumps(section))  # where lists may be tuples
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in ("data", *first["loc"]))
        raise DataError(f"{where}: {field}: {first['msg']}") from None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data.order",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=_span, required=True, metavar="A:B", help="which steps")
    parser.add_argument("--epoch", type=whole(0), help="count --steps from this epoch's first step")
    run = parser.add_argument_group("the run")
    run.add_argument("--config", type=Path, help="run config or run folder, instead of the rest")
    run.add_argument(
        "--shards", nargs="+", action="append", help="as data.train.shards; again: one more source"
    )
    run.add_argument("--weight", type=float, action="append", help="of each source, in their order")
    run.add_argument("--seed", type=whole(0, (1 << 64) - 1), help="the run's seed")
    run.add_argument("--batch-size", type=whole(1), help="the global batch")
    run.add_argument("--streams", type=whole(1), help="data.streams, if the config sets it")
    run.add_argument(
        "--shuffle-buffer", type=whole(0), help="data.shuffle_buffer, if the config does"
    )
    run.add_argument("--repeats", type=whole(1), default=1, help="data.augment.repeats (1)")
    run.add_argument(
        "--samples-per-epoch", type=whole(1), help="data.samples_per_epoch, for --epoch"
    )
    run.add_argument("--replacement", action="store_true", help="if data.replacement is set")
    world = parser.add_argument_group("who read it")
    world.add_argument("--world-size", type=whole(1), default=1, help="ranks (1)")
    world.add_argument("--rank", type=whole(0), help="only the rows of this rank")
    world.add_argument("--workers", type=whole(0), default=0, help="data.num_workers")
    world.add_argument("--micro-batch-size", type=whole(1), help="rows per rank and forward pass")
    world.add_argument("--pairs", action="store_true", help="if loss.mixup or loss.cutmix is set")
    world.add_argument(
        "--begin", type=whole(0), default=0, help="step at which the run was resumed"
    )
    return parser.parse_args(arguments)


def _span(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no range; give A:B with A < B, as 100:110")
    return int(match[1]), int(match[2])


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    try:
        for line in rows(parse(arguments)):
            print(json.dumps(line))
    except DataError as error:
        print(f"data.order: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head`
        sys.stderr.close()
    return 0
