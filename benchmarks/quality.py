"""Held-out accuracy of learned routing beside its controls and dense models, by the same recipe.

    python -m benchmarks.quality [--seeds 3] [--epochs 10] [--cases learned random ...]    # an hour

Where everything is centred, fixed patches are as good as chosen ones. Here each of the quickstart's
digits lies somewhere on a black image of 40 x 40 pixels, 4,000 to train on and 1,000 held out. Each
case is the quickstart with another model, trained by `train.py` in one process for each seed, which
draws weights, order and augmentation. What the cases tell:

- random, static: the FLOPs of learned routing, but patches are drawn, or always the same. What
  learned routing is above them is the worth of choosing.
- all light, all heavy: no patch or every patch goes heavy; the ends between which capacity lies.
- dense: timm's twin; dense, 3 blocks: timm's with about the FLOPs of the routed one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import routedvit  # noqa: F401  (registers the models)
from benchmarks.results import append_result
from data.digits import mnist_splits
from data.encoding import Encoding
from data.sources import ArrayReference, Split
from data.writer import write_split

ROOT = Path(__file__).resolve().parents[1]
SIDE = 40  # pixels of an image; a digit has 28, and patches 4
MODEL = {"name": "colt5_vit_test", "img_size": SIDE, "patch_size": 4, "in_chans": 1}
DENSE = {
    **MODEL, "name": "test_vit", "num_heads": 4, "mlp_ratio": 4, "qk_norm": True,
    "init_values": 1.0, "reg_tokens": 1, "global_pool": "avg", "dynamic_img_size": False,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "learned": MODEL,
    "random": MODEL | {"router": "random"},
    "static": MODEL | {"router": "static"},
    "all light": MODEL | {"router": "all_light"},
    "all heavy": MODEL | {"router": "all_heavy"},
    "dense": DENSE,
    "dense, 3 blocks": DENSE | {"depth": 3},
}


def write_digits(folder: Path) -> None:
    """Shards of the quickstart's digits, each at a place of its own."""
    for name, split in mnist_splits().items():
        generator = np.random.default_rng(0)
        moved = []
        for digit in cast(list[ArrayReference], split.references):
            image = np.zeros((SIDE, SIDE), np.uint8)
            top, left = generator.integers(0, SIDE - 28, 2, endpoint=True)
            image[top : top + 28, left : left + 28] = digit.pixels
            moved.append(replace(digit, pixels=image))
        write_split(Split(moved, split.label_names), folder / name, 250, Encoding())


def megaflops(case: str) -> float:
    """Of one image forward, matrix products alone."""
    chosen = dict(CASES[case])
    model = timm.create_model(chosen.pop("name"), num_classes=10, **chosen).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, SIDE, SIDE))
    return counter.get_total_flops() / 1e6


def train(case: str, seed: int, epochs: int, folder: Path) -> float:
    """Held-out top-1 in % after the last epoch."""
    run = folder / f"{case.replace(', ', '_').replace(' ', '_')}_{seed}"
    chosen = dict(CASES[case])
    settings = {
        "name": run.name, "output_dir": str(run), "seed": seed, "train.epochs": epochs,
        "data.train.shards": str(folder / "digits" / "train"),
        "data.val.shards": str(folder / "digits" / "val"),
        "eval.every_epochs": 0, "checkpoint.every_steps": 10**6, "log.probe_images": 0,
        "log.routing_every_steps": 10**6, "log.gradients_every_steps": 10**6,
        "model.name": chosen.pop("name"),
        **{f"model.kwargs.{key}": value for key, value in chosen.items()},
    }  # fmt: skip
    sets = [
        part
        for key, value in settings.items()
        for part in ("--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}")
    ]
    command = [sys.executable, "train.py", "--config", "configs/quickstart.json", *sets]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    newest = (run / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    found = (run / "checkpoints" / newest / "evaluation.json").read_text(encoding="utf-8")
    return float(json.loads(found)["metrics"]["val/top1"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    arguments = parser.parse_args()
    top1: dict[str, list[float]] = {case: [] for case in arguments.cases}
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder) / "digits")
        for seed in range(arguments.seeds):  # outermost, so that a run cut short compares all
            for case, values in top1.items():
                values.append(train(case, seed, arguments.epochs, Path(folder)))
                print(f"seed {seed}, {case}: {values[-1]:.1f} %", flush=True)
    first = arguments.cases[0]
    for case, values in top1.items():
        mean = statistics.mean(values)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        flops = megaflops(case)
        print(
            f"{case:16s} {flops:6.1f} MFLOPs  top-1 {mean:.1f} % (standard deviation {spread:.1f})"
        )
        append_result(
            "quality", f"{case}, {arguments.epochs} epochs, {flops:.1f} MFLOPs", values,
            unit="% top-1", baseline=first,
            ratio=statistics.median(values) / statistics.median(top1[first]),
        )  # fmt: skip


if __name__ == "__main__":
    main()
