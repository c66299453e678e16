"""What a rank holds of weights and optimiser state at one instant, in the form of shards.py.

It is taken when a checkpoint is due and written when there is time. A copy in the memory of the
host lets training go on meanwhile; without one a part at a time is brought there to be written.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from routedvit.training.checkpoints.permissions import as_umask_says
from routedvit.training.checkpoints.zero_layout import ZeroLayout

WEIGHT = "weight"  # the name of a holder's own values beside those of its states
PART_BYTES = 1 << 30  # a new file begins beyond this size


class TakenShards:
    """This rank's share. It can be written once.

    Args:
        layout: says what it is.
        copy: hold it in the memory of the host, so that what is written is as it is now; else
            nothing of it may change before it is written.
    """

    def __init__(self, layout: ZeroLayout, *, copy: bool) -> None:
        self.rank = layout.rank
        pieces, optimizer = layout.share(), layout.optimizer
        holders = {id(piece.holder): piece.holder for piece in pieces}
        number_of = {key: number for number, key in enumerate(holders)}
        table: list[dict[str, Any]] = []
        self._parts: list[dict[str, torch.Tensor]] = []  # a file each
        size = PART_BYTES
        for number, holder in enumerate(holders.values()):
            if size >= PART_BYTES:
                self._parts.append({})
                size = 0
            state = optimizer.state.get(holder, {})
            kept = {key: value for key, value in state.items() if torch.is_tensor(value)}
            dtypes = {
                key: str(value.dtype).removeprefix("torch.")
                for key, value in kept.items()
                if value.shape == holder.shape and key != "step"  # of a scalar they look alike
            }
            table.append(
                {
                    "part": len(self._parts) - 1,
                    "elementwise": dtypes,
                    "whole": sorted(kept.keys() - dtypes.keys()),
                    "small": {key: value for key, value in state.items() if key not in kept},
                }
            )
            for key, value in {WEIGHT: holder, **kept}.items():
                flat = value.detach() if key in table[-1]["whole"] else value.detach().reshape(-1)
                self._parts[-1][f"{number}/{key}"] = flat.to("cpu", copy=True) if copy else flat
                size += flat.nbytes
        places = [(*piece[:4], number_of[id(piece.holder)], piece.offset) for piece in pieces]
        self._table = json.dumps({"holders": table, "pieces": places})

    def write(self, folder: Path) -> None:
        """Write it into `folder`, which exists, and let go of each part once it is written."""
        for number in range(len(self._parts)):
            part = self._parts.pop(0)
            path = folder / part_name(self.rank, number)
            write_tensors(path, {name: value.cpu().contiguous() for name, value in part.items()})
        (folder / f"rank_{self.rank:05d}.json").write_text(self._table, encoding="utf-8")


def part_name(rank: int, part: int) -> str:
    """The file of the tensors of a rank's part."""
    return f"rank_{rank:05d}_{part:02d}.safetensors"


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A safetensors file; OSError where the disk does not take it."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from None
    as_umask_says(path)


def state_bytes(layout: ZeroLayout) -> int:
    """About how many bytes a `TakenShards` of this rank holds."""
    holders = {id(piece.holder): piece.holder for piece in layout.share()}.values()
    states = (
        value for holder in holders for value in layout.optimizer.state.get(holder, {}).values()
    )
    return sum(tensor.nbytes for tensor in (*holders, *states) if torch.is_tensor(tensor))
