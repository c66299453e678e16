"""`python -m routedvit.convert`: weights of a dense vision transformer as those of a routed one.

    python -m routedvit.convert --from vit_base_patch16_224 --to colt5_vit_b --out weights/colt5_b
    python -m routedvit.convert --from deit3_small_patch16_224 --weights deit3.safetensors \
        --to colt5_vit_s --out weights/colt5_s --set img_size=384 --set ffn_capacity=0.5

Writes `model.safetensors` and `config.json` as timm reads them:

    timm.create_model('local-dir:weights/colt5_b', pretrained=True)

With capacity 1, the default here, the routed model computes what the dense one did. Without
--weights timm downloads its own.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import timm
import timm.models
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from routedvit.models import convert_dense

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = build_parser().parse_args(arguments)
    try:
        settings = dict(parse_setting(text) for text in options.set)
        dense = load_dense(options.source, options.weights)
        model = convert_dense(dense, options.target, **settings)
        timm.models.save_for_hf(
            model,
            str(options.out),
            model_args=timm.models.get_model_args(model),
            safe_serialization=True,
        )
    except (ValueError, TypeError, OSError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    print(f"\n{options.out}: {options.target} from {options.source}; read it with")
    print(f"timm.create_model('local-dir:{options.out}', pretrained=True)")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m routedvit.convert",
        description="Write the weights of a dense vision transformer as those of a routed one.",
    )
    add = parser.add_argument
    add("--from", dest="source", required=True, metavar="NAME", help="dense timm model")
    add("--weights", type=Path, metavar="FILE", help="its weights; downloaded by timm if left out")
    add("--to", dest="target", required=True, metavar="NAME", help="such as colt5_vit_b")
    add("--out", type=Path, required=True, metavar="FOLDER", help="for weights and config.json")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="argument of the routed model, such as img_size=384 or q_capacity=0.5",
    )
    return parser


def parse_setting(text: str) -> tuple[str, Any]:
    """'img_size=384' -> ('img_size', 384); a value that is no JSON is a string.

    Raises:
        ValueError: no key or no '='.
    """
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError(f"--set {text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def load_dense(name: str, weights: Path | None) -> VisionTransformer:
    """The dense model with its weights, in eval mode.

    Raises:
        ValueError: unknown name, no vision transformer, or weights of another model.
        OSError: a file that is not there, or a download that fails.
    """
    if not timm.is_model(name):
        raise ValueError(f"--from {name}: timm has no such model; see timm.list_models('*vit*')")
    if weights is not None and not weights.is_file():
        raise ValueError(f"--weights {weights} does not exist")
    state = {} if weights is None else timm.models.load_state_dict(str(weights))
    classes = {"num_classes": len(state["head.weight"])} if "head.weight" in state else {}
    model = timm.create_model(name, pretrained=weights is None, **cast(Any, classes))
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"--from {name} is a {type(model).__name__}, not timm's VisionTransformer")
    if weights is not None:
        try:
            # the filter knows the layouts in which such models were published
            model.load_state_dict(checkpoint_filter_fn(state, model, adapt_layer_scale=True))
        except RuntimeError as error:
            # its first line says of which class, the others name every parameter
            mistakes = str(error).splitlines()[1:]
            first = (mistakes or [str(error)])[0].strip()
            more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
            raise ValueError(
                f"--weights {weights} does not fit --from {name}: {first}{more}"
            ) from None
    return model.eval()


if __name__ == "__main__":
    raise SystemExit(main())
