"""What a step keeps, its peak, and how long it takes."""

from iexact_runner.kept import MIB, SavedTensors, TensorRecord, total_bytes
from iexact_runner.measure.peak import PeakMemory, allocated, peak_mib, reset_peak
from iexact_runner.measure.throughput import Throughput, time_epochs

__all__ = [
    "MIB",
    "PeakMemory",
    "SavedTensors",
    "TensorRecord",
    "Throughput",
    "allocated",
    "peak_mib",
    "reset_peak",
    "time_epochs",
    "total_bytes",
]
