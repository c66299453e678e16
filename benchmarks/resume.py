"""Seconds from a cursor to the first batch: is a resume mid-epoch as quick as an epoch's start?

    python -m benchmarks.resume --rounds 7

48 shards of 500 small JPEGs in the page cache, a batch of 256, one process. A case builds the
loader anew, as a process that was just started does, and takes its first batch. Within an epoch the
shuffle window reaches back and ahead over many shards, at its start it holds few: with 8 streams
the first batch mid-epoch touches 48 shards and that of an epoch's start 10. The bar is 1.5 times.
The same shards without their index files show what those are for.
"""

import argparse
import itertools
import os
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.loader import photographs
from benchmarks.results import append_result
from benchmarks.timing import interleave
from data.config import DataConfig
from data.encoding import Encoding
from data.loaders import TrainLoader, build_train_loader
from data.manifest import read_manifest, write_manifest
from data.sources import FileReference, Split
from data.writer import write_split

SHARDS, PER_SHARD, STREAMS, BATCH, SIZE = 48, 500, 8, 256, 96
EPOCH = SHARDS * PER_SHARD
STARTS = {
    "epoch start": 0,
    "mid-epoch": EPOCH // 2 // BATCH * BATCH,
    "late in the epoch": EPOCH * 9 // 10 // BATCH * BATCH,
    "middle of the third epoch": EPOCH * 5 // 2 // BATCH * BATCH,
}


def write_set(folder: Path) -> Path:
    """The shards: few photographs under many keys, as only their number matters here."""
    photographs(folder / "photographs", 30)
    source = folder / "photographs" / "all"
    names = itertools.cycle(sorted(path.name for path in source.glob("*.jpg")))
    references = [
        FileReference(f"photo{number:05d}", str(source), next(names), number % 10)
        for number in range(EPOCH)
    ]
    split = Split(references, [str(label) for label in range(10)])
    write_split(split, folder / "shards", PER_SHARD, Encoding(resize=160))
    return folder / "shards"


def without_indices(shards: Path) -> Path:
    """The same shards beside a manifest that names no index files."""
    bare = shards.with_name("bare")
    bare.mkdir()
    manifest = read_manifest(shards / "manifest.json")
    for entry in manifest.shards:
        os.link(shards / entry.name, bare / entry.name)
        entry.index = None
    write_manifest(bare, manifest)
    return bare


def loader_of(shards: Path) -> TrainLoader:
    """A new loader of the whole world's batches."""
    augment = {"color_jitter": 0.0}
    config = {"train": {"shards": str(shards)}, "num_workers": 0, "streams": STREAMS}
    return build_train_loader(
        DataConfig.model_validate(config | {"augment": augment}),
        input_size=(3, SIZE, SIZE), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic",
        seed=0, global_batch_size=BATCH, micro_batch_size=BATCH, rank=0, world_size=1,
    )  # fmt: skip


def first_batch(shards: Path, start: int) -> None:
    """A new loader's first batch from a global position on."""
    assert len(next(loader_of(shards).batches(start))["key"]) == BATCH


def touched(shards: Path, start: int) -> int:
    """How many shards that batch is from."""
    positions = torch.arange(start, start + BATCH).numpy()
    return len(set(loader_of(shards).dataset.order.locate(positions).shard.tolist()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sets = {"": write_set(Path(folder))}
        sets[", no index files"] = without_indices(sets[""])
        cases: dict[str, Callable[[], object]] = {
            name + kind: partial(first_batch, shards, start)
            for kind, shards in sets.items()
            for name, start in STARTS.items()
        }
        seconds = interleave(cases, rounds, "cpu")
        for kind, shards in sets.items():
            baseline = "epoch start" + kind
            for name, start in STARTS.items():
                values = seconds[name + kind]
                median = statistics.median(values)
                ratio = median / statistics.median(seconds[baseline])
                print(
                    f"{name + kind:42s} {touched(shards, start):3d} shards {median:6.3f} s"
                    f"  ({min(values):.3f} to {max(values):.3f})  {ratio:5.2f} x"
                )
                append_result(
                    "resume", name + kind, values, unit="s", baseline=baseline, ratio=ratio
                )


if __name__ == "__main__":
    main()
