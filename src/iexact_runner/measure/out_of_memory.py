"""What a run that ran out of memory is told: what was asked for, and which preset would fit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from iexact_runner.config import CompressionConfig, Config
from iexact_runner.config.presets import preset
from iexact_runner.measure import MIB
from iexact_runner.measure.step import COMPILING_BYTES, PASSING_MAPS, UNKNOWN, kept_tensors
from iexact_runner.problem import Problem

# Presets of ``conf/compression``, in the order in which they are suggested: the closest gradients come first.
PRESETS = ("int8", "int4", "lowrank", "int2", "exact", "iexact")


def requested(error: BaseException) -> str:
    """What an allocation that failed asked for; empty if the error does not say."""
    found = re.search(r"(?:tried to|unable to) allocate ([\d.]+) ?([KMGT]iB|bytes)", str(error), re.IGNORECASE)
    if found is None:
        return ""
    amount, unit = found.groups()
    return f"{int(amount) / MIB:.2f} MiB" if unit == "bytes" else f"{amount} {unit}"


def memory_by_preset(problem: Problem, config: Config) -> tuple[dict[str, Any], dict[str, int], int]:
    """What training would keep, found without allocating it.

    Returns:
        ``memory`` of a summary as far as it is known, the bytes kept under each preset that keeps less, and the bytes
        of the widest FP32 map of the step.
    """
    kept = kept_tensors(config.model, problem, config.compression) or []
    plain = kept_tensors(config.model, problem, CompressionConfig(scheme="none")) or []
    bytes_kept = sum(record.bytes for record in kept)
    memory = dict.fromkeys(UNKNOWN) | {
        "saved_mib": bytes_kept / MIB,
        "offloaded_mib": sum(record.host_bytes for record in kept) / MIB,
        "saved_mib_fp32": sum(record.bytes for record in plain) / MIB,
        "tensors": [record.to_dict() for record in kept],
    }
    presets, widest = kept_by_preset(problem, config, PRESETS)
    smaller = {name: size for name, size in presets.items() if size < bytes_kept}
    return memory, smaller, widest


def kept_by_preset(problem: Problem, config: Config, names: Sequence[str]) -> tuple[dict[str, int], int]:
    """Bytes that training keeps under presets, and those of the widest FP32 map of a step; nothing is allocated.

    Presets are left out where that is not known.
    """
    found = {name: kept_tensors(config.model, problem, preset(name)) for name in names}
    kept = {name: records for name, records in found.items() if records is not None}
    plain = kept_tensors(config.model, problem, CompressionConfig(scheme="none")) or []
    widest = max((record.bytes_fp32 for record in plain), default=0)
    return {name: sum(record.bytes for record in records) for name, records in kept.items()}, widest


def fits(kept: int, widest: int, *, available: int | None) -> bool | None:
    """Whether a step that keeps so many bytes fits beside the data; None if it is not known what is free."""
    return None if available is None else kept + PASSING_MAPS * widest + COMPILING_BYTES <= available


def evaluation_advice(problem: Problem, config: Config) -> str:
    """What would make evaluation smaller, in words; what training keeps has no part in it."""
    fields = [f"model.{name}" for name in ("hidden_channels", "heads") if hasattr(config.model, name)]
    half = ", or halve the maps with precision=bfloat16" if config.precision == "float32" else ""
    nodes = f"{problem.whole.x.size(0):,} nodes"
    return f"evaluation holds a few maps of all {nodes} under every preset; lower {' or '.join(fields)}{half}"


def step_advice(memory: dict[str, Any], smaller: dict[str, int], widest: int, *, available: int | None) -> str:
    """Which preset would fit into the available bytes, in words."""
    kept = f"the backward pass needs {memory['saved_mib']:.2f} MiB of maps"
    for name, size in smaller.items():
        if fits(size, widest, available=available):
            return f"{kept}; compression={name} keeps {size / MIB:.2f} MiB, which would fit"
    least = min(smaller, key=smaller.__getitem__, default=None)
    if least is None or available is not None:
        return f"{kept}, and no preset is sure to fit; lower model.hidden_channels or model.num_layers"
    return f"{kept}; compression={least} keeps {smaller[least] / MIB:.2f} MiB"


def available_bytes(device: torch.device) -> int | None:
    """Bytes that could still be allocated; None where that is not known."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        rest = [] if limit == resource.RLIM_INFINITY else [limit - pages * resource.getpagesize()]
    except (ImportError, OSError):  # not Linux
        return None
    return min([*rest, int(found[1]) * 1024]) if found else None
