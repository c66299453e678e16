"""Images per second and core from a verified tar to a normalised training batch.

    python -m benchmarks.loader --rounds 5

500 px JPEGs, RandomResizedCrop(224) and a flip, one process, everything in the page cache. Beside
ours: plain webdataset + Pillow + timm's transform (which verifies nothing), ours with timm's pixels
to the letter, ours without hashing, ours as the bytes that loader processes deliver (the others are
normalised to floats), and decoding alone. The cases alternate within a round; each round opens the
shards anew, so it pays for hashing and indexing them. Then one loader process feeds a ViT-Ti/16
that trains on the CPU: what share of its step waits for data?
"""

import argparse
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
import skimage.data
import timm
import torch
import webdataset
from PIL import Image

from benchmarks.results import append_result, report_measured
from benchmarks.timing import interleave
from data import write
from data.config import DataConfig
from data.loaders import TrainLoader, build_train_loader
from data.manifest import sha256_of
from data.reader import ShardReader
from data.shards import resolve
from data.transforms import train_transform
from routedvit.training.images import as_floats

SIZE, BATCH = 224, 32
PLAIN = "webdataset + Pillow + timm"


def photographs(folder: Path, count: int) -> None:
    """JPEGs of 500 x 375, quality 90, cut at random from the photographs of scikit-image."""
    sources = [skimage.data.astronaut(), skimage.data.cat(), skimage.data.coffee()]
    generator = np.random.default_rng(0)
    (folder / "all").mkdir(parents=True)
    for number in range(count):
        image = Image.fromarray(sources[number % 3])
        width = int(generator.integers(240, image.width - 20))
        height = min(image.height, width * 3 // 4)
        left = int(generator.integers(image.width - width))
        top = int(generator.integers(image.height - height + 1))
        image = image.crop((left, top, left + width, top + height))
        image.resize((500, 375), Image.Resampling.LANCZOS).save(
            folder / "all" / f"{number}.jpg", quality=90
        )


def loader_of(shards: str, **fields: object) -> TrainLoader:
    """Our training loader on one rank."""
    augment = {"color_jitter": 0.0, "interpolation": "bicubic"}
    section = {"train": {"shards": shards}, "num_workers": 0, "augment": augment} | fields
    return build_train_loader(
        DataConfig.model_validate(section),
        input_size=(3, SIZE, SIZE), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic",
        seed=0, global_batch_size=BATCH, micro_batch_size=BATCH, rank=0, world_size=1,
    )  # fmt: skip


def ours(shards: str, batches: int, *, floats: bool = True, **fields: object) -> None:
    """One pass through our loader, to normalised floats or to the bytes that travel."""
    for batch in itertools.islice(loader_of(shards, **fields).batches(0), batches):
        images = as_floats(batch) if floats else batch["image"]
        assert images.shape[0] == BATCH


def plain(shards: str, batches: int) -> None:
    """One pass through webdataset, Pillow and timm."""
    config = DataConfig.model_validate({"train": {"shards": shards}})
    transform = train_transform(
        config.augment.model_copy(update={"color_jitter": 0.0}),
        size=(SIZE, SIZE), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic",
    )  # fmt: skip
    dataset = webdataset.WebDataset(resolve(shards).names, shardshuffle=False)
    dataset = dataset.decode("pilrgb").to_tuple("jpg", "cls").map_tuple(transform, int)
    for images, _ in itertools.islice(dataset.batched(BATCH), batches):
        assert images.shape[0] == BATCH


def payloads(shards: str) -> list[bytes]:
    """The encoded images of a set."""
    reader = ShardReader(resolve(shards))
    return [
        reader.read(shard, sample).payload
        for shard, size in enumerate(reader.shards.sizes)
        for sample in range(size)
    ]


def waiting_share(shards: str, steps: int) -> float:
    """Share of the time of training steps that is spent on waiting for the next batch."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters())
    batches = loader_of(shards, num_workers=1).batches(0)
    next(batches)
    waited, began = 0.0, time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        torch.nn.functional.cross_entropy(model(as_floats(batch)), batch["target"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return waited / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        photographs(Path(folder) / "photographs", arguments.images)
        write.main(["--source", "folder", "--path", f"{folder}/photographs", "--shard-size", "64",
                    "--out", f"{folder}/shards"])  # fmt: skip
        shards = f"{folder}/shards/train"
        batches, encoded = arguments.images // BATCH, payloads(shards)
        cases: dict[str, Callable[[], object]] = {
            PLAIN: lambda: plain(shards, batches),
            "ours, sha256": lambda: ours(shards, batches, verify="sha256"),
            "ours, not hashed": lambda: ours(shards, batches, verify="size"),
            "ours, sha256, as bytes": lambda: ours(shards, batches, floats=False, verify="sha256"),
            "ours, exact, sha256": lambda: ours(shards, batches, verify="sha256", decode="exact"),
            "SHA-256 only": lambda: [sha256_of(Path(name)) for name in resolve(shards).names],
            "decode only, Pillow": lambda: [
                Image.open(io.BytesIO(payload)).convert("RGB") for payload in encoded
            ],
            "decode only, simplejpeg": lambda: [
                simplejpeg.decode_jpeg(payload) for payload in encoded
            ],
        }
        images = batches * BATCH
        rates = {
            name: [images / seconds for seconds in times]
            for name, times in interleave(cases, arguments.rounds, "cpu").items()
        }
        report_measured("loader", rates, unit="img/s per core", baseline=PLAIN)
        cost = statistics.median(rates["ours, sha256"]) / statistics.median(rates["SHA-256 only"])
        print(f"SHA-256 takes {cost:.1%} of the time of ours")
        shares = [waiting_share(shards, 4) for _ in range(3)]
        print(f"waiting for data, ViT-Ti/16 training on the CPU: {statistics.median(shares):.1%}")
        append_result(
            "loader", "share of a CPU ViT-Ti/16 step that waits for data", shares, unit="share",
            baseline="the step", ratio=statistics.median(shares),
        )  # fmt: skip


if __name__ == "__main__":
    main()
