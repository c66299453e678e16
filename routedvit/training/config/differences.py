"""Where two configs differ, as JSON trees: by dotted keys, and in words.

A key of a list of sections has their number in it: `data.train.1.weight`.
"""

import json
from collections.abc import Iterator
from typing import Any


def differences(before: Any, after: Any, key: str = "") -> Iterator[str]:
    """Dotted keys at which two JSON trees differ; lists of as many sections by their numbers."""
    if _are_sections(before) and _are_sections(after) and len(before) == len(after):
        before, after = dict(enumerate(before)), dict(enumerate(after))
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted(before.keys() | after.keys()):
            inner = f"{key}.{name}" if key else name
            yield from differences(before.get(name), after.get(name), inner)
    elif json.dumps(before) != json.dumps(after):  # JSON makes tuples lists
        yield key


def is_free(key: str, free: tuple[str, ...]) -> bool:
    """Whether the key, or a section that it is in, is among `free`; there a * is any one name."""
    names = key.split(".")
    for pattern in (entry.split(".") for entry in free):
        pairs = zip(pattern, names, strict=False)
        if len(names) >= len(pattern) and all(given in ("*", name) for given, name in pairs):
            return True
    return False


def describe_differences(keys: list[str], before: dict[str, Any], after: dict[str, Any]) -> str:
    """'optim.lr was 0.1, is 0.2 (and 3 more)'."""
    text = f"{keys[0]} was {value_at(before, keys[0])}, is {value_at(after, keys[0])}"
    return text + (f" (and {len(keys) - 1} more)" if len(keys) > 1 else "")


def value_at(tree: Any, key: str) -> str:
    """What stands at a dotted key of a JSON tree, as JSON; 'null' if nothing does."""
    for part in key.split("."):
        if isinstance(tree, list) and part.isdigit():
            tree = dict(enumerate(tree)).get(int(part))
        else:
            tree = tree.get(part) if isinstance(tree, dict) else None
    return json.dumps(tree)


def _are_sections(tree: Any) -> bool:
    return isinstance(tree, list) and bool(tree) and all(isinstance(part, dict) for part in tree)
