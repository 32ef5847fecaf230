"""What a configuration file from elsewhere may say, checked before Hydra makes or runs anything of it.

The files that come with this package and what is typed on the command line are trusted. Files that ``--config-dir``,
``--config-path`` or ``hydra.searchpath`` bring in are data: they choose among groups, set fields of the schema,
``hydra.mode`` and ``hydra.sweeper.params``, and name folders below the working folder. They refer to other fields, but
not to the environment.
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
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError
from omegaconf.grammar_parser import parse

from iexact_runner.errors import ConfigError

# Below ``hydra``: what any file may set, and what Hydra itself fills in.
_FREE = ("mode", "searchpath", "sweeper.params", "runtime", "overrides", "job.override_dirname", "job.config_name")
_FOLDERS = (
    "output_dir",
    "resume",
    "dataset.root",
    "dataset.path",
    "sampler.maps_folder",
    "compression.offload_folder",
    "parallel.folder",
)
_TYPE_IT = "a configuration file may not set this; type it on the command line"
# Of what an interpolation can call: the clock, and another field. The rest reads the environment or evaluates text.
_RESOLVERS = ("now", "oc.select")


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


def check_interpolations(values: object, source: str, *, allowed: Iterable[str] = _RESOLVERS) -> None:
    """Refuses text that would make OmegaConf read the environment or evaluate something; nothing of it is resolved.

    Args:
        values: of a file, as they are written.
        source: what they are from, for the message.
        allowed: resolvers that they may name.

    Raises:
        ConfigError: naming the first such field.
    """
    for path, value in _leaves(values).items():
        for name in _resolvers(value) if isinstance(value, str) and "${" in value else ():
            if name not in allowed:
                valid = f"{source} may not use {name}, which is for the command line; write the value itself"
                raise ConfigError.of(path, value, valid)


def _resolvers(text: str) -> Iterator[str]:
    """Names of the resolvers that a text calls, as they are written, wherever they stand in it."""
    try:
        pending = [parse(text)]
    except GrammarParseError:
        return  # OmegaConf refuses it too
    while pending:
        node = pending.pop()
        if hasattr(node, "resolverName"):
            yield node.resolverName().getText()
        pending += node.getChildren() if hasattr(node, "getChildren") else ()


class CheckingRepository(ConfigRepository):
    """Hydra's configuration files; those from elsewhere are checked as they are read, before anything is composed."""

    def load_config(self, config_path: str) -> ConfigResult | None:
        """Reads and checks a file.

        Raises:
            ConfigError: naming the field that a file from elsewhere may not set to this.
        """
        loaded = super().load_config(config_path)
        scheme, _, folder = ("" if loaded is None else loaded.path).partition("://")
        if loaded is not None and _is_foreign(scheme, folder):
            source = f"the configuration file {config_path}"
            defaults = [vars(default) for default in loaded.defaults_list or ()]
            check_interpolations({"package": loaded.header.get("package"), "defaults": defaults}, source)
            check_interpolations(OmegaConf.to_container(loaded.config, resolve=False), source)
        return loaded


class CheckingLoader(ConfigLoaderImpl):
    """Hydra's loader, which refuses a configuration in which files from elsewhere set what they may not.

    Args:
        config_search_path: where Hydra looks for files.
    """

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self.repository = CheckingRepository(config_search_path)
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
        self._check_swept(overrides)
        composed = super().load_configuration(config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        self._check_recipe(composed, overrides)
        if any(_is_foreign(source.schema, source.path) for source in composed.hydra.runtime.config_sources):
            check_foreign(composed, self._typed)
        return composed

    def _check_swept(self, overrides: list[str]) -> None:
        """Checks what ``hydra.sweeper.params`` of a file come to, for Hydra takes escapes out of them."""
        typed = {override.get_key_element() for override in _parsed(self._typed)}
        for override in _parsed(overrides):
            if override.get_key_element() not in typed:
                check_interpolations({override.get_key_element(): str(override.value())}, "hydra.sweeper.params")

    def _check_recipe(self, composed: DictConfig, overrides: list[str]) -> None:
        """Refuses a recipe that was asked for and does not exist; the group is optional, so Hydra would not mind."""
        for group in ("recipe", "sampler_recipe"):
            choice, options = composed.hydra.runtime.choices.get(group), self.get_group_options(group)
            if any(line.startswith(f"{group}=") for line in overrides) and choice not in options:
                raise ConfigError.of(group, choice, f"must be one of {', '.join(options)}; ~{group} is none")


def check_foreign(composed: DictConfig, typed: list[str]) -> None:
    """Refuses a configuration with foreign files in it unless the command line alone says what only it may say.

    Args:
        composed: the configuration with its ``hydra`` node.
        typed: the overrides of the command line.
    """
    names = {override.get_key_element().lstrip("+~") for override in _parsed(typed)}
    own = _flat(_own_hydra(composed, typed, names))
    found = _flat(composed.hydra)
    sweep: Any = OmegaConf.to_container(composed.hydra.sweep, resolve=False)
    if _is_below(str(sweep["subdir"])):
        found["sweep.subdir"] = own["sweep.subdir"]
    for path in {**found, **own}:
        if found.get(path) != own.get(path) and not any(f"{path}.".startswith(f"{free}.") for free in _FREE):
            raise ConfigError.of(f"hydra.{path}", found.get(path), _TYPE_IT)
    check_trust(composed, typed)
    for name in _FOLDERS:
        folder = OmegaConf.select(composed, name)
        if name not in names and folder and not Path(folder).resolve().is_relative_to(Path.cwd().resolve()):
            raise ConfigError.of(name, folder, f"lies outside the working folder; {_TYPE_IT}")


def _parsed(overrides: list[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(overrides)


def _is_foreign(scheme: str, folder: str) -> bool:
    """Whether a source of configurations is a folder other than our own."""
    return scheme == "file" and Path(folder) != config_dir()


def _is_below(folder: str) -> bool:
    """Whether a job's folder, as the sweeper names it, is one below that of the sweep whatever is interpolated."""
    return "$" not in folder and not Path(folder).is_absolute() and ".." not in Path(folder).parts


def check_trust(composed: DictConfig, typed: Iterable[str]) -> None:
    """Refuses to run code because a configuration file says so: what dataset files say, or a class that it names."""
    lines = [line.lstrip("+") for line in typed]
    for name in ("dataset.trust_pickle", "model.target"):
        value = OmegaConf.select(composed, name, throw_on_missing=False)
        if value and not any(line.startswith(f"{name}=") for line in lines):
            raise ConfigError.of(name, str(value).lower() if value is True else value, _TYPE_IT)


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
    return {path: repr(value) for path, value in _leaves(OmegaConf.to_container(node, resolve=False)).items()}


def _leaves(tree: Any) -> dict[str, Any]:
    """Leaves of nested dictionaries and lists by their dotted paths."""
    leaves: dict[str, Any] = {}

    def visit(value: Any, path: str) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        if items is None:
            leaves[path] = value
        else:
            for key, item in items:
                visit(item, f"{path}.{key}" if path else str(key))

    visit(tree, "")
    return leaves
