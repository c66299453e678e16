"""Everything that needs a GPU, in one call: `python -m benchmarks.gpu` (or `make gpu`).

The tests marked `gpu`, then each benchmark that has something to say about a GPU. Goes on after a
failure, tells at the end what failed, and exits with 1 if anything did.
"""

import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
STEPS = (
    ("-m", "pytest", "-m", "gpu", "tests"),
    ("-m", "benchmarks.router"),
    ("-m", "benchmarks.router", "--forward"),
    ("-m", "benchmarks.tokens"),
    ("-m", "benchmarks.block"),
    ("-m", "benchmarks.train_step", "--rounds", "10"),
)


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here: nothing to run")
    failed = []
    for step in STEPS:
        began = time.perf_counter()
        print(f"== python {' '.join(step)}", flush=True)
        if subprocess.run([sys.executable, *step], cwd=ROOT).returncode:
            failed.append(" ".join(step))
        print(f"== {time.perf_counter() - began:.0f} s\n", flush=True)
    sys.exit(f"failed: {'; '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
