"""Which run ``resume`` means, and whether a command line agrees with what is recorded there."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from iexact_runner.config import Config
from iexact_runner.errors import ConfigError
from iexact_runner.runs.files import locked
from iexact_runner.runs.records import (
    CONFIG,
    WITHOUT_EFFECT,
    DamagedRecord,
    config_hash,
    flatten,
    read_run,
    run_folders,
)
from iexact_runner.untrusted.text import visible

logger = logging.getLogger(__name__)


def place(config: Config, fresh: Path) -> tuple[Path, bool]:
    """The folder of a run, and whether the run that is recorded there goes on.

    Args:
        config: whose ``resume`` names a folder, is ``auto``, or None.
        fresh: the folder of a run that begins.
    """
    if config.resume is None:
        return fresh, False
    if config.resume != "auto":
        return Path(config.resume), True
    found = newest_unfinished(Path(config.output_dir), asdict(config))
    if found is None:
        logger.info(f"resume=auto: no unfinished run of this configuration below {config.output_dir}: a new one begins")
    return found or fresh, found is not None


def newest_unfinished(output_dir: Path, config: Mapping[str, Any]) -> Path | None:
    """The folder last written of all runs that were not completed, have this configuration, and do not run now."""
    wanted = config_hash(config, resumed=True)
    found = []
    for folder in run_folders([output_dir]):
        try:
            run = read_run(folder)
        except DamagedRecord as error:
            logger.warning(f"resume=auto: {error}; passed over")
            continue
        if run.status != "completed" and config_hash(run.summary["config"], resumed=True) == wanted:
            found.append(folder)
    for folder in sorted(found, key=_last_written, reverse=True):
        with locked(folder) as alone:
            if alone:
                return folder
    return None


def check_agreement(
    folder: Path, *, recorded: Mapping[str, Any], asked: Mapping[str, Any], overrides: Sequence[str]
) -> None:
    """Refuses overrides beside ``resume=FOLDER`` that would change the numbers of the run.

    Args:
        folder: of the run.
        recorded: its configuration.
        asked: the configuration that the command line alone comes to.
        overrides: those of the command line; only what they name is compared.

    Raises:
        ConfigError: naming the first field that differs.
    """
    there = dict(flatten(recorded))
    names = list(map(overridden, overrides))
    # What is not a field, such as an experiment, can change any.
    everything = any(name.partition(".")[0] not in asked for name in names)
    for path, value in flatten(asked):
        named = everything or any(f"{path}.".startswith(f"{name}.") for name in names)
        if named and path.partition(".")[0] not in WITHOUT_EFFECT and there.get(path, value) != value:
            valid = (
                f"{folder} has {'null' if there[path] is None else visible(str(there[path]))}, and goes on as it began"
            )
            raise ConfigError.of(path, value, valid)


def overridden(override: str) -> str:
    """The group or dotted field that an override names: ``+quick=on`` names ``quick``."""
    return re.split("[=@]", override.lstrip("+~"))[0]


def _last_written(folder: Path) -> float:
    return max(path.stat().st_mtime for path in folder.iterdir() if path.is_file()) if (folder / CONFIG).exists() else 0
