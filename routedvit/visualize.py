"""`python -m routedvit.visualize`: the patches of photographs that a model routes, as a PNG.

    python -m routedvit.visualize --checkpoint runs/quickstart/weights photo.jpg --out routing.png
    python -m routedvit.visualize --model colt5_vit_b --checkpoint weights.safetensors a.jpg b.jpg

Images are prepared as the model was evaluated (timm's data config: size, crop, mean and std), and
what is drawn is that input, so a tinted patch is exactly a patch the model saw.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

import routedvit  # noqa: F401 (registers the models with timm)
from routedvit import drawing


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m routedvit.visualize",
        description="Draw the patches that take the heavy path, per block, over images.",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    parser.add_argument("--model", help="timm name, such as colt5_vit_b")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="folder of exported weights (config.json and model.safetensors), which names the "
        "model itself, or a weights file for --model",
    )
    parser.add_argument("--router", default="ffn", help="ffn, q, kv0, ... (default: %(default)s)")
    parser.add_argument("--size", type=int, default=196, help="pixels per picture (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("routing.png"), help="(%(default)s)")
    return parser


def load_model(name: str | None, checkpoint: Path | None) -> nn.Module:
    """The model in eval mode.

    Raises:
        ValueError: neither argument says which model, or the files do not fit.
    """
    if checkpoint is not None and checkpoint.is_dir():
        if not (checkpoint / "config.json").is_file():
            raise ValueError(f"--checkpoint {checkpoint} has no config.json; name a weights folder")
        try:
            model = timm.create_model(f"local-dir:{checkpoint.resolve()}", pretrained=True)
        except KeyError:  # a run folder has a config.json too, which names no architecture
            raise ValueError(
                f"--checkpoint {checkpoint} holds no weights that timm reads; "
                f"of a run name the folder of its weights, {checkpoint / 'weights'}"
            ) from None
        return _drawable(model.eval())
    if name is None:
        raise ValueError("give --model NAME, or a --checkpoint folder that holds a config.json")
    if checkpoint is not None and not checkpoint.is_file():
        raise ValueError(f"--checkpoint {checkpoint} does not exist")
    try:
        return _drawable(timm.create_model(name, checkpoint_path=str(checkpoint or "")).eval())
    except RuntimeError as error:  # an unknown name, or weights of another model
        raise ValueError(str(error)) from None


def _drawable(model: nn.Module) -> nn.Module:
    if not hasattr(model, "routing"):
        raise ValueError(f"{type(model).__name__} does not route; name a colt5_vit model")
    channels = resolve_model_data_config(model)["input_size"][0]
    if channels not in (1, 3):
        raise ValueError(f"the model takes {channels} channels; only grey and RGB can be drawn")
    return model


def load_images(paths: Sequence[Path], model: nn.Module) -> Tensor:
    """float32 [B, C, H, W]: the images as the model's evaluation sees them.

    Raises:
        ValueError: a file is missing or no image.
    """
    config = resolve_model_data_config(model)
    transform = create_transform(**config)
    mode = "L" if config["input_size"][0] == 1 else "RGB"
    tensors = []
    for path in paths:
        try:
            with Image.open(path) as image:
                tensors.append(transform(ImageOps.exif_transpose(image).convert(mode)))
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from None
    return torch.stack(tensors)


def draw(model: Any, images: Tensor, *, router: str, title: str, size: int) -> Tensor:
    """uint8 [3, H, W]: the routing of normalised `images` in `model`."""
    config = resolve_model_data_config(model)
    with torch.no_grad():
        routing = model.routing(images)
    pictures = drawing.denormalize(images, config["mean"], config["std"])
    return drawing.routing_sheet(
        pictures, routing, router=router, title=title, size=size, patch=model.patch_embed.patch_size
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    try:
        model = load_model(args.model, args.checkpoint)
        images = load_images(args.images, model)
        title = args.model or str(args.checkpoint)
        if args.checkpoint is None:
            title += ", random weights"
        sheet = draw(model, images, router=args.router, title=title, size=args.size)
    except ValueError as error:
        parser.error(str(error))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    drawing.to_pil(sheet).save(args.out, format="PNG")
    print(f"{args.out}: {sheet.shape[2]} x {sheet.shape[1]} pixels, router {args.router}")


if __name__ == "__main__":
    main()
