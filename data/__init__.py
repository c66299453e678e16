"""Shards: write them, check them, and stream them in an order that no machine count changes.

This folder runs from the checkout (`python -m data.write`), is not part of the wheel and never
imports `routedvit`. The way in is `data.loaders`; the promise it keeps is stated in `data.order`.
"""
