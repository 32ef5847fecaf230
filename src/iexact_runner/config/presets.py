"""Presets of ``conf/compression`` without Hydra: the names and fields of the command line, for use as a library."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from iexact_runner.config.compression import CompressionConfig
from iexact_runner.errors import ConfigError, suggest
from iexact_runner.guard import config_dir


def preset(name: str, **fields: Any) -> CompressionConfig:
    """The checked configuration of a preset.

    Args:
        name: a file of ``conf/compression``, as in ``compression=NAME``.
        fields: of :class:`CompressionConfig`, in place of the preset's, as in ``compression.FIELD=VALUE``.

    Raises:
        ConfigError: if there is no such preset or field, or a value is not valid; it names a field of the caller's.
    """
    if name not in preset_names():
        raise ConfigError.of("compression", name, f"no such choice; {suggest(name, preset_names())}")
    own = _fields(name)
    check_names(fields)
    if "scheme" in fields:
        valid = f"compression={name} is {own['scheme']}; name another preset"
        raise ConfigError.of("compression.scheme", fields["scheme"], valid)
    try:
        typed = OmegaConf.merge(OmegaConf.structured(CompressionConfig), own | fields)
        config = OmegaConf.to_object(typed)
    except OmegaConfBaseException as error:
        raise ConfigError(f"compression.{error.full_key}: {str(error.msg).splitlines()[0]}") from error
    except ConfigError as error:
        if any(str(error).startswith(f"compression.{field}=") for field in fields):
            raise
        written = ", ".join(f"compression.{field}={_shown(value)}" for field, value in fields.items())
        raise ConfigError(f"{written}: does not fit compression={name}, which has {error}") from error
    assert isinstance(config, CompressionConfig)
    return config


def check_names(fields: dict[str, Any]) -> None:
    """Refuses keywords that are no fields of a scheme.

    Raises:
        ConfigError: naming the first of them.
    """
    valid = [field.name for field in dataclasses.fields(CompressionConfig)]
    for name, value in fields.items():
        if name not in valid:
            raise ConfigError.of(f"compression.{name}", value, f"no such field; {suggest(name, valid)}")


@cache
def preset_names() -> tuple[str, ...]:
    """All presets, by name."""
    return tuple(sorted(path.stem for path in _folder().glob("*.yaml")))


def _folder() -> Path:
    return config_dir() / "compression"


def _fields(name: str) -> dict[str, Any]:
    """What a preset says, and what the preset says that it builds on."""
    content = yaml.safe_load((_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
    fields: dict[str, Any] = {}
    for other in content.pop("defaults"):
        if other == "_self_":
            fields |= content
        elif other in preset_names():
            fields |= _fields(other)
    return fields


def _shown(value: object) -> object:
    return "null" if value is None else value
