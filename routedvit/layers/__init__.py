"""Modules of a routed block: routers, light and heavy attention, light and heavy feed-forward."""

from routedvit.layers.attention import HeavyAttention, WindowAttention
from routedvit.layers.conditional_routed import (
    ConditionalRoutedFeedForward,
    ConditionalRoutedImageAttention,
)
from routedvit.layers.fixed_router import FixedRouter, build_router
from routedvit.layers.routed_attention import RoutedAttention
from routedvit.layers.routed_block import RoutedBlock
from routedvit.layers.routed_feedforward import RoutedFeedForward
from routedvit.layers.router import Router, as_ratio

__all__ = [
    "ConditionalRoutedFeedForward",
    "ConditionalRoutedImageAttention",
    "FixedRouter",
    "HeavyAttention",
    "RoutedAttention",
    "RoutedBlock",
    "RoutedFeedForward",
    "Router",
    "WindowAttention",
    "as_ratio",
    "build_router",
]
