"""How near the training step of a large model comes to the rate of plain matrix products.

    python -m benchmarks.utilisation [--rounds 10] [--profile FOLDER]

`colt5_vit_l` in its dense mode (every capacity 1, no light path) beside timm's
`vit_large_patch16_224`, both compiled, and one large square matrix product of the same type: all
three interleaved in one run. What is reported is operations per second; the ratio is that over the
matrix product's. Operations are those of PyTorch's FlopCounterMode over forward and backward, the
optimiser's time is in the step. On a GPU in bf16, else in fp32 on two blocks.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch

import routedvit  # noqa: F401  (registers the models)
from benchmarks.profiles import write_profiles
from benchmarks.results import append_result
from benchmarks.timing import interleave
from benchmarks.train_step import ALL_HEAVY, DTYPES, Step, synchronised

DENSE, ROUTED, PRODUCT = "vit_large_patch16_224", "colt5_vit_l", "matrix product"


@dataclass(frozen=True)
class Scale:
    """What is measured on one kind of device."""

    batch: int
    depth: int
    side: int  # of the matrices


SCALES = {
    "cpu": Scale(batch=4, depth=2, side=2048),
    "cuda": Scale(batch=128, depth=24, side=8192),
}


def product(side: int, device: str) -> Callable[[], object]:
    """One product of random matrices: zeros would be faster than data on a GPU."""
    left, right = torch.randn(2, side, side, device=device, dtype=DTYPES[device])
    out = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--profile", type=Path, help="folder for a table of operators per model")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scale = SCALES[device]

    steps, work = {}, {PRODUCT: 2 * scale.side**3}
    for name, options in ((DENSE, {}), (ROUTED, ALL_HEAVY)):
        one = Step(timm.create_model(name, depth=scale.depth, **options), 1, 224)
        work[name] = scale.batch * one.flops()
        model = timm.create_model(name, depth=scale.depth, **options)
        steps[name] = synchronised(Step(model, scale.batch, 224, compiled=True), device)
    cases = {PRODUCT: synchronised(product(scale.side, device), device), **steps}
    seconds = interleave(cases, arguments.rounds, "cpu")  # a step talks to the host

    case = f"224 px, batch {scale.batch}, {scale.depth} blocks, {DTYPES[device]},"
    rates = {name: [work[name] / t / 1e12 for t in times] for name, times in seconds.items()}
    middle = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        share = middle[name] / middle[PRODUCT]
        print(
            f"utilisation {case} {name:24s} {middle[name]:8.3f} TFLOP/s"
            f" ({min(values):.3f} to {max(values):.3f})  {share:.1%} of the matrix product's rate"
        )
        append_result(
            "utilisation", f"{case} {name}", values,
            unit="TFLOP/s", baseline=PRODUCT, ratio=share,
        )  # fmt: skip
    if arguments.profile:
        write_profiles(arguments.profile, f"utilisation {case}", steps)


if __name__ == "__main__":
    main()
