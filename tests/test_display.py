from __future__ import annotations

import logging
import sys

from rich.console import Console

from iexact_runner.data import preflight
from iexact_runner.display import show_messages, show_summary


def test_messages_reach_the_screen_while_libraries_are_silenced(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger("iexact_runner"), "handlers", [])
    show_messages(Console(file=sys.stdout))
    with preflight.quiet():
        print("a library's own bar")
        logging.getLogger("iexact_runner.data.pyg").info("downloading role.json into data")
    shown = capsys.readouterr().out
    assert "downloading role.json into data" in shown and "library" not in shown


def test_names_of_a_run_are_shown_as_they_are(capsys):
    config = {"model": {"name": "sage"}, "dataset": {"name": "a[b]\x1b[2J"}, "compression": {"scheme": "none"}}
    summary = {"config": config, "status": "completed"} | dict.fromkeys(("accuracy", "memory", "throughput", "energy"))
    show_summary(Console(file=sys.stdout), summary, folder="outputs/c[d]")
    shown = capsys.readouterr().out
    assert "sage on a[b]\\x1b[2J, FP32" in " ".join(shown.split()) and "written to outputs/c[d]\n" in shown
