"""What every section of the run config builds on: the strict base, errors for users."""

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """A mistake in the run config that the user can mend; its text is one line that says how."""


def one_line(error: BaseException | str, limit: int | None = 300) -> str:
    """What an error says, without its line breaks."""
    return " ".join(str(error).split())[:limit]


class Section(BaseModel):
    """Base of every section: unknown keys are refused, numbers are finite, never made from strings.

    Those of `data`, which imports nothing from here, have one alike in `data.config`.

    The string below a field is its description in `configs/schema.json`.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
