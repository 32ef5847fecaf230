"""Energy and emissions of the timed epochs, by codecarbon's offline tracker (extra ``energy``)."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from iexact_runner.errors import ConfigError

logger = logging.getLogger(__name__)

RAPL = Path("/sys/class/powercap")
# No country's code: codecarbon then takes the world's average grid.
WORLD = "WORLD"


def check_installed() -> None:
    """Refuses to measure without codecarbon.

    Raises:
        ConfigError: saying how to install it.
    """
    if importlib.util.find_spec("codecarbon") is None:
        raise ConfigError.of("measure.energy", "true", "needs codecarbon; pip install 'iexact-runner[energy]'")


def sensors(device: torch.device) -> list[str]:
    """Which meters of this machine can be read: RAPL of the processor, NVML of a CUDA device."""
    found = ["RAPL"] if any(os.access(path, os.R_OK) for path in RAPL.glob("*/energy_uj")) else []
    return found + (["NVML"] if device.type == "cuda" and torch.version.hip is None else [])


class EnergyMeter:
    """Context around the epochs that count; :attr:`record` holds kWh and gCO2e afterwards, or None.

    Where no meter can be read the tracker would guess from the load and a table of processors: nothing is recorded
    then, and a message says why. Memory, which has no meter, counts by codecarbon's model.

    Args:
        device: where the epochs run.
        country: ISO 3166 code of three letters, whose grid the emissions are those of; None is the world's average.
    """

    def __init__(self, device: torch.device, *, country: str | None) -> None:
        self.record: dict[str, Any] | None = None
        self._country = country
        self._sensors = sensors(device)
        self._tracker: Any = None

    def __enter__(self) -> EnergyMeter:
        if not self._sensors:
            logger.warning("measure.energy: no energy meter can be read here (RAPL, NVML); energy stays null")
            return self
        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
        from codecarbon import OfflineEmissionsTracker

        self._tracker = OfflineEmissionsTracker(
            country_iso_code=self._country or WORLD,
            measure_power_secs=1,
            output_methods=[],
            log_level="critical",
            allow_multiple_runs=True,
        )
        self._tracker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tracker is None:
            return
        kilograms = self._tracker.stop()
        if kilograms is None:
            logger.warning("measure.energy: codecarbon measured nothing; energy stays null")
            return
        measured = self._tracker.final_emissions_data
        known = self._country is None or measured.country_name is not None
        if not known:
            logger.warning(f"measure.country={self._country}: codecarbon does not know this country; gco2e stays null")
        self.record = {
            "kwh": measured.energy_consumed,
            "gco2e": 1000 * kilograms if known else None,
            "cpu_kwh": measured.cpu_energy,
            "gpu_kwh": measured.gpu_energy,
            "ram_kwh": measured.ram_energy,
            "seconds": measured.duration,
            "sensors": self._sensors,
            "country": self._country,
        }
