"""What a manifest says about the images of a set, gathered shard by shard and then put together.

Every image weighs the same, whatever its size: mean is the mean of the images' means, and std comes
from the mean of their mean squares. Grey images count as three equal channels where a set has both.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from data.config import DataConfig
from data.decode import converted
from data.manifest import Manifest, ShardEntry

MAX_TRAINED_PIXELS: int = DataConfig.model_fields["max_pixels"].default
PIXEL_SAMPLES = 256  # images per shard that mean and std are taken from; headers are read of all


@dataclass
class ShardStatistics:
    """The statistics of one shard, as plain JSON values once `note()` is called."""

    class_counts: Counter[int] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    large: int = 0  # images that training would refuse by default
    sums: np.ndarray = field(default_factory=lambda: np.zeros((2, 3)))  # of x and of x^2
    pixel_samples: int = 0

    def add(self, image: Image.Image, label: int) -> None:
        """Count an image; decodes it while PIXEL_SAMPLES have not been reached.

        BadSample when it cannot be decoded; then nothing of it is counted.
        """
        if self.pixel_samples < PIXEL_SAMPLES:
            self.sums += _moments(image)
            self.pixel_samples += 1
        self.class_counts[label] += 1
        self.modes[image.mode] += 1
        self.widths.append(image.width)
        self.heights.append(image.height)
        self.large += image.width * image.height > MAX_TRAINED_PIXELS

    def note(self, entry: ShardEntry) -> dict[str, Any]:
        """Everything `combine` needs, for a JSON file."""
        return {
            "entry": entry.model_dump(),
            "class_counts": {str(label): count for label, count in self.class_counts.items()},
            "modes": dict(self.modes),
            "width": [min(self.widths, default=0), max(self.widths, default=0)],
            "height": [min(self.heights, default=0), max(self.heights, default=0)],
            "shorter_sides": dict(Counter(map(str, map(min, self.widths, self.heights)))),
            "large": self.large,
            "sums": self.sums.tolist(),
            "pixel_samples": self.pixel_samples,
        }


def _moments(image: Image.Image) -> np.ndarray:
    """Mean of x and of x^2 per channel, [2, 3], for pixels x in 0 to 1; needs 3 bytes a pixel."""
    counts = np.array(converted(image, 3).histogram(), dtype=np.int64).reshape(3, 256)
    values = np.arange(256)
    sums = np.stack([counts @ values / 255, counts @ values**2 / 255**2])
    return sums / (image.width * image.height)


def combine(notes: list[dict[str, Any]], label_names: list[str] | None) -> Manifest:
    """The manifest of the shards that `notes` describe."""
    counts: Counter[int] = Counter()
    modes: Counter[str] = Counter()
    for note in notes:
        counts.update({int(label): count for label, count in note["class_counts"].items()})
        modes.update(note["modes"])
    classes = max(len(label_names or []), max(counts) + 1)
    pixel_samples = sum(note["pixel_samples"] for note in notes)
    mean, square = np.sum([note["sums"] for note in notes], axis=0) / pixel_samples
    std = np.sqrt(np.maximum(square - mean**2, 0))
    channels = 1 if set(modes) <= {"L", "1"} else 3
    entries = [ShardEntry.model_validate(note["entry"]) for note in notes]
    seen = [note for note in notes if note["modes"]] or notes  # of the others no image was readable
    return Manifest(
        samples=sum(entry.samples for entry in entries),
        class_counts=[counts[label] for label in range(classes)],
        label_names=label_names,
        mean=[round(value, 6) for value in mean[:channels].tolist()],
        std=[round(value, 6) for value in std[:channels].tolist()],
        pixel_samples=pixel_samples,
        modes=dict(sorted(modes.items())),
        width=(min(n["width"][0] for n in seen), max(n["width"][1] for n in seen)),
        height=(min(n["height"][0] for n in seen), max(n["height"][1] for n in seen)),
        shards=entries,
    )
