"""What every section of the run config builds on: the strict base, errors for users."""

import json
import re
from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class ConfigError(ValueError):
    """A mistake in the run config that the user can mend; its text is one line that says how."""


def one_line(error: BaseException | str, limit: int | None = 300) -> str:
    """What an error says, without its line breaks."""
    return " ".join(str(error).split())[:limit]


def counted(number: int, thing: str) -> str:
    """'1 rank', '1,024 images'."""
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def explained(pattern: str, words: str) -> BeforeValidator:
    """Refuses a string that is not like `pattern` in `words`; pydantic would show the pattern.

    Beside `Field(pattern=...)`, which stands in the schema.
    """

    def check(value: Any) -> Any:
        if isinstance(value, str) and not re.fullmatch(pattern, value):
            raise ValueError(f"{json.dumps(value)} {words}")
        return value

    return BeforeValidator(check)


class Section(BaseModel):
    """Base of every section: unknown keys are refused, numbers are finite, never made from strings.

    Those of `data`, which imports nothing from here, have one alike in `data.config`.

    The string below a field is its description in `configs/schema.json`.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def refuse_idle(self, needs: str, *keys: str) -> None:
        """Raises ValueError for one of `keys`, which nothing would read, that is not its default.

        A default may be said: the record of a run says them all. `needs` ends the sentence "it
        needs ...".
        """
        for key in keys:
            value = getattr(self, key)
            default = type(self).model_fields[key].get_default(call_default_factory=True)
            if value != default:
                raise ValueError(
                    f"{key} = {json.dumps(value)} would do nothing: it needs {needs}; set that, or "
                    f"delete {key} (its default is {json.dumps(default)})"
                )
