"""The page of a report in a browser: it sorts, filters, tells numbers under the pointer, and loads nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from iexact_runner.report.page import render_page
from iexact_runner.report.reading import read_report
from recorded import FP32, record

HAS_CHROMIUM = importlib.util.find_spec("PyQt6") and importlib.util.find_spec("PyQt6.QtWebEngineWidgets")
CELLS = """
const texts = (column) => [...document.querySelectorAll("tbody tr:not([hidden])")].map(
  (row) => row.cells[column].textContent);
const heads = [...document.querySelectorAll("thead")[0].querySelectorAll("button")];
const column = heads.findIndex((head) => head.textContent.startsWith("saved"));
"""


@pytest.fixture
def page(tmp_path):
    """A page of four rows, one without a figure, with the path that it is written to."""
    pytest.importorskip("matplotlib")
    for index, saved in enumerate((29.72, 909.56, 3.5, None)):
        compression = FP32 if saved == 909.56 else {"bits": 2 ** (index % 4)}
        record(tmp_path / "runs" / str(index), compression=compression, saved_mib=saved, scores=(0.8 + index / 100,))
    text = render_page(read_report([tmp_path / "runs"], epochs=True), title="a <page>")
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    return path


def in_chromium(path, script, *, width=1280):
    """What a script gives on the page, of which nothing may be refused or fail."""
    command = [sys.executable, Path(__file__).with_name("chromium.py"), path, str(width), script]
    environment = os.environ | {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_DISABLE_SANDBOX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("{"))
    found = json.loads(line)
    assert found["logged"] == []
    return found["result"]


def test_points_tell_their_numbers_and_nothing_is_loaded(page):
    text = page.read_text(encoding="utf-8")
    assert "<title>EXACT, INT1: test accuracy [%] 80.00, saved [MiB] 29.72</title>" in text
    assert "Content-Security-Policy" in text and "default-src 'none'" in text
    assert "<img" not in text and "<link" not in text and "http-equiv" in text and "hover: " not in text


@pytest.mark.skipif(not HAS_CHROMIUM, reason="needs PyQt6-WebEngine")
def test_tables_sort_by_number_with_empty_cells_last(page):
    script = f"{CELLS} heads[column].click(); const up = texts(column); heads[column].click(); [up, texts(column)]"
    assert in_chromium(page, script) == [["3.50", "29.72", "909.56", ""], ["909.56", "29.72", "3.50", ""]]


@pytest.mark.skipif(not HAS_CHROMIUM, reason="needs PyQt6-WebEngine")
def test_rows_that_hold_every_word_stay(page):
    script = f"""{CELLS} const field = document.querySelector("input");
    const shown = (words) => {{
      field.value = words; field.dispatchEvent(new Event("input")); return texts(column).length; }};
    [shown("sage fp32"), shown("exact"), shown("nothing"), shown("")]"""
    assert in_chromium(page, script) == [1, 3, 0, 4]


@pytest.mark.skipif(not HAS_CHROMIUM, reason="needs PyQt6-WebEngine")
@pytest.mark.parametrize("width", [400, 1280])
def test_only_tables_and_figures_scroll_sideways(page, width):
    assert in_chromium(page, "document.documentElement.scrollWidth <= innerWidth", width=width) is True
