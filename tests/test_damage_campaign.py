"""A seeded few of the bad overrides and damaged files of ``scripts/campaigns/damage_campaign.py``."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from conftest import REPOSITORY


@pytest.fixture
def campaign(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts" / "campaigns"))
    import damage_campaign

    for name, value in damage_campaign.DEAD.items():
        monkeypatch.setenv(name, value)
    return damage_campaign


@pytest.mark.parametrize(
    ("part", "count"), [("try_overrides", 12), ("try_datasets", 5), ("try_records", 6), ("try_checkpoints", 4)]
)
def test_nothing_is_lost(campaign, tmp_path, part, count):
    tally = getattr(campaign, part)(count, 11, tmp_path)
    assert tally.tried == count and tally.losses == []


def test_no_mutated_record_is_lost_in_any_format(campaign, tmp_path):
    tally = campaign.try_mutated_records(3, 11, tmp_path)
    assert tally.tried == 3 * 6 and tally.losses == []


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("table", "a\x1b[2Jb\n"),
        ("csv", "a,b\n1,=1+1\n"),
        ("csv", "a,b\n1,-x\n"),
        ("csv", "a,b\n1\n"),
        ("markdown", "| <b> |\n"),
        ("markdown", "| [a](b) |\n"),
        ("markdown", "| a | b |\n| a | b | c |\n"),
        ("latex", "% a comment\n\\input{x}\n"),
        ("latex", "    a \\input{x} \\\\\n"),
        ("latex", "    [5cm] \\\\\n"),
        ("html", "<p><script>x</script></p>"),
    ],
)
def test_what_acts_in_a_report_is_noticed(campaign, form, text):
    assert campaign.live(form, text) != []
    assert campaign.live(form, "") == []


def test_losses_are_noticed(campaign, tmp_path, monkeypatch):
    """An override that is none, a loader that does not look, and a report that fails are counted."""
    monkeypatch.setattr(campaign, "bad_overrides", lambda: [("seed=1",), ("output_dir=here", "compression.bits=3")])
    losses = campaign.try_overrides(2, 0, tmp_path).losses
    assert len(losses) == 1 and losses[0].startswith("seed=1: status None changed ['outputs'")

    def fail() -> None:
        Path("ran").mkdir()
        raise RuntimeError("a traceback")

    monkeypatch.setattr(campaign.report, "main", fail)
    assert len(campaign.try_records(2, 0, tmp_path).losses) == 2
    shutil.rmtree(tmp_path / "both")
    assert len(campaign.try_mutated_records(1, 0, tmp_path).losses) == 6


def test_undamaged_datasets_are_loaded_or_the_campaign_says_so(campaign, tmp_path, monkeypatch):
    monkeypatch.setattr(campaign, "write_datasets", lambda root: root.mkdir())
    with pytest.raises(RuntimeError, match="cannot be loaded"):
        campaign.try_datasets(1, 0, tmp_path)
