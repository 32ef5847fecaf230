"""What a configuration file from elsewhere may say, checked before Hydra makes or runs anything of it.

The files that come with this package and what is typed on the command line are trusted. Files that ``--config-dir``,
``--config-path`` or ``hydra.searchpath`` bring in are data: they choose among groups, set fields of the schema,
``hydra.mode`` and ``hydra.sweeper.params``, and name folders below the working folder.
"""

from __future__ import annotations

import contextlib
import io
import re
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hydra._internal import hydra as hydra_application
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from iexact_runner.errors import ConfigError

# Below ``hydra``: what any file may set, and what Hydra itself fills in.
_FREE = ("mode", "searchpath", "sweeper.params", "runtime", "overrides", "job.override_dirname", "job.config_name")
_FOLDERS = ("output_dir", "resume", "dataset.root")
_TYPE_IT = "a configuration file may not set this; type it on the command line"


def config_dir() -> Path:
    """``conf/``: inside an installed package, or at the root of a checkout."""
    here = Path(__file__).resolve().parent
    installed = here / "conf"
    return installed if installed.is_dir() else here.parents[1] / "conf"


def parse_arguments(arguments: list[str]) -> Namespace:
    """The command line as Hydra parses it.

    Raises:
        ConfigError: if an option does not exist, or asks Hydra to unpickle a file.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options = get_args_parser().parse_args(arguments)
    except SystemExit as error:
        problem = said.getvalue().strip().rpartition("error: ")[2]
        wrong = problem.removeprefix("unrecognized arguments: ")
        if wrong != problem:
            problem = f"{wrong}: no such option; fields are FIELD=VALUE, and iexact --help lists them"
        raise ConfigError(problem) from error
    if options.experimental_rerun is not None:
        valid = "is a pickle, which could run anything; repeat the run with its config.yaml instead"
        raise ConfigError.of("--experimental-rerun", options.experimental_rerun, valid)
    return options


@contextlib.contextmanager
def checked_configurations() -> Iterator[None]:
    """Makes Hydra check every configuration that it composes; it has no place for this between composing and using."""
    hydra_application.ConfigLoaderImpl = CheckingLoader  # type: ignore[attr-defined]
    try:
        yield
    finally:
        hydra_application.ConfigLoaderImpl = ConfigLoaderImpl  # type: ignore[attr-defined]


class CheckingLoader(ConfigLoaderImpl):
    """Hydra's loader, which refuses a configuration in which files from elsewhere set what they may not.

    Args:
        config_search_path: where Hydra looks for files.
    """

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        # Kept, for the jobs of a sweep may be composed in other processes.
        self._typed: list[str] = get_args_parser().parse_args().overrides

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """Composes and checks.

        Raises:
            ConfigError: naming the field that a file from elsewhere may not set.
        """
        composed = super().load_configuration(config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        self._check_recipe(composed, overrides)
        sources = composed.hydra.runtime.config_sources
        if any(source.schema == "file" and Path(source.path) != config_dir() for source in sources):
            check_foreign(composed, self._typed)
        return composed

    def _check_recipe(self, composed: DictConfig, overrides: list[str]) -> None:
        """Refuses a recipe that was asked for and does not exist; the group is optional, so Hydra would not mind."""
        choice, options = composed.hydra.runtime.choices.get("recipe"), self.get_group_options("recipe")
        if any(line.startswith("recipe=") for line in overrides) and choice not in options:
            raise ConfigError.of("recipe", choice, f"must be one of {', '.join(options)}; ~recipe is none")


def check_foreign(composed: DictConfig, typed: list[str]) -> None:
    """Refuses a configuration with foreign files in it unless the command line alone says what only it may say.

    Args:
        composed: the configuration with its ``hydra`` node.
        typed: the overrides of the command line.
    """
    parsed = OverridesParser.create().parse_overrides(typed)
    names = {override.get_key_element().lstrip("+~") for override in parsed}
    own = _flat(_own_hydra(composed, typed, names))
    found = _flat(composed.hydra)
    sweep: Any = OmegaConf.to_container(composed.hydra.sweep, resolve=False)
    if _is_below(str(sweep["subdir"])):
        found["sweep.subdir"] = own["sweep.subdir"]
    for path in {**found, **own}:
        if found.get(path) != own.get(path) and not any(f"{path}.".startswith(f"{free}.") for free in _FREE):
            raise ConfigError.of(f"hydra.{path}", found.get(path), _TYPE_IT)
    check_trust(OmegaConf.select(composed, "dataset.trust_pickle"), typed)
    for name in _FOLDERS:
        folder = OmegaConf.select(composed, name)
        if name not in names and folder and not Path(folder).resolve().is_relative_to(Path.cwd().resolve()):
            raise ConfigError.of(name, folder, f"lies outside the working folder; {_TYPE_IT}")


def _is_below(folder: str) -> bool:
    """Whether a job's folder, as the sweeper names it, is one below that of the sweep whatever is interpolated."""
    return "$" not in folder and not Path(folder).is_absolute() and ".." not in Path(folder).parts


def check_trust(trust_pickle: object, typed: Iterable[str]) -> None:
    """Refuses to run what dataset files say because a file says so."""
    if trust_pickle and not any(line.lstrip("+").startswith("dataset.trust_pickle=") for line in typed):
        raise ConfigError.of("dataset.trust_pickle", "true", _TYPE_IT)


def _own_hydra(found: DictConfig, typed: list[str], names: set[str]) -> DictConfig:
    """The ``hydra`` node of our own configuration with the same choices and what was typed."""
    choices = {
        f"{group}={choice}"
        for group, choice in found.hydra.runtime.choices.items()
        if group.startswith("hydra/") and choice is not None and group not in names
    }
    overrides = [line for line in typed if re.match(r"[+~]*hydra[./](?!searchpath)", line)]
    loader = ConfigLoaderImpl(create_config_search_path(str(config_dir())))
    try:
        composed = loader.load_configuration("config", [*sorted(choices), *overrides], RunMode.MULTIRUN)
    except MissingConfigException as error:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        raise ConfigError.of(group, choice, f"must be one of {', '.join(error.options or ())}") from error
    node: DictConfig = composed.hydra
    return node


def _flat(node: DictConfig) -> dict[str, str]:
    """Leaves as they are written, by their dotted paths."""
    leaves: dict[str, str] = {}

    def visit(value: Any, path: str) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        if items is None:
            leaves[path] = repr(value)
        else:
            for key, item in items:
                visit(item, f"{path}.{key}" if path else str(key))

    visit(OmegaConf.to_container(node, resolve=False), "")
    return leaves
