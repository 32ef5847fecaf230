from __future__ import annotations

import logging
import sys

from rich.console import Console

from iexact_runner.data import preflight
from iexact_runner.display import Display, show_messages, show_summary
from iexact_runner.training import Epoch, Scores


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


def summary_of(**figures):
    memory = dict.fromkeys(("loss", "model", "peak_allocated", "peak_reserved", "reference_activation"))
    memory = {f"{name}_mib": value for name, value in memory.items()}
    sizes = {"saved_mib": 2.0, "saved_mib_fp32": 900.0, "step_peak_mib": 250.0, "evaluation_peak_mib": 240.0}
    return {
        "config": {"model": {"name": "sage"}, "dataset": {"name": "digits"}, "compression": {"scheme": "none"}},
        "status": "completed",
        "accuracy": None,
        "energy": None,
        "memory": memory | sizes | {"data_mib": 95.0},
        "throughput": {"epochs_per_second": {"median": 3.0, "p20": 2.5, "p80": 3.5}},
    } | figures


def test_each_figure_stands_against_fp32(capsys):
    fp32 = {"step_peak_mib": 1000.0, "evaluation_peak_mib": 200.0, "data_mib": 95.0}
    fp32 |= {"epochs_per_second": {"median": 2.0}}
    show_summary(Console(file=sys.stdout, width=120), summary_of(fp32=fp32), folder="outputs")
    shown = capsys.readouterr().out
    for line in (
        "saved           │ 2.00 MiB  (450.0x less than 900.00 in FP32)",
        "step peak       │ 250.00 MiB  (4.0x less than 1000.00 in FP32)",
        "evaluation peak │ 240.00 MiB  (1.20x 200.00 in FP32)",
        "data            │ 95.00 MiB  (the same in FP32)",
        "epochs/s        │ 3.00  (p20 2.50, p80 3.50; 1.50x FP32's 2.00)",
    ):
        assert line in shown
    show_summary(Console(file=sys.stdout, width=120), summary_of(fp32=fp32 | {"data_mib": 50.0}), folder="outputs")
    assert "data            │ 95.00 MiB  (1.90x 50.00 in FP32)" in capsys.readouterr().out
    show_summary(Console(file=sys.stdout, width=120), summary_of(fp32=None), folder="outputs")
    shown = capsys.readouterr().out
    assert "step peak       │ 250.00 MiB " in shown and "3.00  (p20 2.50, p80 3.50)" in shown


def test_fp32_that_keeps_nothing_is_no_divisor(capsys):
    """One layer of GCN in FP32 keeps the features alone, which are data."""
    summary = summary_of(fp32=None)
    summary["memory"]["saved_mib_fp32"] = 0.0
    show_summary(Console(file=sys.stdout, width=120), summary, folder="outputs")
    assert "saved           │ 2.00 MiB " in capsys.readouterr().out


def test_an_epoch_without_an_evaluation_shows_the_scores_of_the_last(capsys):
    with Display(Console(file=sys.stdout, width=200), runs=1, epochs=3, metric="accuracy") as display:
        display.start_run(0)
        for number, scores in ((1, None), (2, Scores(0.5, 0.25, 0.125)), (3, None)):
            display.show(0, Epoch(number, 1.5, 0.1, scores), saved_mib=2.0)
    first, *others = [line for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert "loss 1.5000  saved 2.00 MiB" in first
    assert all("loss 1.5000  accuracy train 0.5000 val 0.2500 test 0.1250  saved 2.00" in line for line in others)
