"""The one file that imports deepspeed: processes, the optimiser step under ZeRO, sharded state.

The rest of the trainer sees an `Engine` with one method per verb and never learns which ZeRO stage
runs underneath. DeepSpeed is prepared so that nothing is compiled and little is loaded:

- its shared-memory all-reduce for CPUs (used by inference only) would be built with g++ at the
  first start, half a minute on two cores; telling it that no op is compatible avoids the build and
  the probing of every other op (nvcc, git, ninja);
- it imports its Muon optimiser in every run, whose torch.compile decorators load all of Inductor:
  1 s of a warm start, 8 s where no bytecode is cached. They are imported undecorated;
- optimisers come from torch and timm, so no fused op is built.

Reference: DeepSpeed 0.19.8, deepspeed/__init__.py and deepspeed/runtime/engine.py.
"""

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pydantic
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d

from routedvit.training.config import ConfigError
from routedvit.training.config_file import nearest
from routedvit.training.connection import connecting
from routedvit.training.interfaces import Batch
from routedvit.training.native_config import zero_stage
from routedvit.training.world import World, join_environment

# Both are read while deepspeed is imported. The NVML check keeps CUDA uninitialised for forks.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import default_pg_timeout
from deepspeed.runtime import compiler as deepspeed_compiler
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.zero.parameter_offload import ensure_zero_ordered_dict
from deepspeed.utils import safe_get_full_fp32_param

T = TypeVar("T")
STATE_FOLDER = "deepspeed"  # DeepSpeed's tag: its files lie in this folder of a checkpoint

HYPERPARAMETERS = {"lr", "initial_lr", "lr_scale", "weight_decay", "betas", "eps"}


class StepResult(NamedTuple):
    """One optimiser step, equal on all ranks."""

    loss: float  # mean over the global batch
    metrics: dict[str, float]  # the objective's metrics, likewise
    grad_norm: torch.Tensor | float  # global 2-norm before clipping; float() waits for the step
    skipped: bool  # a loss or gradient was not finite on some rank: weights are unchanged
    stop: bool  # some rank asked to stop


def start(*, tf32: bool = True, tell: Callable[[str], None] = print) -> World:
    """Connect this process to the others, whoever launched it. Collective; call it first.

    See `connection.connecting` for what it raises and when it calls `tell`.
    """
    world = join_environment()
    deepspeed.ops.__compatible_ops__ = {}
    _import_muon_undecorated()
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    with connecting(world, tell):
        deepspeed.init_distributed(verbose=False)
    atexit.register(stop)  # gloo's threads abort a process that ends while still connected
    return world


def stop() -> None:
    """Disconnect; calling it twice is fine."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _import_muon_undecorated() -> None:
    decorator = deepspeed_compiler.compile
    deepspeed_compiler.compile = lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        deepspeed_compiler.compile = decorator


class Engine:
    """A module under DeepSpeed: steps, evaluation mode, full weights, sharded state.

    Args:
        world: what `start` returned.
        objective: called as objective(image, target, position) -> (scalar loss, {name: scalar});
            its attribute `model` is the network. The loss is part of it because under ZeRO-3
            weights exist only inside the forward of the module that DeepSpeed wraps.
        optimizer: a torch optimiser over the objective's parameters (see `optim.py`). DeepSpeed
            keeps the object and its group dicts, so a schedule may go on setting their `lr`.
        native: the dict from `native_config.resolve_native_config`.

    Raises:
        ConfigError: DeepSpeed refuses `native`, or the device cannot do its precision.
    """

    def __init__(
        self,
        world: World,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        native: dict[str, Any],
    ) -> None:
        _check_native(native)
        self.rank = world.rank
        self.world_size = world.size
        self.device = world.device
        self.zero_stage = zero_stage(native)
        self.accumulation: int = native["gradient_accumulation_steps"]
        self.optimizer = optimizer
        self._grad_clip: float = native["gradient_clipping"]
        if self.zero_stage == 0:
            native = native | {"gradient_clipping": 0.0}  # clipped in _finish_step_unsharded
        self.model: nn.Module = objective.model  # type: ignore[assignment]
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self._engine, *_ = deepspeed.initialize(
            model=objective, optimizer=optimizer, config=native, dist_init_required=False
        )
        _bound_all_waits()
        self.objective: nn.Module = self._engine.module
        self.model.register_forward_pre_hook(_cast_to_parameters)

    def train_step(self, batches: Sequence[Batch], *, stop: bool = False) -> StepResult:
        """Forward and backward of `accumulation` micro-batches and one optimiser step. Collective.

        A loss that is not finite poisons its gradients, so the check of the gradient norm that
        DeepSpeed makes anyway skips the step on every rank alike. `stop` rides on the all-reduce
        of the loss: True on any rank comes back as True on all.
        """
        assert len(batches) == self.accumulation
        totals: torch.Tensor | None = None
        names: list[str] = []
        for index, batch in enumerate(batches):
            image = batch["image"].to(self.device, non_blocking=True)
            target = batch["target"].to(self.device, non_blocking=True)
            position = batch["position"].to(self.device, non_blocking=True)
            loss, metrics = self._engine(image, target, position)
            self._engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan))
            names = list(metrics)
            values = torch.stack([loss.detach().float(), *metrics.values()])
            totals = values if totals is None else totals + values
            if index < self.accumulation - 1:
                self._engine.step()  # counts the micro-batch
        assert totals is not None
        mean = _Read(torch.cat([totals / self.accumulation, totals.new_tensor([float(stop)])]))
        grad_norm, applied = self._finish_step()
        loss_mean, *metric_means, stops = mean.get()
        return StepResult(
            loss=loss_mean,
            metrics=dict(zip(names, metric_means, strict=True)),
            grad_norm=grad_norm,
            skipped=not applied,
            stop=stops > 0,
        )

    def _finish_step(self) -> tuple[torch.Tensor | float, bool]:
        """Clip and step, or skip; returns the gradient norm and whether the step was applied."""
        if self.zero_stage == 0:
            return self._finish_step_unsharded()
        self._engine.step()
        applied = self._engine.was_step_applied()
        return self._engine.get_global_grad_norm() if applied else float("inf"), applied

    def _finish_step_unsharded(self) -> tuple[torch.Tensor, bool]:
        """As `_finish_step`; without ZeRO, DeepSpeed neither checks nor tells the norm."""
        parameters = [p for p in self.objective.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])  # type: ignore[misc]
        applied = bool(norm.isfinite())
        if not applied:
            for parameter in parameters:
                parameter.grad = None  # torch optimisers leave these alone
        elif self._grad_clip > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._grad_clip, norm)
        self._engine.step()
        return norm, applied

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The network in eval mode without gradients; all ranks run the same forwards."""
        self.objective.eval()
        if self.zero_stage == 3:
            self._watch_parameter_access(True)
        try:
            with torch.no_grad():
                yield self.model
        finally:
            if self.zero_stage == 3:
                self._watch_parameter_access(False)
            self.objective.train()

    def _watch_parameter_access(self, on: bool) -> None:
        """Let ZeRO-3 gather weights that a forward reads from its children, as it does in training.

        DeepSpeed switches this on around the forward of the module it wraps; evaluators call the
        network inside, where a fused op would find weights of shape (0,).
        """
        for module in self.objective.modules():
            ensure_zero_ordered_dict(module)
            module._parameters._in_forward = on  # type: ignore[attr-defined]

    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, full fp32 master weight) of the network, one after the other. Collective."""
        for name, parameter in self.model.named_parameters():
            if self.zero_stage > 0 and parameter.requires_grad:
                yield name, safe_get_full_fp32_param(parameter)
            else:
                with deepspeed.zero.GatheredParameters([parameter], enabled=self.zero_stage == 3):
                    yield name, parameter.detach().float()

    def save_state(self, folder: Path) -> None:
        """Write the sharded weights and optimiser state below `folder`. Collective."""
        self._engine.save_checkpoint(str(folder), tag=STATE_FOLDER, save_latest=False)
        if self.rank == 0:  # DeepSpeed drops copies of its conversion scripts beside the data
            for script in folder.glob("zero_to_*.py"):
                script.unlink()

    def load_state(self, folder: Path) -> None:
        """Read what `save_state` wrote. It unpickles: verify the files first. Collective.

        Rates and decays stay as they are: the config decides them, not the checkpoint.
        """
        groups = self.optimizer.param_groups
        kept = [{key: group[key] for key in HYPERPARAMETERS & group.keys()} for group in groups]
        path, _ = self._engine.load_checkpoint(str(folder), tag=STATE_FOLDER)
        assert path is not None, f"{folder} holds no DeepSpeed state"
        for group, values in zip(self.optimizer.param_groups, kept, strict=True):
            group.update(values)

    def gather(self, value: T) -> list[T]:
        """`value` of every rank, in the order of ranks, on every rank. Collective."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's `value` on every rank. Collective."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait for all ranks. Collective."""
        dist.barrier()


def _bound_all_waits() -> None:
    """Give every process group DEEPSPEED_TIMEOUT (minutes; 10 unless set).

    DeepSpeed reduces gradients in groups of its own, made with torch's timeout: a machine that lost
    its power left the others waiting for half an hour.
    """
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(default_pg_timeout, group)


class _Read:
    """World mean of a small vector, copied to the host without stalling the device.

    The copy is enqueued before the optimiser step, which waits for the device by itself, so `get`
    after the step finds it done. The last element is summed rather than averaged.
    """

    def __init__(self, values: torch.Tensor) -> None:
        dist.all_reduce(values)
        values[:-1] /= dist.get_world_size()
        self._host = values.to("cpu", non_blocking=True)
        self._event = None
        if values.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def get(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return [float(value) for value in self._host]


def _cast_to_parameters(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give a bf16 or fp16 network its floating-point inputs in its own type."""
    dtype = next(model.parameters()).dtype
    return tuple(
        value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for value in inputs
    )


def _check_native(native: dict[str, Any]) -> None:
    """Let DeepSpeed read its config, and say in one line what it does not like."""
    if native.get("fp16", {}).get("enabled") and not get_accelerator().is_fp16_supported():
        raise ConfigError("precision.dtype = fp16: this device has no fp16; use bf16 or fp32")
    try:
        deepspeed.DeepSpeedConfig(native)
    except pydantic.ValidationError as error:
        raise ConfigError(_first_mistake(error, native)) from None
    except (DeepSpeedConfigError, AssertionError, TypeError, AttributeError) as error:
        raise ConfigError(f"deepspeed: {error}") from None


def _first_mistake(error: pydantic.ValidationError, native: dict[str, Any]) -> str:
    """'deepspeed.zero_optimization.stge: unknown key (did you mean 'stage'?)'."""
    mistake = error.errors(include_url=False)[0]
    key = str(mistake["loc"][-1]) if mistake["loc"] else ""
    where = _find(native, key, "deepspeed") or "deepspeed"
    if mistake["type"] != "extra_forbidden":
        return f"{where} = {mistake['input']!r}: {mistake['msg']}"
    models = {model.__name__: model for model in _subclasses(DeepSpeedConfigModel)}
    known = list(models[error.title].model_fields) if error.title in models else []
    return f"{where}: unknown key{nearest(key, known)}"


def _find(tree: dict[str, Any], key: str, path: str) -> str | None:
    """Dotted path of the first `key` in nested dicts."""
    if key in tree:
        return f"{path}.{key}"
    inner = (_find(v, key, f"{path}.{k}") for k, v in tree.items() if isinstance(v, dict))
    return next(filter(None, inner), None)


def _subclasses(model: type[pydantic.BaseModel]) -> Iterator[type[pydantic.BaseModel]]:
    for child in model.__subclasses__():
        yield child
        yield from _subclasses(child)
