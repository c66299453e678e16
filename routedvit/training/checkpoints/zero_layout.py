"""Where each parameter's master weight lies under each ZeRO stage.

DeepSpeed keeps fp32 master weights in flat tensors, one per parameter group (or part of one) and
rank, and hands those to the optimiser, which keeps its state under them: a flat tensor and its
states "hold" pieces of parameters.

    stage 0      every rank holds every parameter whole; the holder is the parameter itself
    stage 1, 2   a group's parameters in a row, padded, cut into one equal part per rank
    stage 3      each parameter is padded and cut into one equal part per rank; a rank's holder has
                 its parts of all parameters of the group in a row

`ZeroLayout` tells these apart so that nothing else must. It reads private attributes of DeepSpeed
0.19.8: runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py and runtime/bf16_optimizer.py.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from routedvit.training.config.run import ConfigError

LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Piece(NamedTuple):
    """Elements `start` to `start + numel` of the flattened parameter `name`, held by this rank.

    They are the elements from `offset` on of `holder` (flattened), and of each state of the same
    size that the optimiser keeps under `holder`.
    """

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    start: int
    numel: int
    holder: torch.Tensor
    offset: int


class ZeroLayout:
    """The pieces of one rank, and what goes with them.

    Args:
        zero: DeepSpeed's optimiser; the torch optimiser itself under stage 0.
        stage: of ZeRO.
        module: what DeepSpeed wraps; its parameter names are the pieces'.
        rank, world_size: this process among how many.
    """

    def __init__(
        self, zero: Any, stage: int, module: nn.Module, rank: int, world_size: int
    ) -> None:
        self.zero = zero
        self.stage = stage
        self.rank = rank
        self.world_size = world_size
        # The torch optimiser that keeps its state under the holders.
        self.optimizer: torch.optim.Optimizer = zero.optimizer if stage else zero
        self._names = {parameter: name for name, parameter in module.named_parameters()}

    def pieces(self) -> list[Piece]:
        """What this rank holds of all trained parameters, holder by holder."""
        if self.stage == 0:
            return list(self._whole())
        return list(self._cut_one_by_one() if self.stage == 3 else self._cut_in_a_row())

    def share(self) -> list[Piece]:
        """Pieces that are, over all ranks, every element once."""
        held = self.pieces()
        return held[self.rank :: self.world_size] if self.stage == 0 else held

    def _whole(self) -> Iterator[Piece]:
        for group in self.zero.param_groups:
            for parameter in group["params"]:
                name, shape = self._names[parameter], tuple(parameter.shape)
                yield Piece(name, shape, 0, parameter.numel(), parameter, 0)

    def _cut_in_a_row(self) -> Iterator[Piece]:
        for parameters, offsets, holder in self._rows():
            first = self.rank * holder.numel()
            for parameter, place in zip(parameters, offsets, strict=True):
                begin = max(place, first)
                numel = min(place + parameter.numel(), first + holder.numel()) - begin
                if numel > 0:
                    name, shape = self._names[parameter], tuple(parameter.shape)
                    yield Piece(name, shape, begin - place, numel, holder, begin - first)

    def _rows(self) -> Iterator[tuple[list[nn.Parameter], list[int], torch.Tensor]]:
        """Per group: parameters in their row, their places in it, this rank's part.

        In bf16 with fp32 gradients, stage 1 is a class of its own.
        """
        zero = self.zero
        if not hasattr(zero, "bf16_groups"):
            yield from zip(
                zero.round_robin_bit16_groups,  # in the row's order, which may be dealt by rank
                zero.round_robin_bit16_offsets,
                zero.single_partition_of_fp32_groups,
                strict=True,
            )
            return
        for parameters, holder in zip(
            zero.bf16_groups, zero.fp32_groups_flat_partition, strict=True
        ):
            ends = list(itertools.accumulate(parameter.numel() for parameter in parameters))
            yield parameters, [0, *ends[:-1]], holder

    def _cut_one_by_one(self) -> Iterator[Piece]:
        zero = self.zero
        for parameters, holder in zip(
            zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True
        ):
            for parameter in parameters:
                _, offset, size = zero.grad_position[zero.get_param_id(parameter)]
                start = self.rank * size
                numel = min(size, parameter.ds_numel - start)  # the rest is padding
                if numel > 0:
                    name, shape = self._names[parameter], tuple(parameter.ds_shape)
                    yield Piece(name, shape, start, numel, holder, offset)

    def counters(self) -> dict[str, Any]:
        """What is counted beside the holders, as JSON: steps per group, the loss scale of fp16."""
        scaler = getattr(self.zero, "loss_scaler", None)
        scale = vars(scaler) if getattr(scaler, "dynamic", False) else {}
        groups = self.optimizer.param_groups
        return {
            "group_steps": [float(group["step"]) if "step" in group else None for group in groups],
            "loss_scale": {key: scale[key] for key in LOSS_SCALE if key in scale},
        }

    def set_counters(self, saved: dict[str, Any]) -> None:
        """Put back what `counters` gave.

        Raises:
            ConfigError: there are other groups now, and those had counted differently.
        """
        groups, steps = self.optimizer.param_groups, saved["group_steps"]
        if len(groups) != len(steps):
            if len({*steps}) > 1:
                raise ConfigError(
                    f"the optimiser had {len(steps)} groups that counted their steps differently, "
                    f"and now has {len(groups)}; set optim.layer_decay and weight_decay back"
                )
            steps = steps[:1] * len(groups)
        for group, step in zip(groups, steps, strict=True):
            if step is None:
                group.pop("step", None)
            else:
                group["step"] = torch.tensor(step) if torch.is_tensor(group.get("step")) else step
        scaler = getattr(self.zero, "loss_scaler", None)
        if getattr(scaler, "dynamic", False):
            vars(scaler).update(saved["loss_scale"])

    def share_weights(self) -> None:
        """Give the weights that compute the values of the master weights. Collective."""
        zero = self.zero
        if self.stage == 3:
            zero.checkpoint_event_prologue()  # no parameter is whole now
            for master, working, parts in zip(
                zero.fp32_partitioned_groups_flat,
                zero.fp16_partitioned_groups_flat,
                zero.fp16_partitioned_groups,
                strict=True,
            ):
                working.data.copy_(master.data)
                for part, value in zip(parts, zero.unflatten(working, parts), strict=True):
                    part.data = value.data
            zero.checkpoint_event_epilogue()  # gathers the small ones, whole on every rank
        elif self.stage > 0:
            zero.update_lp_params()
