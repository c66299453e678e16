"""Throughput and FLOPs of a training step against capacity, with the dense twin as a line.

    python -m benchmarks.capacity [--rounds 3] [--depth 4] [--plot docs/capacity.png]

All capacities and the dense twin are interleaved in one run. The picture has two panels: images per
second over those of the dense twin beside what the FLOPs promise, and GFLOPs of a step per image.
"""

import argparse
import statistics
from fractions import Fraction
from pathlib import Path
from typing import Any

import timm

import routedvit  # noqa: F401  (registers the models)
from benchmarks.results import append_result, hardware
from benchmarks.timing import interleave
from benchmarks.train_step import DENSE, ROUTED, Step

CAPACITIES = [Fraction(1, 16), Fraction(1, 8), Fraction(1, 4), Fraction(1, 2), Fraction(3, 4)]


def make(capacity: Fraction | None, size: int, depth: int) -> Any:
    """The dense twin for None; keys and values get twice the capacity, as by default."""
    if capacity is None:
        return timm.create_model(DENSE, img_size=size, depth=depth)
    keys = min(2 * capacity, Fraction(1))
    capacities: dict[str, Any] = {
        "q_capacity": capacity,
        "kv_capacity": keys,
        "ffn_capacity": capacity,
    }
    return timm.create_model(ROUTED, img_size=size, depth=depth, **capacities)


def measure(size: int, batch: int, depth: int, rounds: int) -> dict[str, list[float]]:
    """Capacities, speed-ups over the dense twin, and GFLOPs per image (the last of the twin)."""
    choices: list[Fraction | None] = [None, *CAPACITIES]
    flops = [Step(make(choice, size, depth), 1, size).flops() for choice in choices]
    steps = {str(choice): Step(make(choice, size, depth), batch, size) for choice in choices}
    seconds = interleave(steps, rounds, "cpu")
    medians = [statistics.median(seconds[str(choice)]) for choice in choices]
    for choice, median, times in zip(choices, medians, seconds.values(), strict=True):
        name = "dense" if choice is None else f"capacity {choice}"
        append_result(
            "capacity", f"{size} px, batch {batch}, {depth} blocks, {name}",
            [batch / t for t in times], unit="img/s", baseline="dense",
            ratio=medians[0] / median,
        )  # fmt: skip
    table = {
        "capacity": [float(choice) for choice in CAPACITIES],
        "realised": [medians[0] / median for median in medians[1:]],
        "promised": [flops[0] / own for own in flops[1:]],
        "gflops": [own / 1e9 for own in [*flops[1:], flops[0]]],
    }
    for row in zip(*list(table.values())[:3], strict=True):
        print("capacity {:.4f}: {:.2f} x the dense twin, FLOPs promise {:.2f} x".format(*row))
    return table


def plot(table: dict[str, list[float]], title: str, file: Path) -> None:
    """Two panels, one file."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    places = range(len(CAPACITIES))
    left.plot(places, table["promised"], "o--", color="0.6", label="FLOPs promise")
    left.plot(places, table["realised"], "o-", color="tab:blue", label="measured")
    left.axhline(1, color="tab:red", label="dense twin (timm)")
    left.set(ylabel="throughput over the dense twin", ylim=(0, None))
    right.plot(places, table["gflops"][:-1], "o-", color="tab:blue", label=ROUTED)
    right.axhline(table["gflops"][-1], color="tab:red", label="dense twin (timm)")
    right.set(ylabel="GFLOPs of a step per image", ylim=(0, None))
    for axes in (left, right):
        axes.set_xticks(places, [str(capacity) for capacity in CAPACITIES])
        axes.set_xlabel("capacity: share of heavy patches")
        axes.legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--plot", type=Path, help="PNG to write; needs matplotlib")
    arguments = parser.parse_args()
    table = measure(arguments.size, arguments.batch, arguments.depth, arguments.rounds)
    if arguments.plot:
        title = f"training step at {arguments.size} px, {arguments.depth} blocks, {hardware()}"
        plot(table, title, arguments.plot)


if __name__ == "__main__":
    main()
