"""Text of strangers as it may be shown: nothing in it moves a cursor, hides words, or is markup."""

from __future__ import annotations

import json

from rich.text import Text

# A value in a message stands on one line.
_LONGEST = 60


def visible(text: str) -> str:
    r"""Text with an escape such as ``\x1b`` for every character that is not printed.

    Those are control characters, line ends, marks of direction, and surrogates, which no encoding has.
    """
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def unmarked(text: str, *, style: str = "") -> Text:
    """Visible text in which a terminal's library looks for no markup."""
    return Text(visible(text), style=style)


def shown(value: object) -> str:
    """A value as a message quotes it, cut where it is long."""
    text = visible(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
