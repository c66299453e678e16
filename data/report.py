"""What `data.check` prints about a set, for people: how many of what, and how large."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import counted, legible
from data.manifest import Manifest
from data.statistics import MAX_TRAINED_PIXELS

ALL_CLASSES = 12  # up to so many are all listed; of more, the ENDS largest and smallest
ENDS = 5
BAR = 40  # characters, for the largest class


def describe(
    folder: Path,
    manifest: Manifest,
    names: list[str] | None,
    notes: list[dict[str, Any]],
    ignored: int,
    images: Counter[str],
) -> list[str]:
    """The lines about what a folder holds: as `manifest` describes what was found in its shards,
    `names` call the classes, `notes` tell of each shard, and `images` are among the `ignored`."""
    size = sum(entry.bytes for entry in manifest.shards)
    (low, high), (short, tall) = manifest.width, manifest.height
    mean, std = ([f"{value:.4f}" for value in values] for values in (manifest.mean, manifest.std))
    lines = [
        f"{folder}: {counted(manifest.samples, 'sample')} in "
        f"{counted(len(manifest.shards), 'shard')}, "
        f"{size / 1e6:.1f} MB",
        f"  images    {low} to {high} pixels wide, {short} to {tall} high; "
        + ", ".join(f"{count} {mode}" for mode, count in manifest.modes.items()),
        *_spread(notes),
        f"  pixels    mean {' '.join(mean)}, std {' '.join(std)} "
        f"(of {manifest.pixel_samples} images)",
        *histogram(manifest.class_counts, names),
    ]
    if ignored:
        lines.append(
            f"  ignored   {ignored} members that are neither a sample's image nor its label"
        )
    if images:
        most = ", ".join(f"{count} .{legible(kind)}" for kind, count in images.most_common(ENDS))
        more = f" and {len(images) - ENDS} more kinds" if len(images) > ENDS else ""
        lines.append(f"            of them {images.total()} images: {most}{more}")
    if large := sum(note["large"] for note in notes):
        lines.append(
            f"  NOTE      {large} images of more than {MAX_TRAINED_PIXELS:,} pixels: training "
            "replaces them unless data.max_pixels is raised; `data.write --resize` shrinks them"
        )
    return lines


def _spread(notes: list[dict[str, Any]]) -> list[str]:
    """A line on where the shorter sides of the images lie; none where they are all alike."""
    counts: Counter[int] = Counter()
    for note in notes:
        counts.update({int(side): count for side, count in note["shorter_sides"].items()})
    if len(counts) == 1:
        return []
    sides = np.array(sorted(counts))
    up_to = np.cumsum([counts[side] for side in sides.tolist()])
    tenth, half, most = (
        sides[np.searchsorted(up_to, share * up_to[-1])] for share in (0.1, 0.5, 0.9)
    )
    return [
        f"            shorter side: median {half}, a tenth up to {tenth}, a tenth from {most} on"
    ]


def histogram(counts: list[int], names: list[str] | None) -> list[str]:
    """The classes as bars, the most frequent first; of many the largest and smallest alone."""
    most, empty = max(counts), counts.count(0)
    without = f", {empty} of them without any" if empty else ""
    lines = [f"  classes   {len(counts)}, with {min(counts)} to {most} images each{without}"]
    ordered = sorted(range(len(counts)), key=lambda label: (-counts[label], label))
    gap = len(ordered) > ALL_CLASSES
    shown = ordered[:ENDS] + ordered[-ENDS:] if gap else ordered
    titles = [_title(label, names) for label in shown]
    wide, digits = max(map(len, titles)), len(str(most))
    for number, (label, title) in enumerate(zip(shown, titles, strict=True)):
        if gap and number == ENDS:
            lines.append(f"            ... {len(ordered) - 2 * ENDS} more")
        bar = "#" * round(BAR * counts[label] / most)
        lines.append(f"            {title:{wide}}  {counts[label]:{digits}}  {bar}".rstrip())
    return lines


def _title(label: int, names: list[str] | None) -> str:
    """The number of a class with its name, where that says more."""
    name = names[label] if names and label < len(names) else ""
    return str(label) if name in ("", str(label)) else f"{label} {_printable(name)}"


def _printable(name: str) -> str:
    """At most 24 characters that no terminal obeys."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    return name if len(name) <= 24 else name[:23] + "…"
