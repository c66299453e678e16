"""What a routed model costs: `python -m routedvit.describe colt5_vit_b --img-size 224`.

Exported weights say what they were made with: `python -m routedvit.describe runs/NAME/weights`.
Prints parameters, and FLOPs at several capacities beside the dense twin: the same width, depth and
heads with every token heavy and no light path. Nothing is allocated, models are built on the meta
device.
"""

import argparse
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import timm
import torch

import routedvit  # noqa: F401  registers the models
from routedvit.models import RoutedVisionTransformer

__all__ = ["describe", "main"]

LOCAL = "local-dir:"
CAPACITIES = (Fraction(1, 16), Fraction(1, 8), Fraction(1, 4), Fraction(1, 2), Fraction(1))
COLUMNS = "{:<26}{:>9}{:>9}{:>9}{:>9}{:>10}"


def describe(name: str, img_size: int | None = None, **kwargs: Any) -> str:
    """A table of parameters and FLOPs (one image, forward, a multiply-add is 2) of a routed model.

    Args:
        name: a registered model, such as 'colt5_vit_b', or a folder of exported weights, with or
            without timm's 'local-dir:' before it.
        img_size: side of the image in pixels; the model's own if None.
        kwargs: further arguments of the model.

    Raises:
        ValueError: no such model, not a routed one, or an argument it does not take.
    """
    if not timm.is_model(name):
        folder = Path(name.removeprefix(LOCAL))
        if not folder.is_dir():
            known = ", ".join(timm.list_models("colt5_vit*"))
            raise ValueError(
                f"model {name!r} is unknown; name a folder of exported weights, or choose one of "
                f"{known}"
            )
        name = f"{LOCAL}{folder}"
    if img_size is not None:
        kwargs["img_size"] = img_size
    model = _build(name, **kwargs)
    twin = _build(name, **{**kwargs, "dense_blocks": len(model.blocks)})
    height, width = model.patch_embed.grid_size
    lines = [
        f"{name}: {_millions(model.parameters())} parameters, dense twin"
        f" {_millions(twin.parameters())}; {height} x {width} patches"
        f" + {model.num_prefix_tokens} prefix tokens",
        "",
        COLUMNS.format("GFLOPs per image", "light", "heavy", "router", "total", "of dense"),
    ]
    dense = twin.flops().total
    lines.append(_row("dense twin", twin, dense))
    lines.append(_row("as built", model, dense))
    for capacity in CAPACITIES:
        # as in the paper, twice as many keys as queries
        model.set_capacity(capacity, kv=min(2 * capacity, Fraction(1)))
        lines.append(_row(f"q, ffn {capacity}  kv {min(2 * capacity, Fraction(1))}", model, dense))
    return "\n".join(lines)


def _build(name: str, **kwargs: Any) -> RoutedVisionTransformer:
    try:
        with torch.device("meta"):
            model = timm.create_model(name, **kwargs)
    except (FileNotFoundError, KeyError):  # a run's config.json names no architecture
        if not name.startswith(LOCAL):
            raise
        folder = name.removeprefix(LOCAL)
        raise ValueError(
            f"{folder} holds no config.json of a timm model; of a run name the folder of its "
            f"weights, {folder}/weights"
        ) from None
    if not isinstance(model, RoutedVisionTransformer):
        raise ValueError(f"model {name!r} is not routed; describe takes colt5_vit_* models")
    return model


def _row(label: str, model: RoutedVisionTransformer, dense: int) -> str:
    flops = model.flops()
    parts = (flops.light, flops.heavy, flops.router, flops.total)
    return COLUMNS.format(
        label, *(f"{part / 1e9:.2f}" for part in parts), f"{flops.total / dense:.0%}"
    )


def _millions(parameters: Any) -> str:
    return f"{sum(p.numel() for p in parameters) / 1e6:.2f} M"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m routedvit.describe", description=__doc__)
    parser.add_argument("model", help="such as colt5_vit_b, or a folder of weights")
    parser.add_argument("--img-size", type=int, help="side of the image in pixels")
    options = parser.parse_args(arguments)
    try:
        print(describe(options.model, options.img_size))
    except (ValueError, TypeError) as error:
        print(f"describe: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head`
        sys.stderr.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
