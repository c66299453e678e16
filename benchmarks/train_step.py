"""Training steps of `colt5_vit_b` beside timm's dense twin: does the clock follow the FLOPs?

    python -m benchmarks.train_step [--rounds 3] [--depth 12] [--only 224,448,all_heavy,seed]
        [--profile FOLDER]

A step is forward, backward and a fused AdamW. What counts is the realised speed-up over the dense
twin divided by the ratio of their FLOPs (counted by PyTorch's FlopCounterMode over forward and
backward): 1 means that the clock follows the count. Eager is set against eager and compiled against
compiled, all four interleaved in one run. Two more comparisons: `all_heavy`, the routed model with
every capacity 1 and no light path against the dense one, and `seed`, our `ConditionalRoutedViT`
against the one of `colt5-attention` with the same arguments and weights.

On a GPU weights and images are bf16, as under the trainer's default precision (whose fp32 master
weights are left out on both sides), and batches are larger. With --profile each step is profiled
once after it was timed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import routedvit
from benchmarks.original import original
from benchmarks.profiles import write_profiles
from benchmarks.results import append_result
from benchmarks.timing import interleave

DENSE, ROUTED = "vit_base_patch16_224", "colt5_vit_b"
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
BATCHES = {"cpu": {224: 16, 448: 4}, "cuda": {224: 256, 512: 64}}
# as timm's vit_base: a class token, no registers
ALL_HEAVY: dict[str, Any] = {
    "q_capacity": 1, "kv_capacity": 1, "ffn_capacity": 1, "light_heads": 0, "light_mlp_ratio": 0,
    "class_token": True, "reg_tokens": 0, "global_pool": "token",
}  # fmt: skip
SEED: dict[str, Any] = {
    "image_size": 224, "patch_size": 16, "num_classes": 1000, "depth": 4,
    "attn_num_heavy_tokens_q": 12, "attn_num_heavy_tokens_kv": 24, "attn_heavy_dim_head": 64,
    "attn_light_dim_head": 64, "attn_light_window_size": 7, "ff_num_heavy_tokens": 49,
    "ff_heavy_mult": 4, "ff_light_mult": 0.5,
}  # fmt: skip
SEED_WIDTHS = {192: (3, 1), 384: (6, 2), 768: (12, 3)}  # heavy and light heads


@dataclass(frozen=True)
class Options:
    """How to measure: rounds, blocks of the models, and a folder for profiles or None."""

    rounds: int
    depth: int
    profile: Path | None


class Step:
    """One training step of a model on fixed random images."""

    def __init__(self, model: nn.Module, batch: int, size: int, *, compiled: bool = False) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = DTYPES[self.device]
        model = model.to(self.device, dtype)
        self.images = torch.randn(batch, 3, size, size, device=self.device, dtype=dtype)
        self.labels = torch.randint(1000, (batch,), device=self.device)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        # one graph, of these shapes alone
        self.model: Callable[..., Any] = (
            torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
        )

    def __call__(self) -> None:
        F.cross_entropy(self.model(self.images).float(), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def flops(self) -> int:
        """Of forward and backward."""
        with FlopCounterMode(display=False) as counter:
            self.model(self.images).sum().backward()
        self.optimizer.zero_grad()
        return counter.get_total_flops()


def compare(
    case: str,
    steps: dict[str, Step],
    rounds: int,
    baseline: str,
    flop_ratio: float | None = None,
    profile: Path | None = None,
) -> dict[str, float]:
    """Time the steps, print and append a row each; returns the speed-ups over the baseline."""
    device = next(iter(steps.values())).device
    # a step allocates and communicates with the host: on a GPU too it is timed from outside
    timed = {name: synchronised(step, device) for name, step in steps.items()}
    seconds = interleave(timed, rounds, "cpu")
    median = {name: statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        speed_up = median[baseline] / median[name]
        note = f"speed-up {speed_up:.3f}"
        if flop_ratio is not None and name != baseline:
            note += f", realised over FLOP ratio {speed_up / flop_ratio:.3f} ({flop_ratio:.3f})"
            append_result(
                "train_step", f"{case} {name}, realised over FLOP ratio",
                [b / t / flop_ratio for b, t in zip(seconds[baseline], times, strict=True)],
                unit="ratio", baseline=baseline, ratio=speed_up / flop_ratio,
            )  # fmt: skip
        print(
            f"train_step {case:26s} {name:16s} {1e3 * median[name]:9.1f} ms"
            f" ({1e3 * min(times):.1f} to {1e3 * max(times):.1f})  {note}",
            flush=True,
        )
        append_result(
            "train_step", f"{case} {name}", [1e3 * t for t in times],
            unit="ms", baseline=baseline, ratio=1 / speed_up,
        )  # fmt: skip
    if device == "cuda":
        for name, step in steps.items():
            watch_the_host(f"{case} {name}", step, median[name])
    if profile is not None:
        write_profiles(profile, f"train_step {case}", timed)
    return {name: median[baseline] / own for name, own in median.items()}


def watch_the_host(case: str, step: Step, whole: float) -> None:
    """How long the host is busy with a step of a GPU, which takes `whole` seconds, and whether it
    compiles or waits in it.
    """
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
        torch.cuda.synchronize()
    print(f"train_step {case} host {1e3 * statistics.median(seconds):.1f} ms", flush=True)
    append_result(
        "train_step", f"{case} host", [1e3 * t for t in seconds],
        unit="ms", baseline="step", ratio=statistics.median(seconds) / whole,
    )  # fmt: skip
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            step()
    except RuntimeError as error:
        print(f"NOT MET, train_step {case}: {str(error).splitlines()[0]}", flush=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def synchronised(step: Callable[[], object], device: str) -> Callable[[], None]:
    """`step`, which then waits until the device has done it."""

    def call() -> None:
        step()
        if device == "cuda":
            torch.cuda.synchronize()

    return call


def against_dense(size: int, batch: int, options: Options) -> None:
    """Eager and compiled, each routed step against its dense twin."""
    models = {
        name: (lambda name=name: timm.create_model(name, img_size=size, depth=options.depth))
        for name in (DENSE, ROUTED)
    }
    flops = {name: Step(make(), 1, size).flops() for name, make in models.items()}
    ratio = flops[DENSE] / flops[ROUTED]
    for compiled, mode in ((False, "eager"), (True, "compiled")):
        case = f"{size} px, batch {batch}, {options.depth} blocks, {mode},"
        torch.compiler.reset()
        steps = {
            name: Step(make(), batch, size, compiled=compiled) for name, make in models.items()
        }
        compare(case, steps, options.rounds, DENSE, ratio, options.profile)


def all_heavy(batch: int, options: Options) -> None:
    """Every capacity 1 and no light path: the routed model is a dense one."""
    depth = options.depth
    steps = {
        DENSE: Step(timm.create_model(DENSE, depth=depth), batch, 224),
        "all heavy": Step(timm.create_model(ROUTED, depth=depth, **ALL_HEAVY), batch, 224),
    }
    case = f"224 px, batch {batch}, {depth} blocks,"
    compare(case, steps, options.rounds, DENSE, profile=options.profile)


def against_seed(batch: int, options: Options) -> None:
    """`ConditionalRoutedViT`, theirs and ours, with the same arguments and weights."""
    package = original()
    if package is None:
        return
    for dim, (heavy, light) in SEED_WIDTHS.items():
        arguments = {**SEED, "dim": dim, "attn_heavy_heads": heavy, "attn_light_heads": light}
        theirs = package.ConditionalRoutedViT(**arguments)
        ours = routedvit.ConditionalRoutedViT(**arguments)
        ours.load_state_dict(theirs.state_dict())
        steps = {"colt5-attention": Step(theirs, batch, 224), "ours": Step(ours, batch, 224)}
        case = f"ConditionalRoutedViT, D={dim}, batch {batch},"
        compare(case, steps, 5 * options.rounds, "colt5-attention", profile=options.profile)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--only", default="", help="comma-separated: sizes, all_heavy, seed")
    parser.add_argument("--profile", type=Path, help="folder for a table of operators per step")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",") if arguments.only else None
    batches = BATCHES["cuda" if torch.cuda.is_available() else "cpu"]
    options = Options(arguments.rounds, arguments.depth, arguments.profile)
    for size, batch in batches.items():
        if wanted is None or str(size) in wanted:
            against_dense(size, batch, options)
    if wanted is None or "all_heavy" in wanted:
        all_heavy(batches[224], options)
    if wanted is None or "seed" in wanted:
        against_seed(batches[224], options)


if __name__ == "__main__":
    main()
