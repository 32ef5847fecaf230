"""The pages of the documentation and their code blocks, for tests that do what stands in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from conftest import REPOSITORY

PAGES = [*sorted(REPOSITORY.glob("*.md")), *sorted(REPOSITORY.glob("docs/**/*.md"))]


class Block(NamedTuple):
    """A fenced block: its language, and its text without the fence."""

    kind: str
    text: str

    @property
    def file(self) -> str | None:
        """The path that the first line gives a block that is a whole file."""
        named = re.match(r"# (\S+/\S+\.(?:py|yaml))\n", self.text)
        return named[1] if named else None


def name(page: Path) -> str:
    """A page as people call it."""
    return str(page.relative_to(REPOSITORY))


def blocks(page: Path) -> list[Block]:
    """The blocks of a page; directives of the site are none."""
    found = re.findall(r"^```(.*)\n((?s:.*?))^```$", page.read_text(), flags=re.MULTILINE)
    return [Block(kind, text) for kind, text in found if not kind.startswith("{")]


def commands(page: Path) -> list[str]:
    """The lines of a page's shell blocks."""
    lines = [line for block in blocks(page) if block.kind == "bash" for line in block.text.splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def follow(page: Path, checkout: Path) -> None:
    """Makes the files and changes of a page in a copy of the repository."""
    for block in blocks(page):
        if block.kind == "diff":
            header, *lines = block.text.splitlines()
            file = checkout / header.removeprefix("--- ")
            for place in "\n".join(lines).split("\n@@\n"):
                change(file, place.splitlines())
        elif block.file is not None:
            (checkout / block.file).write_text(block.text.partition("\n")[2])


def change(file: Path, lines: list[str]) -> None:
    """Makes one change; the lines that stay or go must stand in the file just once."""
    text = file.read_text()
    before, after = ("".join(f"{line[1:]}\n" for line in lines if line[:1] != sign) for sign in "+-")
    assert text.count(before) == 1, f"{file}: found {text.count(before)} times:\n{before}"
    file.write_text(text.replace(before, after))
