"""What a run writes: ``config.yaml``, ``metrics.jsonl`` as it happens, and ``summary.json`` at the end."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from iexact_runner.errors import UserError

SCHEMA_VERSION = 1


class RunFolder:
    """The folder of one run.

    Args:
        path: created if it does not exist.

    Raises:
        UserError: if the folder cannot be written, or holds the records of another run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        taken = [name for name in ("metrics.jsonl", "summary.json") if (path / name).exists()]
        if taken:
            raise UserError(f"{path}: already holds {' and '.join(taken)} of another run; name another folder")
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"output_dir={path}: cannot be written ({reason}); name a folder that can") from error

    def write_config(self, yaml: str) -> None:
        """Writes the resolved configuration."""
        write_atomically(self.path / "config.yaml", yaml)

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Adds one line to ``metrics.jsonl``, on disk when this returns."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(to_json(line) + "\n")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes ``summary.json`` whole or not at all."""
        write_atomically(self.path / "summary.json", to_json(summary, indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Writes a file beside its place and renames it there, so that a reader never sees half of it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # A temporary file is private; results are as readable as anything else the user writes.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON without NaN or Infinity, which other readers refuse: they become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def mean_std(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (0 for one value) and the values themselves; nulls for none."""
    if not values:
        return {"mean": None, "std": None, "values": []}
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": spread, "values": list(values)}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value
