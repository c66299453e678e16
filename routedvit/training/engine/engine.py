"""The optimiser step under ZeRO and the sharded state, behind one method per verb.

Reference: DeepSpeed 0.19.8, deepspeed/runtime/engine.py.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.parameter_offload import ensure_zero_ordered_dict
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import nn

from routedvit.training.ahead import Ahead
from routedvit.training.checkpoints.taken_shards import state_bytes
from routedvit.training.checkpoints.zero_layout import ZeroLayout
from routedvit.training.config.native import zero_stage
from routedvit.training.config.run import ConfigError
from routedvit.training.device_clock import DeviceClock
from routedvit.training.distributed import collective
from routedvit.training.distributed.world import World
from routedvit.training.engine import state
from routedvit.training.engine.native_check import check_native, mistakes_in_words
from routedvit.training.engine.processes import bound_all_waits
from routedvit.training.images import as_floats
from routedvit.training.interfaces import Batch
from routedvit.training.recipe.weight_average import exchange

T = TypeVar("T")


class StepResult(NamedTuple):
    """One optimiser step, equal on all ranks."""

    loss: float  # mean over the global batch
    metrics: dict[str, float]  # the objective's metrics, likewise
    grad_norm: torch.Tensor | float  # global 2-norm before clipping; float() waits for the step
    skipped: bool  # a loss or gradient was not finite on some rank: weights are unchanged
    stop: bool  # some rank asked to stop
    writing: bool = False  # some rank was still writing a checkpoint when the step began
    own_loss: torch.Tensor | float = 0.0  # mean over this rank's images; float() may wait
    loss_scale: float | None = None  # of fp16, for the next step


class Engine:
    """A module under DeepSpeed: steps, evaluation mode, full weights, sharded state.

    Args:
        world: what `start` returned.
        objective: called as objective(image, target, position) -> (scalar loss, {name: scalar});
            its attribute `model` is the network. The loss is part of it because under ZeRO-3
            weights exist only inside the forward of the module that DeepSpeed wraps.
        optimizer: a torch optimiser over the objective's parameters (see `recipe/optim.py`).
            DeepSpeed keeps the object and its group dicts, so a schedule may go on setting `lr`.
        native: the dict from `config.native.resolve_native_config`.

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
        check_native(native)
        self.rank = world.rank
        self.world_size = world.size
        self.device = world.device
        self.zero_stage = zero_stage(native)
        self.accumulation: int = native["gradient_accumulation_steps"]
        self.scales_loss = bool(native.get("fp16", {}).get("enabled"))  # and so overflows at times
        self.optimizer = optimizer
        self._autocast = native.get("torch_autocast", {}).get("enabled", False)
        self._grad_clip: float = native["gradient_clipping"]
        if self.zero_stage == 0:
            native = native | {"gradient_clipping": 0.0}  # clipped in _finish_step_unsharded
        self.model: nn.Module = objective.model  # type: ignore[assignment]
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        with mistakes_in_words():
            self._engine, *_ = deepspeed.initialize(
                model=objective, optimizer=optimizer, config=native, dist_init_required=False
            )
        bound_all_waits()
        self.forward_clock = DeviceClock(self.device)
        self._send_ahead = Ahead(self.device)
        self.objective: nn.Module = self._engine.module
        self._layout = ZeroLayout(
            self._engine.optimizer, self.zero_stage, self.objective, self.rank, self.world_size
        )
        self.model.register_forward_pre_hook(cast_to_parameters)

    def train_step(
        self,
        batches: Sequence[Batch],
        *,
        stop: bool = False,
        writing: bool = False,
        before_step: Callable[[], None] | None = None,
    ) -> StepResult:
        """Forward and backward of `accumulation` micro-batches and one optimiser step. Collective.

        A loss that is not finite poisons its gradients, so the check of the gradient norm that
        DeepSpeed makes anyway skips the step on every rank alike. `stop` and `writing` ride on the
        all-reduce of the loss: True on any rank comes back as True on all. `before_step` is called
        on all ranks when the gradients are complete; `full_gradients` is there for it.
        """
        assert len(batches) == self.accumulation
        totals: torch.Tensor | None = None
        names: list[str] = []
        for index, batch in enumerate(self._send_ahead(batches)):
            images = as_floats(batch)
            with self.forward_clock.timed():
                loss, metrics = self._engine(images, batch["target"], batch["position"])
            self._engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan))
            names = list(metrics)
            values = torch.stack([loss.detach().float(), *metrics.values()])
            totals = values if totals is None else totals + values
            if index < self.accumulation - 1:
                self._engine.step()  # counts the micro-batch
        assert totals is not None
        # filled, not copied: a copy from the host would wait for the whole backward pass
        flags = [totals.new_full((1,), float(flag)) for flag in (stop, writing)]
        mean = collective.WorldMean(torch.cat([totals / self.accumulation, *flags]))
        if before_step is not None:
            before_step()
        grad_norm, applied = self._finish_step()
        loss_mean, *metric_means, stops, writes = mean.get()
        return StepResult(
            loss=loss_mean,
            metrics=dict(zip(names, metric_means, strict=True)),
            grad_norm=grad_norm,
            skipped=not applied,
            stop=stops > 0,
            writing=writes > 0,
            own_loss=totals[0] / self.accumulation,
            loss_scale=self._engine.optimizer.cur_scale if self.scales_loss else None,
        )

    def ahead(self, batches: Iterator[Batch], steps: int) -> Iterator[Batch]:
        """The micro-batches of `steps` steps, the first of the next step on its way to the device
        while one is computed. Several to a step are sent off within the step, to save memory.
        """
        batches = itertools.islice(batches, steps * self.accumulation)
        return self._send_ahead(batches) if self.accumulation == 1 else batches

    def _finish_step(self) -> tuple[torch.Tensor | float, bool]:
        """Clip and step, or skip; returns the gradient norm and whether the step was applied."""
        if self.zero_stage == 0:
            return self._finish_step_unsharded()
        try:
            self._engine.step()
        except Exception as error:  # DeepSpeed raises nothing narrower
            if "loss scale already at minimum" in str(error):
                raise ConfigError(
                    "fp16: gradients overflow even at the smallest loss scale; use precision.dtype "
                    "= bf16, or lower optim.lr and start again from the newest checkpoint"
                ) from error
            raise
        if not self._engine.was_step_applied():
            self._forget_gradients()
            return float("inf"), False
        return self._engine.get_global_grad_norm(), True

    def _forget_gradients(self) -> None:
        """Those of a skipped step. With an offloaded optimiser DeepSpeed 0.19.8 goes on to add to
        them under ZeRO 1 and 2, where it adds up in fp32 beside a bf16 or fp16 network: one step
        that is not finite would make all that follow so.
        """
        if self.offloads and self.zero_stage < 3:
            sums = self._engine.optimizer.averaged_gradients
            sums.update(dict.fromkeys(sums))

    def _finish_step_unsharded(self) -> tuple[torch.Tensor, bool]:
        """As `_finish_step`; without ZeRO, DeepSpeed neither checks nor tells the norm."""
        parameters = [p for p in self.objective.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])  # type: ignore[misc]
        applied = math.isfinite(norm.item())
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
            autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast)
            # Compiled blocks would not call the hooks that watch routing.
            with torch.no_grad(), autocast, torch.compiler.set_stance("force_eager"):
                yield self.model
        finally:
            if self.zero_stage == 3:
                self._watch_parameter_access(False)
            self.objective.train()

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """The averages in the place of the weights, live and master, for as long as it lasts.

        Everything in it sees them: `evaluating`, `full_parameters`, an export. Afterwards the
        weights are back, bit for bit. Without averages nothing changes, see
        recipe/weight_average.py. Collective; do not train or save in it.
        """
        self._exchange_weights()
        try:
            yield
        finally:
            self._exchange_weights()

    def _exchange_weights(self) -> None:
        """Swap masters and averages, then make the live weights from the masters as a step does."""
        exchange(self.optimizer)
        zero = self._engine.optimizer
        if self.zero_stage in (1, 2):
            zero.update_lp_params()
        elif self.zero_stage == 3:
            zero._partition_all_parameters()
            for sub_group in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(sub_group)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
            zero.invalidate_secondary_tensor()

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

    def full_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, full gradient of the global batch) of everything trained, one after the other.

        Only inside `before_step`; not clipped yet, without the loss scale. Names are those of the
        network; other parameters of the objective have its own. Collective, and slow: a
        communication per parameter.
        """
        scale = float(getattr(self._engine.optimizer, "loss_scale", 1.0))
        for name, parameter in self.objective.named_parameters():
            gradient = safe_get_full_grad(parameter) if parameter.requires_grad else None
            if gradient is not None:
                yield name.removeprefix("model."), gradient / scale

    def share_bytes(self) -> int:
        """About how many bytes `take_state` holds on this rank."""
        return state_bytes(self._layout)

    @property
    def offloads(self) -> bool:
        """Whether the optimiser works in the memory of the host."""
        return bool(self._engine.zero_use_cpu_optimizer())

    def host_tensors(self) -> Iterator[torch.Tensor]:
        """What DeepSpeed keeps in the memory of the host."""
        return state.host_tensors(self)

    def take_state(self, *, copy: bool = False) -> state.TakenState:
        """Weights and optimiser state as they are now, to be written. Collective.

        `copy`: hold them in the memory of the host, so that training may go on before they are.
        """
        return state.TakenState(self, copy=copy)

    def load_state(self, folder: Path) -> None:
        """Read what `take_state` wrote. Collective; see `state.load_state`."""
        state.load_state(self, folder)

    def gather(self, value: T) -> list[T]:
        """`value` of every rank, in the order of ranks, on every rank. Collective."""
        return collective.gather(value)

    def broadcast(self, value: T) -> T:
        """Rank 0's `value` on every rank. Collective."""
        return collective.broadcast(value)

    def close(self) -> None:
        """Let DeepSpeed tell what it has counted, if `comms_logger` asks for it. Collective."""
        if self._engine.config.get("comms_logger", {}).get("enabled"):
            deepspeed.comm.log_summary()

    def barrier(self) -> None:
        """Wait for all ranks. Collective."""
        dist.barrier()


def cast_to_parameters(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give a bf16 or fp16 network its floating-point inputs in its own type."""
    dtype = next(model.parameters()).dtype
    return tuple(
        value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for value in inputs
    )
