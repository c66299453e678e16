"""Routed vision transformers; importing this package registers `colt5_vit_*` with timm."""

from routedvit.models import colt5_vit
from routedvit.models.conditional_routed_vit import ConditionalRoutedViT
from routedvit.models.convert import convert_dense
from routedvit.models.routed_vit import RoutedVisionTransformer
from routedvit.models.routing import Routing

__all__ = [
    "ConditionalRoutedViT",
    "RoutedVisionTransformer",
    "Routing",
    "colt5_vit",
    "convert_dense",
]
