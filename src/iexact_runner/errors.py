"""Errors a user can act on: each is one line that names the field, the value and what is valid."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Base of every error that the command line shows as one line, without a traceback."""


class ConfigError(UserError, ValueError):
    """A configuration field has a value that is not valid."""

    @classmethod
    def of(cls, field: str, value: object, valid: str) -> ConfigError:
        """An error for a field.

        Args:
            field: dotted name as typed on the command line, for example ``compression.bits``.
            value: the offending value.
            valid: what would have been accepted.
        """
        typed = {None: "null", True: "true", False: "false"}
        shown = typed[value] if value is None or isinstance(value, bool) else value
        return cls(f"{field}={shown}: {valid}")


class DatasetError(UserError, RuntimeError):
    """A dataset is missing, damaged, or does not fit the run."""


class TrainingError(UserError, RuntimeError):
    """Training cannot go on, for example because the loss stopped being finite."""


class TeamError(UserError, RuntimeError):
    """Another process of a run on several is gone or cannot be reached."""


class OutOfMemory(UserError, MemoryError):
    """The run does not fit into the memory of its device."""


# What one process of several may meet alone, and so tells itself.
OF_ONE_PROCESS = (TeamError, OutOfMemory)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def suggest(name: str, valid: Iterable[str]) -> str:
    """What may be meant by a name that does not exist, and which do."""
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1)
    return (f"did you mean {close[0]}? " if close else "") + f"valid: {', '.join(names)}"
