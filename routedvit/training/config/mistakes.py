"""Words the first mistake that pydantic found in a config: one line that names its mend.

A mistake is told of where it was made, the file or `--set`.
"""

import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

# What to write where a value is of the wrong kind and pydantic's words are its own.
WANTED = {
    "bool_type": "write true or false",
    "list_type": "write a list, [A, B, ...]",
    "tuple_type": "write a list, [A, B, ...]",
    "dict_type": "write an object, {...}",
    "model_type": "write an object, {...}",
}


def worded(
    error: ValidationError, config_class: type[BaseModel], path: str, typed: Mapping[str, str]
) -> str:
    """One line for one mistake, with a count of the others.

    An unknown key comes first: where a key is misspelled another one may be missing for it.

    Args:
        path: the config file.
        typed: the texts that `--set` gave, by their keys.
    """
    mistakes = error.errors(include_url=False)
    first = next((one for one in mistakes if one["type"] == "extra_forbidden"), mistakes[0])
    text = _text(first, config_class)
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    place = first["loc"][:-1] if first["type"] == "missing" else first["loc"]
    return f"{_where(field_path(config_class, place), text, path, typed)}: {text}{more}"


def _where(field: str, text: str, path: str, typed: Mapping[str, str]) -> str:
    """Who said it: the file, `--set`, or a section of the file with what `--set` put into it."""
    if any(_is_in(field, key) for key in typed):
        return "--set"
    inside = [key for key in typed if _is_in(key, field)]
    inside = [key for key in inside if key.rpartition(".")[2] in text] or (inside if field else [])
    given = " ".join(f"--set {key}={typed[key]}" for key in inside)
    return f"{path} with {given}" if given else path


def _is_in(key: str, section: str) -> bool:
    """Whether a dotted key is this section or lies in it; all lie in ''."""
    return not section or f"{key}.".startswith(f"{section}.")


def _text(mistake: Any, config_class: type[BaseModel]) -> str:
    kind, loc, value = mistake["type"], mistake["loc"], mistake["input"]
    field = field_path(config_class, loc)
    if kind == "extra_forbidden":
        known = _known_keys(config_class, loc[:-1])
        near = nearest(str(loc[-1]), known)
        return f"unknown key {field!r}{near}; known here: {', '.join(known)}"
    if kind == "union_tag_not_found":
        return f"'{field}.name' is missing; add it"
    if kind == "union_tag_invalid":
        tags = mistake["ctx"]["expected_tags"]
        return f"{field}.name = {json.dumps(mistake['ctx']['tag'])}: input should be one of {tags}"
    if kind == "missing" and isinstance(loc[-1], int):  # a list that is too short
        return f"{field} = {json.dumps(value)}: value {loc[-1] + 1} is missing; add it"
    if kind == "missing":
        return f"{field!r} is missing; add it"
    if kind == "value_error":
        return f"{field}: {mistake['ctx']['error']}" if field else str(mistake["ctx"]["error"])
    return f"{field} = {json.dumps(value)}: {WANTED.get(kind, mistake['msg'].lower())}"


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean ...?)' for the known name closest to a misspelled one, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _known_keys(config_class: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Field names of the section at `loc`, following nested models and optional ones."""
    return list(_walk(config_class, loc)[1].model_fields)


def field_path(config_class: type[BaseModel], loc: tuple[int | str, ...]) -> str:
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
        models = models_inside(field.annotation) if field else []
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


def models_inside(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a value of this type can be."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, dict):
        return [model for part in typing.get_args(annotation) for model in models_inside(part)]
    return []
