"""Weights and optimiser state in files that any number of ranks under any ZeRO stage can read.

    shards/rank_00000.json               what this rank held: pieces of parameters, and counters
           rank_00000_00.safetensors     the tensors that held them: fp32 weights, exp_avg, ...

A rank writes the flat tensors it holds as they are (taken_shards.py), with a table that says which
elements of which parameter lie where (see `zero_layout.Piece`). A load walks over the pieces of the
new layout and copies, element range by element range, what the old files hold of them. Resuming on
the same ranks is the case in which the ranges coincide; another number of ranks or another stage is
no other code.
Values are copied bit by bit and nothing is sent between ranks. A rank reads the tables of all ranks
and of the tensors its own share only; beside the engine's own it needs the memory of one parameter.

DeepSpeed's own files are pickles, bound to the number of ranks and the stage that wrote them. Its
universal format takes Adam's two moments only and does not cross between stage 3 and the others.

Whatever an optimiser keeps per element follows the parameter. What it keeps per holder (a count of
steps, say) follows as it is, if all parameters that meet in a new holder agree on it. A state of
any other shape (Adafactor's rows and columns) belongs to a whole parameter: under stage 0 only.
"""

import functools
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from routedvit.training.checkpoints.taken_shards import WEIGHT, part_name
from routedvit.training.checkpoints.zero_layout import Piece, ZeroLayout
from routedvit.training.config.run import ConfigError


class Source(NamedTuple):
    """A piece as it lies in the files: elements `start` to `start + numel` of a parameter."""

    start: int
    numel: int
    rank: int
    holder: int  # index in the rank's table
    offset: int


@torch.no_grad()
def load_shards(folder: Path, layout: ZeroLayout) -> None:
    """Fill what this rank holds from the files of all ranks. Collective.

    States that the files do not have are dropped; of a parameter that had none (it got no gradient
    yet) they begin at zero, as ZeRO begins them.

    Raises:
        ConfigError: a parameter is missing or has another shape, or a state cannot be made for
            this layout.
    """
    files, optimizer = _Files(folder), layout.optimizer
    groups = {id(tensor): group for group in optimizer.param_groups for tensor in group["params"]}
    by_holder: dict[int, list[Piece]] = defaultdict(list)
    for piece in layout.pieces():
        by_holder[id(piece.holder)].append(piece)
    for own in by_holder.values():
        holder = own[0].holder
        sources = list(dict.fromkeys(source for piece in own for source in files.sources(piece)))
        before = optimizer.state.pop(holder, {})
        state: dict[str, Any] = {}
        for key, dtype in files.elementwise(sources).items():
            old = before.get(key)  # filled in place, since others may refer to it
            state[key] = torch.zeros_like(holder, dtype=dtype) if old is None else old.zero_()
        for piece in own:
            for key, target in {WEIGHT: holder, **state}.items():
                files.copy(piece, key, target.view(-1))
        group = groups.get(id(holder), optimizer.param_groups[0])
        beside_holder = group.get("fused") or group.get("capturable")
        for key, value in files.per_holder(own, sources).items():
            if torch.is_tensor(value):  # a copy, since those read from one file share its memory
                value = value.to(holder.device if beside_holder else "cpu", copy=True)
            state[key] = value
        if state:
            optimizer.state[holder] = state


class _Files:
    """The files of all ranks: whose holds what of a parameter."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tables: list[list[dict[str, Any]]] = []
        self._sources: dict[str, list[Source]] = defaultdict(list)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._open = functools.lru_cache(maxsize=512)(
            lambda name: safe_open(folder / name, framework="pt", device="cpu")
        )
        for rank, path in enumerate(sorted(folder.glob("rank_*.json"))):
            table = json.loads(path.read_text(encoding="utf-8"))
            self._tables.append(table["holders"])
            for name, shape, start, numel, holder, offset in table["pieces"]:
                self._sources[name].append(Source(start, numel, rank, holder, offset))
                self._shapes[name] = tuple(shape)

    def sources(self, piece: Piece) -> list[Source]:
        """What the files hold of a piece, all of it."""
        name, end = piece.name, piece.start + piece.numel
        if self._shapes.get(name) != piece.shape:
            theirs = self._shapes.get(name, "no parameter of that name")
            raise ConfigError(
                f"{self._folder.parent} was saved with another model: {name} has the shape "
                f"{piece.shape} here and {theirs} there; set the model back, or --fresh starts over"
            )
        found = [
            s for s in self._sources[name] if s.start < end and s.start + s.numel > piece.start
        ]
        held = sum(min(end, s.start + s.numel) - max(piece.start, s.start) for s in found)
        assert held == piece.numel, f"{self._folder} holds {held} of {piece.numel} of {name}"
        return found

    def elementwise(self, sources: Sequence[Source]) -> dict[str, torch.dtype]:
        """The states that `sources` have per element, and their types."""
        tables = [self._tables[source.rank][source.holder] for source in sources]
        return {
            key: getattr(torch, dtype)
            for table in tables
            for key, dtype in table["elementwise"].items()
        }

    def copy(self, piece: Piece, key: str, target: torch.Tensor) -> None:
        """Copy the weight or the state `key` of a piece to its place in the flat `target`."""
        for source in self.sources(piece):
            table = self._tables[source.rank][source.holder]
            if key == WEIGHT or key in table["elementwise"]:
                first = max(piece.start, source.start)
                numel = min(piece.start + piece.numel, source.start + source.numel) - first
                begin = source.offset + first - source.start
                file = self._open(part_name(source.rank, table["part"]))
                values = file.get_slice(f"{source.holder}/{key}")[begin : begin + numel]
                target.narrow(0, piece.offset + first - piece.start, numel).copy_(values)

    def per_holder(self, own: Sequence[Piece], sources: Sequence[Source]) -> dict[str, Any]:
        """The states, counters mostly, that the optimiser has once for a holder of `own` pieces.

        Raises:
            ConfigError: the parameters that meet in the holder do not agree on one, or it belongs
                to a whole parameter and the holder is something else.
        """
        found: dict[str, Any] = {}
        is_parameter = len(own) == 1 and own[0].holder.shape == own[0].shape
        for rank, holder in dict.fromkeys((source.rank, source.holder) for source in sources):
            table = self._tables[rank][holder]
            file = self._open(part_name(rank, table["part"]))
            tensors = {key: file.get_tensor(f"{holder}/{key}") for key in table["whole"]}
            for key, value in {**table["small"], **tensors}.items():
                if torch.is_tensor(value) and value.numel() > 1 and not is_parameter:
                    why = f"optimiser state {key!r} belongs to whole parameters, which ZeRO divides"
                elif key in found and not _equal(found[key], value):
                    why = f"{key!r} is {found[key]} for some and {value} for others of its group"
                else:
                    found[key] = value
                    continue
                raise ConfigError(
                    f"{self._folder.parent} cannot be loaded under this ZeRO stage: of "
                    f"{own[0].name}, {why}; use deepspeed.zero_optimization.stage = 0"
                )
        return found


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if torch.is_tensor(one) else bool(one == other)
