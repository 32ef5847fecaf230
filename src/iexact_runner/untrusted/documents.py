"""JSON and YAML of strangers: of a bounded size and depth, every name once, and of values what JSON has."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from iexact_runner.untrusted.text import shown, visible

Place = tuple[Any, ...]  # linked, for it is put in words once and made for every value
MAX_DEPTH = 32
# Characters of one text: what a table breaks into lines in a moment.
MAX_TEXT = 100_000


def read_bounded(path: Path, *, limit: int) -> bytes:
    """The content of a regular file.

    Args:
        path: not a device, which has no end, nor a pipe, which may never begin.
        limit: bytes that it may have.

    Raises:
        ValueError: if it is something else, or larger.
        OSError: if it cannot be read.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError("is not a regular file")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"is larger than {limit / 2**20:g} MiB")
    return data


def parse_json(data: bytes) -> Any:
    """The value that JSON stands for.

    Raises:
        ValueError: if it is not JSON, or has what :func:`check_plain` refuses.
    """
    try:
        value = json.loads(data, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise ValueError(f"is not JSON ({visible(str(error))})") from error
    check_plain(value)
    return value


def parse_yaml(data: bytes) -> Any:
    """The value that YAML without references and tags stands for.

    Raises:
        ValueError: if it is not YAML, or has what :func:`check_plain` refuses.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        text, depth = data.decode(), 0
        # Looked at before anything is built: libyaml's loader crashes the process on what is deep enough.
        for event in yaml.parse(text, Loader=loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ValueError(f"is nested more than {MAX_DEPTH} deep")
            if isinstance(event, yaml.AliasEvent):  # a few can stand for more values than memory holds
                raise ValueError("has references, which no configuration of a run has")
            if getattr(event, "tag", None) is not None:  # which say how to build a value
                raise ValueError("has tags, which no configuration of a run has")
        _check_names(yaml.compose(text, Loader=loader))
        value = yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML ({visible(' '.join(str(error).split()))})") from error
    check_plain(value)
    return value


def check_plain(value: Any, *, place: Place = (), depth: int = 0) -> None:
    """Refuses what no record holds, wherever it stands.

    Args:
        value: of JSON or YAML.
        place: where it stands: the place of what it stands in, and its name or number there.
        depth: of what it stands in.

    Raises:
        ValueError: naming the place of a date or set, a number that is not finite or needs more than 64 bits, a text
            with half a character or too long, a name that is not text, or too deep a nesting.
    """
    if isinstance(value, (dict, list)) and depth == MAX_DEPTH:
        raise ValueError(f"{_named(place)}: is nested more than {MAX_DEPTH} deep")
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise ValueError(f"{_named(place)}: has the name {shown(name)}, which must be text")
            _check_text(name, place=place)
            check_plain(inner, place=(place, name), depth=depth + 1)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            check_plain(inner, place=(place, index), depth=depth + 1)
    elif isinstance(value, str):
        _check_text(value, place=place)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{_named(place)}={value}: must be a finite number")
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{_named(place)}={shown(value)}: must be a number of at most 64 bits")
    elif value is not None:
        raise ValueError(f"{_named(place)}={shown(value)}: must be text, a number, true, false or null")


def _check_text(text: str, *, place: Place) -> None:
    if len(text) > MAX_TEXT:
        raise ValueError(f"{_named(place)}={shown(text)}: must be at most {MAX_TEXT} characters")
    if not text.isascii() and any("\ud800" <= sign <= "\udfff" for sign in text):
        raise ValueError(f"{_named(place)}={shown(text)}: must be Unicode text, without half a character")


def _named(place: Place) -> str:
    """A place as a message calls it: ``accuracy.test.values[0]``."""
    words = ""
    while place:
        place, key = place
        words = (f"[{key}]" if isinstance(key, int) else f".{key}") + words
    return words.removeprefix(".")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"has {_repeated(name for name, _ in pairs)} twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _check_names(node: Any) -> None:
    """Refuses a mapping of YAML that has a name twice, of which the last would count."""
    if isinstance(node, yaml.MappingNode):
        names = [name.value for name, _ in node.value if isinstance(name, yaml.ScalarNode)]
        if len(set(names)) < len(names):
            raise ValueError(f"has {_repeated(names)} twice")
    if isinstance(node, yaml.CollectionNode):
        for part in node.value:
            for inner in part if isinstance(part, tuple) else (part,):
                _check_names(inner)


def _repeated(names: Iterable[str]) -> str:
    ((name, _),) = Counter(names).most_common(1)
    return shown(name)
