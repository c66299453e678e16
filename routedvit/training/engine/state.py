"""What an engine holds, on the disk and in the memory of the host.

    shards/rank_*                  weights and optimiser state, see checkpoints/shards.py
           replicated.safetensors  frozen parameters and buffers, whole
           counters.json           what DeepSpeed counts beside them

Where DeepSpeed keeps things is told by its own names for them (0.19.8).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from safetensors import safe_open

from routedvit.training.checkpoints.shards import load_shards
from routedvit.training.checkpoints.taken_shards import TakenShards, write_tensors
from routedvit.training.config.run import ConfigError
from routedvit.training.recipe.weight_average import drop_unless_kept

if TYPE_CHECKING:
    from routedvit.training.engine.engine import Engine

SHARDS, REPLICATED, COUNTERS = "shards", "replicated.safetensors", "counters.json"


class TakenState:
    """What an engine holds now, to be written later. Making one is collective.

    Args:
        engine: whose.
        copy: see `TakenShards`.
    """

    def __init__(self, engine: "Engine", *, copy: bool) -> None:
        self._shards = TakenShards(engine._layout, copy=copy)
        self._whole: dict[str, torch.Tensor] = {}
        self._counters = ""  # on rank 0, as those that are whole
        for name, value in _replicated(engine):
            if engine.rank == 0:
                self._whole[name] = value.detach().to("cpu", copy=True)
        if engine.rank == 0:
            self._counters = json.dumps(engine._layout.counters())

    def write(self, folder: Path) -> None:
        """Write this rank's files below `folder`; each rank for itself, and once.

        Raises:
            OSError: the disk does not take them.
        """
        folder = folder / SHARDS
        folder.mkdir(exist_ok=True)
        self._shards.write(folder)
        if self._counters:
            write_tensors(folder / REPLICATED, self._whole)
            (folder / COUNTERS).write_text(self._counters, encoding="utf-8")


def load_state(engine: "Engine", folder: Path) -> None:
    """Read what `TakenState` wrote, on any number of ranks under any stage. Collective.

    Rates and decays stay as they are: the config decides them, not the checkpoint.

    Raises:
        ConfigError: on every rank, if on any: it is of another model, cannot be right under this
            stage, or its disk fails.
    """
    folder = folder / SHARDS
    fault = None
    try:
        load_shards(folder, engine._layout)
    except (ConfigError, OSError) as error:
        fault = f"rank {engine.rank}: {error}"
    # A rank may refuse what it holds alone; the others would wait for it below.
    if found := next(filter(None, engine.gather(fault)), None):
        raise ConfigError(found)
    with safe_open(folder / REPLICATED, framework="pt") as file:
        for name, value in _replicated(engine, change=True):
            value.detach().copy_(file.get_tensor(name))
    engine._layout.set_counters(json.loads((folder / COUNTERS).read_text(encoding="utf-8")))
    engine._layout.share_weights()
    drop_unless_kept(engine.optimizer)


def host_tensors(engine: "Engine") -> Iterator[torch.Tensor]:
    """What DeepSpeed keeps in the memory of the host."""
    zero = engine._engine.optimizer
    found: list[Any] = []
    if engine.offloads:
        masters = getattr(zero, "single_partition_of_fp32_groups", None)
        masters = masters or zero.fp32_partitioned_groups_flat
        found += [*masters, *(master.grad for master in masters)]
        found += [value for state in engine.optimizer.state.values() for value in state.values()]
        found += getattr(zero, "param_buffer_of_bit16_for_cpu_offload_groups", [])
        found += getattr(zero, "accumulated_grads_in_cpu", {}).values()
        for name in ("temp_grad_buffer_for_cpu_offload", "grad_partitions_flat_buffer"):
            found.append(getattr(zero, name, None))
    if engine._engine.zero_offload_param() is not None:
        found += [getattr(p, "ds_tensor", None) for p in engine.objective.parameters()]
    yield from (tensor for tensor in found if torch.is_tensor(tensor))


def _replicated(engine: "Engine", *, change: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Frozen parameters and saved buffers, whole, one after the other. Collective."""
    for name, parameter in engine.objective.named_parameters():
        if not parameter.requires_grad:
            with deepspeed.zero.GatheredParameters(
                [parameter], modifier_rank=0 if change else None, enabled=engine.zero_stage == 3
            ):
                yield name, parameter
    saved = engine.objective.state_dict().keys()
    yield from ((n, buffer) for n, buffer in engine.objective.named_buffers() if n in saved)
