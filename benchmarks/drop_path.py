"""Efficient stochastic depth beside timm's: does a step get cheaper by what is not computed?

    python -m benchmarks.drop_path [--model colt5_vit_b] [--rate 0.5] [--rounds 5] [--depth 6]

Training steps as in `benchmarks.train_step`, with LayerScale, eager and compiled. The baseline's
drop-path computes every sublayer for all images. Rates rise from 0 in the first block, so that the
promise is about half of `--rate`.
"""

import argparse

import timm
import torch

from benchmarks.train_step import BATCHES, Step, compare

BASELINE, SPARING = "drop-path", "efficient drop-path"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="colt5_vit_b")
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--depth", type=int, default=6)
    arguments = parser.parse_args()
    batch = BATCHES["cuda" if torch.cuda.is_available() else "cpu"][224]
    for compiled, mode in ((False, "eager"), (True, "compiled")):
        torch.compiler.reset()
        steps, flops = {}, {}
        for name in (BASELINE, SPARING):
            model = timm.create_model(
                arguments.model, depth=arguments.depth, init_values=1e-4,
                drop_path_rate=arguments.rate, efficient_drop_path=name == SPARING,
            )  # fmt: skip
            flops[name] = Step(model.train(), batch, 224).flops()
            steps[name] = Step(model, batch, 224, compiled=compiled)
        case = f"{arguments.model}, 224 px, batch {batch}, rate {arguments.rate}, {mode},"
        compare(case, steps, arguments.rounds, BASELINE, flops[BASELINE] / flops[SPARING])


if __name__ == "__main__":
    main()
