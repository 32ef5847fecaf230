"""Everything that only a GPU can show, in one command of a few minutes: parity first, then times.

python scripts/bench/gpu_suite.py --out benchmarks

1. gpu_parity.csv: every kernel against the reference, bit for bit.
2. gpu_steps.csv: loss and gradient of every model and preset, and losses of mini-batches, on the GPU and on the CPU.
3. gpu_parallel.csv: gradients of two processes that share a graph against those of one.
4. gpu_profile.csv, gpu_profile_kernels.csv: launches, copies, waits and the longest kernels of a training step.
5. gpu_epochs.csv: a training step against plain PyG FP32 in the same process.
6. gpu_graph.csv: training steps captured in a CUDA graph against the same steps without.
7. gpu_kernels.csv: bandwidth of each kernel against a copy on the same device.

Each row has the device, the versions and the commit. Ends with status 1 if a kernel or a step differs, or a part fails.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import multiprocessing
import random
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

NEEDED = ("torch", "triton", "torch_geometric", "numpy", "pandas", "hydra", "omegaconf", "rich", "iexact_runner")
DATASETS = ("synthetic_arxiv", "synthetic_flickr")
MODELS = ("sage", "gcn", "gcn2", "gat", "deepergcn")
PROFILED = ("none", "exact", "iexact", "lowrank")
# The targets that the tables are read against; that of a preset is a ratio to plain PyG FP32.
BANDWIDTH_TARGET = 0.80
EPOCH_TARGETS = {"iexact": 1.05, "lowrank": 0.90}


def main() -> None:
    """Runs the parts one after the other; what is done is on disk before the next begins."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--datasets", nargs="+", default=DATASETS, help="of the training steps that are timed")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--rounds", type=int, default=9, help="timed epochs of each preset")
    parser.add_argument("--parity-seconds", type=float, default=150.0, help="stop comparing after this long")
    parser.add_argument("--workers", type=int, default=4, help="processes that compile and compare kernels")
    parser.add_argument("--seconds", type=float, default=400.0, help="start no further benchmark after this long")
    arguments = parser.parse_args()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"gpu_suite: not installed: {', '.join(missing)}")
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu_suite: no CUDA device was found")
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.device = torch.device(arguments.device)
    start = time.monotonic()
    arguments.deadline = start + arguments.seconds
    good = True
    for name in arguments.parts:
        began = time.monotonic()
        try:
            good &= PARTS[name](arguments)
        except Exception:  # what the other parts show is worth having
            traceback.print_exc()
            good = False
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    print(f"done in {time.monotonic() - start:.0f} s")
    sys.exit(0 if good else 1)


def check_parity(kernels: Any, device: Any, out: Path, *, max_seconds: float, workers: int = 1) -> bool:
    """Compares kernels with the reference on the CPU; whether all compared cases agree, the quick ones among them.

    Every specialisation is compiled on first use, which all cases together have no time for: after the quick ones,
    which touch every function, width and type, the others follow in a seeded random order until the time is up.
    """
    start = time.monotonic()
    if workers == 1:
        shares = [_compared(kernels, device, 0, 1, max_seconds)]
    else:
        # Not forked: a process that has a CUDA context cannot pass it on.
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            tasks = [
                pool.submit(_compared_by_name, kernels.__name__, device, share, workers, max_seconds)
                for share in range(workers)
            ]
            shares = [task.result() for task in tasks]
    compared, total = sum(share[0] for share in shares), sum(share[1] for share in shares)
    rows = [{"difference": line} for share in shares for line in share[2]]
    for row in rows[:20]:
        print(f"DIFFERS {row['difference']}")
    print(f"parity: {compared} of {total} cases compared in {time.monotonic() - start:.0f} s, {len(rows)} differences")
    counts = {"compared": compared, "of": total, "differences": len(rows)}
    _write([counts | row for row in rows or [{"difference": ""}]], out / "gpu_parity.csv", device)
    return not rows


def _compared_by_name(name: str, *arguments: Any) -> tuple[int, int, list[str]]:
    import torch

    torch.set_num_threads(1)  # processes with a thread for every processor each wait for one another
    return _compared(importlib.import_module(name), *arguments)


def _compared(kernels: Any, device: Any, share: int, of: int, max_seconds: float) -> tuple[int, int, list[str]]:
    """Cases that one of ``of`` processes compared, cases that it has, and a line for each difference."""
    from iexact_runner.kernels import parity

    quick, others = list(parity.cases(quick=True))[share::of], list(parity.cases(quick=False))
    random.Random(0).shuffle(others)
    others = others[share::of]
    start, compared, lines = time.monotonic(), 0, []
    for case in [*quick, *others]:
        if compared >= len(quick) and time.monotonic() - start > max_seconds:
            break
        try:
            lines += parity.differences(case, kernels, device)
        except Exception as error:  # it does not compile, or reads where nothing is
            lines.append(f"{case}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        compared += 1
    return compared, len(quick) + len(others), lines


def check_steps(device: Any, out: Path) -> bool:
    """Compares a training step of every model and preset with the same on the CPU; whether all agree."""
    with ProcessPoolExecutor(len(MODELS) + 1, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = [row for found in pool.map(_steps_of, itertools.repeat(device), [*MODELS, ""]) for row in found]
    return _agree("steps", rows, out / "gpu_steps.csv", device)


def _steps_of(device: Any, model: str) -> list[dict[str, Any]]:
    """Of steps of a model; of mini-batches if it is empty."""
    import torch

    from gpu_steps import compare_epochs, compare_steps

    torch.set_num_threads(2)
    return compare_steps(device, models=[model]) if model else compare_epochs(device)


def check_processes(device: Any, out: Path) -> bool:
    """Compares gradients of two processes with those of one; whether all agree."""
    from gpu_parallel import compare_processes

    return _agree("parallel", compare_processes(str(device)), out / "gpu_parallel.csv", device)


def _agree(part: str, rows: list[dict[str, Any]], path: Path, device: Any) -> bool:
    """Writes rows that compare, tells of those that differ, and says whether none does."""
    _write(rows, path, device)
    problems = [row for row in rows if row["problem"]]
    for row in problems:
        named = (str(row[name]) for name in ("model", "preset", "forward", "backward") if name in row)
        print(f"{' '.join(named)}: {row['problem']}")
    print(f"{part}: {len(rows)} compared, {len(problems)} differ")
    return not problems


def profile_steps(device: Any, out: Path, *, models: tuple[str, ...], deadline: float) -> bool:
    """Launches, copies and waits of a training step of every model, in the sizes of arxiv."""
    from bench_epoch import PRESETS, append_rows
    from gpu_profile import profile_presets, show

    paths = out / "gpu_profile.csv", out / "gpu_profile_kernels.csv"
    for path in paths:
        path.unlink(missing_ok=True)
    for model in models:
        if time.monotonic() > deadline:
            print(f"{model}: not profiled, the time is up")
            continue
        presets = {name: PRESETS[name] for name in PROFILED}
        tables = profile_presets(DATASETS[0], model, device, presets=presets)
        show(*tables)
        for rows, path in zip(tables, paths, strict=True):
            append_rows(rows, path)
    return True


def time_captured(device: Any, out: Path, *, models: tuple[str, ...], deadline: float) -> bool:
    """Losses and times of captured training steps; whether each was captured, with the losses of steps that are not."""
    from bench_epoch import append_rows
    from gpu_graph import PRESETS, compare_captured, show

    path = out / "gpu_graph.csv"
    path.unlink(missing_ok=True)
    good = True
    for model in models:
        if time.monotonic() > deadline:
            print(f"{model}: not captured, the time is up")
            continue
        rows = compare_captured(DATASETS[0], model, device, PRESETS if model != "deepergcn" else ("iexact", "lowrank"))
        show(rows)
        append_rows(rows, path)
        good &= not any(row["problem"] for row in rows)
    return good


def time_kernels(device: Any, out: Path) -> bool:
    """Bandwidth of each kernel, bytes read and written once, against a device-to-device copy."""
    import torch
    from triton.testing import do_bench

    from bench_kernels import kernel_runs
    from iexact_runner.kernels import triton as triton_kernels

    rows = []
    for shape in ((169_343, 128), (2_449_029, 128)):
        x = torch.randn(shape, device=device)
        target = torch.empty_like(x)
        copy = 2 * x.nbytes / (1e-3 * do_bench(lambda x=x, target=target: target.copy_(x), return_mode="median"))
        for name, kernel in kernel_runs(triton_kernels, x).items():
            seconds = 1e-3 * do_bench(kernel.run, warmup=5, rep=20, return_mode="median")
            share = kernel.nbytes / seconds / copy
            rows.append(
                {
                    "kernel": name,
                    "rows": shape[0],
                    "columns": shape[1],
                    "microseconds_median": 1e6 * seconds,
                    "gigabytes_per_second": kernel.nbytes / seconds / 1e9,
                    "share_of_copy_bandwidth": share,
                    "copy_gigabytes_per_second": copy / 1e9,
                }
            )
            mark = "" if share >= BANDWIDTH_TARGET else "  below target"
            print(f"{shape[0]:>9} x {shape[1]}  {name:<28} {1e6 * seconds:>9.1f} us  {share:.2f} of copy{mark}")
        _write(rows, out / "gpu_kernels.csv", device)
    return True


def time_epochs(
    device: Any,
    out: Path,
    *,
    rounds: int,
    deadline: float,
    datasets: tuple[str, ...],
    models: tuple[str, ...],
) -> bool:
    """A training step of every model and preset against plain PyG FP32."""
    from rich.console import Console

    from bench_epoch import BY_HAND, PRESETS, append_rows, show, time_presets
    from iexact_runner.errors import UserError

    # What directions cost that are found anew in each pass, as on a CPU, instead of followed.
    presets = PRESETS | {"lowrank, refresh 1": ("compression=lowrank", "compression.refresh=1")}
    path = out / "gpu_epochs.csv"
    path.unlink(missing_ok=True)
    for dataset, model in itertools.product(datasets, models):
        if time.monotonic() > deadline:
            print(f"{model} on {dataset}: left out, the time is up")
            continue
        try:
            rows = time_presets(dataset, model, device, rounds=rounds, presets=presets, by_hand=BY_HAND)
        except UserError as error:
            print(f"{model} on {dataset}: {error}")
            continue
        show(rows, Console(width=120))
        append_rows(rows, path)
        for row in rows:
            target = EPOCH_TARGETS.get(row["preset"])
            if target and row["ratio_median"] > target:
                print(f"{model} on {dataset}, {row['preset']}: {row['ratio_median']:.3f} is above {target}")
    return True


def _parity(arguments: argparse.Namespace) -> bool:
    from iexact_runner.kernels import triton as triton_kernels

    limit = {"max_seconds": arguments.parity_seconds, "workers": arguments.workers}
    return check_parity(triton_kernels, arguments.device, arguments.out, **limit)


PARTS: dict[str, Callable[[argparse.Namespace], bool]] = {
    "parity": _parity,
    "steps": lambda arguments: check_steps(arguments.device, arguments.out),
    "parallel": lambda arguments: check_processes(arguments.device, arguments.out),
    "profile": lambda arguments: profile_steps(
        arguments.device, arguments.out, models=arguments.models, deadline=arguments.deadline
    ),
    "epochs": lambda arguments: time_epochs(
        arguments.device,
        arguments.out,
        rounds=arguments.rounds,
        deadline=arguments.deadline,
        datasets=arguments.datasets,
        models=arguments.models,
    ),
    "graph": lambda arguments: time_captured(
        arguments.device, arguments.out, models=arguments.models, deadline=arguments.deadline
    ),
    "kernels": lambda arguments: time_kernels(arguments.device, arguments.out),
}


def _write(rows: list[dict[str, Any]], path: Path, device: Any) -> None:
    import pandas as pd

    from gpu_profile import provenance

    kept = provenance(device)
    pd.DataFrame([row | kept for row in rows]).to_csv(path, index=False)


if __name__ == "__main__":
    main()
