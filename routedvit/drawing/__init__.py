"""Pictures of what the routers chose: which patches of an image took the heavy path.

One picture, the *sheet*, serves TensorBoard, the README and `python -m routedvit.visualize`: a row
per image, the image itself in the first column and one column per block.

Any image size, patch grid (square or not) and 1 or 3 channels. torch computes pixels, PIL sets the
text. Nothing here knows a model: a routing is anything with `indices`, `gates` and `grid`.

Shapes: images [B, C, H, W]; indices, gates [B, k]; grid (H', W') patches; pictures uint8 [3, H, W].
"""

from routedvit.drawing.card import to_pil, to_png
from routedvit.drawing.pixels import Routing, denormalize, fit, gate_map, highlight
from routedvit.drawing.sheets import TINTS, reconstruction_sheet, router_kind, routing_sheet

__all__ = [
    "TINTS",
    "Routing",
    "denormalize",
    "fit",
    "gate_map",
    "highlight",
    "reconstruction_sheet",
    "router_kind",
    "routing_sheet",
    "to_pil",
    "to_png",
]
