"""What records leave out of URLs: user and password, and the query of http(s), often a token.

Records are read by more people than the command is: they go into checkpoints, TensorBoard and the
first line of every log.
"""

import re
import sys
from typing import Any, TypeVar

T = TypeVar("T")

HIDDEN = "***"  # `data.remote` refuses to fetch a URL that has it
USER = re.compile(r"(?<=://)[^/@\s\"']+(?=@)")
QUERY = re.compile(r"(https?://[^?\s\"']*\?)[^\s\"']+")


def command_line() -> str:
    """What this process was started with, as logs may tell it."""
    return without_secrets(" ".join(sys.argv))


def without_secrets(value: T) -> T:
    """A string, or all strings in lists and dicts, without what may be secret in a URL."""
    found: Any = value
    if isinstance(value, str):
        found = QUERY.sub(rf"\1{HIDDEN}", USER.sub(HIDDEN, value))
    elif isinstance(value, dict):
        found = {key: without_secrets(inner) for key, inner in value.items()}
    elif isinstance(value, list):
        found = [without_secrets(inner) for inner in value]
    return found
