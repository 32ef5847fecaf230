"""Energy of the timed epochs: with a meter, without one, and without the package."""

from __future__ import annotations

import io
import json
import sys
import time
import types

import pytest
import torch
from rich.console import Console

from iexact_runner.cli import compose_config
from iexact_runner.display import show_messages
from iexact_runner.errors import ConfigError
from iexact_runner.experiment import Experiment
from iexact_runner.measure import energy
from iexact_runner.runs.records import RunFolder

CPU = torch.device("cpu")
QUICK = ("task=measure", "measure.energy=true", "model.hidden_channels=8", "measure.timed_epochs=3")


def run(path, *overrides):
    screen = io.StringIO()
    console = Console(file=screen, width=200)
    show_messages(console)
    Experiment(compose_config(*QUICK, *overrides), RunFolder(path), console).run("a: b\n")
    return json.loads((path / "summary.json").read_text()), screen.getvalue()


@pytest.fixture
def tracker(monkeypatch):
    """A tracker that counts a watt-second a second, and what it was asked."""
    asked = {}

    class Tracker:
        def __init__(self, **options):
            asked.update(options)

        def start(self):
            self.started = time.perf_counter()

        def stop(self):
            kwh = (time.perf_counter() - self.started) / 3.6e6
            country = "Denmark" if asked["country_iso_code"] == "DNK" else None
            self.final_emissions_data = types.SimpleNamespace(
                energy_consumed=kwh, cpu_energy=kwh, gpu_energy=0.0, ram_energy=0.0, duration=1.0, country_name=country
            )
            return 0.1 * kwh

    monkeypatch.setitem(sys.modules, "codecarbon", types.SimpleNamespace(OfflineEmissionsTracker=Tracker))
    monkeypatch.setattr(energy, "check_installed", lambda: None)
    monkeypatch.setattr(energy, "sensors", lambda device: ["RAPL"])
    return asked


def test_timed_epochs_are_what_is_measured(tmp_path, tracker):
    summary, screen = run(tmp_path, "measure.country=DNK", "measure.warmup_epochs=5")
    record = summary["energy"]
    timed = 3 / summary["throughput"]["epochs_per_second"]["median"]
    assert record["kwh"] * 3.6e6 == pytest.approx(timed, rel=0.9)
    assert record["gco2e"] == pytest.approx(100 * record["kwh"])
    assert (record["sensors"], record["country"]) == (["RAPL"], "DNK") and "kWh" in screen
    assert tracker["country_iso_code"] == "DNK" and tracker["output_methods"] == []
    assert tracker["allow_multiple_runs"], "other jobs of the machine may measure too"


def test_country_that_is_not_known_leaves_the_emissions_null(tmp_path, tracker):
    summary, screen = run(tmp_path, "measure.country=XYZ")
    assert summary["energy"]["gco2e"] is None and summary["energy"]["kwh"] > 0
    assert "measure.country=XYZ: codecarbon does not know this country" in screen
    world, _ = run(tmp_path / "world")
    assert world["energy"]["gco2e"] > 0 and world["energy"]["country"] is None


def test_a_meter_that_measured_nothing_is_named(tmp_path, tracker, monkeypatch):
    monkeypatch.setattr(sys.modules["codecarbon"].OfflineEmissionsTracker, "stop", lambda self: None)
    summary, screen = run(tmp_path)
    assert summary["energy"] is None and summary["status"] == "completed"
    assert "measure.energy: codecarbon measured nothing; energy stays null" in screen


def test_machine_without_a_meter_records_null_and_says_so(tmp_path, monkeypatch):
    pytest.importorskip("codecarbon")
    monkeypatch.setattr(energy, "RAPL", tmp_path / "none")
    summary, screen = run(tmp_path / "run", "device=cpu")
    assert summary["energy"] is None and summary["status"] == "completed"
    assert "no energy meter can be read here (RAPL, NVML); energy stays null" in screen


def test_meters_are_found_where_they_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    assert energy.sensors(CPU) == []
    (tmp_path / "intel-rapl:0").mkdir()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("1")
    assert energy.sensors(CPU) == ["RAPL"]
    monkeypatch.setattr(torch.version, "hip", None)
    assert energy.sensors(torch.device("cuda")) == ["RAPL", "NVML"]


def test_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with pytest.raises(
        ConfigError, match=r"measure.energy=true: needs codecarbon; pip install 'iexact-runner\[energy\]'"
    ):
        run(tmp_path)


def test_tracker_of_codecarbon_works_as_it_is_used(monkeypatch):
    pytest.importorskip("codecarbon")
    monkeypatch.setattr(energy, "sensors", lambda device: ["RAPL"])
    records = []
    for country in ("DNK", "USA", None, "XYZ"):
        with energy.EnergyMeter(CPU, country=country) as meter:
            time.sleep(0.3)
        records.append(meter.record)
    assert all(record["kwh"] > 0 and 0.2 < record["seconds"] < 10 for record in records)
    denmark, america, world, unknown = (record["gco2e"] and record["gco2e"] / record["kwh"] for record in records)
    assert unknown is None and world == pytest.approx(475) and 50 < denmark < america
