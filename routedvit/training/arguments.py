"""The options of `train.py`."""

import argparse
from pathlib import Path

# What each kind of call reads besides its own option; without any of these it trains.
REHEARSAL = ("config", "set", "dry_run", "find_batch", "world_size", "gpu_memory")
READ: dict[str, tuple[str, ...]] = {
    "keys": (),
    "write_schema": (),
    "dry_run": REHEARSAL,
    "find_batch": REHEARSAL,
    "evaluate": ("config", "set"),
    "export": ("config", "set"),
}


def parse_arguments(description: str) -> argparse.Namespace:
    """What was typed behind `train.py`, whose help begins with `description`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
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
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--evaluate",
        metavar="CHECKPOINT",
        help="only evaluate: step_00000500, its folder, exported weights, or 'latest'",
    )
    instead.add_argument(
        "--export",
        metavar="CHECKPOINT",
        help="only write a model for timm: step_00000500, its folder, 'latest' or 'best'",
    )
    parser.add_argument(
        "--resume",
        metavar="CHECKPOINT",
        type=Path,
        help="go on from this one, not the newest: step_00000500, or a folder of another run",
    )
    rehearsal = parser.add_argument_group("what would the run take? nothing is started")
    rehearsal.add_argument("--dry-run", action="store_true", help="data, FLOPs, memory per GPU")
    rehearsal.add_argument("--find-batch", action="store_true", help="and the largest micro-batch")
    rehearsal.add_argument("--world-size", type=int, metavar="N", help="ranks; default: GPUs here")
    rehearsal.add_argument("--gpu-memory", type=float, metavar="GIB", help="default: GPU's, or 80")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    args = parser.parse_args()
    if mistake := in_vain(args):
        parser.error(mistake)
    return args


def in_vain(args: argparse.Namespace) -> str | None:
    """What is wrong with options that nothing would read: they were meant for another call."""
    given = [
        name
        for name, value in vars(args).items()
        if name != "local_rank" and value is not None and value is not False and value != []
    ]
    kind = next((name for name in READ if name in given), None)
    for name in given:
        if kind and name not in (kind, *READ[kind]):
            return f"{_typed(kind)} does not read {_typed(name)}; leave out one of them"
        if not kind and name in ("world_size", "gpu_memory"):
            return f"{_typed(name)} is read by --dry-run and --find-batch only; add one of them"
    return None


def _typed(name: str) -> str:
    return "--" + name.replace("_", "-")
