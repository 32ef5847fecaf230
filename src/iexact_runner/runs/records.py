"""What a run writes and how it is read back.

``config.yaml`` is written first, ``metrics.jsonl`` as the run goes on, ``summary.json`` at its end.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from iexact_runner.config import CompressionConfig
from iexact_runner.errors import UserError
from iexact_runner.runs import schema
from iexact_runner.runs.files import (
    LOCK,
    TEMPORARY,
    append_line,
    count_lines,
    cut_after,
    locked,
    sync,
    write_atomically,
)
from iexact_runner.untrusted import documents
from iexact_runner.untrusted.text import shown, visible

SCHEMA_VERSION = 1
CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
STATUSES = ("completed", "failed", "interrupted")
# Folders below a job's that hold what earlier attempts at it left begin with this.
ATTEMPT = "attempt_"
# Fields of a configuration that say where and how it is recorded; no number depends on them.
WITHOUT_EFFECT = ("output_dir", "debug", "logger", "checkpoint", "processes", "resume", "sweep")

# Bytes that a file may have; of metrics that is some 150,000 epochs.
MOST_CONFIG, MOST_SUMMARY, MOST_METRICS = 2**18, 2**24, 2**25

_COMPRESSION_DEFAULTS = asdict(CompressionConfig(scheme="none"))


class DamagedRecord(UserError):
    """A file of a run that cannot be read as what it should hold; the message may quote what is there."""

    def __init__(self, message: str) -> None:
        super().__init__(visible(message))


class UnwritableFolder(UserError):
    """The folder of a run cannot be written any more."""


class RunFolder:
    """The folder of one run.

    Args:
        path: created if it does not exist.
        resumed: whether the run that is recorded there goes on.

    Raises:
        UserError: if the folder cannot be written, or holds the records of another run.
    """

    def __init__(self, path: Path, *, resumed: bool = False) -> None:
        self.path = path
        self.resumed = resumed
        for file in (path / METRICS, path / SUMMARY) if resumed else ():
            _check_regular(file)
        taken = [name for name in (METRICS, SUMMARY) if (path / name).exists()]
        if taken and not resumed:
            raise UserError(f"{path}: already holds {' and '.join(taken)} of another run; name another folder")
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"output_dir={path}: cannot be written ({reason}); name a folder that can") from error

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Context in which a run goes on here; a resumed one has not ended, so its summary is removed.

        Raises:
            UserError: if another process runs here.
        """
        with ExitStack() as stack:
            with self._writing(LOCK):
                if not stack.enter_context(locked(self.path)):
                    raise UserError(f"{self.path}: another process runs in it; wait for its end")
                if self.resumed:
                    if self._completed():
                        raise UserError(f"{self.path}: its run is completed; there is nothing to resume")
                    for leftover in (*self.path.glob(f"{TEMPORARY}*"), self.path / SUMMARY):
                        leftover.unlink(missing_ok=True)
            yield

    def write_config(self, yaml: str) -> None:
        """Writes the resolved configuration; that of a resumed run stays."""
        if not self.resumed:
            self.write(CONFIG, yaml)

    def forget_config(self) -> None:
        """Removes the configuration of a run that could not begin; of one that did there are other records."""
        if not self.resumed and not any((self.path / name).exists() for name in (METRICS, SUMMARY)):
            (self.path / CONFIG).unlink(missing_ok=True)

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Adds one line to ``metrics.jsonl``, where others see it when this returns."""
        with self._writing(METRICS):
            append_line(self.path / METRICS, to_json(line))

    def metrics_lines(self) -> int:
        """Whole lines of ``metrics.jsonl``."""
        return count_lines(self.path / METRICS)

    def keep_metrics(self, lines: int) -> None:
        """Cuts ``metrics.jsonl`` after so many lines, which it has."""
        with self._writing(METRICS):
            cut_after(self.path / METRICS, lines)

    def sync_metrics(self) -> None:
        """Waits until ``metrics.jsonl`` would outlive a power failure."""
        with self._writing(METRICS):
            sync(self.path / METRICS)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes ``summary.json`` whole or not at all."""
        self.write(SUMMARY, to_json(summary, indent=2) + "\n")

    def write(self, name: str, content: str | bytes, *, keep_as: str | None = None) -> None:
        """Writes a file whole or not at all; ``keep_as`` is a name under which the one before it stays.

        Raises:
            UnwritableFolder: if it cannot be written, for example because the disk is full.
        """
        with self._writing(name):
            write_atomically(self.path / name, content, keep_as=None if keep_as is None else self.path / keep_as)

    def _completed(self) -> bool:
        try:
            return bool(_read_summary(self.path / SUMMARY)["status"] == "completed")
        except (FileNotFoundError, DamagedRecord):
            return False

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            valid = f"make room, then go on with resume={self.path}"
            raise UnwritableFolder(f"{self.path}: {name} cannot be written ({reason}); {valid}") from error


@dataclass(frozen=True)
class Run:
    """A run as it was recorded.

    Args:
        folder: where its files lie.
        status: ``completed``, ``failed``, ``interrupted``, or ``unfinished`` while there is no summary.
        summary: what ``summary.json`` holds; of an unfinished run only its ``config``.
        epochs: lines of ``metrics.jsonl``.
    """

    folder: Path
    status: str
    summary: Mapping[str, Any]
    epochs: int

    def lookup(self, path: str) -> Any:
        """Value at a dotted path of the summary; None where there is none."""
        return value_at(self.summary, path)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; of a run that was not completed, without a last one that is cut off.

        Raises:
            DamagedRecord: if one is not JSON, or not that of an epoch.
        """
        path = self.folder / METRICS
        lines = _read(path, limit=MOST_METRICS).splitlines() if path.exists() else []
        epochs = []
        for number, line in enumerate(lines if self.status == "completed" else lines[: self.epochs], start=1):
            with _damage_in(path, f"line {number}"):
                epoch = documents.parse_json(line)
                schema.check(epoch, schema.Epoch)
                if words := [name for name, value in epoch.items() if not _is_number(value) and value is not None]:
                    raise ValueError(f"{words[0]}={shown(epoch[words[0]])}: must be a number or null")
            epochs.append(epoch)
        return epochs


def run_folders(folders: Iterable[Path]) -> list[Path]:
    """Every folder at or below ``folders`` that holds records, the jobs of a sweep in their order.

    Not those that a later attempt at the same job took the place of.
    """
    found = set()
    for folder in folders:
        for place, inner, names in os.walk(folder):
            inner[:] = [name for name in inner if not name.startswith((ATTEMPT, TEMPORARY))]
            if SUMMARY in names or METRICS in names or (CONFIG in names and _is_config(Path(place, CONFIG))):
                found.add(Path(place))
    return sorted(found, key=lambda path: [_natural(part) for part in path.parts])


def read_run(folder: Path) -> Run:
    """Reads a run and checks that its files are whole.

    Raises:
        DamagedRecord: if a file is not; the message names it.
    """
    try:
        if not (folder / SUMMARY).exists():
            config = read_config(folder / CONFIG)
            with _damage_in(folder / CONFIG):
                schema.check(config, schema.Config)
                schema.check_fields(config)
            return Run(folder, "unfinished", {"config": config}, _count_lines(folder / METRICS, completed=False))
        summary = _read_summary(folder / SUMMARY)
        lines = _count_lines(folder / METRICS, completed=summary["status"] == "completed")
    except OSError as error:
        raise DamagedRecord(f"{error.filename}: cannot be read ({error.strerror})") from error
    config, status = summary["config"], summary["status"]
    # A field that is newer than the record had its default.
    config["compression"] = _COMPRESSION_DEFAULTS | config["compression"]
    expected = config["runs"] * config["training"]["epochs"]
    if status == "completed" and config.get("task") in ("train", "distribution") and lines != expected:
        raise DamagedRecord(f"{folder / METRICS}: has {lines} lines, a completed run {expected}")
    return Run(folder, status, summary, lines)


def _read_summary(path: Path) -> dict[str, Any]:
    data = _read(path, limit=MOST_SUMMARY)
    with _damage_in(path):
        summary = documents.parse_json(data)
        if not isinstance(summary, dict):
            raise ValueError("is not the summary of a run")
        if (version := summary.get("schema_version")) != SCHEMA_VERSION:
            raise ValueError(f"schema_version={shown(version)}: this version reads {SCHEMA_VERSION}")
        if summary.get("status") not in STATUSES:
            raise ValueError(f"status={shown(summary.get('status'))}: must be one of {', '.join(STATUSES)}")
        schema.check(summary, schema.Summary)
        schema.check_fields(summary["config"])
    checked: dict[str, Any] = summary
    return checked


def _count_lines(path: Path, *, completed: bool) -> int:
    """Lines of a JSON Lines file; the last whole one is read, for the others were written before it."""
    data = _read(path, limit=MOST_METRICS) if path.exists() else b""
    if completed and data and not data.endswith(b"\n"):
        raise DamagedRecord(f"{path}: its last line is cut off")
    data = data[: data.rfind(b"\n") + 1]
    if data:
        with _damage_in(path, "its last line"):
            documents.parse_json(data[data.rfind(b"\n", 0, -1) + 1 :])
    return data.count(b"\n")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _read(path: Path, *, limit: int) -> bytes:
    with _damage_in(path):
        return documents.read_bounded(path, limit=limit)


def _check_regular(path: Path) -> None:
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DamagedRecord(f"{path}: is not a regular file")


@contextmanager
def _damage_in(path: Path, place: str = "") -> Iterator[None]:
    """Context in which what is found wrong is that of a file, at a place in it."""
    try:
        yield
    except ValueError as error:
        raise DamagedRecord(f"{path}: {f'{place}: ' if place else ''}{error}") from error


def read_config(path: Path) -> dict[str, Any]:
    """The resolved configuration of a run.

    Raises:
        DamagedRecord: if the file cannot be read as one.
    """
    try:
        data = _read(path, limit=MOST_CONFIG)
    except OSError as error:
        raise DamagedRecord(f"{path}: cannot be read ({error.strerror})") from error
    with _damage_in(path):
        config = documents.parse_yaml(data)
        if not isinstance(config, dict):
            raise ValueError("is not the configuration of a run")
    checked: dict[str, Any] = config
    return checked


def _is_config(path: Path) -> bool:
    """Whether a ``config.yaml`` with nothing beside it is that of a run that just began: others have such files too."""
    try:
        return {"task", "model", "dataset", "compression"} <= read_config(path).keys()
    except DamagedRecord:
        return False


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which 2 comes before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def value_at(value: Any, path: str) -> Any:
    """Value at a dotted path of nested mappings; None where there is none."""
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted paths of a nested mapping and their values."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def config_hash(config: Mapping[str, Any], *, resumed: bool = False) -> str:
    """Tells configurations apart whose numbers may differ: 16 hexadecimal digits.

    The same for a resolved ``config.yaml``, for the ``config`` of a summary, and for the fields of a ``Config``.

    Args:
        config: all fields.
        resumed: whether a run may go on with another number of processes; else these tell jobs apart too.
    """
    effective = {name: value for name, value in config.items() if name not in WITHOUT_EFFECT}
    if not resumed and config.get("processes", 1) != 1:
        effective["processes"] = config["processes"]
    return hashlib.sha256(json.dumps(_canonical(effective), sort_keys=True).encode()).hexdigest()[:16]


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON without NaN or Infinity, which other readers refuse: they become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def mean_std(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (0 for one value) and the values themselves; nulls for none."""
    if not values:
        return {"mean": None, "std": None, "values": []}
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": spread, "values": list(values)}


def _canonical(value: Any) -> Any:
    """A value with whole numbers as integers: 1 and 1.0 are the same to every field."""
    if isinstance(value, Mapping):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value
