"""What each checkpointing policy saves.

    python -m benchmarks.checkpointing [--model colt5_vit_b] [--batch 4] [--rounds 5]

Counts the bytes of activations that are alive between forward and backward, from the storages that
the forward pass made and that have not been freed, and times a training step, policies interleaved.
"""

import argparse
import statistics
import time
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import routedvit  # noqa: F401  registers the models
from benchmarks.results import append_result

POLICIES: dict[str, dict[str, Any]] = {
    "none": {"enable": False},
    "heavy": {"policy": "heavy"},
    "block, every 2nd": {"policy": "block", "every": 2},
    "block": {"policy": "block"},
}


class _Storages(TorchDispatchMode):
    """Remembers, without keeping it alive, every storage that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return output


def saved_activation_bytes(model: nn.Module, *inputs: Any) -> int:
    """Bytes that model(*inputs) leaves behind for the backward pass; weights and inputs aside."""
    given = [*model.parameters(), *model.buffers(), *(t for t in inputs if isinstance(t, Tensor))]
    aside = {tensor.untyped_storage()._cdata for tensor in given}
    with _Storages() as storages:
        output = model(*inputs)
    aside.add(output.untyped_storage()._cdata)
    return sum(
        size
        for data, (reference, size) in storages.seen.items()
        if data not in aside and not reference.expired()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="colt5_vit_b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    name, batch, rounds = arguments.model, arguments.batch, arguments.rounds
    model: Any = timm.create_model(name).train()
    images = torch.randn(batch, 3, *model.patch_embed.img_size)
    saved: dict[str, int] = {}
    seconds: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    for _ in range(rounds):
        for policy, options in POLICIES.items():
            model.set_grad_checkpointing(**options)
            saved[policy] = saved_activation_bytes(model, images)
            model.zero_grad()
            start = time.perf_counter()
            model(images).square().mean().backward()
            seconds[policy].append(time.perf_counter() - start)
    print(f"{name}, {batch} images of {images.shape[-1]} px, float32, {rounds} rounds\n")
    print("| policy | MiB saved per image | of none | step time, of none |")
    print("|---|---|---|---|")
    median = {policy: statistics.median(times) for policy, times in seconds.items()}
    for policy in POLICIES:
        share, slower = saved[policy] / saved["none"], median[policy] / median["none"]
        mib = saved[policy] / batch / 2**20
        append_result(
            "checkpointing", f"{name} {policy}", [mib], unit="MiB", baseline="none", ratio=share
        )
        print(f"| {policy} | {mib:.1f} | {share:.0%} | {slower:.2f} |")


if __name__ == "__main__":
    main()
