"""Whole parameters out of a checkpoint's shards, by any process, without DeepSpeed.

The tables beside the shards say which elements of which parameter lie where (see `shards.py`), so a
parameter is put together by copying, whatever ranks and stage have written them. The same goes for
what the optimiser keeps per element, such as a running average of the weights.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from routedvit.training.checkpoints.shards import WEIGHT

SHARDS, REPLICATED = "shards", "replicated.safetensors"  # as `engine.state` names them


def full_weights(checkpoint: Path, key: str = WEIGHT) -> dict[str, Tensor]:
    """fp32 parameters and saved buffers by name, on the CPU.

    Args:
        checkpoint: folder `step_...`, whose files are verified already.
        key: 'weight', or the optimiser's state that is wanted in its place, such as 'ema';
            parameters that have none keep their weight.
    """
    folder = checkpoint / SHARDS
    found: dict[str, Tensor] = load_file(folder / REPLICATED)
    for path in sorted(folder.glob("rank_*.json")):
        table = json.loads(path.read_text(encoding="utf-8"))
        # A ViT-H over 64 ranks has tens of thousands of pieces, in a file or two of each rank.
        by_part: dict[int, list[Any]] = defaultdict(list)
        for piece in table["pieces"]:
            by_part[table["holders"][piece[4]]["part"]].append(piece)
        for part, pieces in by_part.items():
            with safe_open(folder / f"{path.stem}_{part:02d}.safetensors", framework="pt") as file:
                for name, shape, start, numel, number, offset in pieces:
                    whole = found.setdefault(name, torch.empty(shape))
                    chosen = key if key in table["holders"][number]["elementwise"] else WEIGHT
                    values = file.get_slice(f"{number}/{chosen}")[offset : offset + numel]
                    whole.view(-1)[start : start + numel] = values
    return found


def has_state(checkpoint: Path, key: str) -> bool:
    """Whether the optimiser kept `key` for some parameter."""
    tables: list[dict[str, Any]] = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in (checkpoint / SHARDS).glob("rank_*.json")
    ]
    return any(key in holder["elementwise"] for table in tables for holder in table["holders"])
