from __future__ import annotations

import pytest

from iexact_runner.untrusted.text import shown, unmarked, visible


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("caf\u00e9 \u6f22\u5b57 a[b] \\n", "caf\u00e9 \u6f22\u5b57 a[b] \\n"),
        ("\x1b[2J\x00\x7f", r"\x1b[2J\x00\x7f"),
        ("a\r\n\tb", r"a\r\n\tb"),
        ("\x85\x9b\u2028", r"\x85\x9b\u2028"),
        ("\u202egnp\u2066", r"\u202egnp\u2066"),
        ("\ud800", r"\ud800"),
    ],
)
def test_what_is_not_printed_is_an_escape(text, seen):
    assert visible(text) == seen and unmarked(text).plain == seen


def test_markup_is_text():
    assert unmarked("x [/nope] [bold]y :skull:").plain == "x [/nope] [bold]y :skull:"


def test_values_of_messages_are_short_and_stand_on_one_line():
    assert shown("a\nb\x7f") == r'"a\nb\x7f"' and shown([1, None, True]) == "[1, null, true]"
    assert shown("x" * 1000) == f'"{"x" * 59}...'
