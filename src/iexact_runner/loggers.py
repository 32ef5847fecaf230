"""TensorBoard and MLflow beside the records, for who looks at runs there; the records stay the source of truth."""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from iexact_runner.config import Config
from iexact_runner.errors import ConfigError
from iexact_runner.runs.records import flatten
from iexact_runner.training import Epoch

logger = logging.getLogger(__name__)

# What each logger needs, which are its extras too.
NEEDS = {"none": (), "tensorboard": ("tensorboard",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}
FINAL = {"saved_mib": "memory.saved_mib", "epochs_per_second": "throughput.epochs_per_second.median"}


class Logger:
    """Logs nothing; the others log every epoch of every repeat, and at the end what memory and speed came to."""

    def log(self, run: int, epoch: Epoch) -> None:
        """Logs an epoch of repeat ``run``."""

    def close(self, summary: Mapping[str, Any]) -> None:
        """Logs the final figures and lets go."""


class TensorBoardLogger(Logger):
    """Event files in ``tensorboard/run_0``, ``run_1``, ... of the run's folder.

    Args:
        folder: folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tensorboard"
        self._writers: dict[int, Any] = {}

    def log(self, run: int, epoch: Epoch) -> None:
        """Logs loss and scores as scalars."""
        from torch.utils.tensorboard import SummaryWriter

        if run not in self._writers:
            # A resumed run does the epochs after its checkpoint again: those logged before go.
            self._writers[run] = SummaryWriter(str(self._folder / f"run_{run}"), purge_step=epoch.number)
        for name, value in _scalars(epoch).items():
            self._writers[run].add_scalar(name, value, epoch.number)

    def close(self, summary: Mapping[str, Any]) -> None:
        """Adds the final figures and flushes."""
        for writer in self._writers.values():
            for name, value in _final(summary).items():
                writer.add_scalar(name, value, 0)
            writer.close()


class MLflowLogger(Logger):
    """A run of the MLflow experiment ``iexact`` for every repeat, at ``MLFLOW_TRACKING_URI`` or in the output folder.

    Args:
        folder: folder of the run.
        config: logged as parameters.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        from mlflow import MlflowClient

        output = Path(config["output_dir"]).absolute()
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{output / 'mlflow.db'}")
        experiment = self._client.get_experiment_by_name("iexact")
        self._experiment = experiment.experiment_id if experiment else self._client.create_experiment("iexact")
        self._folder = folder
        self._parameters = {name: str(value) for name, value in flatten(config)}
        self._runs: dict[int, str] = {}
        self._given_up = False

    def log(self, run: int, epoch: Epoch) -> None:
        """Logs loss and scores as metrics with the epoch as their step."""
        if self._given_up:
            return
        with self._or_give_up():
            if run not in self._runs:
                self._runs[run] = self._start(run)
            self._log(run, _scalars(epoch), step=epoch.number)

    def close(self, summary: Mapping[str, Any]) -> None:
        """Logs the final figures and ends the runs."""
        status = {"completed": "FINISHED", "interrupted": "KILLED"}.get(summary["status"], "FAILED")
        if self._given_up:
            return
        with self._or_give_up():
            for run, identity in self._runs.items():
                self._log(run, _final(summary), step=0)
                self._client.set_terminated(identity, status)

    @contextmanager
    def _or_give_up(self) -> Iterator[None]:
        """A server that stops answering ends the logging, not the run."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except (MlflowException, OSError) as error:
            self._given_up = True
            logger.warning(f"logger=mlflow: no more is logged ({' '.join(str(error).split())}); the records go on")

    def _start(self, run: int) -> str:
        from mlflow.entities import Param

        started = self._client.create_run(
            self._experiment, run_name=f"{self._folder.name}/{run}", tags={"folder": str(self._folder)}
        )
        identity: str = started.info.run_id
        self._client.log_batch(identity, params=[Param(*item) for item in self._parameters.items()])
        return identity

    def _log(self, run: int, values: Mapping[str, float], *, step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._runs[run], metrics=metrics)


def check_installed(name: str) -> None:
    """Refuses a logger whose package is missing.

    Raises:
        ConfigError: saying how to install it.
    """
    missing = [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]
    if missing:
        valid = f"needs {' and '.join(missing)}; pip install 'iexact-runner[{name}]', or logger=none"
        raise ConfigError.of("logger", name, valid)


def open_logger(config: Config, folder: Path, record: Mapping[str, Any]) -> Logger:
    """The logger of a run; ``record`` is its configuration as plain values."""
    if config.logger == "tensorboard":
        return TensorBoardLogger(folder)
    return MLflowLogger(folder, record) if config.logger == "mlflow" else Logger()


def _scalars(epoch: Epoch) -> dict[str, float]:
    scores = {} if epoch.scores is None else epoch.scores._asdict()
    return {"loss": epoch.loss, "seconds": epoch.seconds, **scores}


def _final(summary: Mapping[str, Any]) -> dict[str, float]:
    flat = dict(flatten({name: summary[name] or {} for name in ("memory", "throughput")}))
    return {name: flat[path] for name, path in FINAL.items() if path in flat}
