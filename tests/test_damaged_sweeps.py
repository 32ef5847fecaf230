"""A seeded few of the damaged status files of ``scripts/campaigns/damaged_sweeps.py``."""

from __future__ import annotations

import pytest

from conftest import REPOSITORY
from iexact_runner.runs.jobs import Job


@pytest.fixture
def campaign(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts" / "campaigns"))
    import damaged_sweeps

    return damaged_sweeps


def test_nothing_is_lost(campaign, tmp_path):
    tally = campaign.try_statuses(2, 3, tmp_path)
    assert tally.tried == 2 and tally.losses == []


def test_losses_are_noticed(campaign, tmp_path, monkeypatch):
    """A job that is not taken up where it was makes its seed stand twice."""
    monkeypatch.setattr(campaign, "STATES", ("completed",))
    monkeypatch.setattr(Job, "config_hash", lambda job: "nothing that is asked for")
    (loss,) = campaign.try_statuses(1, 0, tmp_path).losses
    assert "another folder" in loss
