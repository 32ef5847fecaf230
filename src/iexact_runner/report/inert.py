"""Text of records in the formats of a report: as it was recorded, and markup, link or formula in none of them."""

from __future__ import annotations

import html
import re

from iexact_runner.untrusted.text import visible

# What a spreadsheet takes for a formula; tab and carriage return have become escapes before.
_FORMULA = ("=", "+", "-", "@")
_LONGEST_LABEL = 300
_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
# Signs of Markdown: an underscore at the edge of a word, a bracket before what would be a link, the dots of an address.
_MARKDOWN = re.compile(r"[\\`*~|]|(?<!\w)_|_(?!\w)|\](?=[(\[])|:(?=//)|(?<=www)\.")


def to_cell(value: object) -> object:
    """A value for a cell of a CSV file: numbers and nulls as they are, text as no formula."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    text = visible(str(value))
    return f"'{text}" if text.startswith(_FORMULA) else text


def to_markdown(text: str) -> str:
    """Text for one line of Markdown."""
    return html.escape(_MARKDOWN.sub(r"\\\g<0>", visible(text)), quote=False)


def to_tex(text: str) -> str:
    """Text for a cell or caption of LaTeX."""
    escaped = "".join(_TEX.get(sign, rf"\{sign}" if sign in "&%$#_{}" else sign) for sign in visible(text))
    escaped = re.sub(r"^[\[*]", r"{\g<0>}", escaped)  # an option of the line end before it
    escaped = re.sub(r"(?<![\w.])([+-])(?=\d)", r"$\1$", escaped)  # a sign, not a hyphen
    return escaped.replace(" ± ", r" $\pm$ ").replace(" - ", "--")


def to_html(text: str) -> str:
    """Text for an HTML page."""
    return html.escape(visible(text))


def to_figure(text: str) -> str:
    """Text for a label of a figure: no formula between dollars, not too long, never left out of a legend."""
    label = visible(text).replace("$", r"\$")
    label = label if len(label) <= _LONGEST_LABEL else f"{label[:_LONGEST_LABEL]}..."
    return f" {label}" if label.startswith("_") else label
