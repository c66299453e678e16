"""`python -m data.order`: which samples did a step see? Keys as JSON lines, no image decoded.

    python -m data.order --shards shards/mnist/train --seed 0 --steps 100:110 --batch-size 64
    python -m data.order ... --epoch 1 --steps 0:2 --world-size 4 --rank 1 --workers 2

--steps A:B are steps of the run, A included and B not; with --epoch E they count from the first
step that begins in epoch E. --seed, --streams, --shuffle-buffer and --repeats must be those of the
run. With --world-size each line names the rank, and with --workers the loader process that made the
row in a run begun at step 0 (`--begin` for one resumed later).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from data.config import DataConfig
from data.errors import DataError
from data.order import SampleOrder, check_world
from data.reader import ShardReader
from data.shards import resolve


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The lines to print, in the order of positions."""
    batch, world = arguments.batch_size, arguments.world_size
    shards = resolve(arguments.shards, "--shards")
    order = SampleOrder(
        shards.sizes,
        seed=arguments.seed,
        shuffle_buffer=arguments.shuffle_buffer,
        streams=arguments.streams,
        repeats=arguments.repeats,
    )
    check_world(order.streams, batch, world)
    micro = arguments.micro_batch_size or batch // world
    reader = ShardReader(shards)
    first = (
        -(-arguments.epoch * order.num_samples * order.repeats // batch) if arguments.epoch else 0
    )
    for step in range(first + arguments.steps[0], first + arguments.steps[1]):
        positions = np.arange(step * batch, (step + 1) * batch, dtype=np.int64)
        place = order.locate(positions)
        for position, epoch, shard, sample in zip(positions.tolist(), *place, strict=True):
            rank = position % world
            if arguments.rank is not None and rank != arguments.rank:
                continue
            line = {"step": step, "position": position, "epoch": int(epoch), "rank": rank}
            if arguments.workers:
                turn = (position - arguments.begin * batch) // world // micro
                line["worker"] = turn % arguments.workers
            yield line | {
                "key": reader.key(int(shard), int(sample)),
                "label": reader.label(int(shard), int(sample)),
                "shard": shards.names[int(shard)],
            }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    defaults = DataConfig.model_fields
    parser = argparse.ArgumentParser(
        prog="python -m data.order",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shards", required=True, nargs="+", help="as data.train.shards")
    parser.add_argument("--seed", type=int, required=True, help="the run's seed")
    parser.add_argument("--steps", type=_span, required=True, metavar="A:B", help="which steps")
    parser.add_argument("--batch-size", type=int, required=True, help="the global batch")
    parser.add_argument("--epoch", type=int, help="count --steps from this epoch's first step")
    parser.add_argument("--streams", type=int, help="data.streams, if the config sets it")
    parser.add_argument(
        "--shuffle-buffer",
        type=int,
        default=defaults["shuffle_buffer"].default,
        help="data.shuffle_buffer (%(default)s)",
    )
    parser.add_argument("--repeats", type=int, default=1, help="data.augment.repeats (1)")
    parser.add_argument("--world-size", type=int, default=1, help="ranks (1)")
    parser.add_argument("--rank", type=int, help="only the rows of this rank")
    parser.add_argument("--workers", type=int, default=0, help="data.num_workers")
    parser.add_argument("--micro-batch-size", type=int, help="rows per rank and forward pass")
    parser.add_argument("--begin", type=int, default=0, help="step at which the run was resumed")
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
