"""The reference of the configuration is whole: every field and every choice, what is valid and what it sets."""

from __future__ import annotations

import dataclasses
import re
import runpy
import subprocess
import sys

import pytest

from conftest import REPOSITORY
from iexact_runner.config import (
    DATASET_PREFIXES,
    MODEL_CONFIGS,
    PARALLEL_CONFIGS,
    SAMPLER_CONFIGS,
    CompressionConfig,
    Config,
    DatasetConfig,
)

REFERENCE = runpy.run_path(str(REPOSITORY / "scripts" / "docs" / "config_reference.py"))
GROUPS = REFERENCE["groups"]()
PAGES = {path.stem: path.read_text() for path in (REPOSITORY / "docs" / "reference").glob("*.md")}
CLASSES = {
    "model": [*MODEL_CONFIGS.values()],
    "dataset": [DatasetConfig, *DATASET_PREFIXES],
    "compression": [CompressionConfig],
    "parallel": [*PARALLEL_CONFIGS.values()],
    "sampler": [*dict.fromkeys(kind for made in SAMPLER_CONFIGS.values() for kind in made.__mro__[:-1])],
}


def rows(group):
    """Cells of each line of the tables, by the first."""
    lines = [line.strip("| ").split(" | ") for line in REFERENCE["page"](group).splitlines() if line.startswith("| `")]
    return {line[0].strip("`"): line[1:] for line in lines}


def test_every_group_has_its_page_in_the_site():
    assert set(PAGES) == set(GROUPS)
    for group, text in PAGES.items():
        assert text.startswith("# ") and text.endswith(f"\n<!-- config: {group} -->\n")


def test_every_field_of_a_run_stands_in_its_page_or_has_one():
    assert {field.name for field in dataclasses.fields(Config)} - set(PAGES) <= set(rows("run"))
    assert set(rows("run")) == {field.name for field in dataclasses.fields(Config)} - set(REFERENCE["SECTIONS"])


@pytest.mark.parametrize("group", REFERENCE["SECTIONS"])
def test_every_field_stands_in_its_page_with_a_meaning(group):
    default = {field.name: field.default_factory for field in dataclasses.fields(Config)}[group]
    fields = [field for kind in CLASSES.get(group, [default]) for field in dataclasses.fields(kind)]
    shown = rows(group)
    assert {f"{group}.{field.name}" for field in fields} == {name for name in shown if "." in name}
    for field in fields:
        *_, valid, meaning = shown[f"{group}.{field.name}"]
        assert meaning.endswith(".") and len(meaning) > 1
        if field.type == "bool":
            assert valid == "bool, true or false"


@pytest.mark.parametrize("group", [group for group in GROUPS if (REPOSITORY / "conf" / group).is_dir()])
def test_every_choice_stands_in_its_page(group):
    names = {path.stem for path in (REPOSITORY / "conf" / group).glob("*.yaml")}
    assert names and names == {name for name in rows(group) if "." not in name}


def test_what_is_valid_is_what_the_checks_say():
    bits = "int, one of 1, 2, 4, 8, or null to keep the projected map in FP32"
    assert rows("compression")["compression.bits"][:2] == ["`null`", bits]
    assert rows("compression")["compression.rank"][1] == "int, 1 or more, or null"
    assert rows("training")["training.optimizer"][1] == "text, one of adam, rmsprop"
    assert rows("dataset")["dataset.average_degree"][1] == "float, above 0 and at most (num_nodes - 1) / 4"
    assert rows("run")["task"][1].startswith("text, one of train, measure")


def test_what_a_choice_sets_is_what_it_composes():
    exact = rows("compression")["exact"][1]
    assert re.findall(r"`(.*?)`", exact)[:3] == ["scheme=projected", "bits=2", "kept_frac=0.125"]
    assert "`compression=plain,exact" in rows("experiment")["table1_arxiv"][1]
    assert "`training.epochs=500`" in rows("recipe")["sage_arxiv"][1]


def test_a_field_without_a_meaning_is_refused():
    @dataclasses.dataclass
    class Bare:
        """A class.

        Args:
            told: of it something is said.
        """

        told: int = 1
        untold: int = 2

    meanings = REFERENCE["documentation"](Bare)[1]
    told, untold = dataclasses.fields(Bare)
    assert REFERENCE["field_row"]("bare", told, meanings, [Bare()])[-1] == "of it something is said."
    with pytest.raises(ValueError, match=r"bare\.untold: no line under Args"):
        REFERENCE["field_row"]("bare", untold, meanings, [Bare()])


def test_script_prints_a_page():
    script = [sys.executable, str(REPOSITORY / "scripts" / "docs" / "config_reference.py")]
    result = subprocess.run([*script, "bins"], capture_output=True, text=True, check=True)
    assert "| `bins.bits` | `2` | int, one of 1, 2, 4, 8 |" in result.stdout
