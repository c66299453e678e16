"""Numbers that are read off a run when it logs: what the network was given, arithmetic, memory."""

from __future__ import annotations

import resource
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# Dense bf16 peaks in TFLOP/s, from the makers' data sheets, without sparsity. The first entry that
# is part of the device's name counts.
PEAK_TFLOPS = {
    "GB200": 2500, "B200": 2250, "B100": 1750, "H200": 989, "GH200": 989, "H100 PCIe": 756,
    "H100 NVL": 835, "H100": 989, "H800": 989, "H20": 148, "A100": 312, "A800": 312, "A40": 150,
    "A30": 165, "A10G": 70, "A10": 125, "RTX A6000": 155, "L40S": 362, "L40": 181, "L4": 121,
    "RTX 6000 Ada": 364, "RTX 5090": 209, "RTX 4090": 165, "RTX 3090": 71, "MI355": 2500,
    "MI325": 1307, "MI300": 1307, "MI250": 383,
}  # fmt: skip
TRAINING_OVER_FORWARD = 3  # a backward costs two forwards


class ForwardCounter:
    """Watches what the network is given while it trains: images, their size, its capacity.

    A hook on the network's own forward adds up the FLOPs of every training image at the capacity
    and size it has in that step, three times for forward and backward. Blocks that are recomputed
    run again but the network does not, so nothing is counted twice; evaluation does not count. An
    objective that goes around the network's forward (an autoencoder) is not counted at all.

    Args:
        model: the network.
        flops: model and image size (H, W) -> FLOPs of one image, forward.
        world_size: devices that share the images.
        peak_tflops: of one device, for the utilisation; None leaves it out (as on a CPU).
    """

    def __init__(
        self,
        model: nn.Module,
        flops: Callable[[Any, tuple[int, int]], float],
        *,
        world_size: int = 1,
        peak_tflops: float | None = None,
    ) -> None:
        self._flops = flops
        self._world_size = world_size
        self._peak_tflops = peak_tflops
        self._known: dict[Any, float] = {}  # FLOPs of one image by size and capacities
        self._images, self._total = 0, 0.0  # since the last read
        self._routers = _routers_by_kind(model)
        self._capacities: dict[str, float] = {}
        model.register_forward_pre_hook(self._count)

    def _count(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not model.training:
            return
        images = inputs[0]
        ratios = {
            kind: tuple((router.numerator, router.denominator) for router in routers)
            for kind, routers in self._routers.items()
        }
        size = (int(images.shape[-2]), int(images.shape[-1]))
        key = (size, *ratios.values())
        if key not in self._known:
            self._known[key] = self._flops(model, size)
        self._images += len(images)
        self._total += len(images) * self._known[key]
        self._capacities = {
            kind: sum(n / d for n, d in each) / len(each) for kind, each in ratios.items()
        }

    def read(self, images_per_second: float) -> dict[str, float]:
        """Scalars since the last call, for the speed of the whole world in that time."""
        values = {f"train/capacity_{kind}": value for kind, value in self._capacities.items()}
        if self._total:
            per_image = TRAINING_OVER_FORWARD * self._total / self._images
            achieved = per_image * images_per_second / self._world_size / 1e12
            values["speed/tflops_per_device"] = achieved
            if self._peak_tflops is not None:
                values["speed/flop_utilisation"] = achieved / self._peak_tflops
        self._images, self._total = 0, 0.0
        return values


def forward_flops(model: Any, size: tuple[int, int]) -> float:
    """FLOPs of one training image, forward, by the model's own count (a multiply-add is 2)."""
    return float(model.flops(size, training=True).total)


def measured_flops(model: nn.Module, input_size: tuple[int, int, int]) -> float:
    """FLOPs of one image (C, H, W) as torch counts them: for a model without a count of its own.

    One forward; collective under ZeRO-3.
    """
    parameter = next(model.parameters())
    image = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    with FlopCounterMode(display=False) as counter:
        model(image)
    return float(counter.get_total_flops())


def known_peak(device: torch.device) -> float | None:
    """Dense bf16 TFLOP/s of a GPU by its name, such as 'NVIDIA H100 80GB HBM3'; None if unknown."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of(name: str) -> float | None:
    """The entry of `PEAK_TFLOPS` for a device's name."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def memory(device: torch.device) -> dict[str, float]:
    """GiB that this process holds on the host, and the most that torch ever held on its GPU."""
    values = {"speed/host_memory_gib": _resident_bytes() / 2**30}
    if device.type == "cuda":
        values["speed/peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return values


def weight_decay(optimizer: torch.optim.Optimizer) -> float:
    """The present weight decay of the groups that decay."""
    return max(float(group.get("weight_decay", 0.0)) for group in optimizer.param_groups)


def _routers_by_kind(model: Any) -> dict[str, list[Any]]:
    """Routers that have a capacity, by the last part of their name: 'q', 'kv', 'ffn'."""
    kinds: dict[str, list[Any]] = defaultdict(list)
    if hasattr(model, "routers"):
        for name, router in model.routers().items():
            if not getattr(router, "kind", "").startswith("all_"):  # dense blocks have none
                kinds[name.rpartition(".")[2]].append(router)
    return kinds


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()
