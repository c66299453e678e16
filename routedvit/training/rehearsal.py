"""A training step that computes nothing: the run's own objective and engine on fake tensors.

A fake tensor has a shape, a type and no memory, and the world may be of any size, with this process
as rank 0 of it (`engine.pretend`). So the memory of one GPU of 64 is read off a laptop, and what
DeepSpeed allocates (flat copies, buckets, gathered weights) is counted where it is allocated, not
modelled. The first step creates the optimiser's state and lets ZeRO-3 record in which order it
needs the weights; the second is like all that follow and is the one measured.

Not counted, since no tensor holds it: the CUDA context and NCCL, workspaces of cuDNN and cuBLAS,
fragmentation. Attention is PyTorch's fused CPU kernel, which keeps what the GPU's keeps; routing
operators are their PyTorch references.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from timm.data import resolve_input_data_config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch.utils.flop_counter import FlopCounterMode

from routedvit.training.assembly import wrap_objective
from routedvit.training.config.native import split_batch
from routedvit.training.config.recipe import TeacherConfig
from routedvit.training.config.run import RunConfig
from routedvit.training.distributed.world import World
from routedvit.training.engine import cast_to_parameters, pretend
from routedvit.training.interfaces import Batch
from routedvit.training.memory import MemoryMeter, storage_bytes
from routedvit.training.model import create_model, knows_checkpointing, set_checkpointing
from routedvit.training.objectives import DistillationObjective, build_objective
from routedvit.training.objectives.teacher import Teacher, build_teacher
from routedvit.training.precision import DTYPES
from routedvit.training.recipe.capacity import CapacityDial, scheduled

aten = torch.ops.aten
VIEWS = {
    aten.detach.default, aten.permute.default, aten.select.int, aten.slice.Tensor,
    aten.squeeze.dim, aten.t.default, aten.transpose.int, aten.unsqueeze.default,
    aten.view.default,
}  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, each figure where it is largest, so they do not add up to `peak`."""

    weights: int  # this rank's share, in the type of compute
    gathered: int  # weights of other ranks at the end of a forward pass (ZeRO-3)
    master: int  # the fp32 copy that the optimiser updates, where it is one
    state: int  # of the optimiser
    gradients: int  # when the optimiser steps, with communication buffers
    peak: int  # everything, activations and temporaries included
    host: int  # what is offloaded to the memory of the host; none of the above holds it
    saved: int  # this rank's share of a checkpoint, copied to the host to be written


@dataclass(frozen=True)
class Compute:
    """What does not depend on the world: parameters, FLOPs per image, activations in bytes."""

    num_parameters: int
    forward_flops: float
    training_flops: float  # forward, backward and what is recomputed
    activations: dict[tuple[str, int], int]  # of a micro-batch, by checkpointing policy and `every`


def measure_compute(
    config: RunConfig, world_size: int, policies: tuple[tuple[str, int], ...]
) -> Compute:
    """FLOPs, and what forward keeps for backward under each of `policies` that the model knows,
    without any engine.
    """
    size, _ = split_batch(config.train.batch_size, config.train.micro_batch_size, world_size)
    with _fakes() as meter:
        objective = _fake_objective(config, world_size)
        model: nn.Module = objective.model  # type: ignore[assignment]
        if not config.precision.autocast:
            for parameter in objective.parameters():  # DeepSpeed leaves buffers alone
                parameter.data = parameter.data.to(DTYPES[config.precision.dtype])
        model.register_forward_pre_hook(cast_to_parameters)
        batch = _batch(image_format(config)["input_size"], size)

        def forward() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision.autocast):
                loss, _ = objective(batch["image"], batch["target"], batch["position"])
                return loss

        with FlopCounterMode(display=False) as counter:
            loss = forward()
            forward_flops = counter.get_total_flops()
            loss.backward()
            del loss
        activations = {}
        for policy, every in policies:
            if not knows_checkpointing(model, policy, every):
                continue
            set_checkpointing(model, policy, every)
            before = meter.live
            loss = forward()
            activations[policy, every] = meter.live - before - loss.untyped_storage().nbytes()
            del loss
        return Compute(
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            forward_flops=forward_flops / size,
            training_flops=counter.get_total_flops() / size,
            activations=activations,
        )


class MemoryRehearsal:
    """The engine of a run in a pretended world, on fake tensors; `rehearse_memory` opens one."""

    def __init__(self, config: RunConfig, world: World, meter: MemoryMeter) -> None:
        self.meter = meter
        objective = _fake_objective(config, world.size)
        self.engine, self.average = wrap_objective(config, objective, world)
        self.input_size = image_format(config)["input_size"]
        self.optimizer = self.engine.optimizer
        self.offloads = self.engine.offloads
        self._in_optimizer = self._after_forward = self._before_host_step = 0
        self.host: list[Tensor] | None = None  # unknown before the first step
        self.engine.objective.register_forward_hook(self._forward_is_done)
        self.optimizer.register_step_pre_hook(self._optimizer_begins)
        self.optimizer.register_step_post_hook(self._optimizer_is_done)

    def measure(self, micro_batch_size: int) -> Memory:
        """One step with micro-batches of this size."""
        if self.host is None:
            self._step(micro_batch_size)
            self.host = list(self.engine.host_tensors())
            self.meter.set_aside(self.host)
        self._in_optimizer = self._after_forward = 0
        weights, here = storage_bytes(self._shares()), storage_bytes(self._gathered())
        self.meter.reset_peak()
        self._step(micro_batch_size)
        state, masters = self._optimizer_tensors()
        return Memory(
            weights=weights,
            gathered=max(0, self._after_forward - here),
            master=storage_bytes(masters),
            state=storage_bytes(state),
            gradients=max(0, self._in_optimizer - weights - storage_bytes([*masters, *state])),
            peak=self.meter.peak,
            host=storage_bytes(self.host),
            saved=self.engine.share_bytes(),
        )

    def _step(self, size: int) -> None:
        self.engine.train_step(
            [_batch(self.input_size, size) for _ in range(self.engine.accumulation)]
        )

    def _shares(self) -> list[Tensor]:
        """Weights that lie on this GPU between steps."""
        own = [getattr(p, "ds_tensor", p) for p in self.engine.objective.parameters()]
        return self._on_gpu([*own, *self._gathered()])

    def _gathered(self) -> list[Tensor]:
        """Whole weights that are on this GPU now."""
        return [p.data for p in self.engine.objective.parameters() if p.numel()]

    def _optimizer_tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """(state, masters) on this GPU; where the weights are fp32 and whole they are no copy."""
        weights = {p.untyped_storage()._cdata for p in self._gathered()}
        state = [t for s in self.optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
        masters = [key for key in self.optimizer.state if torch.is_tensor(key)]
        masters = [key for key in masters if key.untyped_storage()._cdata not in weights]
        return self._on_gpu(state), self._on_gpu(masters)

    def _on_gpu(self, tensors: list[Tensor]) -> list[Tensor]:
        host = {tensor.untyped_storage()._cdata for tensor in self.host or ()}
        return [tensor for tensor in tensors if tensor.untyped_storage()._cdata not in host]

    def _forward_is_done(self, *_: Any) -> None:
        self._after_forward = max(self._after_forward, storage_bytes(self._gathered()))

    def _optimizer_begins(self, *_: Any) -> None:
        self._in_optimizer = max(self._in_optimizer, self.meter.live)
        self._before_host_step = self.meter.peak

    def _optimizer_is_done(self, *_: Any) -> None:
        if self.offloads:  # its temporaries are on the host
            self.meter.peak = self._before_host_step


@contextmanager
def rehearse_memory(config: RunConfig, world_size: int) -> Iterator[MemoryRehearsal]:
    """A `MemoryRehearsal` of `config` in a world of `world_size` ranks."""
    with pretend(world_size) as world, _fakes() as meter:
        yield MemoryRehearsal(config, world, meter)


class _FakeMeter(MemoryMeter):
    """Counts fake tensors, and answers what has no answer: the value of one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # half of all calls
            return args[0].fake_device
        if func in VIEWS and not kwargs and isinstance(args[0], FakeTensor):
            return _directly(func, args, args[0])
        if func is aten.cat.default and isinstance(args[0][0], FakeTensor):
            joined = _directly(func, args, args[0][0])
            self.add(joined)
            return joined
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            # Flags, such as an overflow, are down; numbers, such as a norm, are finite.
            dtype = args[0].dtype
            return 1.0 if dtype.is_floating_point else False if dtype == torch.bool else 0
        return super().__torch_dispatch__(func, types, args, kwargs)


def _directly(func: Any, args: Any, like: FakeTensor) -> Tensor:
    """A simple operator on fake tensors, 40 times as fast as by way of FakeTensorMode.

    ZeRO-3 joins every weight from as many pieces as there are ranks.
    """
    with in_kernel_invocation_manager(like.fake_mode):
        result = func(*args)
    return FakeTensor(like.fake_mode, result, like.fake_device)


@contextmanager
def _fakes() -> Iterator[MemoryMeter]:
    """Everything made inside is a fake tensor and is counted."""
    # DeepSpeed asserts alignments of addresses; Module.to would swap parameters that it refers to.
    addresses = patch.object(FakeTensor, "data_ptr", lambda tensor: 0)
    conversion = patch.object(nn.Module, "_apply", _apply)
    # Asked at every operator, and each time looked up in the driver.
    no_gpu = patch.object(torch.cuda, "is_available", lambda: False)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with addresses, conversion, no_gpu, fakes, _FakeMeter() as meter:
        yield meter


def _apply(module: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """As nn.Module._apply on real tensors: the conversion goes into the parameter's `data`."""
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None:
                parameter.data = function(parameter.data)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = function(buffer)
    return module


def image_format(config: RunConfig) -> dict[str, Any]:
    """Size, mean, std and interpolation of the images that the model takes (timm's names)."""
    with torch.device("meta"):
        num_classes = config.model.kwargs["num_classes"]
        model = create_model(config.model, num_classes=num_classes, seed=0)
    found = resolve_input_data_config(model, {"model_kwargs": config.model.kwargs})
    return {key: found[key] for key in ("input_size", "mean", "std", "interpolation")}


def _fake_objective(config: RunConfig, world_size: int) -> nn.Module:
    """The run's objective, of fake parameters.

    Built on `meta`, outside of the fakes: code that reads values while it builds, such as drop-path
    rates, gets the right ones.
    """
    images = image_format(config)
    micro_batch_size, _ = split_batch(
        config.train.batch_size, config.train.micro_batch_size, world_size
    )
    meta = torch.device("meta")
    with unset_fake_temporarily(), meta:
        num_classes = config.model.kwargs["num_classes"]
        model = create_model(config.model, num_classes=num_classes, seed=config.seed)
        objective = build_objective(
            config,
            model,
            micro_batch_size=micro_batch_size,
            device=meta,
            mean=images["mean"],
            std=images["std"],
            teacher=_teacher_at_hand,
        )
    set_checkpointing(model, *config.train.checkpointing)
    largest = max(scheduled(config.capacity))
    if largest > 1:  # the step that takes most
        CapacityDial(model, lambda step: largest).turn(0)
    parts = list(objective.modules())
    if isinstance(objective, DistillationObjective):
        parts += objective.teacher.network.modules()  # type: ignore[attr-defined]
    for part in parts:
        for name, parameter in part._parameters.items():
            if parameter is not None:
                fake = torch.empty_like(parameter, device="cpu")
                part._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty_like(buffer, device="cpu")
    return objective


def _teacher_at_hand(config: TeacherConfig, **options: Any) -> Teacher:
    """A real one, to be made fake with the rest: some networks compute their widths by tensors.

    Weights that lie here are read, for what may be wrong with them; none are downloaded.
    """
    trained = config.pretrained and config.name.startswith("local-dir:")
    trained = trained or (config.checkpoint is not None and Path(config.checkpoint).is_file())
    with unset_fake_temporarily(), torch.device("cpu"):
        return build_teacher(config, **options | {"device": torch.device("cpu")}, trained=trained)


def _batch(input_size: tuple[int, int, int], size: int) -> Batch:
    """A micro-batch of `size` images (C, H, W)."""
    return {
        "image": torch.empty(size, *input_size),
        "target": torch.zeros(size, dtype=torch.int64),
        "position": torch.tensor(list(range(size))),  # may be read: a constant keeps its values
    }
