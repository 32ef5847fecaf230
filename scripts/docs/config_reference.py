"""Prints the reference of a group of the configuration in Markdown: fields and choices, from the schema and conf/.

python scripts/docs/config_reference.py [GROUP]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

import yaml
from omegaconf import MISSING

from iexact_runner.cli import compose_config, config_dir
from iexact_runner.config import Config
from iexact_runner.errors import ConfigError

# The page of the fields that are in no group.
RUN = "run"
# Values of each type that most checks refuse, saying what is valid.
WRONG = {
    "int": (-1, 0),
    "float": (-1.0, 0.0),
    "str": ("?", ""),
    "Any": (-1, "?"),
    "list[int]": ([-1], []),
    "dict[str, Any]": (),
}
# Groups of fields, by name.
SECTIONS = tuple(field.name for field in dataclasses.fields(Config) if str(field.type).endswith("Config"))
# What a choice has no default for.
NEEDED = {"file": ("dataset.path=PATH",), "module": ("model.target=package.module:Class",)}


def main() -> None:
    """Prints one page, or the names of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", nargs="?", choices=groups(), metavar="GROUP", help="; ".join(groups()))
    group = parser.parse_args().group
    print("\n".join(groups()) if group is None else page(group))


def groups() -> list[str]:
    """Everything that has a page: the settings of a run, groups of fields, and groups of choices."""
    # What is below hydra/ are Hydra's own groups.
    folders = [path.name for path in config_dir().iterdir() if path.is_dir() and path.name != "hydra"]
    return [RUN, *sorted({*SECTIONS, *folders})]


def page(group: str) -> str:
    """Tables of the fields of a group, and of its choices."""
    parts = list(field_tables(group)) if group == RUN or group in SECTIONS else []
    if (config_dir() / group).is_dir():
        parts += ["## Choices", choice_table(group)]
    return "\n\n".join(parts)


def field_tables(group: str) -> Iterator[str]:
    """A section for the fields that all choices have, then one for those of each kind of choice."""
    composed = examples(group)
    for owner in owners(composed.values()):
        having = {name: example for name, example in composed.items() if isinstance(example, owner)}
        fields = [field for field in own_fields(owner) if not (owner is Config and field.name in SECTIONS)]
        summary, meanings = documentation(owner)
        if fields:
            everywhere = len(having) == len(composed)
            yield "## Fields" if everywhere else "## Fields of " + ", ".join(f"`{name}`" for name in having)
            yield summary
            yield table(
                ("field", "default", "valid", "meaning"),
                [field_row(group, field, meanings, list(having.values())) for field in fields],
            )


def owners(composed: Iterable[object]) -> list[type]:
    """The dataclasses of some examples, base classes first."""
    kinds = [kind for example in composed for kind in reversed(type(example).__mro__)]
    return [kind for kind in dict.fromkeys(kinds) if dataclasses.is_dataclass(kind)]


def own_fields(owner: type) -> list[dataclasses.Field[Any]]:
    """Fields that a dataclass adds to those of its base."""
    return [field for field in dataclasses.fields(owner) if field.name in owner.__annotations__]


def field_row(
    group: str, field: dataclasses.Field[Any], meanings: dict[str, str], having: list[Any]
) -> tuple[str, ...]:
    """The row of one field.

    Raises:
        ValueError: if the docstring of its class does not say what it means.
    """
    path = field.name if group == RUN else f"{group}.{field.name}"
    if field.name not in meanings:
        raise ValueError(f"{path}: no line under Args in the docstring of its class")
    kind = str(field.type).removesuffix(" | None").replace("Any", "number or word").replace("str", "text")
    made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    default = "by choice" if made == MISSING else f"`{typed(made)}`"
    rules = valid(path, field, having)
    return f"`{path}`", default, f"{kind}, {rules}" if rules else kind, meanings[field.name]


def valid(path: str, field: dataclasses.Field[Any], having: list[Any]) -> str:
    """What the checks answer to wrong values in some checked examples; nothing if they refuse none."""
    if field.type in ("bool", "bool | None"):
        return "true or false" if field.type == "bool" else "true, false or null"
    answers: dict[str, None] = {}
    for example in having:
        for value in WRONG[str(field.type).removesuffix(" | None")]:
            try:
                dataclasses.replace(example, **{field.name: value})
            except ConfigError as error:
                if str(error).startswith(f"{path}="):
                    # What a bound comes to for one of the examples is not what it is.
                    answers[re.sub(r" = [\d.]+$", "", str(error).partition(": ")[2])] = None
    rules = [answer.removeprefix("must be ") for answer in answers if answer.startswith("must be ")]
    return "; ".join(rules or answers)


def choice_table(group: str) -> str:
    """A row for each file of a group: what it is, and what it sets."""
    rows = []
    for path in sorted((config_dir() / group).glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        example = examples(group).get(path.stem)
        says = comment(text) or ("" if example is None else documentation(type(example))[0])
        settings = written(yaml.safe_load(text)) if example is None else changed(example)
        rows.append((f"`{path.stem}`", says, ", ".join(f"`{setting}`" for setting in settings)))
    return table(("choice", "what it is", "sets"), rows)


def changed(example: Any) -> Iterator[str]:
    """Fields of a composed choice that differ from their defaults."""
    for field in dataclasses.fields(example):
        value = getattr(example, field.name)
        # A null that the scheme makes false is no setting of the choice.
        by_scheme = field.default is None and value is False
        if value != field.default and field.name != "name" and not by_scheme:
            yield f"{field.name}={typed(value)}"


def written(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """What a file sets that lies across groups; the lists of Hydra's sweeper as they would be typed."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name == "defaults":
            for entry in value:
                yield from [entry] if isinstance(entry, str) else written(entry)
        elif isinstance(value, dict):
            yield from written(value, "" if name == "hydra.sweeper.params" else f"{name}.")
        elif name != "hydra.mode":
            yield f"{name.removeprefix('override /')}={typed(value)}"


def typed(value: object) -> str:
    """A value as it is typed on a command line."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value).replace(" ", "")


@functools.cache
def examples(group: str) -> dict[str, Any]:
    """The checked fields of a group by the choice that composes them; by no name where there are no choices."""
    if group == RUN:
        return {"": compose_config()}
    if group not in SECTIONS:
        return {}
    names = sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))
    if not names:
        return {"": getattr(compose_config(), group)}
    return {name: getattr(compose_config(f"{group}={name}", *NEEDED.get(name, ())), group) for name in names}


def documentation(kind: type) -> tuple[str, dict[str, str]]:
    """The docstring of a class before ``Args:``, and what it says of each argument."""
    summary, _, arguments = inspect.cleandoc(kind.__doc__ or "").partition("Args:\n")
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", arguments, flags=re.MULTILINE)
    return " ".join(summary.split()), {name: " ".join(text.split()) for name, text in entries}


def comment(text: str) -> str:
    """What the comment on top of a file says, a command in it as code."""
    lines = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("#") and "@package" not in line]
    return " ".join(f"`{line}`:" if line.startswith("iexact ") else line for line in lines)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    head = list(header)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    main()
