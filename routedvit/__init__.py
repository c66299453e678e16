"""routedvit: vision transformers in which every token goes light and the tokens that matter go
heavy.

    import routedvit, timm
    model = timm.create_model("colt5_vit_b")

Importing registers the models with timm. Needs torch and timm only; training lives in
`routedvit.training`.
"""

from routedvit.models import (
    ConditionalRoutedViT,
    RoutedVisionTransformer,
    Routing,
    convert_dense,
)

__all__ = ["ConditionalRoutedViT", "RoutedVisionTransformer", "Routing", "convert_dense"]
__version__ = "0.1.0"
