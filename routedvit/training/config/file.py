"""Reads a run config from JSON, applies `--set`, words a mistake in one line with its mend."""

import difflib
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from routedvit.training.config.run import ConfigError

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
    for override in overrides:
        _apply_override(raw, override)
    try:
        return config_class.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first_mistake(error, config_class)}") from None


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
        if models := _models_inside(field.annotation):
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


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """' (did you mean ...?)' for the known name closest to a misspelled one, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _similar_files(path: str) -> str:
    folder = Path(path).parent
    names = sorted(str(entry) for entry in folder.glob("*.json")) if folder.is_dir() else []
    names = [name for name in names if not name.endswith("schema.json")]
    return f"; there are {', '.join(names)}" if names else ""


def _apply_override(raw: dict[str, Any], override: str) -> None:
    """`a.b=c` sets raw['a']['b']; c is read as JSON and, where it is none, taken as a string."""
    dotted, separator, text = override.partition("=")
    if not separator or not dotted:
        raise ConfigError(
            f"--set {override}: write it as section.key=value, such as optim.lr=0.001"
        )
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    *sections, key = dotted.split(".")
    node = raw
    for section in sections:
        if node.get(section) is None:  # a run's config.json has null where a section is off
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}: {section!r} is a value, not a section")
    node[key] = value


def _first_mistake(error: ValidationError, config_class: type[BaseModel]) -> str:
    """One line for the first mistake, with a count of the others."""
    mistakes = error.errors(include_url=False)
    first = mistakes[0]
    field = _field_path(config_class, first["loc"])
    if first["type"] == "extra_forbidden":
        known = _known_keys(config_class, first["loc"][:-1])
        text = f"unknown key {field!r}{nearest(str(first['loc'][-1]), known)}"
        text += f"; known here: {', '.join(known)}"
    elif first["type"] == "union_tag_not_found":
        text = f"'{field}.name' is missing; add it"
    elif first["type"] == "missing" and isinstance(place := first["loc"][-1], int):
        given = json.dumps(first["input"])  # a list that is too short
        text = f"{field} = {given}: value {place + 1} is missing; add it"
    elif first["type"] == "missing":
        text = f"{field!r} is missing; add it"
    elif first["type"] == "value_error":
        text = f"{field}: {first['ctx']['error']}"
    else:
        text = f"{field} = {json.dumps(first['input'])}: {first['msg'].lower()}"
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    return text + more


def _known_keys(config_class: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Field names of the section at `loc`, following nested models and optional ones."""
    return list(_walk(config_class, loc)[1].model_fields)


def _field_path(config_class: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """Dotted path without what pydantic adds for the members of a union, such as '.float'."""
    return ".".join(_walk(config_class, loc)[0])


def _walk(
    config_class: type[BaseModel], loc: tuple[int | str, ...]
) -> tuple[list[str], type[BaseModel]]:
    """Path of `loc` as a person would write it, and the innermost section on it."""
    path: list[str] = []
    section = config_class
    variants: dict[Any, type[BaseModel]] = {}
    for part in loc:
        if part in variants:  # the tag of a union of sections chooses one and is no key
            section, variants = variants[part], {}
            continue
        path.append(str(part))
        field = section.model_fields.get(str(part))
        models = _models_inside(field.annotation) if field else []
        if field and not models:
            break
        variants = (
            {tag: m for m in models for tag in _tags(m)} if field and field.discriminator else {}
        )
        section = models[0] if models else section  # a list index names no section
    return path, section


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    """Values of `name` that choose this member of a union."""
    return typing.get_args(model.model_fields["name"].annotation)


def _models_inside(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a value of this type can be."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, dict):
        return [model for part in typing.get_args(annotation) for model in _models_inside(part)]
    return []
