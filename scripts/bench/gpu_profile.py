"""What one training step asks of a GPU: launches, copies from and to the host, waits of the host, and its kernels.

python scripts/bench/gpu_profile.py --dataset synthetic_arxiv --model sage --csv benchmarks/gpu_profile.csv

A wait is a call after which the host goes on only once the GPU is done; each is counted with the line that asks for it.
"""

from __future__ import annotations

import argparse
import collections
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench_epoch import PRESETS, append_rows, subjects
from iexact_runner.measure import environment

# Steps before the one that is looked at: kernels are compiled, the optimizer's state is made, directions are found.
WARM_UP = 3
HOTTEST = 12
Row = dict[str, Any]


def main() -> None:
    """Prints the figures of each preset and its longest kernels, and writes both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="synthetic_arxiv")
    parser.add_argument("--model", default="sage")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["none", "iexact", "lowrank"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--csv", type=Path, help="file to append the rows to")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    presets = {name: PRESETS[name] for name in arguments.presets}
    rows, kernels = profile_presets(arguments.dataset, arguments.model, device, presets=presets)
    show(rows, kernels)
    if arguments.csv:
        append_rows(rows, arguments.csv)
        append_rows(kernels, arguments.csv.with_name(f"{arguments.csv.stem}_kernels.csv"))


def profile_presets(
    dataset: str, model: str, device: torch.device, *, presets: Mapping[str, tuple[str, ...]]
) -> tuple[list[Row], list[Row]]:
    """One row a preset and PyG FP32, and one for each of the kernels that take longest."""
    kept = provenance(device)
    rows, kernels = [], []
    for name, subject in subjects(dataset, model, device, presets=presets).items():
        where = {"dataset": dataset, "model": model, "preset": name}
        figures, hottest = profile_step(subject.step, device)
        rows.append(where | figures | kept)
        kernels += [where | kernel | kept for kernel in hottest]
    return rows, kernels


def provenance(device: torch.device) -> Row:
    """Device, versions and commit, as every row of a GPU has them."""
    facts = environment.describe(device, backend="triton")
    return {key: facts[key] for key in ("device_name", "python", "torch", "triton", "cuda", "git_commit")}


def profile_step(step: Callable[[int], object], device: torch.device) -> tuple[Row, list[Row]]:
    """Figures of a step that was taken a few times before, and its longest kernels."""
    for epoch in range(WARM_UP):
        step(1 + epoch)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    step(1 + WARM_UP)
    torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    with waits() as sites:
        step(2 + WARM_UP)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiled:
        step(3 + WARM_UP)
        torch.cuda.synchronize(device)
    calls: collections.Counter[str] = collections.Counter()
    microseconds: collections.Counter[str] = collections.Counter()
    for event in profiled.events() or []:
        # Spans that are only marked, such as the optimizer's, are no kernels.
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            calls[event.name] += 1
            microseconds[event.name] += event.time_range.elapsed_us()
    moved = ("Memcpy", "Memset")
    figures = {
        "launches": sum(count for name, count in calls.items() if not name.startswith(moved)),
        "fills": sum(count for name, count in calls.items() if name.startswith("Memset")),
        "copies_from_host": sum(count for name, count in calls.items() if name.startswith("Memcpy HtoD")),
        "copies_to_host": sum(count for name, count in calls.items() if name.startswith("Memcpy DtoH")),
        "waits": sum(sites.values()),
        "milliseconds": 1e3 * seconds,
        "milliseconds_of_kernels": sum(microseconds.values()) / 1e3,
        "waits_at": "; ".join(f"{count} x {site}" for site, count in sites.most_common()),
    }
    hottest = [
        {"kernel": name[:120], "calls": calls[name], "microseconds": total}
        for name, total in microseconds.most_common(HOTTEST)
    ]
    return figures, hottest


@contextmanager
def waits() -> Iterator[collections.Counter[str]]:
    """Counts the host's waits for a GPU by the line of this project, or else the last one, that asked for them."""
    sites: collections.Counter[str] = collections.Counter()

    def count(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchroniz" not in str(message):
            return
        frames = [frame for frame in traceback.extract_stack()[:-1] if frame.filename != warnings.__file__]
        own = [frame for frame in frames if "iexact_runner" in frame.filename] or frames
        sites[f"{Path(own[-1].filename).name}:{own[-1].lineno}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield sites
        finally:
            torch.cuda.set_sync_debug_mode("default")


def show(rows: list[Row], kernels: list[Row]) -> None:
    """Prints the figures, and of each preset the longest kernels."""
    for row in rows:
        counts = ", ".join(
            f"{row[name]} {name.replace('_', ' ')}"
            for name in ("launches", "fills", "copies_from_host", "copies_to_host", "waits")
        )
        times = f"{row['milliseconds']:.2f} ms, kernels {row['milliseconds_of_kernels']:.2f} ms"
        print(f"{row['model']} {row['preset']}: {times}; {counts}")
        print(f"    waits at {row['waits_at']}")
        for kernel in kernels:
            if (kernel["model"], kernel["preset"]) == (row["model"], row["preset"]):
                print(f"    {kernel['microseconds']:>9.0f} us {kernel['calls']:>4} x {kernel['kernel'][:90]}")


if __name__ == "__main__":
    main()
