"""Errors of Hydra and OmegaConf in one line that names the field, the value and what is valid."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from iexact_runner import config as schema
from iexact_runner.errors import suggest

# Launchers of Hydra's plugins, and the extras that bring them.
LAUNCHER_EXTRAS = {
    "hydra/launcher/joblib": "joblib",
    "hydra/launcher/ray": "ray",
    "hydra/launcher/submitit_local": "slurm",
    "hydra/launcher/submitit_slurm": "slurm",
}


def explain(error: BaseException) -> str:
    """An error in one line that names the field, the value and what is valid."""
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and error.missing_cfg_file in LAUNCHER_EXTRAS:
        extra = LAUNCHER_EXTRAS[error.missing_cfg_file]
        return f"{error.missing_cfg_file}: is not installed: pip install 'iexact-runner[{extra}]'"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        choices = [option for option in error.options if not option.startswith("base_")]
        return f"{group}={choice}: no such choice; {suggest(choice, choices)}"
    if isinstance(error, OverrideParseException):
        if "missing EQUAL" in error.message:
            return f"{error.override!r}: must be FIELD=VALUE; iexact --help lists the fields"
        return f"{error.override!r}: {_one_line(error.message.partition('See https')[0])}"
    if isinstance(error, HydraException) and isinstance(cause, OmegaConfBaseException):
        override = _quoted_override(str(error))
        if dataclasses.is_dataclass(cause.object_type) and cause.key is not None:
            if cause.key not in [field.name for field in dataclasses.fields(cause.object_type)]:
                return f"{override}: no such field; {suggest_field(str(cause.key), cause.object_type)}"
        return f"{override}: {_one_line(str(cause.msg))}"
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {_one_line(str(error.msg))}"
    return _one_line(str(error))


def _quoted_override(message: str) -> str:
    """The override that Hydra complains of, out of its message."""
    first = message.splitlines()[0]
    for opening in ("Could not override ", "Error merging override "):
        if first.startswith(opening):
            return first.removeprefix(opening).rstrip(".").strip("'")
    return first


def suggest_field(name: str, kind: Any) -> str:
    """What may be meant by a field that a configuration of this kind does not have: one of its own, or of a group."""
    own = [field.name for field in dataclasses.fields(kind)]
    groups = [*get_type_hints(schema.Config).items(), ("dataset", schema.SyntheticConfig)]
    groups += [("model", model) for model in schema.MODEL_CONFIGS.values()]
    homes = [f"{group}.{name}" for group, fields in groups if name in getattr(fields, "__dataclass_fields__", ())]
    if homes and kind is schema.Config:
        return f"did you mean {' or '.join(dict.fromkeys(homes))}?"
    return suggest(name, own)


def _one_line(text: str) -> str:
    # OmegaConf appends where it looked, a line each, starting with the key.
    return " ".join(text.partition("full_key:")[0].split())
