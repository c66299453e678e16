"""What DeepSpeed says about its config, in one line that names the key."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import pydantic
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.zero.utils import ZeRORuntimeException

from routedvit.training.config.base import one_line
from routedvit.training.config.mistakes import nearest
from routedvit.training.config.run import ConfigError


def check_native(native: dict[str, Any]) -> None:
    """Let DeepSpeed read its config, and say in one line what it does not like."""
    if native.get("fp16", {}).get("enabled") and not get_accelerator().is_fp16_supported():
        raise ConfigError("precision.dtype = fp16: this device has no fp16; use bf16 or fp32")
    try:
        deepspeed.DeepSpeedConfig(native)
    except pydantic.ValidationError as error:
        raise ConfigError(_first_mistake(error, native)) from None
    except (DeepSpeedConfigError, AssertionError, TypeError, AttributeError) as error:
        raise ConfigError(f"deepspeed: {error}") from None


@contextmanager
def mistakes_in_words() -> Iterator[None]:
    """What DeepSpeed finds in its config only when it starts is a mistake too, no crash."""
    try:
        yield
    except (
        AssertionError, ImportError, KeyError, NotImplementedError, TypeError, ValueError,
        ZeRORuntimeException,
    ) as error:  # fmt: skip
        raise ConfigError(
            f"deepspeed: DeepSpeed does not start with this config ({type(error).__name__}: "
            f"{one_line(error, limit=None)}); see the section 'deepspeed'"
        ) from error


def _first_mistake(error: pydantic.ValidationError, native: dict[str, Any]) -> str:
    """'deepspeed.zero_optimization.stge: unknown key (did you mean 'stage'?)'."""
    mistake = error.errors(include_url=False)[0]
    key = str(mistake["loc"][-1]) if mistake["loc"] else ""
    where = _find(native, key, "deepspeed") or "deepspeed"
    if mistake["type"] != "extra_forbidden":
        return f"{where} = {mistake['input']!r}: {mistake['msg']}"
    models = {model.__name__: model for model in _subclasses(DeepSpeedConfigModel)}
    known = list(models[error.title].model_fields) if error.title in models else []
    return f"{where}: unknown key{nearest(key, known)}"


def _find(tree: dict[str, Any], key: str, path: str) -> str | None:
    """Dotted path of the first `key` in nested dicts."""
    if key in tree:
        return f"{path}.{key}"
    inner = (_find(v, key, f"{path}.{k}") for k, v in tree.items() if isinstance(v, dict))
    return next(filter(None, inner), None)


def _subclasses(model: type[pydantic.BaseModel]) -> Iterator[type[pydantic.BaseModel]]:
    for child in model.__subclasses__():
        yield child
        yield from _subclasses(child)
