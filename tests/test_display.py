from __future__ import annotations

import logging
import sys

from rich.console import Console

from iexact_runner.data import preflight
from iexact_runner.display import show_messages


def test_messages_reach_the_screen_while_libraries_are_silenced(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger("iexact_runner"), "handlers", [])
    show_messages(Console(file=sys.stdout))
    with preflight.quiet():
        print("a library's own bar")
        logging.getLogger("iexact_runner.data.pyg").info("downloading role.json into data")
    shown = capsys.readouterr().out
    assert "downloading role.json into data" in shown and "library" not in shown
