"""Reads a run config from JSON, applies `--set`, and lists the keys that a config can have."""

import json
import typing
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from routedvit.training.config.base import ConfigError
from routedvit.training.config.mistakes import field_path, models_inside, worded

Config = TypeVar("Config", bound=BaseModel)


def load_config(config_class: type[Config], path: str, overrides: list[str]) -> Config:
    """Read `path`, apply overrides such as 'optim.lr=1e-3', and validate.

    `path` may be the `config.json` of a run folder: its run once more.

    Raises:
        ConfigError: the file is missing or no JSON, a key is unknown, or a value does not fit.
    """
    raw = read_json(path)
    if raw.keys() >= {"config", "git_revision", "versions"}:  # what a run folder keeps of its run
        raw = raw["config"]
    raw.pop("$schema", None)  # editors complete keys from configs/schema.json
    overridden = [_split(override) for override in overrides]
    for key, text in overridden:
        _apply(raw, key, _parsed(text))
    typed = dict(overridden)
    try:
        return _validated(config_class, raw)
    except ValidationError as error:
        for key in _meant_as_strings(error, config_class, typed):  # --set name=2024
            _apply(raw, key, typed[key])
    try:
        return _validated(config_class, raw)
    except ValidationError as error:
        raise ConfigError(worded(error, config_class, path, typed)) from None


def read_json(path: str) -> dict[str, Any]:
    """The JSON object in `path`, or a ConfigError that says where it stops being one."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist{_similar_files(path)}") from None
    except IsADirectoryError:
        of_a_run = Path(path, "config.json")
        inside = f"; name {of_a_run}" if of_a_run.exists() else _similar_files(str(of_a_run))
        raise ConfigError(f"config file {path} is a folder{inside}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{where}: not JSON: {error.msg}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds a JSON {type(raw).__name__}; write an object {{...}}")
    return raw


def json_schema(config_class: type[BaseModel]) -> str:
    """The text of configs/schema.json, from which editors complete and check the keys."""
    schema = config_class.model_json_schema()
    schema["properties"]["$schema"] = {"type": "string", "description": "Path of this schema."}
    return json.dumps(schema, indent=2) + "\n"


def describe_keys(config_class: type[BaseModel], prefix: str = "") -> str:
    """One line per key: dotted name, default and meaning."""
    lines = []
    for name, field in config_class.model_fields.items():
        if models := models_inside(field.annotation):
            models = models if field.discriminator else models[:1]
            lines += [describe_keys(model, f"{prefix}{name}.") for model in models]
            if not isinstance(field.default, str):  # a word in place of the section
                continue
        default = "required"
        if typing.get_origin(field.annotation) is typing.Literal and field.is_required():
            default = json.dumps(typing.get_args(field.annotation)[0])  # the tag of a union
        elif not field.is_required():
            default = json.dumps(field.get_default(call_default_factory=True))
        meaning = " ".join((field.description or "").split())
        lines.append(f"  {prefix}{name} = {default}\n      {meaning}")
    return "\n".join(lines)


def _similar_files(path: str) -> str:
    folder = Path(path).parent
    names = sorted(str(entry) for entry in folder.glob("*.json")) if folder.is_dir() else []
    names = [name for name in names if not name.endswith("schema.json")]
    return f"; there are {', '.join(names)}" if names else ""


def _validated(config_class: type[Config], raw: dict[str, Any]) -> Config:
    return config_class.model_validate_json(json.dumps(raw))


def _meant_as_strings(
    error: ValidationError, config_class: type[BaseModel], typed: dict[str, str]
) -> set[str]:
    """Keys of `typed` where JSON read a number or a boolean and only a string will do."""
    wanted = {
        field_path(config_class, mistake["loc"])
        for mistake in error.errors(include_url=False)
        if mistake["type"] == "string_type"
    }
    return {key for key in wanted & typed.keys() if isinstance(_parsed(typed[key]), int | float)}


def _split(override: str) -> tuple[str, str]:
    """Key and text of `a.b=c`."""
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise ConfigError(
            f"--set {override}: write it as section.key=value, such as optim.lr=0.001"
        )
    return key, text


def _parsed(text: str) -> Any:
    """The value that was typed: JSON or, where it is none, a string."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _apply(raw: dict[str, Any], dotted: str, value: Any) -> None:
    """raw['a']['b'] = value for 'a.b'."""
    *sections, key = dotted.split(".")
    node = raw
    for section in sections:
        if node.get(section) is None:  # a run's config.json has null where a section is off
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise ConfigError(f"--set {dotted}: {section!r} is a value, not a section")
    node[key] = value
