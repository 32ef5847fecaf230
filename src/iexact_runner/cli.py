"""The command line: Hydra composes a configuration, it is checked, and the task runs."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import gc
import os
import re
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from iexact_runner import __version__, guard
from iexact_runner import config as schema
from iexact_runner.errors import OF_ONE_PROCESS, ConfigError, UserError
from iexact_runner.explanations import explain, suggest_field
from iexact_runner.guard import check_trust, checked_configurations, config_dir, parse_arguments
from iexact_runner.job import remove_if_empty, run_job
from iexact_runner.parallel.launch import launched_rank, launched_size
from iexact_runner.streams import forgiving_streams

if TYPE_CHECKING:
    from iexact_runner.runs.sweeps import Sweep

INTERRUPTED = "interrupted: what was recorded so far is kept"
EXIT_FAILED, EXIT_USAGE, EXIT_UNSHOWN, EXIT_INTERRUPTED = 1, 2, 3, 130


@functools.cache
def register_schema() -> None:
    """Makes the dataclasses known to Hydra, so that it refuses unknown fields and wrong types."""
    store = ConfigStore.instance()
    # Hydra copies all of it for every list of choices, a hundred times for a help text, and never changes a copy.
    ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]
    store.store(name="schema", node=schema.Config)
    store.store(group="compression", name="base_compression", node=schema.CompressionConfig)
    store.store(group="dataset", name="base_dataset", node=schema.DatasetConfig)
    for dataset, name in schema.DATASET_PREFIXES.items():
        store.store(group="dataset", name=f"base_{name}", node=dataset)
    for name, model in schema.MODEL_CONFIGS.items():
        store.store(group="model", name=f"base_{name}", node=model)
    for name, sampler in schema.SAMPLER_CONFIGS.items():
        store.store(group="sampler", name=f"base_{name}", node=sampler)
    for name, parallel in schema.PARALLEL_CONFIGS.items():
        store.store(group="parallel", name=f"base_{name}", node=parallel)


def to_config(composed: DictConfig) -> schema.Config:
    """The checked configuration; from here on there are only dataclasses.

    Raises:
        ConfigError: if a field is unknown or a value is not valid.
    """
    if OmegaConf.get_type(composed) is not schema.Config:
        raise ConfigError("--config-name: the file must build on iexact's own: its defaults begin with config")
    _check_known(composed)
    config = OmegaConf.to_object(composed)
    assert isinstance(config, schema.Config)
    return config


def compose_config(*overrides: str) -> schema.Config:
    """The checked configuration of a command line, for use as a library.

    Raises:
        ConfigError: if a field is unknown or a value is not valid.
    """
    register_schema()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        return to_config(hydra.compose("config", overrides=spell_out(list(overrides))))


@hydra.main(config_path=str(config_dir()), config_name="config", version_base="1.3")
def app(composed: DictConfig) -> None:
    """Runs one job in the folder that Hydra made for it; a failed job does not stop the others of a sweep."""
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    debug = OmegaConf.select(composed, "debug") is True
    job = ""
    try:
        if hydra_config.mode == RunMode.MULTIRUN:
            sweep_folder = Path(hydra_config.sweep.dir).absolute()
            job = _job_title(os.path.relpath(folder, sweep_folder), hydra_config.overrides.task)
            run_sweep_job(composed, folder, sweep_folder)
        else:
            composed = of_resumed_run(composed, hydra_config.overrides.task)
            run_job(to_config(composed), folder, OmegaConf.to_yaml(composed, resolve=True))
    except (ConfigError, OmegaConfBaseException) as error:
        remove_if_empty(folder)
        _report(job + explain(error), EXIT_USAGE, debug=debug)
    except UserError as error:
        _report(job + explain(error), EXIT_FAILED, debug=debug, everywhere=isinstance(error, OF_ONE_PROCESS))
    except KeyboardInterrupt as interrupt:
        remove_if_empty(folder)
        raise KeyboardInterrupt(_way_on(composed)) from interrupt
    except Exception as error:
        _report(job + _unexpected(error, debug=debug), EXIT_FAILED, debug=debug)


def of_resumed_run(composed: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """With ``resume=FOLDER`` the configuration that is recorded there, otherwise the one that was composed.

    Raises:
        ConfigError: if an override would change the numbers of the run.
    """
    resumed = OmegaConf.select(composed, "resume")
    if resumed in (None, "", "auto"):
        return composed
    from iexact_runner.runs.records import CONFIG, WITHOUT_EFFECT, read_config
    from iexact_runner.runs.resume import check_agreement, overridden

    path = Path(resumed, CONFIG)
    if not path.is_file():
        raise ConfigError.of("resume", resumed, f"must be the folder of a run; {path} does not exist")
    recorded: Any = read_config(path)
    guard.check_interpolations(recorded, f"{path}, which is recorded,", allowed=())
    asked: Any = OmegaConf.to_container(composed, resolve=True)
    check_agreement(path.parent, recorded=recorded, asked=asked, overrides=overrides)
    own = {overridden(override).partition(".")[0] for override in overrides}
    recorded |= {name: asked[name] for name in WITHOUT_EFFECT if name in own and name in asked}
    typed = OmegaConf.structured(schema.Config)
    try:
        typed.model = schema.model_config(recorded["model"]["name"]) or schema.MODEL_CONFIGS[recorded["model"]["name"]]
        typed.dataset = schema.dataset_config(recorded["dataset"]["name"])
        typed.sampler = schema.SAMPLER_CONFIGS[recorded.get("sampler", {"name": "none"})["name"]]
        typed.parallel = schema.PARALLEL_CONFIGS[recorded.get("parallel", {"name": "none"})["name"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError.of("resume", resumed, f"{path} is not the configuration of a run") from error
    merged = OmegaConf.merge(typed, recorded)
    assert isinstance(merged, DictConfig)
    check_trust(merged, overrides)
    return merged


def run_sweep_job(composed: DictConfig, folder: Path, sweep_folder: Path) -> None:
    """Runs one job of a sweep and records its status, unless another process does."""
    from iexact_runner.runs.jobs import Job
    from iexact_runner.runs.parents import end_with_parent
    from iexact_runner.runs.records import METRICS, SUMMARY

    if not _sweeps:
        end_with_parent()
    with Job(folder).attempt(sweep_folder, fail_fast=OmegaConf.select(composed, "sweep.fail_fast") is True) as mine:
        if not mine:
            return
        from iexact_runner.runs.devices import own_gpu

        config = to_config(composed)
        if config.resume == "auto":
            begun = (folder / METRICS).exists() or (folder / SUMMARY).exists()
            config = dataclasses.replace(config, resume=str(folder) if begun else None)
        # Several processes take the first GPUs, one each.
        with own_gpu(announce=print) if config.device == "auto" and config.processes == 1 else nullcontext():
            # Without a sweep of its own this is one of several processes that share a terminal.
            run_job(config, folder, OmegaConf.to_yaml(composed, resolve=True), live=bool(_sweeps))


def begin_sweep(sweep: Sweep) -> None:
    """Makes the tables of a sweep the end of the command."""
    _sweeps.append(sweep)


def report_job(name: str, overrides: list[str], error: Exception) -> None:
    """Tells of a job that cannot be launched."""
    _report(_job_title(name, overrides) + explain(error), EXIT_USAGE, debug=False)


def show_sweep(sweep: Sweep) -> None:
    """Prints the jobs of a sweep and the table of its runs; jobs with tables of their own have none."""
    from iexact_runner.report.command import show, wide_console
    from iexact_runner.report.reading import read_report
    from iexact_runner.runs.records import run_folders

    console = wide_console()
    sweep.show(console)
    if not sweep.completed and not _failures:
        _failures.append(EXIT_FAILED)
    folders = [job.folder for job in sweep.jobs]
    if not run_folders(folders):
        return
    report = read_report(folders)
    if not report.grids(title=sweep.title) and not report.damaged:
        return
    show(report, console, title=sweep.title)
    page = f"iexact-report {sweep.folder} --format html --output report.html"
    console.print(f"as a page: {page}", highlight=False, markup=False, soft_wrap=True)
    for line in report.damaged:
        _report(line, EXIT_FAILED, debug=False)


def spell_out(arguments: list[str]) -> list[str]:
    """Arguments as Hydra takes them.

    The choice of a group cannot be a truth value there, new keys need ``++``, and a task is a field, not a first word.
    """
    first = next((place for place, argument in enumerate(arguments) if argument not in ("-m", "--multirun")), None)
    if first is not None and arguments[first] in schema.TASKS:
        arguments = [*arguments[:first], f"task={arguments[first]}", *arguments[first + 1 :]]
    spelled = ["+quick=on" if argument == "quick=true" else argument for argument in arguments]
    spelled = [f"++{argument}" if argument.startswith("model.kwargs") else argument for argument in spelled]
    return [argument for argument in spelled if argument != "quick=false"]


def main() -> None:
    """Entry point of ``iexact``: every expected error is one line on stderr and a non-zero exit status."""
    _failures.clear()
    atexit.register(gc.freeze)  # the interpreter would look for garbage among all that was imported, for a second
    with forgiving_streams() as is_lost:
        _command()
        if not _failures and is_lost():
            _failures.append(EXIT_UNSHOWN)
    if _failures:
        sys.exit(_failures[-1])


def _command() -> None:
    """Does what the command line says; failures are told and counted."""
    if "--version" in sys.argv[1:]:
        print(f"iexact {__version__}")
        return
    if any(re.fullmatch(r"output_dir=(''|\"\")?", argument) for argument in sys.argv[1:]):
        _report("output_dir='': must be a folder", EXIT_FAILED, debug=False)  # Hydra would make folders in the root
        return
    # What ends a batch job ends it as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.argv[1:] = spell_out(sys.argv[1:])
    register_schema()
    # torch, imported later, would warn on the screen of what a user cannot change.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # torch_geometric compiles functions of its own in a way that newer versions of torch warn of.
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)
    # Hydra then raises what it would print in its own many-line way.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    debug = "debug=true" in (argument.lower() for argument in sys.argv[1:])
    _sweeps.clear()
    try:
        parse_arguments(sys.argv[1:])
        with checked_configurations(), folder_of_helper():
            app()
        for sweep in _sweeps:
            show_sweep(sweep)
    except KeyboardInterrupt as interrupt:
        way_on = f"the same command with {_sweeps[-1].again} runs what is missing" if _sweeps else str(interrupt)
        _report("; ".join(filter(None, (INTERRUPTED, way_on))), EXIT_INTERRUPTED, debug=False)
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        _report(explain(error), EXIT_USAGE, debug=debug)
    except UserError as error:
        _report(explain(error), EXIT_FAILED, debug=debug)
    except OSError as error:  # Hydra could not make the folder of the run
        reason = error.strerror or str(error)
        _report(f"output_dir: {error.filename} cannot be written ({reason}); name a folder that can", 1, debug=debug)
    except Exception as error:
        _report(_unexpected(error, debug=debug), EXIT_USAGE, debug=debug)
    except SystemExit as end:  # Hydra's way to end --help
        _failures.extend([EXIT_FAILED] if end.code else [])


@contextmanager
def folder_of_helper() -> Iterator[None]:
    """Records of a process that is not the first of its run go to a folder that is gone afterwards."""
    if launched_size() > 1 and any(argument in ("-m", "--multirun") for argument in sys.argv[1:]):
        raise ConfigError("-m: started in several processes; processes=N starts those of each job of a sweep")
    if launched_rank() == 0:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="iexact.") as folder:
        sys.argv.append(f"hydra.run.dir={Path(folder, 'run')}")
        yield


def _unexpected(error: Exception, *, debug: bool) -> str:
    if "Config group override must be a string" in str(error):
        return "GROUP=null: a group needs a choice; ~GROUP drops an optional one, for example ~recipe"
    return f"{type(error).__name__}: {explain(error)}" + ("" if debug else " (debug=true shows where)")


# Exit statuses of the jobs of this process that did not complete.
_failures: list[int] = []
# Sweeps that this process launched.
_sweeps: list[Sweep] = []


def _way_on(composed: DictConfig) -> str:
    """How a run that was interrupted goes on; nothing for a task that cannot."""
    if OmegaConf.select(composed, "task") not in schema.RESUMABLE:
        return ""
    return "the same command" + (" goes on" if OmegaConf.select(composed, "resume") else " with resume=auto goes on")


def _job_title(name: str, overrides: Iterable[str]) -> str:
    return f"job {name} ({' '.join(overrides)}): "


def _report(message: str, status: int, *, debug: bool, everywhere: bool = False) -> None:
    """Tells of a failure; of several processes the first does, unless the others know more."""
    if debug:
        traceback.print_exc()
    if everywhere or launched_rank() == 0:
        print(f"iexact: {message}", file=sys.stderr)
    _failures.append(status)


def _check_known(composed: DictConfig, prefix: str = "") -> None:
    """Refuses fields that ``+name=value`` added: nothing would ever read them."""
    kind: Any = OmegaConf.get_type(composed)
    if not dataclasses.is_dataclass(kind):  # arguments of a class of the user's
        return
    names = [field.name for field in dataclasses.fields(kind)]
    for key in map(str, composed):
        if key not in names:
            raise ConfigError(f"{prefix}{key}: no such field; {suggest_field(key, kind)}")
        if not OmegaConf.is_missing(composed, key) and OmegaConf.is_dict(composed[key]):
            _check_known(composed[key], f"{prefix}{key}.")
