"""Checks of single values: each failure is one line with the dotted field name, the value and what is valid."""

from __future__ import annotations

import math
from collections.abc import Iterable

from iexact_runner.errors import ConfigError


def check(condition: bool, name: str, value: object, valid: str) -> None:
    """Raises unless ``condition`` holds."""
    if not condition:
        raise ConfigError.of(name, value, valid)


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raises unless ``value`` is one of ``choices``."""
    options = tuple(choices)
    check(value in options, name, value, f"must be one of {', '.join(map(str, options))}")


def check_probability(name: str, value: float) -> None:
    """Raises unless ``value`` is in [0, 1)."""
    check(0.0 <= value < 1.0, name, value, "must be at least 0 and below 1")


def check_at_least(name: str, value: float, low: int) -> None:
    """Raises unless ``value`` is ``low`` or more."""
    check(value >= low, name, value, f"must be {low} or more")


def check_above(name: str, value: float, low: float) -> None:
    """Raises unless ``value`` is finite and above ``low``."""
    check(low < value < math.inf, name, value, f"must be above {low}")
